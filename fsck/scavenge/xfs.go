package scavenge

import (
	"encoding/binary"
	"math/bits"
)

// xfsFS is what an XFS superblock says (XFS Algorithms and Data Structures;
// all numbers big-endian).
type xfsFS struct {
	v5               bool
	sector, inode    int64 // bytes
	agBlocks, agents uint64
	agLog, inoLog    uint
	meta             [16]byte // the UUID in metadata
	dirBlock         int64
}

// xfsSuper takes a superblock that the AGF behind it confirms: that one knows
// the number of its allocation group.
func (e *evidence) xfsSuper(w []byte, loc int64) {
	if len(w) < 512 {
		return
	}
	be := binary.BigEndian
	block, sect := int64(be.Uint32(w[4:])), int64(be.Uint16(w[102:]))
	x := &xfsFS{sector: sect, agBlocks: uint64(be.Uint32(w[84:])), agents: uint64(be.Uint32(w[88:])), agLog: uint(w[124]),
		inode: int64(be.Uint16(w[104:])), inoLog: uint(w[123])}
	blocks := be.Uint64(w[8:])
	var uuid [16]byte
	copy(uuid[:], w[32:])
	x.meta = uuid
	switch be.Uint16(w[100:]) & 0xf {
	case 4:
	case 5:
		x.v5 = true
		if be.Uint32(w[216:])&4 != 0 {
			copy(x.meta[:], w[248:])
		}
	default:
		return
	}
	pow2 := func(v, lo, hi int64) bool { return v >= lo && v <= hi && v&(v-1) == 0 }
	if !pow2(block, 512, 65536) || !pow2(sect, 512, 32768) || !pow2(x.inode, 256, 2048) || sect > block ||
		x.agBlocks < 64 || x.agBlocks >= 1<<31 || x.agLog != uint(bits.Len64(x.agBlocks-1)) ||
		x.inoLog != uint(bits.TrailingZeros64(uint64(block/x.inode))) || w[192] > 8 ||
		x.agents == 0 || blocks > x.agents*x.agBlocks || blocks <= (x.agents-1)*x.agBlocks || blocks > uint64(anySize/block) {
		return
	}
	x.dirBlock = block << w[192]
	if x.v5 && (int64(len(w)) < sect || !sumMatches(w[:sect], 224)) {
		return
	}
	// The second sector is the AGF.
	if int64(len(w)) < 2*sect {
		return
	}
	f := w[sect:][:sect]
	ag := uint64(be.Uint32(f[8:]))
	if string(f[:4]) != "XAGF" || be.Uint32(f[4:]) != 1 || ag >= x.agents ||
		uint64(be.Uint32(f[12:])) != min(x.agBlocks, blocks-ag*x.agBlocks) || x.v5 && !sumMatches(f, 216) {
		return
	}
	if x.v5 && [16]byte(f[64:80]) != x.meta {
		return
	}
	g := e.guestFor("xfs", uuid, block)
	if g == nil {
		return
	}
	size := int64(blocks) * block
	if g.xfs == nil || ag == 0 || size > g.size && len(g.supers) > 0 && !g.supers[0].primary {
		g.xfs, g.size = x, size
	}
	g.super(loc, int64(ag*x.agBlocks)*block, ag == 0)
}

// look takes a block of version 5 metadata, which says where it belongs.
func (x *xfsFS) look(e *evidence, g *guest, w []byte, loc int64) error {
	if !x.v5 {
		return nil
	}
	be := binary.BigEndian
	if w[0] == 'I' && w[1] == 'N' && w[4] == 3 {
		n := x.inode
		if int64(len(w)) < n || n < 176 || [16]byte(w[160:176]) != x.meta || !sumMatches(w[:n], 100) {
			return nil
		}
		ino := be.Uint64(w[152:])
		ag, at := ino>>(x.agLog+x.inoLog), ino>>x.inoLog&(1<<x.agLog-1)
		if ag >= x.agents || at >= x.agBlocks {
			return nil
		}
		off := int64(ag*x.agBlocks+at)*g.block + int64(ino&(1<<x.inoLog-1))*n
		if off >= g.size {
			return nil
		}
		return e.add(g, kindPlain, loc, off, n)
	}
	var blkno, uuid, sum int
	n := g.block
	switch string(w[:4]) {
	case "AB3B", "AB3C", "IAB3", "FIB3", "RMB3", "R3FC":
		blkno, uuid, sum = 16, 32, 52
	case "BMA3":
		blkno, uuid, sum = 24, 40, 64
	case "XDB3", "XDD3", "XDF3":
		blkno, uuid, sum, n = 8, 24, 4, x.dirBlock
	case "XSLM", "XARM":
		blkno, uuid, sum = 40, 16, 12
	default:
		switch be.Uint16(w[8:]) {
		case 0x3ebe, 0x3bee, 0x3df1, 0x3dff:
			blkno, uuid, sum = 16, 32, 12
			if be.Uint16(w[8:]) != 0x3bee {
				n = x.dirBlock // a node may be that of attributes as well
			}
		default:
			return nil
		}
	}
	if [16]byte(w[uuid:uuid+16]) != x.meta {
		return nil
	}
	if int64(len(w)) < n || !sumMatches(w[:n], sum) {
		if n = g.block; int64(len(w)) < n || !sumMatches(w[:n], sum) {
			return nil
		}
	}
	daddr := be.Uint64(w[blkno:])
	if daddr >= uint64(g.size)/sector {
		return nil
	}
	return e.add(g, kindPlain, loc, int64(daddr)*sector, n)
}
