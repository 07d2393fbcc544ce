package qcow2fsck

import (
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// Bits of L1 and L2 entries (section Cluster mapping).
const (
	entryCopied     = 1 << 63
	entryCompressed = 1 << 62
	entryZero       = 1 << 0
	entryOffset     = 0x00fffffffffffe00
	l1Reserved      = 0x7f00000000000000 | 0x1ff
	l2Reserved      = 0x3f00000000000000 | 0x1fe
)

// looksLikeL1 reports that not most of the entries that say something are
// impossible.
func (c *check) looksLikeL1(off uint64, entries uint32) bool {
	n := min(int64(entries)*8, 64<<10)
	if c.isHole(int64(off), n) {
		return true
	}
	b := make([]byte, n)
	c.read(b, int64(off))
	good, bad := 0, 0
	for ; len(b) >= 8; b = b[8:] {
		e := be64(b)
		switch {
		case e == 0:
		case e&l1Reserved != 0 || !c.aligned(e&entryOffset, 1):
			bad++
		default:
			good++
		}
	}
	// Of few entries all may be damaged.
	return bad <= good || bad <= 2
}

// garbage counts the entries of an L2 table, or a part of one, that are
// possible and those that no L2 entry ever looked like.
func (c *check) garbage(b []byte) (good, bad int) {
	mask := uint64(c.cs - 1)
	for i := 0; i+int(c.entryBytes) <= len(b); i += int(c.entryBytes) {
		e := be64(b[i:])
		switch {
		case e&(entryCompressed|l2Reserved|entryOffset&mask) == 0 && e != 0 && e&entryOffset < 1<<50: // nearly all
			good++
		case e == 0:
			if c.extended && uint32(be64(b[i+8:])) != 0 {
				bad++
			}
		case e&entryCompressed != 0:
			off, n := qcow2.DecodePacked(e, c.bits)
			if off == 0 || off >= uint64(c.clusters)<<c.bits || off+uint64(n) > uint64(c.clusters+1)<<c.bits+uint64(c.cs) {
				bad++
			} else {
				good++
			}
		case e&l2Reserved != 0 || e&entryOffset&mask != 0 || e&entryOffset > 1<<50:
			bad++
		default:
			good++
		}
	}
	return good, bad
}

// rawCount reads count i of the refcount block at off. ok is false when the
// file does not have it.
func (c *check) rawCount(off int64, order uint, i int64) (v uint64, ok bool) {
	bit := i << order
	k := int64(max(1<<order/8, 1))
	at := off + bit/8
	part := c.countPart.Load()
	if part == nil || at < part.off || at+k > part.off+int64(len(part.b)) {
		// Neighbours are asked for next.
		part = &countPart{off: at &^ (countPartBytes - 1), b: make([]byte, countPartBytes)}
		part.b = part.b[:c.read(part.b, part.off)]
		c.countPart.Store(part)
	}
	if at+k > part.off+int64(len(part.b)) {
		return 0, false
	}
	b := part.b[at-part.off:]
	return qcow2.Refcount(b[:k], order, int(bit%8>>order)), true
}

// countPart is a part of a refcount block as the image has it, as it was read
// last: counts in it are not judged by those that a repair has planned.
type countPart struct {
	off int64
	b   []byte
}

const countPartBytes = 4096

// stored is the count of a cluster as the image has it; 0 where it has none.
func (c *check) stored(cluster int64) uint64 {
	k := cluster / c.perBlock
	if k >= int64(len(c.blocks.table)) || c.blocks.table[k] == 0 {
		return 0
	}
	v, _ := c.rawCount(int64(c.blocks.table[k]), c.order, cluster%c.perBlock)
	return v
}

// maxAsked is how many clusters counted looks at in a check.
const maxAsked = 1 << 20

// counted reports that the image counts references for all clusters of a
// range. The table is not known yet when it is asked; it reads the header's.
func (c *check) counted(off, n uint64) bool {
	for cl := int64(off >> c.bits); cl <= int64((off+n-1)>>c.bits); cl++ {
		if c.asked++; c.asked > maxAsked {
			return false
		}
		var b [8]byte
		if c.read(b[:], int64(min(c.h.rtOff, 1<<62))+cl/c.perBlock*8) < 8 {
			return false
		}
		block := be64(b[:])
		if !c.aligned(block, 1) {
			return false
		}
		if v, ok := c.rawCount(int64(block), c.order, cl%c.perBlock); !ok || v == 0 {
			return false
		}
	}
	return true
}

// sampleTables calls do for a few L2 tables of the L1 table that the header
// names.
func (c *check) sampleTables(most int, do func(b []byte)) {
	n := min(int64(c.h.l1Size)*8, c.cs, 64<<10)
	l1 := make([]byte, n)
	c.read(l1, int64(min(c.h.l1Off, 1<<62)))
	b := make([]byte, c.cs)
	for ; len(l1) >= 8 && most > 0; l1 = l1[8:] {
		off := be64(l1) & entryOffset
		if be64(l1)&l1Reserved != 0 || !c.aligned(off, 1) {
			continue
		}
		c.read(b, int64(off))
		do(b)
		most--
	}
}

// extendedL2 judges the feature bit by what stands in the L2 tables: the
// second words of extended entries are bitmaps, those of plain tables entries.
func (c *check) extendedL2() bool {
	h := &c.h
	set := h.incompat&incompatExtL2 != 0
	var plainPairs, bitmapPairs, other int
	c.sampleTables(16, func(b []byte) {
		for i := 0; i+16 <= len(b); i += 16 {
			first, second := be64(b[i:]), be64(b[i+8:])
			if second == 0 {
				continue
			}
			isEntry := second&entryCopied != 0 && second&(l2Reserved|entryCompressed|entryZero) == 0 &&
				c.aligned(second&entryOffset, 1) && (!set || plainPairs > 100 || c.counted(second&entryOffset, 1))
			// Clusters of consecutive entries of a plain table mostly follow
			// each other; a bitmap has more than alignment allows.
			isBitmap := uint32(second)&uint32(second>>32) == 0 && first&(l2Reserved|entryCompressed|entryZero) == 0 &&
				(uint32(second) != 0) == (first&entryOffset != 0) && c.alignedOr0(first&entryOffset)
			switch {
			case isEntry:
				plainPairs++
			case isBitmap:
				bitmapPairs++
			default:
				other++
			}
		}
	})
	var text string
	switch {
	case set && (plainPairs > 0 && bitmapPairs == 0 && other == 0 || h.clusterBits < minExtL2Bits):
		text = "the L2 tables are plain ones"
	case !set && h.version == 3 && h.clusterBits >= minExtL2Bits && bitmapPairs > 0 && plainPairs == 0 && other == 0 && c.oddWordsBad():
		text = "the L2 tables are extended ones"
	default:
		return true
	}
	want := h.incompat ^ incompatExtL2
	if c.found(codeExtL2, offIncompat, "incompatible_features", h.incompat, text, full("change the bit")) {
		c.put64(fsck.PhaseHeader, offIncompat, want)
	}
	// The tables say what they are, whatever is done about the bit.
	h.incompat = want
	c.setGeometry()
	return true
}

func (c *check) alignedOr0(off uint64) bool { return off == 0 || c.aligned(off, 1) }

// oddWordsBad reports that most second words are impossible as plain entries.
func (c *check) oddWordsBad() bool {
	good, bad := 0, 0
	c.sampleTables(16, func(b []byte) {
		for i := 8; i+8 <= len(b); i += 16 {
			if e := be64(b[i:]); e != 0 {
				g, k := c.garbage(b[i : i+8])
				good, bad = good+g, bad+k
			}
		}
	})
	return bad > good
}

// samplePacked is how many of some compressed clusters decode.
func (c *check) samplePacked(typ qcow2.CompressionType) int {
	n, tried := 0, 0
	dst := make([]byte, c.cs)
	c.sampleTables(64, func(b []byte) {
		for i := 0; i+8 <= len(b) && tried < 16; i += int(c.entryBytes) {
			if e := be64(b[i:]); e&entryCompressed != 0 {
				off, k := qcow2.DecodePacked(e, c.bits)
				if off == 0 || off >= uint64(c.size) || int64(k) > 2*c.cs+1 {
					continue
				}
				tried++
				src := make([]byte, k)
				src = src[:c.read(src, int64(off))]
				if qcow2.Decompress(typ, src, dst) == nil {
					n++
				}
			}
		}
	})
	return n
}

// suspect finds refcount blocks whose content is not that of one: if the map
// claims their cluster too, the map is believed. They are looked for when the
// map first claims one.
func (c *check) suspect() {
	if c.suspected {
		return
	}
	c.suspected = true
	if c.order < 3 {
		return // any content is possible
	}
	most := uint64(c.h.nbSnap+1) * uint64(max(2, c.cs/64+2))
	b := make([]byte, c.cs)
	for k, off := range c.blocks.table {
		if off == 0 {
			continue
		}
		c.readTable(b, int64(off))
		high, used := 0, 0
		for i := 0; i < int(c.perBlock); i++ {
			if c.order == 4 && i%4 == 0 && be64(b[2*i:]) == 0x0001000100010001 {
				used += 4
				i += 3
				continue
			}
			if v := qcow2.Refcount(b, c.order, i); v > 0 {
				used++
				high += int(b2i(v > most))
			}
		}
		inside := int64(k)*c.perBlock < c.clusters
		if used == 0 && inside || high*8 > used {
			c.suspects = append(c.suspects, int64(off>>c.bits))
		}
	}
	slices.Sort(c.suspects)
}

// isSuspect reports that a cluster is one of those.
func (c *check) isSuspect(cluster int64) bool {
	if len(c.suspects) == 0 {
		return false
	}
	_, ok := slices.BinarySearch(c.suspects, cluster)
	return ok
}

// dropBlock takes a refcount block that the map claims out of the table.
func (c *check) dropBlock(cluster int64) {
	k, ok := c.blockAt(cluster)
	if !ok {
		return
	}
	at := int64(c.blocks.off) + int64(k)*8
	if c.found(codeRTMetadata, at, fmt.Sprintf("refcount table entry %d", k), c.blocks.table[k], "the map claims that cluster, and it does not hold counts", preen("make a new block")) {
		c.put64(fsck.PhaseCounts, at, 0)
	}
	c.blocks.drop(k)
}
