package qcow2fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// expected is what four 16-bit counts are for the cells of one byte of two-bit
// states.
var expected = func() (t [256]uint64) {
	for s := range t {
		for k := range 4 {
			if s>>(2*k)&3 != stateFree {
				t[s] |= 1 << (48 - 16*k)
			}
		}
	}
	return t
}()

// usualCounts are the 16-bit counts of usualPage.
var usualCounts = bytes.Repeat([]byte{0, 1}, pageCells)

// blockNumbers are the numbers of the refcount blocks of the window: those that
// there are, and those that there should be. Ascending.
func (c *check) blockNumbers() []int64 {
	var ks []int64
	lo, hi := c.cells.lo, c.cells.hi.Load()
	for k, off := range c.blocks.table {
		if first := int64(k) * c.perBlock; off != 0 && first+c.perBlock > lo && first < hi {
			ks = append(ks, int64(k))
		}
	}
	for _, no := range c.cells.numbers(lo / pageCells) {
		p := c.cells.page(no, false)
		for i := 0; i < pageCells; {
			if p.two != nil && i%4 == 0 && p.two[i/4] == 0 {
				i += 4
				continue
			}
			if n, _ := p.get(i); n == 0 {
				i++
				continue
			}
			k := (no*pageCells + int64(i)) / c.perBlock
			ks = append(ks, k)
			i = int(min((k+1)*c.perBlock-no*pageCells, pageCells))
		}
	}
	slices.Sort(ks)
	return slices.Compact(ks)
}

// span is the part of block k that is in the window, in clusters.
func (c *check) span(k int64) (from, to int64) {
	from, to = max(k*c.perBlock, c.cells.lo), c.cells.hi.Load()
	if k < 1<<62/c.perBlock {
		to = min(to, (k+1)*c.perBlock)
	}
	return from, to
}

// pagesIn reports, for ranges that ascend, whether there are cells for any
// cluster of one.
func (c *cells) pagesIn() func(from, to int64) bool {
	numbers := c.numbers(c.lo / pageCells)
	return func(from, to int64) bool {
		for len(numbers) > 0 && numbers[0] < from/pageCells {
			numbers = numbers[1:]
		}
		return len(numbers) > 0 && numbers[0] <= (to-1)/pageCells
	}
}

// zeroBlock reports that b is what readBlock returns for zeros.
func (c *check) zeroBlock(b []byte) bool { return c.zeros != nil && &b[0] == &c.zeros[0] }

// readBlock reads block k into b and returns it, or zeros, not to be changed,
// where there is none or it is a hole.
func (c *check) readBlock(k int64, b []byte) []byte {
	if k < int64(len(c.blocks.table)) && c.blocks.table[k] != 0 {
		off := int64(c.blocks.table[k])
		if c.blocks.made[k] || !c.isHole(off, c.cs) {
			c.read(b, off)
			return b
		}
	}
	if c.zeros == nil {
		c.zeros = make([]byte, c.cs)
	}
	return c.zeros
}

// diff calls do for the clusters [from, to) of block k whose count in b is not
// that of the cells.
func (c *check) diff(k int64, b []byte, from, to int64, do func(cluster int64, have, want uint64, fl uint8)) {
	base := k * c.perBlock
	empty := c.zeroBlock(b)
	for at := from; at < to; {
		no := at / pageCells
		n := min(to, (no+1)*pageCells) - at
		p := c.cells.page(no, false)
		if empty && (p == nil || p.two == freePage) {
			at += n
			continue
		}
		i, j := int(at%pageCells), int(at-base)
		if n == pageCells && c.order == 4 && p != nil && p.two == usualPage && bytes.Equal(b[2*j:2*(j+pageCells)], usualCounts) {
			at += n
			c.counts.lastCluster = max(c.counts.lastCluster, at)
			continue
		}
		for end := i + int(n); i < end; {
			if c.order == 4 && i%4 == 0 && i+4 <= end {
				want := uint64(0)
				if p != nil && p.two != nil {
					want = expected[p.two[i/4]]
				}
				if (p == nil || p.two != nil) && binary.BigEndian.Uint64(b[2*j:]) == want {
					i, j = i+4, j+4
					continue
				}
			}
			have := qcow2.Refcount(b, c.order, j)
			want, fl := uint32(0), uint8(0)
			if p != nil {
				want, fl = p.get(i)
			}
			if have != uint64(want) {
				do(base+int64(j), have, uint64(want), fl)
			}
			if have > 0 || want > 0 {
				c.counts.lastCluster = max(c.counts.lastCluster, min(base+int64(j), c.end-1)+1)
			}
			i, j = i+1, j+1
		}
		at += n
		c.lastOf(p, b, no, at, j)
	}
}

// lastOf keeps the last cluster in use for the clusters that the quick
// comparison passed.
func (c *check) lastOf(p *cellPage, _ []byte, no, end int64, _ int) {
	if p == nil || end <= c.counts.lastCluster {
		return
	}
	for i := int((end - 1) % pageCells); i >= 0; i-- {
		if n, _ := p.get(i); n > 0 {
			c.counts.lastCluster = max(c.counts.lastCluster, no*pageCells+int64(i)+1)
			return
		}
	}
}

// maxCount is the largest count of the image's width.
func (c *check) maxCount() uint64 { return ^uint64(0) >> (64 - 1<<c.order) }

// scan holds the counts of the image against the cells for the first time and
// reports whether they are the same. It marks the cells whose owners are in
// doubt because there are more of them than are counted.
//
// It also sees whether more clusters of the window are counted without a
// reference than the map refers to. Then it is likely that a part of the map is
// gone without a trace (an L1 table of zeros is a valid one) and what is called
// leaks is the disk: it is not given back without its content being kept.
func (c *check) scan() (same bool, err error) {
	if c.blocks.unknown {
		return false, c.failed()
	}
	same = !c.blocks.rebuild
	doubts := !c.external && !c.blocks.rebuild && c.h.incompat&incompatDirty == 0
	marked, leaked := 0, int64(0)
	last := c.counts.lastCluster
	b := make([]byte, c.cs)
	ks, used := c.blockNumbers(), c.cells.pagesIn()
	for i, k := range ks {
		if err := c.failed(); err != nil {
			return false, err
		}
		from, to := c.span(k)
		if from >= to {
			continue
		}
		b := c.readBlock(k, b)
		if c.zeroBlock(b) && !used(from, to) {
			continue
		}
		inTable := k < int64(len(c.blocks.table)) && c.blocks.table[k] != 0
		c.diff(k, b, from, to, func(cluster int64, have, want uint64, fl uint8) {
			same = false
			if want == 0 && have > 0 && cluster < c.clusters {
				leaked++
			}
			doubt := want > c.maxCount() || fl&fPlain != 0 && have > 0 && have < want || fl&fPacked != 0 && have < want
			if doubts && inTable && doubt && fl&fMeta == 0 && marked < maxDoubts {
				c.cells.update(cluster, func(n uint32, fl uint8) (uint32, uint8) { return n, fl | fCross })
				marked++
			}
		})
		if i%64 == 0 {
			c.sink.Progress(4, int64(i+1), int64(len(ks)))
		}
	}
	if leaked > fewLeaks && leaked > c.counts.allocated {
		c.mapLoss.Store(true)
	}
	if !same {
		c.counts.lastCluster = last // a repair may free the last one
	}
	return same, c.failed()
}

// compare corrects the counts of the image by the cells.
func (c *check) compare() error {
	if c.blocks.unknown {
		return nil
	}
	c.makeBlocks()
	b := make([]byte, c.cs)
	ks, used := c.blockNumbers(), c.cells.pagesIn()
	for i, k := range ks {
		if err := c.failed(); err != nil {
			return err
		}
		from, to := c.span(k)
		if from >= to {
			continue
		}
		if b := c.readBlock(k, b); !c.zeroBlock(b) || used(from, to) {
			c.compareBlock(k, b, from, to)
		}
		if i%64 == 0 {
			c.sink.Progress(4, int64(i+1), int64(len(ks)))
		}
	}
	return c.failed()
}

// fewLeaks is how many clusters may always be called leaks.
const fewLeaks = 16

// countRun is a run of clusters whose counts are wrong in the same way.
type countRun struct {
	first, n   int64
	have, want uint64
	quiet      bool // a consequence of the repair
	doubt      bool // the owners are in doubt
	copied     bool // an entry of the active map has COPIED
}

// compareBlock does one block.
func (c *check) compareBlock(k int64, b []byte, from, to int64) {
	isNew := c.blocks.made[k]
	missing := k >= int64(len(c.blocks.table)) || c.blocks.table[k] == 0
	var runs []countRun
	used := int64(0)
	c.diff(k, b, from, to, func(cluster int64, have, want uint64, fl uint8) {
		if used++; missing {
			return
		}
		r := countRun{cluster, 1, have, want, c.fresh[cluster], c.kept[cluster] || c.doubtAll && fl&fCross != 0, fl&fCopied != 0}
		if n := len(runs); n > 0 {
			l := &runs[n-1]
			if l.first+l.n == cluster && l.have == have && l.want == want && l.quiet == r.quiet && l.doubt == r.doubt && l.copied == r.copied {
				l.n++
				return
			}
		}
		runs = append(runs, r)
	})
	if used == 0 {
		return
	}
	if missing { // makeBlocks did not make one
		if !c.blocks.gone[int(k)] && !c.blocks.rebuild {
			c.found(codeRTMissing, c.entryPlace(k), fmt.Sprintf("refcount table entry %d", k), nil,
				fmt.Sprintf("%d clusters are in use that no block counts", used), preen("make a block"))
		}
		return
	}
	final := slices.Clone(b)
	changed := false
	for _, r := range runs {
		if !isNew && !r.quiet && !c.wrongCount(k, &r) {
			continue
		}
		if r.want > c.maxCount() {
			continue
		}
		changed = true
		for cl := r.first; cl < r.first+r.n; cl++ {
			qcow2.PutRefcount(final, c.order, int(cl-k*c.perBlock), r.want)
		}
	}
	if changed && c.plan != nil {
		c.writeCounts(k, b, final, from, to, isNew)
	}
}

func (c *check) entryPlace(k int64) int64 {
	if k*8 < c.blocks.clusters<<c.bits {
		return int64(c.blocks.off) + k*8
	}
	return -1
}

// wrongCount reports a run and returns whether to correct it.
func (c *check) wrongCount(k int64, r *countRun) bool {
	place := fsck.Place{Offset: int64(c.blocks.table[k]) + (r.first-k*c.perBlock)<<c.order/8, Field: fmt.Sprintf("refcount of cluster %#x", r.first), Value: r.have}
	clusters := "the cluster"
	if r.n > 1 {
		clusters = fmt.Sprintf("%d clusters", r.n)
	}
	f := fsck.Finding{Place: place, Fix: preen(fmt.Sprintf("set it to %d", r.want))}
	switch {
	case r.want > c.maxCount() && r.n == 1 && c.told[r.first]:
		c.unfixed.Store(true)
		return false
	case r.want > c.maxCount():
		f.Code, f.Fix = codeRefTooNarrow, nil
		f.Text = fmt.Sprintf("%s from offset %#x: %d references", clusters, r.first<<c.bits, r.want)
	case r.want > r.have:
		f.Code = codeRefLow
		f.Text = fmt.Sprintf("%s from offset %#x: %d references, %d counted", clusters, r.first<<c.bits, r.want, r.have)
		if r.doubt {
			f.Fix.Level = fsck.Full
		}
	case r.want > 0:
		f.Code = codeRefHigh
		if r.copied {
			f.Code = codeRefHighCopied
		}
		f.Text = fmt.Sprintf("%s from offset %#x: %d references, %d counted", clusters, r.first<<c.bits, r.want, r.have)
	default:
		f.Code = codeRefLeak
		f.Text = fmt.Sprintf("%s from offset %#x: no reference, %d counted", clusters, r.first<<c.bits, r.have)
		c.stats.LeakedClusters += r.n
		if c.mapLoss.Load() {
			f.Fix.Level = fsck.Full
			f.Fix.Text = "keep the content in lost+found and free it"
		}
	}
	if r.want < r.have && c.errors.Load() > 0 {
		// A part of the map could not be read: who knows what it refers to.
		f.Fix = nil
		c.unfixed.Store(true)
	}
	wanted := c.report(f)
	if !wanted {
		c.leaks = true
		return false
	}
	if f.Code == codeRefLeak && c.mapLoss.Load() {
		c.keepContent(r.first<<c.bits, r.n<<c.bits)
	}
	return true
}

// keepContent quarantines a range unless it is all zeros.
func (c *check) keepContent(off, n int64) {
	end := min(off+n, c.size)
	if off >= end {
		return
	}
	b := make([]byte, min(1<<20, end-off))
	for at := off; ; at += int64(len(b)) {
		if at = max(at, c.dataAt(at)); at >= end || c.failed() != nil {
			return // holes, or Ctrl-C
		}
		part := b[:min(int64(len(b)), end-at)]
		c.read(part, at)
		if !backend.IsZero(part) {
			c.keep(-1, off, end-off)
			return
		}
	}
}

// writeCounts enters a block in the plan: counts that go up before the map
// changes, those that go down behind it.
func (c *check) writeCounts(k int64, old, final []byte, from, to int64, isNew bool) {
	base := k * c.perBlock
	lo := (from - base) << c.order / 8
	hi := ((to-base)<<c.order + 7) / 8
	off := int64(c.blocks.table[k])
	if isNew {
		c.writeDiff(fsck.PhaseNew, off, old, final, lo, hi)
		return
	}
	up := slices.Clone(final)
	for j := int(from - base); j < int(to-base); j++ {
		have, want := qcow2.Refcount(old, c.order, j), qcow2.Refcount(final, c.order, j)
		if have > want {
			qcow2.PutRefcount(up, c.order, j, have)
		}
	}
	c.writeDiff(fsck.PhaseCounts, off, old, up, lo, hi)
	c.writeDiff(fsck.PhaseFree, off, up, final, lo, hi)
}

// writeDiff writes the bytes of [lo, hi) in which b is not a.
func (c *check) writeDiff(ph fsck.Phase, off int64, a, b []byte, lo, hi int64) {
	for i := lo; i < hi; {
		if a[i] == b[i] {
			i++
			continue
		}
		j := i + 1
		for j < hi && a[j] != b[j] {
			j++
		}
		if !c.planned(c.plan.Write(ph, off+i, b[i:j])) {
			return
		}
		i = j
	}
}
