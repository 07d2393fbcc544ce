package guestfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"unicode/utf16"

	"github.com/imagestack/imagestack/backend"
)

// GUID partition table, UEFI specification 2.10 section 5.3: a header in the
// second sector and a copy in the last one, each with a table of entries.
const (
	gptMagic         = "EFI PART"
	gptHeaderSize    = 92
	gptMinEntry      = 128
	gptMaxEntry      = 4096
	gptMaxEntryBytes = 1 << 20 // 8,192 entries of the usual size
)

type gptHeader struct {
	at                int64 // byte offset of this header
	sector            int64 // bytes
	self, other       uint64
	first, last       uint64 // usable sectors
	entries           uint64 // sector of the table of entries
	count, entry      uint32
	entriesCRC        uint32
	partitionsInBytes int64
}

// readGPT tries, for both sector sizes in use, the header at the start and
// then the copy at the end.
func readGPT(r io.ReaderAt, size int64) ([]Partition, error) {
	var errs []error
	found := false
	for _, sector := range []int64{512, 4096} {
		last := size/sector - 1
		if last < 1 {
			continue
		}
		for _, lba := range []int64{1, last} {
			h, there, err := readGPTHeader(r, size, sector, lba)
			found = found || there
			if err == nil && there {
				var parts []Partition
				if parts, err = h.partitions(r); err == nil {
					return parts, nil
				}
				var d *DamageError
				if !errors.As(err, &d) {
					return nil, err // of the disk, not of the table
				}
				if d.Field != gptEntriesCRC {
					// Both checksums hold: this is what was written, and a
					// copy is no better.
					return nil, err
				}
			}
			if err != nil {
				errs = append(errs, err)
			}
		}
	}
	if !found && len(errs) == 0 {
		return nil, damage(512, "GPT header", nil, "the protective MBR announces a GPT, and there is none at either end of the disk")
	}
	return nil, errors.Join(errs...)
}

const gptEntriesCRC = "GPT entries CRC"

// readGPTHeader reads and checks a header; there tells whether its magic is in
// place.
func readGPTHeader(r io.ReaderAt, size, sector, lba int64) (h gptHeader, there bool, err error) {
	b := make([]byte, sector)
	at := lba * sector
	if err := readFull(r, b, at); err != nil {
		return h, false, err
	}
	if string(b[:8]) != gptMagic {
		return h, false, nil
	}
	le := binary.LittleEndian
	length := le.Uint32(b[12:])
	if length < gptHeaderSize || int64(length) > sector {
		return h, true, damage(at+12, "GPT header size", length, fmt.Sprintf("want %d to %d", gptHeaderSize, sector))
	}
	want := le.Uint32(b[16:])
	clear(b[16:20])
	if got := crc32.ChecksumIEEE(b[:length]); got != want {
		return h, true, damage(at+16, "GPT header CRC", fmt.Sprintf("%#x", want), fmt.Sprintf("computed %#x", got))
	}
	h = gptHeader{
		at: at, sector: sector,
		self: le.Uint64(b[24:]), other: le.Uint64(b[32:]),
		first: le.Uint64(b[40:]), last: le.Uint64(b[48:]),
		entries: le.Uint64(b[72:]), count: le.Uint32(b[80:]), entry: le.Uint32(b[84:]),
		entriesCRC: le.Uint32(b[88:]),
	}
	return h, true, h.validate(size)
}

// validate checks what partitions relies on.
func (h *gptHeader) validate(size int64) error {
	sectors := uint64(size / h.sector)
	if h.self != uint64(h.at/h.sector) {
		return damage(h.at+24, "GPT header's own sector", h.self, fmt.Sprintf("it is in sector %d", h.at/h.sector))
	}
	if h.first > h.last || h.last >= sectors {
		return damage(h.at+40, "GPT usable sectors", fmt.Sprintf("%d to %d", h.first, h.last),
			fmt.Sprintf("the disk has %d", sectors))
	}
	if h.entry < gptMinEntry || h.entry > gptMaxEntry || bits.OnesCount32(h.entry) != 1 {
		return damage(h.at+84, "GPT entry size", h.entry, fmt.Sprintf("want a power of two from %d to %d", gptMinEntry, gptMaxEntry))
	}
	if uint64(h.count)*uint64(h.entry) > gptMaxEntryBytes {
		return damage(h.at+80, "GPT number of entries", h.count, fmt.Sprintf("the table would exceed %d bytes", gptMaxEntryBytes))
	}
	h.partitionsInBytes = int64(h.count) * int64(h.entry)
	if h.entries < 2 || h.entries >= sectors || h.partitionsInBytes > size-int64(h.entries)*h.sector {
		return damage(h.at+72, "GPT entries' sector", h.entries, fmt.Sprintf("the disk has %d sectors", sectors))
	}
	return nil
}

// partitions reads the table of entries.
func (h *gptHeader) partitions(r io.ReaderAt) ([]Partition, error) {
	table := make([]byte, h.partitionsInBytes)
	base := int64(h.entries) * h.sector
	if err := readFull(r, table, base); err != nil {
		return nil, err
	}
	if got := crc32.ChecksumIEEE(table); got != h.entriesCRC {
		return nil, damage(h.at+88, gptEntriesCRC, fmt.Sprintf("%#x", h.entriesCRC), fmt.Sprintf("computed %#x", got))
	}
	le := binary.LittleEndian
	var parts []Partition
	for i := range int64(h.count) {
		e := table[i*int64(h.entry):][:gptMinEntry]
		if backend.IsZero(e[:16]) {
			continue
		}
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if first > last || first < h.first || last > h.last {
			return nil, damage(base+i*int64(h.entry)+32, fmt.Sprintf("partition %d", i+1), fmt.Sprintf("sectors %d to %d", first, last),
				fmt.Sprintf("want some of the usable sectors %d to %d", h.first, h.last))
		}
		parts = append(parts, Partition{
			Number: int(i) + 1,
			Start:  int64(first) * h.sector, // below size: validate
			Size:   int64(last-first+1) * h.sector,
			Type:   guid(e[:16]),
			UUID:   guid(e[16:32]),
			Name:   utf16Name(e[56:128]),
		})
	}
	return parts, nil
}

// guid prints a GUID, whose first three fields are little-endian.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08X-%04X-%04X-%04X-%012X", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]),
		binary.BigEndian.Uint16(b[8:]), b[10:16])
}

// utf16Name decodes a name that a zero or the end of the field ends.
func utf16Name(b []byte) string {
	var units []uint16
	for i := 0; i+1 < len(b); i += 2 {
		u := binary.LittleEndian.Uint16(b[i:])
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}
