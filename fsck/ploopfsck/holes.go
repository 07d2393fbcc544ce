package ploopfsck

import (
	"errors"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
)

// maxHoles is how many holes one round of repair fills; it bounds the memory
// of the plan.
const maxHoles = 1 << 18

// holes sums up the holes of one kind.
type holes struct {
	count, bytes, first int64
	fill                []blockmap.Range
}

func (h *holes) add(off, n int64, fill bool) {
	if h.count == 0 {
		h.first = off
	}
	if k := len(h.fill); k > 0 && h.fill[k-1].End() == off {
		h.fill[k-1].Len += n
		h.bytes += n
		return
	}
	h.count++
	h.bytes += n
	if fill && len(h.fill) < maxHoles {
		h.fill = append(h.fill, blockmap.Range{Off: off, Len: n})
	}
}

// findHoles looks at the holes of the host file inside the window, and at
// blocks that were reserved but never written, which are as bad to ploop.
func (c *check) findHoles() error {
	var used, free, meta holes
	from, to := c.marks.first*c.cluster, min((c.marks.first+c.marks.n)*c.cluster, c.eof)
	if c.marks.first == c.firstSlot() {
		from = 0
	}
	limit := (c.lastUsed() + 1) * c.cluster // the tail is of no interest
	to = min(to, max(limit, c.firstData))
	size, err := c.f.Size()
	if err != nil {
		return err
	}
	to = min(to, size)
	src := newHoleSource(c.f, size)
	defer src.close() // opened for reading
	for at := from; at < to; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		hole, data, err := src.next(at)
		if errors.Is(err, errors.ErrUnsupported) {
			return nil
		}
		if errors.Is(err, io.EOF) || err == nil && hole >= to {
			break
		}
		if err != nil {
			c.unreadable(at, "holes", err)
			return nil
		}
		data = min(data, to)
		c.splitHole(hole, data, &used, &free, &meta)
		at = data
	}
	c.space.holes = append(c.space.holes, holeFinding{codeHole, used}, holeFinding{codeHoleMeta, meta}, holeFinding{codeHoleFree, free})
	return nil
}

type holeFinding struct {
	code *fsck.Code
	h    holes
}

// splitHole divides a hole among the uses of the clusters that it covers.
func (c *check) splitHole(at, end int64, used, free, meta *holes) {
	if at < c.firstData {
		n := min(end, c.firstData) - at
		meta.add(at, n, c.plan != nil)
		at += n
	}
	for at < end {
		slot := at / c.cluster
		// As many clusters as share their fate.
		gap, gapEnd := c.marks.gap(slot, ceil(end, c.cluster))
		kind, stop := true, gap
		switch next := c.ext.next(slot); {
		case next == slot:
			stop = slot + 1
		case gap == slot:
			kind, stop = false, min(gapEnd, next)
		}
		n := min(end, stop*c.cluster) - at
		if kind {
			used.add(at, n, c.plan != nil)
		} else {
			free.add(at, n, false)
		}
		at += n
	}
}

// reportHoles comes when it is decided where the file ends.
func (c *check) reportHoles() error {
	for _, hf := range c.space.holes {
		h := hf.h
		if h.count == 0 {
			continue
		}
		f := fsck.Finding{Code: hf.code, Place: fsck.Place{Offset: h.first}, Text: fmt.Sprintf("%d holes, %d bytes together", h.count, h.bytes)}
		// Space for more may not be there, and a repair must not fail for
		// something that is no damage.
		if hf.code != codeHoleFree && h.bytes <= maxQuiet {
			f.Fix = &fsck.Fix{Text: "write zeros there", Level: fsck.Preen}
		}
		if !c.report(f) {
			continue
		}
		for _, r := range h.fill {
			if c.space.cut > 0 {
				r.Len = min(r.Len, c.space.cut-r.Off)
			}
			if r.Len <= 0 {
				continue // moved, and written in the new place
			}
			if err := c.plan.Zero(fsck.PhaseCounts, r.Off, r.Len); err != nil {
				return err
			}
		}
	}
	return nil
}
