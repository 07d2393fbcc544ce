package ploopfsck

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync/atomic"

	"github.com/imagestack/imagestack/fsck"
)

// partSize is how much of the BAT one goroutine looks at at a time.
const partSize = 256 << 10

// run is a number of neighbouring entries that have the same problem, or none:
// then they ascend from entry on.
type run struct {
	idx, count int64
	entry      uint32
	bad        *fsck.Code
}

// part is what a piece of the BAT holds.
type part struct {
	off, end int64 // in the file
	runs     []run // bad ones; all of them where a walk asks for that
	err      error
	done     chan struct{}

	allocated, fragmented int64
	first, last           run   // of the valid ones
	top                   int64 // the highest slot
}

// classify says what is wrong with a nonzero entry.
func (c *check) classify(idx int64, e uint32) *fsck.Code {
	host := c.host(e)
	switch {
	case idx >= c.clusters():
		return codeBeyond
	case e == noEntry:
		return codeInvalid
	case c.step > 1 && int64(e)%c.step != 0:
		return codeUnaligned
	case host < c.firstData:
		return codeMetadata
	case host >= c.eof:
		return codePastEOF
	case host > c.eof-c.cluster:
		return codeTruncated
	}
	return nil
}

// limits are what sound entries have in common, for a quick look.
type limits struct {
	count    int64  // entries below this are the disk's
	min, max uint32 // what they may be
	step     uint32
	low      uint32 // bits that must be 0; only for steps that are powers of two
}

func (c *check) limits() limits {
	l := limits{count: c.clusters(), min: c.entry(c.firstData), step: uint32(c.step)}
	if last := min(c.eof/c.cluster-1, c.maxSlot()); last >= c.firstSlot() {
		l.max = c.entry(last * c.cluster)
	}
	if l.step&(l.step-1) == 0 {
		l.low = l.step - 1
	} else {
		l.max = 0 // classify decides
	}
	return l
}

// sound reports whether an entry is certainly good.
func (l *limits) sound(idx int64, e uint32) bool {
	return e-l.min <= l.max-l.min && e&l.low == 0 && l.max >= l.min && idx < l.count
}

// batEnd is the end of the area in which entries, and the padding behind them,
// are.
func (c *check) batEnd() int64 {
	return min(c.roundUp(headerSize+4*c.entries), c.firstData, c.eof)
}

// scan reads one part and calls visit for its runs of nonzero entries.
func (c *check) scan(p *part, buf []byte, visit func(run)) error {
	b := buf[:p.end-p.off]
	if err := c.read(b, p.off); err != nil {
		return err
	}
	idx := (p.off - headerSize) / 4
	l := c.limits()
	for i := 0; i < len(b); {
		if i+8 <= len(b) && le.Uint64(b[i:]) == 0 {
			i += 8
			continue
		}
		e := le.Uint32(b[i:])
		if e == 0 {
			i += 4
			continue
		}
		r := run{idx: idx + int64(i/4), entry: e, count: 1}
		i += 4
		if l.sound(r.idx, e) {
			for want := e + l.step; i < len(b) && le.Uint32(b[i:]) == want && l.sound(r.idx+r.count, want); i += 4 {
				r.count++
				want += l.step
			}
			visit(r)
			continue
		}
		r.bad = c.classify(r.idx, e)
		// Neighbours with the same problem are one finding.
		most := int64(partSize)
		if r.bad == nil || r.bad == codeTruncated {
			most = 1
		}
		for ; i < len(b) && r.count < most; i += 4 {
			v := le.Uint32(b[i:])
			if v == 0 || c.classify(r.idx+r.count, v) != r.bad {
				break
			}
			r.count++
		}
		visit(r)
	}
	return nil
}

// walk reads the whole BAT, in parallel: scanned is called for the runs of a
// part by the goroutine that read it, then done for the parts one after the
// other, in order. Holes of the file are passed.
func (c *check) walk(scanned func(*part, run), done func(*part) error) error {
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	workers := c.parallel()
	todo := make(chan *part, 2*workers)
	for range workers {
		go func() {
			buf := make([]byte, partSize)
			for p := range todo {
				if p.err = ctx.Err(); p.err == nil {
					p.err = c.scan(p, buf, func(r run) { scanned(p, r) })
				}
				close(p.done)
			}
		}()
	}
	defer close(todo)
	var queue []*part
	finish := func() error {
		p := queue[0]
		queue = queue[1:]
		<-p.done
		if err := c.ctx.Err(); err != nil {
			return context.Cause(c.ctx)
		}
		return done(p)
	}
	// Nothing of this walk may go on when it has returned.
	defer func() {
		cancel()
		for _, p := range queue {
			<-p.done
		}
	}()
	for off, end := int64(headerSize), c.batEnd(); off < end; {
		data, err := c.f.SeekData(off)
		switch {
		case errors.Is(err, io.EOF):
			data = end
		case err != nil:
			data = off // read it, then
		}
		if off = max(off, data&^(partSize-1)); off >= end {
			break
		}
		p := &part{off: off, end: min(off&^(partSize-1)+partSize, end), done: make(chan struct{}), top: -1}
		p.end -= (p.end - p.off) % 4
		if p.end == p.off {
			break
		}
		off = p.end
		queue = append(queue, p)
		todo <- p
		if len(queue) == 2*workers {
			if err := finish(); err != nil {
				return err
			}
		}
	}
	for len(queue) > 0 {
		if err := finish(); err != nil {
			return err
		}
	}
	return nil
}

// marks are the bits of a window of the file: which slots are used, and used
// again.
type marks struct {
	first, n    int64
	used, twice []uint64
	again       atomic.Bool // a bit of twice is set
}

func (m *marks) reset(first, n int64) {
	words := (n + 63) / 64
	if int64(len(m.used)) < words {
		m.used, m.twice = make([]uint64, words), make([]uint64, words)
	} else {
		clear(m.used)
		clear(m.twice)
	}
	m.first, m.n = first, n
	m.again.Store(false)
}

// mark enters [slot, slot+count), as far as the window reaches.
func (m *marks) mark(slot, count int64) {
	from, to := max(slot-m.first, 0), min(slot+count-m.first, m.n)
	for from < to {
		w, bit := from/64, from%64
		k := min(64-bit, to-from)
		mask := (^uint64(0) >> (64 - k)) << bit
		if old := atomic.OrUint64(&m.used[w], mask) & mask; old != 0 {
			atomic.OrUint64(&m.twice[w], old)
			m.again.Store(true)
		}
		from += k
	}
}

func (m *marks) has(set []uint64, slot int64) bool {
	s := slot - m.first
	return s >= 0 && s < m.n && set[s/64]&(1<<(s%64)) != 0
}

// gap returns the first run of unused slots in [from, to) of the window.
func (m *marks) gap(from, to int64) (start, end int64) {
	next := func(s int64, flip uint64) int64 {
		for s < m.n {
			if w := (m.used[s/64] ^ flip) >> (s % 64); w != 0 {
				return s + int64(bits.TrailingZeros64(w))
			}
			s = (s/64 + 1) * 64
		}
		return m.n
	}
	if start = next(max(from-m.first, 0), ^uint64(0)) + m.first; start >= to {
		return to, to
	}
	return start, min(next(start-m.first, 0)+m.first, to)
}

// fileSlots is the end of the slots that an entry can name.
func (c *check) fileSlots() int64 { return min(ceil(c.eof, c.cluster), c.maxSlot()+1) }

// windowSlots is how many slots fit into the memory: half of it, for two bits
// each.
func (c *check) windowSlots() int64 { return max(c.o.Budget()*2, 4096) &^ 63 }

// slot is the place of an entry among the clusters of the file.
func (c *check) slot(e uint32) int64 {
	if c.step == 1 {
		return int64(e)
	}
	return int64(e) / c.step
}

// checkBAT walks the BAT: every entry, then for every window the clusters with
// several owners, the leaks and the holes.
func (c *check) checkBAT() error {
	if foreign, err := c.sectorLayout(); err != nil || foreign {
		return err
	}
	if err := c.lateFirstBlock(); err != nil {
		return err
	}
	first, slots := c.firstSlot(), c.fileSlots()
	window := c.windowSlots()
	c.space.single = slots-first <= window
	total := c.batEnd()
	prev := run{idx: -2}
	c.marks.reset(first, max(0, min(window, slots-first)))
	err := c.walk(func(p *part, r run) {
		if r.bad == nil || r.bad == codeTruncated {
			slot := c.slot(r.entry)
			c.marks.mark(slot, r.count)
			p.count(r, c)
			p.top = max(p.top, slot+r.count-1)
		}
		if r.bad != nil {
			p.runs = append(p.runs, r)
		}
	}, func(p *part) error {
		if p.err != nil {
			c.unreadable(p.off, "BAT", p.err)
			return nil
		}
		if p.allocated > 0 {
			if prev.idx+prev.count == p.first.idx && prev.entry+uint32(prev.count*c.step) != p.first.entry {
				p.fragmented++
			}
			prev = p.last
		}
		c.stats.AllocatedClusters += p.allocated
		c.stats.FragmentedClusters += p.fragmented
		c.used += p.allocated
		c.last = max(c.last, p.top)
		c.sink.Progress(1, p.end, total)
		return c.badRuns(p.runs)
	})
	if err != nil {
		return err
	}
	if err := c.settleOrphans(); err != nil {
		return err
	}
	for pass := 2; ; pass++ {
		if err := c.checkWindow(); err != nil {
			return err
		}
		next := c.marks.first + c.marks.n
		if next > c.last {
			return nil
		}
		c.marks.reset(next, min(window, slots-next))
		err := c.walk(func(p *part, r run) {
			if r.bad == nil || r.bad == codeTruncated {
				c.marks.mark(c.slot(r.entry), r.count)
			}
		}, func(p *part) error {
			c.sink.Progress(pass, p.end, total)
			return nil // what cannot be read was reported in the first pass
		})
		if err != nil {
			return err
		}
	}
}

// count enters a valid run into the statistics, counted as qemu-img does: a
// cluster is fragmented when its predecessor is mapped elsewhere.
func (p *part) count(r run, c *check) {
	if p.allocated == 0 {
		p.first = r
	} else if p.last.idx+p.last.count == r.idx && p.last.entry+uint32(p.last.count*c.step) != r.entry {
		p.fragmented++
	}
	p.allocated += r.count
	p.last = r
}

// sectorLayout recognises an image whose clusters lie on sectors: entry by
// entry it would look damaged.
func (c *check) sectorLayout() (bool, error) {
	if c.version != 1 || c.step <= 1 {
		return false, nil
	}
	var odd, even atomic.Int64
	err := c.walk(func(_ *part, r run) {
		switch r.bad {
		case codeUnaligned:
			odd.Add(r.count)
		case nil, codeTruncated:
			even.Add(r.count)
		}
	}, func(*part) error { return nil })
	if err != nil {
		return false, err
	}
	if odd.Load() < 4 || odd.Load() <= even.Load() {
		return false, nil
	}
	c.blind.Store(true)
	c.report(fsck.Finding{Code: codeForeign, Place: fsck.Place{Offset: headerSize, Field: "BAT"},
		Text: "most entries are not multiples of the cluster size"})
	return true, nil
}

// lateFirstBlock decides about data that begins later than it has to: the
// entries tell whether that is so.
func (c *check) lateFirstBlock() error {
	exact := c.roundUp(headerSize + 4*c.entries)
	if c.firstData <= exact {
		return nil
	}
	stated := c.firstData
	c.firstData = exact
	var early atomic.Int64
	err := c.walk(func(_ *part, r run) {
		if r.bad == nil && c.host(r.entry) < stated {
			early.Add(1)
		}
	}, func(*part) error { return nil })
	if err != nil {
		return err
	}
	if early.Load() == 0 {
		c.firstData = stated
		c.report(fsck.Finding{Code: codeFirstBlockLate, Text: fmt.Sprintf("the first possible place is sector %d", exact/sectorSize),
			Place: fsck.Place{Offset: offFirstBlock, Field: "m_FirstBlockOffset", Value: uint32(stated / sectorSize)}})
		return nil
	}
	if c.headerFix(codeFirstBlock, offFirstBlock, "m_FirstBlockOffset", uint32(stated/sectorSize),
		"clusters in front of it are in use", fmt.Sprintf("set it to %d", exact/sectorSize)) {
		c.changed.put32(offFirstBlock, uint32(exact/sectorSize))
	}
	return nil
}

// checkWindow looks at the bits of the present window.
func (c *check) checkWindow() error {
	if err := c.checkShared(); err != nil {
		return err
	}
	if err := c.checkExtensionShared(); err != nil {
		return err
	}
	c.findLeaks()
	return c.findHoles()
}
