package scavenge

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/imagestack/imagestack/backend"
)

// Bitmaps of blocks and inodes do not say what they are, but their group's
// descriptor has their checksum of 32 bits. Places where nothing else is found
// often have these.

// bitmap is what a descriptor says of one.
type bitmap struct {
	sum   uint32
	block uint64
}

// maxBitmaps bounds how many places are considered for one block.
const maxBitmaps = 4096

// bitmaps takes the checksums of the bitmaps of one group. Descriptors of
// earlier times are evidence as well: what matches them was there then.
func (x *extFS) addBitmaps(e *evidence, d []byte) error {
	le := binary.LittleEndian
	if x.desc < 64 {
		return nil // 16 bits prove too little
	}
	flags := le.Uint16(d[18:])
	for i, uninit := range []uint16{2, 1} { // blocks, inodes
		if flags&uninit != 0 {
			continue // not written
		}
		b := bitmap{uint32(le.Uint16(d[24+2*i:])) | uint32(le.Uint16(d[56+2*i:]))<<16,
			uint64(le.Uint32(d[4*i:])) | uint64(le.Uint32(d[32+4*i:]))<<32}
		if b.block == 0 || b.block >= x.blocks {
			continue
		}
		var err error
		if x.bitmaps, err = append1(e.src, x.bitmaps, b, 16, "bitmaps"); err != nil {
			return err
		}
	}
	return nil
}

func compareBitmaps(a, b bitmap) int {
	return cmp.Or(cmp.Compare(a.sum, b.sum), cmp.Compare(a.block, b.block))
}

// sortBitmaps makes them ready for bitmapAt.
func (x *extFS) sortBitmaps() {
	slices.SortFunc(x.bitmaps, compareBitmaps)
	x.bitmaps = slices.Compact(x.bitmaps)
}

// bitmapAt places the block b at loc when it is the bitmap of one group that
// fits there.
func (x *extFS) bitmapAt(e *evidence, g *guest, b []byte, loc int64, fits func(loc, off int64) bool) error {
	if x.scratch == nil || len(x.bitmaps) == 0 || backend.IsZero(b) {
		return nil
	}
	// That of inodes is short, and filled up with ones.
	lengths := []uint64{x.perGroup / 8, x.inodesPerGroup / 8}
	if x.bigalloc > 0 {
		lengths[0] = x.perGroup >> x.bigalloc / 8
	}
	found, place := 0, int64(0)
	for _, n := range lengths {
		if n == 0 || n > uint64(len(b)) {
			continue
		}
		sum := crc32c(x.sumSeed, b[:n])
		i, _ := slices.BinarySearchFunc(x.bitmaps, bitmap{sum: sum}, compareBitmaps)
		for k := i; k < len(x.bitmaps) && x.bitmaps[k].sum == sum && k < i+maxBitmaps; k++ {
			if off := int64(x.bitmaps[k].block) * x.block; fits(loc, off) && (found == 0 || off != place) {
				found, place = found+1, off
			}
		}
	}
	if found != 1 {
		return nil
	}
	return e.add(g, kindPlain, loc, place, x.block)
}
