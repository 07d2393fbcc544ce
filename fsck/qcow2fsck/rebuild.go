package qcow2fsck

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
)

// makeBlocks makes the refcount blocks that are missing.
func (c *check) makeBlocks() {
	if c.plan == nil {
		return
	}
	t := &c.blocks
	if t.made == nil {
		t.made, t.declined = map[int64]bool{}, map[int64]bool{}
	}
	for again := true; again && c.failed() == nil; {
		again = false
		for _, k := range c.blockNumbers() {
			if k < int64(len(t.table)) && t.table[k] != 0 || t.declined[k] {
				continue
			}
			if !t.gone[int(k)] && !t.rebuild && !c.onlyFresh(k) &&
				!c.found(codeRTMissing, c.entryPlace(k), fmt.Sprintf("refcount table entry %d", k), nil, "clusters are in use that no block counts", preen("make a block")) {
				t.declined[k] = true
				continue
			}
			cl, ok := c.alloc(1, 1, fMeta)
			if !ok {
				return
			}
			for int64(len(t.table)) <= k {
				t.table = append(t.table, 0)
			}
			t.table[k] = uint64(cl) << c.bits
			t.made[k] = true
			c.planned(c.plan.Zero(fsck.PhaseNew, cl<<c.bits, c.cs))
			if k*8 >= t.clusters<<c.bits {
				t.rebuild = true // the table has to become longer
			} else if !t.rebuild {
				c.put64(fsck.PhaseCounts, int64(t.off)+k*8, t.table[k])
			}
			again = true
		}
	}
	if c.cells.hi.Load() == 1<<63-1 {
		c.makeTable()
	}
}

// onlyFresh reports that all clusters of block k that are in use are so only
// since this repair.
func (c *check) onlyFresh(k int64) bool {
	from, to := c.span(k)
	to = min(to, c.end)
	for cl := from; cl < to; cl++ {
		if n, _ := c.cells.get(cl); n > 0 && !c.fresh[cl] {
			return false
		}
	}
	return true
}

// makeTable finds the place of a new refcount table, which may need blocks in
// its turn.
func (c *check) makeTable() {
	t := &c.blocks
	if !t.rebuild || t.place != 0 || c.failed() != nil {
		return
	}
	// As many entries as there are blocks, and some for the blocks that the
	// table itself may need.
	need := int64(len(t.table)) + 2
	n := (need*8 + c.cs - 1) >> c.bits
	n += n*8/c.perBlock>>c.bits + 1
	if uint64(n)<<c.bits > max(maxRefTableBytes, uint64(2*c.cs)) {
		n = (int64(len(t.table))*8 + c.cs - 1) >> c.bits
	}
	cl, ok := c.alloc(n, 1, fMeta)
	if !ok {
		return
	}
	t.place, t.placeN = cl, n
	// The old table's clusters are free from now on.
	if t.clusters > 0 {
		first := int64(t.off >> c.bits)
		for i := range t.clusters {
			c.cells.update(first+i, func(uint32, uint8) (uint32, uint8) { return 0, 0 })
			if c.cells.in(first + i) {
				c.fresh[first+i] = true
			}
		}
	}
	c.makeBlocks()
}

// writeTable enters the new refcount table in the plan.
func (c *check) writeTable() {
	t := &c.blocks
	if c.plan == nil || !t.rebuild || t.place == 0 {
		return
	}
	n := t.placeN << c.bits
	if int64(len(t.table))*8 > n {
		c.planned(fmt.Errorf("%w: the refcount table has grown", fsck.ErrPlan))
		return
	}
	b := make([]byte, n)
	for k, off := range t.table {
		binary.BigEndian.PutUint64(b[8*k:], off)
	}
	off := t.place << c.bits
	c.planned(c.plan.Zero(fsck.PhaseNew, off, n))
	c.planned(c.plan.Write(fsck.PhaseNew, off, b))
	ref := binary.BigEndian.AppendUint64(nil, uint64(off))
	c.planned(c.plan.Write(fsck.PhaseHeader, offRTOffset, binary.BigEndian.AppendUint32(ref, uint32(t.placeN))))
}

// alloc takes n neighbouring clusters that nothing uses: free ones inside the
// file first, so that a full disk is no obstacle, and else new ones behind its
// end. While the map is damaged, what nothing uses may be what it has lost;
// then it is the other way round, and clusters that are counted are the last
// resort, their content kept in lost+found.
func (c *check) alloc(n int64, w uint32, fl uint8) (int64, bool) {
	loss := c.mapLoss.Load()
	inside := func(counted bool) (int64, bool) {
		hi := min(c.cells.hi.Load(), c.end)
		run := int64(0)
		start := max(c.cursor, 1)
		if n > 1 && counted {
			start = max(start, c.many)
		}
		for at := start; at < hi; at++ {
			used, _ := c.cells.get(at)
			if used != 0 || c.fresh[at] || c.sources[at] || c.errors.Load() > 0 || !counted && c.stored(at) != 0 {
				run = 0
				continue
			}
			if run++; run == n {
				switch {
				case n == 1:
					c.cursor = at + 1
				case counted:
					c.many = at + 1
				}
				return at - n + 1, true
			}
		}
		switch { // nothing is left
		case n == 1 && counted:
			c.cursor = hi
		case counted:
			c.many = hi
		}
		return 0, false
	}
	behind := func() (int64, bool, error) {
		at := c.end
		if err := c.plan.Write(fsck.PhaseNew, (at+n)<<c.bits-1, []byte{0}); err != nil {
			return 0, false, err
		}
		c.end += n
		return at, true, nil
	}
	var at int64
	ok := false
	if !loss {
		at, ok = inside(true)
	}
	if !ok {
		var err error
		if at, ok, err = behind(); err != nil {
			if at, ok = inside(false); !ok {
				c.cursor, c.many = c.cells.lo, 0
				if at, ok = inside(true); !ok {
					return 0, c.planned(err)
				}
				if loss {
					c.keepContent(at<<c.bits, n<<c.bits)
				}
			}
		}
	}
	for i := range n {
		c.fresh[at+i] = true
		if c.cells.in(at + i) {
			c.cells.update(at+i, func(uint32, uint8) (uint32, uint8) { return w, fl })
		} else {
			c.grown = append(c.grown, ref{at + i, w, fl})
		}
	}
	return at, ok
}

// keepRanges joins guest ranges that follow each other.
func keepRanges(r []blockmap.Range) []blockmap.Range {
	var s blockmap.Set
	for _, x := range r {
		s.Add(x.Off, x.Len)
	}
	return slices.Collect(s.Ranges())
}
