package ploopfsck

import (
	"errors"
	"fmt"

	"github.com/imagestack/imagestack/fsck"
)

// maxOrphans is how many single bad entries are looked at together.
const maxOrphans = 4096

// badRuns reports bad entries and plans their repair.
func (c *check) badRuns(runs []run) error {
	for _, r := range runs {
		c.bad.Add(r.count)
		var err error
		switch {
		case r.bad == codeTruncated:
			err = c.truncated(r)
		case r.bad == codeBeyond:
			err = c.beyond(r)
		case r.count == 1 && c.space.single && len(c.orphans) < maxOrphans:
			c.orphans = append(c.orphans, r)
		default:
			err = c.unusable(r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// entryFinding is a finding about entries.
func (c *check) entryFinding(r run, text string) fsck.Finding {
	f := fsck.Finding{Code: r.bad, Text: text, Guest: c.guest(r.idx, r.count),
		Place: fsck.Place{Offset: entryOff(r.idx), Field: fmt.Sprintf("BAT[%d]", r.idx), Value: r.entry}}
	if r.count > 1 {
		f.Text += fmt.Sprintf("; so do the %d entries behind it", r.count-1)
	}
	return f
}

// emptyIt says what an empty entry does.
const emptyIt = "empty it: zeros, or what a parent of the image has there, show instead"

// unusable handles entries that point to no cluster.
func (c *check) unusable(r run) error {
	host := c.host(r.entry)
	text := ""
	switch r.bad {
	case codeInvalid:
		text = "points nowhere"
	case codeUnaligned:
		text = fmt.Sprintf("points to byte %#x, inside a cluster of %d bytes", host, c.cluster)
	case codeMetadata:
		text = fmt.Sprintf("points to byte %#x, before the data, which begins at %#x", host, c.firstData)
	default:
		text = fmt.Sprintf("points to byte %#x, behind the file of %#x bytes", host, c.eof)
		if host == c.eof {
			text = fmt.Sprintf("points to byte %#x, where the file ends", host)
		}
	}
	f := c.entryFinding(r, text)
	if !c.convert {
		fix := emptyIt
		if c.o.Parent {
			fix = "give it a cluster of zeros"
		}
		f.Fix = &fsck.Fix{Text: fix, Level: fsck.Full, Loses: f.Guest}
	}
	// In front of the data is nothing of the guest's; what lies behind an
	// unaligned entry may be.
	keeps := r.bad == codeUnaligned && host >= c.firstData && host < c.eof
	c.suspect.Store(true)
	if !c.report(f) {
		return nil
	}
	for k := range r.count {
		idx := r.idx + k
		if keeps {
			var b [4]byte
			if err := c.read(b[:], entryOff(idx)); err != nil {
				return err
			}
			if at := c.host(le.Uint32(b[:])); at >= c.firstData {
				if err := c.keep(idx*c.cluster, at, c.cluster); err != nil {
					return err
				}
			}
		}
		if c.o.Parent {
			if err := c.giveZeros(idx); err != nil {
				return err
			}
		}
	}
	if c.o.Parent {
		return nil
	}
	return c.zeroEntries(r.idx, r.count)
}

// settleOrphans handles single bad entries once it is known which clusters are
// used.
func (c *check) settleOrphans() error {
	for _, r := range c.orphans {
		slot, err := c.evidence(r.idx)
		if err == nil && slot >= 0 {
			err = c.relink(r, slot)
		} else if err == nil {
			err = c.unusable(r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// evidence returns the cluster that entry idx had, -1 when nothing tells. It
// is told by both neighbours: their clusters follow each other with one between
// them that nothing uses.
func (c *check) evidence(idx int64) (int64, error) {
	var b [12]byte
	if idx == 0 || idx+1 >= c.clusters() || c.convert || c.blind.Load() {
		return -1, nil
	}
	if err := c.read(b[:], entryOff(idx-1)); err != nil {
		return -1, err
	}
	left, right := le.Uint32(b[:]), le.Uint32(b[8:])
	if left == 0 || right == 0 || c.classify(idx-1, left) != nil || c.classify(idx+1, right) != nil {
		return -1, nil
	}
	slot := c.slot(left) + 1
	if slot+1 != c.slot(right) || c.marks.has(c.marks.used, slot) || c.ext.has(slot) {
		return -1, nil
	}
	return slot, nil
}

// relink gives a bad entry the cluster that the evidence names.
func (c *check) relink(r run, slot int64) error {
	f := c.entryFinding(r, fmt.Sprintf("points to no cluster (byte %#x); nothing uses the one at %#x between those of its neighbours", c.host(r.entry), slot*c.cluster))
	f.Fix = &fsck.Fix{Text: fmt.Sprintf("let it point to %#x, which is likely and not proved", slot*c.cluster), Level: fsck.Full, Loses: f.Guest}
	c.suspect.Store(true)
	if !c.report(f) {
		return nil
	}
	c.marks.mark(slot, 1)
	c.used++
	return c.setEntry(r.idx, slot*c.cluster)
}

// zeroEntries empties entries.
func (c *check) zeroEntries(idx, count int64) error {
	var zeros [4096]byte
	for count > 0 {
		n := min(count, int64(len(zeros))/4)
		if err := c.plan.Write(fsck.PhaseMap, entryOff(idx), zeros[:4*n]); err != nil {
			return err
		}
		idx, count = idx+n, count-n
	}
	return nil
}

// setEntry lets an entry point to the cluster at byte host.
func (c *check) setEntry(idx, host int64) error {
	var b [4]byte
	le.PutUint32(b[:], c.entry(host))
	return c.plan.Write(fsck.PhaseMap, entryOff(idx), b[:])
}

// giveZeros gives an entry a new cluster of zeros, an empty entry where there
// is no room for one.
func (c *check) giveZeros(idx int64) error {
	at, err := c.allocate()
	if err == nil {
		err = c.plan.Zero(fsck.PhaseNew, at, c.cluster)
	}
	if errors.Is(err, fsck.ErrNoRoom) {
		return c.zeroEntries(idx, 1)
	}
	if err != nil {
		return err
	}
	c.used++
	return c.setEntry(idx, at)
}

// beyond handles entries behind the end of the disk. In the padding of the BAT
// no cluster of this disk can be named, whatever else is wrong.
func (c *check) beyond(r run) error {
	f := c.entryFinding(r, fmt.Sprintf("the disk has only %d clusters", c.clusters()))
	level := fsck.Full
	if r.idx >= c.entries && !c.doubt {
		level = fsck.Preen
	}
	if !c.convert {
		f.Fix = &fsck.Fix{Text: "empty it", Level: level}
	}
	// Who empties the entry makes its cluster a leak.
	defer c.suspect.Store(true)
	if !c.report(f) {
		return nil
	}
	for k := range r.count {
		var b [4]byte
		if err := c.read(b[:], entryOff(r.idx+k)); err != nil {
			return err
		}
		if at := c.host(le.Uint32(b[:])); at >= c.firstData && at < c.eof && le.Uint32(b[:]) != noEntry {
			if err := c.keep((r.idx+k)*c.cluster, at, c.cluster); err != nil {
				return err
			}
		}
	}
	return c.zeroEntries(r.idx, r.count)
}

// truncated handles the entry whose cluster is cut off by the end of the file.
func (c *check) truncated(r run) error {
	host := c.host(r.entry)
	f := c.entryFinding(r, fmt.Sprintf("%d of %d bytes of the cluster are in the file", c.eof-host, c.cluster))
	lost := c.guest(r.idx, 1)
	lost[0].Off += c.eof - host
	if lost[0].Len -= c.eof - host; lost[0].Len <= 0 {
		lost = nil
	}
	level := fsck.Full
	if len(lost) == 0 && !c.doubt {
		level = fsck.Preen
	}
	if !c.convert && c.canGrow(host+c.cluster) {
		f.Fix = &fsck.Fix{Text: "complete the cluster with zeros", Level: level, Loses: lost}
	}
	if !c.report(f) {
		c.space.tailBusy = true
		return nil
	}
	if c.end > 0 || c.space.completed {
		return nil // the file reaches further already
	}
	c.space.completed = true
	return c.plan.Zero(fsck.PhaseCounts, c.eof, host+c.cluster-c.eof)
}
