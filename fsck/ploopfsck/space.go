package ploopfsck

import (
	"fmt"

	"github.com/imagestack/imagestack/fsck"
)

// space is what is known about unused places of the file.
type space struct {
	single    bool  // one window covers the whole file
	inner     int64 // unused slots in front of the last used one
	firstGap  int64 // the first of them
	gaps      int64 // runs of them
	completed bool  // the truncated last cluster is going to be complete
	tailBusy  bool  // the ragged tail belongs to somebody
	cut       int64 // the file ends there after this round; 0 is not decided
	holes     []holeFinding
}

// Bounds of moving clusters inside the file.
const (
	// maxQuiet is how many bytes -p moves without being asked.
	maxQuiet = 1 << 30
	// maxMoves bounds the memory of a plan.
	maxMoves = 1 << 20
)

// lastUsed is the last slot that belongs to anything.
func (c *check) lastUsed() int64 { return max(c.last, c.ext.last()) }

// eachGap calls do for the runs of unused slots of the window in front of to.
func (c *check) eachGap(to int64, do func(start, end int64) bool) {
	m := &c.marks
	for at := m.first; ; {
		start, end := m.gap(at, min(to, m.first+m.n))
		if start >= end {
			return
		}
		at = end
		for start < end {
			// The extension is not in the bits.
			stop := min(end, c.ext.next(start))
			if stop > start && !do(start, stop) {
				return
			}
			start = stop + 1
		}
	}
}

// findLeaks counts the unused slots of the window.
func (c *check) findLeaks() {
	c.eachGap(c.lastUsed(), func(start, end int64) bool {
		if c.space.inner == 0 {
			c.space.firstGap = start
		}
		c.space.inner += end - start
		c.space.gaps++
		return true
	})
}

// checkSpace reports leaks and decides where the file ends.
func (c *check) checkSpace() error {
	end := max((c.lastUsed()+1)*c.cluster, c.firstData) // of what is used
	c.stats.ImageEnd = end
	whole := c.eof / c.cluster * c.cluster // of whole clusters
	tail := max(0, (whole-end)/c.cluster)
	ragged := c.eof%c.cluster != 0 && c.eof > end
	c.stats.LeakedClusters = tail + c.space.inner
	if tail == 0 && !ragged && c.space.inner == 0 {
		return nil
	}
	if c.blind.Load() {
		// Part of the BAT is not known: nothing can be called unused.
		c.stats.LeakedClusters = 0
		return nil
	}
	if c.suspect.Load() || c.convert || c.bad.Load() > 0 {
		return c.suspectLeaks(end)
	}
	return c.freeLeaks(end, tail, ragged)
}

// suspectLeaks saves what may be the lost clusters of damaged entries.
func (c *check) suspectLeaks(end int64) error {
	f := fsck.Finding{Code: codeLeakSuspect, Place: fsck.Place{Offset: end},
		Text: fmt.Sprintf("%d whole clusters are used by nothing; damaged entries may have lost them", c.stats.LeakedClusters)}
	if c.space.inner > 0 {
		f.Place.Offset = c.space.firstGap * c.cluster
	}
	// As long as an entry stays bad the leaks stay too, and are safe.
	if !c.convert && (c.plan == nil || c.damaged.Load() == 0) && c.leaksHoldData(end) {
		f.Fix = &fsck.Fix{Text: "copy them into lost+found", Level: fsck.Full}
	}
	if !c.report(f) {
		return nil
	}
	if c.eof > end {
		if err := c.keep(-1, end, c.eof-end); err != nil {
			return err
		}
	}
	if !c.space.single {
		return nil // gaps are not touched then
	}
	return c.keepGaps()
}

// keepGaps copies what is in the unused clusters inside the file into
// lost+found.
func (c *check) keepGaps() error {
	var err error
	c.eachGap(c.lastUsed(), func(start, stop int64) bool {
		err = c.keep(-1, start*c.cluster, (stop-start)*c.cluster)
		return err == nil
	})
	return err
}

// fewLeaks is how many clusters may always be called leaks.
const fewLeaks = 16

// leaksHoldData reports whether there is anything but holes in the unused
// clusters of the window and behind end.
func (c *check) leaksHoldData(end int64) bool {
	found := c.holds(end, c.eof-end)
	if c.space.single && !found {
		c.eachGap(c.lastUsed(), func(start, stop int64) bool {
			found = c.holds(start*c.cluster, (stop-start)*c.cluster)
			return !found
		})
	}
	return found
}

// freeLeaks gives the unused clusters of a sound image back.
func (c *check) freeLeaks(end, tail int64, ragged bool) error {
	cut := c.eof
	fixable := c.end == 0 // nothing was appended in this round
	offer := func(f fsck.Finding, level fsck.Level, text string) bool {
		if fixable {
			f.Fix = &fsck.Fix{Text: text, Level: level}
		}
		return c.report(f)
	}
	if ragged {
		whole := c.eof / c.cluster * c.cluster
		if offer(fsck.Finding{Code: codeRagged, Place: fsck.Place{Offset: whole, Field: "file size", Value: c.eof},
			Text: fmt.Sprintf("%d bytes behind the last whole cluster", c.eof-whole)}, fsck.Preen, "cut them off") {
			cut = whole
		}
	}
	// When most of the file is used by nothing it is likely that entries are
	// gone without a trace (a BAT of zeros is a valid one), and what is called
	// leaks is the disk.
	level, first := fsck.Preen, ""
	most := tail+c.space.inner > fewLeaks && tail+c.space.inner > c.stats.AllocatedClusters
	if most {
		level, first = fsck.Full, "copy their content into lost+found and "
	}
	if tail > 0 && offer(fsck.Finding{Code: codeLeakTail, Place: fsck.Place{Offset: end},
		Text: fmt.Sprintf("%d clusters at the end of the file", tail)}, level, first+"cut them off") {
		cut = end
		if most {
			if err := c.keep(-1, end, c.eof-end); err != nil {
				return err
			}
		}
	}
	if c.space.inner > 0 {
		moves := c.space.inner
		if used := c.stats.AllocatedClusters; used < moves {
			moves = used
		}
		f := fsck.Finding{Code: codeLeakInner, Place: fsck.Place{Offset: c.space.firstGap * c.cluster},
			Text: fmt.Sprintf("%d clusters in %d places inside the file", c.space.inner, c.space.gaps)}
		if moves > maxQuiet/c.cluster {
			level = fsck.Full
		}
		if c.ext.at != 0 || !c.space.single || moves > maxMoves {
			// Not worth more than a note, then: nothing is wrong with gaps.
			f.Severity, fixable = fsck.Note, false
		}
		fixable = fixable && c.damaged.Load() == 0
		if offer(f, level, first+"move clusters from the end of the file into them") {
			var err error
			if most {
				err = c.keepGaps()
			}
			if err == nil {
				cut, err = c.pack()
			}
			if err != nil {
				return err
			}
		}
	}
	if cut == c.eof || c.plan == nil {
		return nil
	}
	c.space.cut = cut
	return c.plan.SetSize(cut)
}

// pack moves the clusters that lie behind where the file could end into the
// gaps in front, and returns that end.
func (c *check) pack() (int64, error) {
	goal := c.firstSlot() + c.used
	next, stop := int64(0), int64(0) // the gap that is being filled
	at := c.marks.first
	err := c.walk(func(p *part, r run) {
		if last := c.slot(r.entry) + r.count - 1; last >= goal {
			p.runs = append(p.runs, r)
		}
	}, func(p *part) error {
		if p.err != nil {
			return p.err
		}
		for _, r := range p.runs {
			for k := range r.count {
				slot := c.slot(r.entry) + k
				if slot < goal {
					continue
				}
				if next == stop {
					next, stop = c.marks.gap(at, goal)
					at = stop
				}
				if next >= stop {
					return fmt.Errorf("%w: no gap is left for BAT[%d]", fsck.ErrPlan, r.idx+k)
				}
				if err := c.plan.Copy(next*c.cluster, slot*c.cluster, c.cluster); err != nil {
					return err
				}
				if err := c.setEntry(r.idx+k, next*c.cluster); err != nil {
					return err
				}
				next++
			}
		}
		return nil
	})
	c.stats.ImageEnd = goal * c.cluster
	return goal * c.cluster, err
}
