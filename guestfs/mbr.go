package guestfs

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/backend"
)

// Master boot record: four entries of 16 bytes at 446, signature 55 aa at 510,
// disk signature at 440.
const (
	mbrDiskID    = 440
	mbrEntries   = 446
	mbrEntrySize = 16
	mbrSignature = 510
)

// Types of entries that matter.
const (
	typeProtective = 0xee
	typeExtended   = 0x05
	typeExtended2  = 0x0f // with LBA
	typeExtended3  = 0x85 // of Linux
)

// maxLogical bounds the chain of logical partitions: Linux knows 255
// partitions of a disk.
const maxLogical = 255

type mbr struct {
	id      uint32
	entries [4]mbrEntry
}

type mbrEntry struct {
	kind         byte
	start, count int64 // sectors
}

func (e mbrEntry) used() bool { return e.kind != 0 && e.count != 0 }

func (e mbrEntry) extended() bool {
	return e.kind == typeExtended || e.kind == typeExtended2 || e.kind == typeExtended3
}

func (m mbr) protective() bool {
	for _, e := range m.entries {
		if e.kind == typeProtective {
			return true
		}
	}
	return false
}

// parseMBR decodes a sector; not ok means that it is no partition table: the
// signature is missing, or a boot indicator is neither 0 nor 0x80 (the boot
// sector of a filesystem has the signature too).
func parseMBR(b []byte) (m mbr, ok bool) {
	if b[mbrSignature] != 0x55 || b[mbrSignature+1] != 0xaa {
		return m, false
	}
	m.id = binary.LittleEndian.Uint32(b[mbrDiskID:])
	for i := range m.entries {
		e := b[mbrEntries+i*mbrEntrySize:]
		if e[0] != 0 && e[0] != 0x80 {
			return m, false
		}
		m.entries[i] = mbrEntry{
			kind:  e[4],
			start: int64(binary.LittleEndian.Uint32(e[8:])),
			count: int64(binary.LittleEndian.Uint32(e[12:])),
		}
	}
	return m, true
}

// partition turns an entry of the sector at byte at, whose start counts from
// base sectors, into a Partition inside [low, high) bytes.
func (e mbrEntry) partition(number int, id uint32, at, base, low, high int64) (Partition, error) {
	p := Partition{
		Number:    number,
		Start:     (base + e.start) * mbrSector, // below 2^42: no overflow
		Size:      e.count * mbrSector,
		Type:      fmt.Sprintf("%x", e.kind),
		UUID:      fmt.Sprintf("%08x-%02x", id, number),
		Container: e.extended(),
	}
	if p.Start < low+mbrSector || p.Start >= high || p.Size > high-p.Start {
		return p, damage(at, fmt.Sprintf("partition %d", number), fmt.Sprintf("sectors %d+%d", base+e.start, e.count),
			fmt.Sprintf("it does not lie inside bytes %d to %d", low+mbrSector, high))
	}
	return p, nil
}

func readMBR(ctx context.Context, r io.ReaderAt, size int64, table mbr) ([]Partition, error) {
	var parts []Partition
	next := 5
	var logical []Partition
	for i, e := range table.entries {
		if !e.used() {
			continue
		}
		p, err := e.partition(i+1, table.id, int64(mbrEntries+i*mbrEntrySize), 0, 0, size)
		if err != nil {
			return nil, err
		}
		parts = append(parts, p)
		if p.Container {
			more, err := readLogical(ctx, r, p, next, table.id)
			if err != nil {
				return nil, err
			}
			next += len(more)
			logical = append(logical, more...)
		}
	}
	return append(parts, logical...), nil
}

// readLogical follows the chain of extended boot records through the extended
// partition ext. A record has at most two used entries: a logical partition,
// counted from the record, and the next record, counted from ext.
func readLogical(ctx context.Context, r io.ReaderAt, ext Partition, number int, id uint32) ([]Partition, error) {
	var parts []Partition
	sector := make([]byte, mbrSector)
	seen := make(map[int64]bool)
	for at := ext.Start; ; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if seen[at] {
			return nil, damage(at, "extended boot record", nil, "the chain of logical partitions is a loop")
		}
		if len(seen) == maxLogical {
			return nil, damage(at, "extended boot record", nil, fmt.Sprintf("more than %d in a chain", maxLogical))
		}
		seen[at] = true
		if err := readFull(r, sector, at); err != nil {
			return nil, err
		}
		if at == ext.Start && backend.IsZero(sector) {
			return nil, nil // an extended partition that was never used
		}
		table, ok := parseMBR(sector)
		if !ok {
			return nil, damage(at, "extended boot record", nil, "no signature 55aa, or a wrong boot indicator")
		}
		next := int64(-1)
		for i, e := range table.entries {
			where := at + int64(mbrEntries+i*mbrEntrySize)
			switch {
			case !e.used() || i >= 2:
				// The last two mean nothing; old tools left them unclean.
			case !e.extended():
				p, err := e.partition(number+len(parts), id, where, at/mbrSector, at, ext.End())
				if err != nil {
					return nil, err
				}
				parts = append(parts, p)
			case next >= 0:
				return nil, damage(where, "extended boot record", nil, "two links to a next record")
			default:
				if next = ext.Start + e.start*mbrSector; next >= ext.End() {
					return nil, damage(where, "next extended boot record", fmt.Sprintf("sector %d", e.start),
						"it does not lie inside the extended partition")
				}
			}
		}
		if next < 0 {
			return parts, nil
		}
		at = next
	}
}
