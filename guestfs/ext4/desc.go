package ext4

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Flags of a group descriptor.
const (
	flagBlockUninit = 2
	descCsumAt      = 30
	bitmapCsumHiEnd = 60
)

// desc is a group descriptor (kernel documentation, ext4: block group
// descriptors).
type desc struct {
	blockBitmap, inodeBitmap, inodeTable uint64
	free                                 uint64 // clusters
	flags                                uint16
	bitmapCsum                           uint32
}

func (d *desc) uninit() bool { return d.flags&flagBlockUninit != 0 }

// descs reads group descriptors in order, one block of them at a time.
type descs struct {
	s      *super
	r      io.ReaderAt
	buf    []byte
	loaded uint64 // 1 + number of the block of descriptors in buf; 0 is none
}

func newDescs(s *super, r io.ReaderAt) *descs {
	return &descs{s: s, r: r, buf: make([]byte, s.blockSize)}
}

// get reads and checks the descriptor of group g.
func (t *descs) get(g uint64) (d desc, err error) {
	s := t.s
	k := g / s.descPerBlock
	if t.loaded != k+1 {
		t.loaded = 0
		if err := s.readBlock(t.r, t.buf, s.descBlock(k)); err != nil {
			return d, err
		}
		t.loaded = k + 1
	}
	b := t.buf[int64(g%s.descPerBlock)*s.desc:][:s.desc]
	if err := s.checkDescSum(b, g); err != nil {
		return d, err
	}
	le := binary.LittleEndian
	d = desc{
		blockBitmap: uint64(le.Uint32(b)), inodeBitmap: uint64(le.Uint32(b[4:])), inodeTable: uint64(le.Uint32(b[8:])),
		free: uint64(le.Uint16(b[12:])), flags: le.Uint16(b[18:]), bitmapCsum: uint32(le.Uint16(b[24:])),
	}
	if s.desc >= 64 {
		d.blockBitmap |= uint64(le.Uint32(b[32:])) << 32
		d.inodeBitmap |= uint64(le.Uint32(b[36:])) << 32
		d.inodeTable |= uint64(le.Uint32(b[40:])) << 32
		d.free |= uint64(le.Uint16(b[44:])) << 16
		d.bitmapCsum |= uint32(le.Uint16(b[56:])) << 16
	}
	return d, d.check(s, g)
}

func (s *super) checkDescSum(b []byte, g uint64) error {
	if !s.groupCsum() {
		return nil
	}
	want := uint32(binary.LittleEndian.Uint16(b[descCsumAt:]))
	var got uint32
	if s.ro(roMetadataCsum) {
		got = crc32cWithout(crc32c(s.seed, le32(uint32(g))), b, descCsumAt, 2) & 0xffff
	} else {
		c := crc16(0xffff, s.uuid[:])
		c = crc16(c, le32(uint32(g)))
		c = crc16(c, b[:descCsumAt])
		got = uint32(crc16(c, b[descCsumAt+2:]))
	}
	if got != want {
		return badSum(fmt.Sprintf("descriptor of group %d", g), got, want)
	}
	return nil
}

// check refuses a descriptor that points outside the filesystem (or, without
// flex_bg, outside its group).
func (d *desc) check(s *super, g uint64) error {
	low, high := s.firstBlock, s.blocks
	if !s.inc(incompatFlexBG) {
		low = s.groupFirst(g)
		high = low + s.groupBlocks(g)
	}
	for _, p := range []struct {
		name     string
		start, n uint64
	}{{"block bitmap", d.blockBitmap, 1}, {"inode bitmap", d.inodeBitmap, 1}, {"inode table", d.inodeTable, s.inodeTable}} {
		if p.start < low || p.start >= high || p.n > high-p.start {
			return damaged("%s of group %d in blocks %d+%d, want some of %d to %d", p.name, g, p.start, p.n, low, high)
		}
	}
	if d.uninit() && !s.groupCsum() {
		return damaged("group %d is marked as uninitialised, which this filesystem cannot have", g)
	}
	return nil
}
