package ploopfsck

import (
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
)

const (
	// maxShared bounds the clusters of which one round of repair collects the
	// owners.
	maxShared = 1 << 16
	// maxRanges is how many guest ranges a finding names.
	maxRanges = 8
)

// checkShared finds the owners of clusters that the window knows to be used
// again.
func (c *check) checkShared() error {
	if !c.marks.again.Load() {
		return nil
	}
	c.suspect.Store(true)
	owners := map[int64][]int64{} // by slot
	var order []int64
	// The claims of a part that are too many, emptied at once.
	err := c.walk(func(p *part, r run) {
		if r.bad != nil && r.bad != codeTruncated {
			return
		}
		slot := c.slot(r.entry)
		for k := int64(0); k < r.count; k++ {
			if !c.marks.has(c.marks.twice, slot+k) {
				continue
			}
			one := run{idx: r.idx + k, count: 1, entry: r.entry + uint32(k*c.step)}
			p.runs = append(p.runs, one)
		}
	}, func(p *part) error {
		for _, r := range p.runs {
			slot := c.slot(r.entry)
			have := owners[slot]
			switch {
			case have == nil && len(owners) == maxShared:
				// The next round collects it.
				c.bad.Add(1)
				c.report(c.duplicate([]int64{r.idx}, slot))
				continue
			case have == nil:
				order = append(order, slot)
			case len(have) == fsck.MaxClaims:
				if err := c.excess(r, have[0]); err != nil {
					return err
				}
				continue
			}
			owners[slot] = append(have, r.idx)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, slot := range order {
		if len(owners[slot]) < 2 {
			continue // the others were dealt with in this round
		}
		if err := c.share(slot, owners[slot]); err != nil {
			return err
		}
	}
	return nil
}

func (c *check) duplicate(idx []int64, slot int64) fsck.Finding {
	last := idx[len(idx)-1]
	f := fsck.Finding{Code: codeDuplicate, Guest: c.ranges(idx),
		Place: fsck.Place{Offset: entryOff(last), Field: fmt.Sprintf("BAT[%d]", last), Value: c.entry(slot * c.cluster)},
		Text:  "the cluster is used by another entry too"}
	if len(idx) > 1 {
		f.Text = fmt.Sprintf("the cluster at %#x is used by %d entries, the first is BAT[%d]", slot*c.cluster, len(idx), idx[0])
	}
	return f
}

// ranges are the guest ranges of entries in ascending order.
func (c *check) ranges(idx []int64) []blockmap.Range {
	var all []blockmap.Range
	for _, i := range idx {
		for _, r := range c.guest(i, 1) {
			if n := len(all); n > 0 && all[n-1].End() == r.Off {
				all[n-1].Len += r.Len
			} else if n < 2*maxRanges {
				all = append(all, r)
			}
		}
	}
	return all
}

// excess empties a claim on a cluster that has too many.
func (c *check) excess(r run, first int64) error {
	f := c.duplicate([]int64{r.idx}, c.slot(r.entry))
	f.Text = fmt.Sprintf("more than %d entries use the cluster, the first is BAT[%d]", fsck.MaxClaims, first)
	c.bad.Add(1)
	if !c.convert {
		f.Fix = &fsck.Fix{Text: emptyIt, Level: fsck.Full, Loses: f.Guest}
	}
	if !c.report(f) {
		return nil
	}
	c.used--
	return c.zeroEntries(r.idx, 1)
}

// share gives the cluster to the entries idx, ascending: evidence first, then
// copies.
func (c *check) share(slot int64, idx []int64) error {
	c.bad.Add(int64(len(idx) - 1))
	free := make([]bool, len(idx))
	owners := 0
	for k, i := range idx {
		for _, r := range c.guest(i, 1) {
			free[k] = c.o.GuestFree != nil && c.o.GuestFree(r.Off, r.Len)
		}
		if !free[k] {
			owners++
		}
	}
	f := c.duplicate(idx, slot)
	fix := &fsck.Fix{Level: fsck.Full}
	switch owners {
	case 1:
		fix.Text = "leave it to the only one that the guest uses, empty the others"
	case 0:
		fix.Text = "empty all but the first; the guest uses none"
		free[0] = false
	default:
		fix.Text = "copy it for each"
		var doubt []int64
		for k, i := range idx {
			if !free[k] {
				doubt = append(doubt, i)
			}
		}
		fix.Loses = c.ranges(doubt)
	}
	tooMuch := owners > 1 && !c.copies.Allows(c.f, int64(owners-1)*c.cluster)
	if tooMuch {
		fix.Text = "leave it to the first and empty the others: so many copies could fill the disk of the host"
	}
	switch {
	case c.convert:
	case owners > 1 && !tooMuch && !c.canAllocate(int64(owners-1)):
		f.Text += "; the file cannot grow, so there is no room for copies"
	default:
		f.Fix = fix
	}
	if !c.report(f) {
		return nil
	}
	keeper := slices.Index(free, false)
	for k, i := range idx {
		if k == keeper {
			continue
		}
		if free[k] || tooMuch {
			c.used--
			if err := c.zeroEntries(i, 1); err != nil {
				return err
			}
			continue
		}
		c.copies.Spend(c.cluster)
		at, err := c.allocate()
		if err == nil {
			err = c.plan.Copy(at, slot*c.cluster, c.cluster)
		}
		if err != nil {
			return err
		}
		if err := c.setEntry(i, at); err != nil {
			return err
		}
	}
	return nil
}

// checkExtensionShared looks for guest clusters on those of the extension.
// Evidence decides: where the guest does not use what claims them, the claim is
// false and the extension stays. Else the guest's claim counts: who wrote it
// did not know the extension, or the extension was written over it, and then
// its bitmaps do not know that the content has changed.
func (c *check) checkExtensionShared() error {
	var hit []int64
	for _, slot := range c.ext.slots {
		if c.marks.has(c.marks.used, slot) {
			hit = append(hit, slot)
		}
	}
	if len(hit) == 0 {
		return nil
	}
	owners := c.ownersOf(func(slot int64) bool { return c.ext.has(slot) })
	var idx []int64
	free := len(owners) > 0 && c.o.GuestFree != nil && !c.convert
	for _, r := range owners {
		idx = append(idx, r.idx)
		for _, g := range c.guest(r.idx, 1) {
			free = free && c.o.GuestFree(g.Off, g.Len)
		}
	}
	p := extProblem{codeExtShared, hit[0] * c.cluster, "format extension", uint64(hit[0]), "the cluster belongs to the guest"}
	if !free {
		return c.dropExtension(c.ext.at, p, fsck.Full, c.ranges(idx)...)
	}
	c.suspect.Store(true)
	if !c.report(fsck.Finding{Code: p.code, Place: fsck.Place{Offset: p.off, Field: p.field, Value: p.value}, Guest: c.ranges(idx),
		Text: "entries of the BAT claim clusters of the extension, for parts of the disk that the guest does not use",
		Fix:  &fsck.Fix{Text: "empty these entries", Level: fsck.Full}}) {
		return nil
	}
	for _, i := range idx {
		c.used--
		if err := c.zeroEntries(i, 1); err != nil {
			return err
		}
	}
	return nil
}
