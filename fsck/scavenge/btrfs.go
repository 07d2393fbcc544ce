package scavenge

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// btrfsFS is what a btrfs superblock says (btrfs on-disk format; all numbers
// little-endian). Tree blocks carry a logical address, which the chunk tree
// maps to one place on the device or, for DUP, two.
type btrfsFS struct {
	node   int64
	fsid   [16]byte // in tree blocks
	devid  uint64
	chunks []chunk // sorted by logical
}

type chunk struct {
	logical, length int64
	places          [2]int64 // on the device; -1 is none
	generation      uint64
}

const (
	maxChunks     = 1 << 18
	chunkItem     = 228
	btrfsNodeHead = 101
)

func (e *evidence) btrfsSuper(w []byte, loc int64) {
	le := binary.LittleEndian
	if len(w) < 4096 {
		return
	}
	w = w[:4096]
	if le.Uint16(w[196:]) != 0 {
		e.report.note("btrfs with checksums other than crc32c is not looked at")
		return
	}
	if !rawSum(w) {
		return
	}
	off, node, size := le.Uint64(w[48:]), int64(le.Uint32(w[148:])), le.Uint64(w[209:])
	if off != 64<<10 && off != 64<<20 && off != 256<<30 || node < 4096 || node > 64<<10 || node&(node-1) != 0 ||
		size > uint64(anySize) || le.Uint64(w[136:]) != 1 {
		return // several devices: this disk is only a part
	}
	var uuid [16]byte
	copy(uuid[:], w[32:])
	b := &btrfsFS{node: node, fsid: uuid, devid: le.Uint64(w[201:])}
	if le.Uint64(w[188:])&0x400 != 0 {
		copy(b.fsid[:], w[571:])
	}
	g := e.guestFor("btrfs", uuid, 4096)
	if g == nil {
		return
	}
	gen := le.Uint64(w[72:])
	if g.btrfs == nil {
		g.btrfs = b
	}
	if gen >= g.newest {
		g.newest, g.size = gen, int64(size)
	}
	if n := le.Uint32(w[160:]); n <= 2048 {
		g.btrfs.sysChunks(w[811:811+n], gen)
	}
	g.super(loc, int64(off), off == 64<<10)
}

// rawSum checks the CRC-32C in the first bytes of a superblock or tree block.
func rawSum(w []byte) bool {
	return ^crc32c(^uint32(0), w[32:]) == binary.LittleEndian.Uint32(w)
}

func (b *btrfsFS) sysChunks(a []byte, gen uint64) {
	le := binary.LittleEndian
	for len(a) >= 17+48 {
		n := b.chunk(int64(le.Uint64(a[9:])), a[17:], gen)
		if a[8] != chunkItem || n == 0 {
			return
		}
		a = a[17+n:]
	}
}

// chunk takes a chunk item and returns its length, 0 when it is none.
func (b *btrfsFS) chunk(logical int64, a []byte, gen uint64) int {
	le := binary.LittleEndian
	if len(a) < 48 {
		return 0
	}
	length, stripes := le.Uint64(a), int(le.Uint16(a[44:]))
	n := 48 + 32*stripes
	if stripes == 0 || stripes > 64 || len(a) < n || length == 0 || length > uint64(anySize) || logical < 0 || logical > anySize {
		return 0
	}
	// Only what lies on the one device as a whole: single and DUP.
	const striped = 0x8 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400
	c := chunk{logical: logical, length: int64(length), places: [2]int64{-1, -1}, generation: gen}
	if le.Uint64(a[24:])&striped != 0 || stripes > 2 || len(b.chunks) >= maxChunks {
		return n
	}
	for i := range stripes {
		s := a[48+32*i:]
		if le.Uint64(s) != b.devid || le.Uint64(s[8:]) > uint64(anySize) {
			return n
		}
		c.places[i] = int64(le.Uint64(s[8:]))
	}
	i, found := slices.BinarySearchFunc(b.chunks, logical, func(c chunk, v int64) int { return cmp.Compare(c.logical, v) })
	switch {
	case !found:
		b.chunks = slices.Insert(b.chunks, i, c)
	case gen > b.chunks[i].generation:
		b.chunks[i] = c
	}
	return n
}

// physical appends where a logical address lies on the device.
func (b *btrfsFS) physical(logical int64, dst []int64) []int64 {
	i, found := slices.BinarySearchFunc(b.chunks, logical, func(c chunk, v int64) int { return cmp.Compare(c.logical, v) })
	if !found {
		i--
	}
	if i < 0 || logical-b.chunks[i].logical >= b.chunks[i].length {
		return dst
	}
	for _, p := range b.chunks[i].places {
		if p >= 0 {
			dst = append(dst, p+logical-b.chunks[i].logical)
		}
	}
	return dst
}

// look takes a tree block.
func (b *btrfsFS) look(e *evidence, g *guest, w []byte, loc int64) error {
	le := binary.LittleEndian
	if int64(len(w)) < b.node || [16]byte(w[32:48]) != b.fsid {
		return nil
	}
	w = w[:b.node]
	if string(w[64:72]) == "_BHRfS_M" || !rawSum(w) {
		return nil
	}
	logical := le.Uint64(w[48:])
	if logical > uint64(anySize) {
		return nil
	}
	if le.Uint64(w[88:]) == 3 && w[100] == 0 { // a leaf of the chunk tree
		items := int(min(le.Uint32(w[96:]), uint32(b.node)/25))
		for i := range items {
			at := btrfsNodeHead + 25*i
			if at+25 > len(w) {
				break
			}
			it := w[at:]
			from, n := int64(le.Uint32(it[17:]))+btrfsNodeHead, int64(le.Uint32(it[21:]))
			if it[8] != chunkItem || from > b.node || n > b.node-from {
				continue
			}
			b.chunk(int64(le.Uint64(it[9:])), w[from:from+n], le.Uint64(w[80:]))
		}
	}
	return e.add(g, kindLogical, loc, int64(logical), b.node)
}
