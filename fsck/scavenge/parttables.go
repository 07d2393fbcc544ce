package scavenge

import (
	"context"
	"encoding/binary"
	"hash/crc32"
	"io"
	"slices"

	"github.com/imagestack/imagestack/guestfs"
)

// table is a partition table that was found.
type table struct {
	loc   int64
	gpt   bool
	my    int64 // GPT: the sector that the header says it stands in
	end   int64 // GPT: the length of the disk that the two headers imply, in bytes
	guid  [16]byte
	parts []guestfs.Partition
	used  bool
}

// anySize stands for the length of a disk that is not known.
const anySize = int64(1) << 61

// gptHeader takes a header whose checksum is right (UEFI specification,
// section 5.3.2). The table of the primary one is taken as well.
func (e *evidence) gptHeader(w []byte, loc int64) {
	le := binary.LittleEndian
	size := le.Uint32(w[12:])
	if size < 92 || size > sector || e.countTables(true) >= maxTables {
		return
	}
	h := slices.Clone(w[:size])
	clear(h[16:20])
	my, alt := le.Uint64(w[24:]), le.Uint64(w[32:])
	if crc32.ChecksumIEEE(h) != le.Uint32(w[16:]) || max(my, alt) >= uint64(anySize/sector) || my == alt || min(my, alt) != 1 {
		return
	}
	t := table{loc: loc, gpt: true, my: int64(my), end: int64(max(my, alt)+1) * sector, guid: [16]byte(w[56:72])}
	if my == 1 {
		// A protective MBR in front makes it a disk for guestfs, which
		// checks the rest.
		parts, err := guestfs.Partitions(context.Background(), headReader{protective(), w}, t.end)
		if err != nil {
			return
		}
		t.parts = parts
	}
	e.tables = append(e.tables, t)
}

// mbr takes a master boot record with partitions. It has no checksum, and is
// used only where a filesystem confirms it.
func (e *evidence) mbr(w []byte, loc int64) {
	if w[446]&0x7f != 0 || w[450] == 0xee || e.countTables(false) >= maxTables {
		return
	}
	parts, err := guestfs.Partitions(context.Background(), headReader{w, nil}, anySize)
	if err != nil || len(parts) == 0 {
		return
	}
	for _, t := range e.tables {
		if t.loc == loc {
			return
		}
	}
	e.tables = append(e.tables, table{loc: loc, parts: parts})
}

func (e *evidence) countTables(gpt bool) (n int) {
	for i := range e.tables {
		if e.tables[i].gpt == gpt {
			n++
		}
	}
	return n
}

func protective() []byte {
	b := make([]byte, sector)
	b[450] = 0xee
	b[454] = 1
	binary.LittleEndian.PutUint32(b[458:], 1<<32-1)
	b[510], b[511] = 0x55, 0xaa
	return b
}

// headReader is a disk of which only the beginning is there.
type headReader struct{ first, rest []byte }

func (r headReader) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	if off < int64(len(r.first)) {
		n = copy(p, r.first[off:])
	}
	if at := off + int64(n) - int64(len(r.first)); n < len(p) && at < int64(len(r.rest)) {
		n += copy(p[n:], r.rest[at:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
