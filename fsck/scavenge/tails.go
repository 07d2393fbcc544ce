package scavenge

import (
	"cmp"
	"context"
	"encoding/binary"
	"slices"
)

// The content of files tells where it belongs as well, though not under a
// checksum: the last block of a file is filled up with zeros from the end of
// the file on, and the inode knows both the block and the end. One block that
// ends in the right place says little. Several of them, of different lengths,
// that fit the files of one place on the disk and of no other say much, when
// at the same time nothing in the piece contradicts an end of a file there.
// This is what places clusters that hold nothing but the data of files.

// tail is the end of a file.
type tail struct {
	off int64  // of the last block, on the disk
	end uint32 // bytes of it that belong to the file, less than a block
}

const (
	tailBytes = 32 // in both orders
	// minTails is how many ends, of so many different lengths, have to fit.
	minTails = 4
	// A place may have one fitting end for four of the best.
	tailLead = 4
	// One end in eight may be contradicted: files change.
	tailBad = 8
	// maxTailPlaces bounds the candidates of one block.
	maxTailPlaces = 256
	maxTailUnits  = 1 << 14
)

// addTail enters the end of a file in the block at off of the filesystem.
func (e *evidence) addTail(g *guest, off int64, end uint32) (err error) {
	g.tails, err = append1(e.src, g.tails, tail{g.base + off, end}, tailBytes, "the ends of files")
	return err
}

// tail takes the end of a regular file with these extents.
func (t *treeWalk) tail(raw []byte, leaves []extent) error {
	le := binary.LittleEndian
	size := uint64(le.Uint32(raw[4:])) | uint64(le.Uint32(raw[108:]))<<32
	last, end := size/uint64(t.x.block), size%uint64(t.x.block)
	if end == 0 {
		return nil
	}
	for _, l := range leaves {
		if !l.unwritten && last >= l.logical && last-l.logical < l.n && t.inside(l.phys, l.n) && !t.x.log.has(l.phys+last-l.logical) {
			return t.e.addTail(t.g, int64(l.phys+last-l.logical)*t.x.block, uint32(end))
		}
	}
	return nil
}

// tails takes the ends of the files whose inodes were found.
func (x *xfsFS) tails(e *evidence, g *guest) error {
	if !x.v5 || x.inode < 512 {
		return nil
	}
	raw := make([]byte, x.inode)
	for _, h := range e.hits {
		if h.fs != g.index || h.kind != kindPlain {
			continue
		}
		for k := range int64(h.n) {
			if !e.readLoc(raw, h.loc+k*x.inode) || raw[0] != 'I' || raw[1] != 'N' || raw[4] != 3 {
				break // another kind of block
			}
			if err := x.tail(e, g, raw); err != nil {
				return err
			}
		}
	}
	return nil
}

// tail takes the end of one file: regular, with its extents in the inode.
func (x *xfsFS) tail(e *evidence, g *guest, raw []byte) error {
	be := binary.BigEndian
	size := be.Uint64(raw[56:])
	if be.Uint16(raw[2:])>>12 != 8 || raw[5] != 2 || [16]byte(raw[160:176]) != x.meta {
		return nil
	}
	last, end := size/uint64(g.block), size%uint64(g.block)
	if end == 0 {
		return nil
	}
	fork := raw[176:]
	if n := int(raw[82]) * 8; n > 0 && n < len(fork) {
		fork = fork[:n]
	}
	for ; len(fork) >= 16; fork = fork[16:] {
		a, b := be.Uint64(fork), be.Uint64(fork[8:])
		logical, start, count := a<<1>>10, a&511<<43|b>>21, b&(1<<21-1)
		if count == 0 {
			return nil
		}
		if a>>63 != 0 || last < logical || last-logical >= count {
			continue
		}
		start += last - logical
		ag, at := start>>x.agLog, start&(1<<x.agLog-1)
		if ag < x.agents && at < x.agBlocks {
			return e.addTail(g, int64(ag*x.agBlocks+at)*g.block, uint32(end))
		}
	}
	return nil
}

// tailIndex finds tails by their end and their place in a unit.
type tailIndex struct {
	unit  int64
	byEnd []tail
}

func (t *tailIndex) compare(a, b tail) int {
	return cmp.Or(cmp.Compare(a.end, b.end), cmp.Compare(mod(a.off, t.unit), mod(b.off, t.unit)), cmp.Compare(a.off, b.off))
}

// at returns the tails that end at end in a block at rel of a unit.
func (t *tailIndex) at(end uint32, rel int64) []tail {
	key := func(x tail, _ int) int { return cmp.Or(cmp.Compare(x.end, end), cmp.Compare(mod(x.off, t.unit), rel)) }
	i, _ := slices.BinarySearchFunc(t.byEnd, 0, key)
	n := i
	for n < len(t.byEnd) && n < i+maxTailPlaces && key(t.byEnd[n], 0) == 0 {
		n++
	}
	if n == i+maxTailPlaces {
		return nil // so many say nothing
	}
	return t.byEnd[i:n]
}

// byTails places pieces by the ends of files, once for each filesystem.
func (j *job) byTails(ctx context.Context) (placed int, err error) {
	var claims []claim
	for _, g := range j.ev.guests {
		if g.rank == rankNone || g.tailed || len(g.tails) < minTails {
			continue
		}
		g.tailed = true
		if g.ext != nil && g.ext.log.ofData() {
			j.rep.note("the journal of a filesystem holds data of files: the ends of files prove no places in it")
			continue
		}
		slices.SortFunc(g.tails, func(a, b tail) int { return cmp.Or(cmp.Compare(a.off, b.off), cmp.Compare(a.end, b.end)) })
		g.tails = slices.Compact(g.tails) // inodes have copies in a journal
		ix := &tailIndex{unit: j.p.unit, byEnd: slices.Clone(g.tails)}
		slices.SortFunc(ix.byEnd, ix.compare)
		for i := range j.p.place {
			if j.p.place[i] >= 0 || j.p.idle.get(int64(i)) {
				continue
			}
			u, n, err := j.tailPlace(ctx, g, ix, int32(i))
			if err != nil {
				return 0, err
			}
			if n > 0 && j.p.inDisk(u) {
				claims = append(claims, claim{int32(i), int32(u), -1, n})
			}
			if j.o.OnProgress != nil {
				j.o.OnProgress("files", int64(i), int64(len(j.p.place)))
			}
		}
	}
	return j.p.settle(claims, ProofTails), nil
}

// used is how much of a block is not zeros at its end.
func usedBytes(b []byte) int {
	n := len(b)
	for n >= 8 && binary.LittleEndian.Uint64(b[n-8:n]) == 0 {
		n -= 8
	}
	for n > 0 && b[n-1] == 0 {
		n--
	}
	return n
}

// eachBlock shows the blocks of a piece with their place in it.
func (j *job) eachBlock(ctx context.Context, g *guest, piece int32, visit func(b []byte, rel int64)) error {
	var spots []spot
	return j.im.blocks(ctx, piece, func(b []byte, loc int64) error {
		spots = j.p.spots(loc, spots[:0])
		i := slices.IndexFunc(spots, func(s spot) bool { return s.piece == piece })
		if i < 0 {
			return nil
		}
		rel := spots[i].rel
		for x := mod(g.base-rel, g.block); x+g.block <= int64(len(b)); x += g.block {
			visit(b[x:x+g.block], rel+x)
		}
		return nil
	})
}

// tailPlace finds the unit that the ends of files in a piece tell, and how
// many do; 0 when they do not.
func (j *job) tailPlace(ctx context.Context, g *guest, ix *tailIndex, piece int32) (unit, votes int64, err error) {
	type score struct {
		n    int64
		ends [minTails]uint32 // different ones
		kind int
	}
	scores := map[int64]*score{}
	err = j.eachBlock(ctx, g, piece, func(b []byte, rel int64) {
		n := usedBytes(b)
		if n == 0 || n == len(b) {
			return
		}
		for _, t := range ix.at(uint32(n), rel) {
			u := t.off / j.p.unit
			s := scores[u]
			if s == nil {
				if len(scores) == maxTailUnits {
					continue
				}
				s = new(score)
				scores[u] = s
			}
			s.n++
			if s.kind < minTails && !slices.Contains(s.ends[:s.kind], uint32(n)) {
				s.ends[s.kind] = uint32(n)
				s.kind++
			}
		}
	})
	if err != nil {
		return 0, 0, err
	}
	first, second := int64(0), int64(0)
	for u, s := range scores {
		if s.n > first || s.n == first && u < unit {
			unit, first, second = u, s.n, first
		} else {
			second = max(second, s.n)
		}
	}
	if first < minTails || first < tailLead*second || scores[unit].kind < minTails {
		return 0, 0, nil
	}
	// What else ends there must not go on here.
	right, wrong := int64(0), int64(0)
	err = j.eachBlock(ctx, g, piece, func(b []byte, rel int64) {
		off := unit*j.p.unit + rel
		i, found := slices.BinarySearchFunc(g.tails, off, func(t tail, v int64) int { return cmp.Compare(t.off, v) })
		if !found {
			return
		}
		switch n := uint32(usedBytes(b)); {
		case n == g.tails[i].end:
			right++
		case n > g.tails[i].end:
			wrong++
		}
	})
	if err != nil || right < minTails || wrong*tailBad > right {
		return 0, 0, err
	}
	return unit, right, nil
}
