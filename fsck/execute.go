package fsck

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
)

// ExecuteOptions say where a Plan saves what it is going to change.
type ExecuteOptions struct {
	// Undo takes the old bytes as a further section at its end. It is
	// required.
	Undo backend.File
	// SyncDir makes the name of Undo durable; nil: it is already.
	SyncDir func() error
	// Name and MTime (nanoseconds since 1970) describe the image in the undo
	// file.
	Name  string
	MTime int64
	// Lost takes content that has no place in the repaired image. Required
	// when the plan has such.
	Lost LostStore
	// Swap replaces the whole content of the file, durably and at once, for a
	// plan made by Replace. nil writes in place.
	Swap func(content []byte) error
}

// Execute makes the changes. The file of the plan must be writable and locked
// by the caller, and what the plan was computed from must not have changed.
// Afterwards the plan can only be closed.
//
// When an error comes before the first change, undone is true, the undo file is
// as it was before, and so is the place for lost content. Else the repair was
// begun and not finished; the image can be repaired again, or restored with
// ApplyUndo. Cancelling ctx stops it until the first map entry is changed; it
// then goes on to its end.
func (p *Plan) Execute(ctx context.Context, o ExecuteOptions) (undone bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if o.Undo == nil {
		return true, fmt.Errorf("%w: no undo file", ErrPlan)
	}
	if err := p.checkCopies(); err != nil {
		return true, err
	}
	lost, err := p.saveLost(ctx, o.Lost)
	if err == nil {
		err = p.saveUndo(ctx, o)
	}
	if err != nil {
		return true, errors.Join(err, lost.drop())
	}
	if p.whole && o.Swap != nil {
		b := make([]byte, p.size)
		if err := p.pages.read(PhaseMap, b, 0); err != nil {
			return false, err
		}
		return false, o.Swap(b)
	}
	for ph := range numPhases {
		if err := p.doPhase(ctx, ph); err != nil {
			return false, fmt.Errorf("phase %s: %w", ph, err)
		}
	}
	return false, nil
}

// touched are the sectors that the phases change, or cut off.
func (p *Plan) touched(phases ...Phase) *blockmap.Set { return p.sectors(true, phases) }

// touchedBytes are those in which bytes are changed.
func (p *Plan) touchedBytes(phases ...Phase) *blockmap.Set { return p.sectors(false, phases) }

func (p *Plan) sectors(freed bool, phases []Phase) *blockmap.Set {
	var all []blockmap.Range
	add := func(off, n int64) {
		start := off &^ (sector - 1)
		end := (off + n + sector - 1) &^ (sector - 1)
		if last := len(all) - 1; last >= 0 && all[last].End() == start {
			all[last].Len = end - all[last].Off
		} else {
			all = append(all, blockmap.Range{Off: start, Len: end - start})
		}
	}
	for _, ph := range phases {
		if ph == PhaseNew {
			for _, c := range p.copies {
				add(c.dst, c.n)
			}
		}
		for r := range p.zeros[ph].Ranges() {
			add(r.Off, r.Len)
		}
		if ph == PhaseFree && freed {
			for r := range p.punch.Ranges() {
				add(r.Off, r.Len)
			}
			if p.size < p.old {
				add(p.size, p.old-p.size)
			}
		}
		for _, no := range p.pages.numbers(ph) {
			pg, err := p.pages.get(pageKey{no, ph})
			if err != nil || pg == nil {
				add(no*pageSize, pageSize) // the read fails again where it matters
				continue
			}
			const words = sector / 64
			for s := range int64(pageSize / sector) {
				var any uint64
				for _, m := range pg.mask[s*words : (s+1)*words] {
					any |= m
				}
				if any != 0 {
					add(no*pageSize+s*sector, sector)
				}
			}
		}
	}
	// In order, so that adding to the set is cheap.
	slices.SortFunc(all, func(a, b blockmap.Range) int { return cmp.Compare(a.Off, b.Off) })
	set := new(blockmap.Set)
	for _, r := range all {
		set.Add(r.Off, r.Len)
	}
	return set
}

var allPhases = func() (all []Phase) {
	for ph := range numPhases {
		all = append(all, ph)
	}
	return all
}()

// checkCopies makes sure that copies, which read while PhaseNew is being done,
// copy what the file holds now.
func (p *Plan) checkCopies() error {
	if len(p.copies) == 0 {
		return nil
	}
	set := p.touched(PhaseNew)
	for _, c := range p.copies {
		if set.Overlaps(c.src, c.n) {
			return fmt.Errorf("%w: %#x is copied and changed in the same phase", ErrPlan, c.src)
		}
	}
	return nil
}

// eachBlock calls do for the parts of the set, cut at the blocks of the undo
// file. The end is cut off at limit. skip, unless it is nil, says where to go on
// instead of at an offset: there, or behind it.
func eachBlock(ctx context.Context, set *blockmap.Set, limit int64, skip func(off int64) (int64, error), do func(off, n int64) error) error {
	for r := range set.Ranges() {
		for off := r.Off; off < min(r.End(), limit); {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			if skip != nil {
				to, err := skip(off)
				if err != nil {
					return err
				}
				if to > off {
					off = to
					continue
				}
			}
			end := min(off&^(undoBlock-1)+undoBlock, r.End(), limit)
			if err := do(off, end-off); err != nil {
				return err
			}
			off = end
		}
	}
	return nil
}

// saveUndo writes a section. On error the undo file is cut to its old length.
func (p *Plan) saveUndo(ctx context.Context, o ExecuteOptions) (err error) {
	done, err := readSections(o.Undo)
	if err != nil {
		return fmt.Errorf("undo file %s: %w", o.Undo.Name(), err)
	}
	at := int64(0)
	if len(done) > 0 {
		at = done[len(done)-1].end
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("undo file %s: %w", o.Undo.Name(), err)
			if terr := o.Undo.Truncate(at); terr != nil {
				err = errors.Join(err, terr)
			}
		}
	}()
	// What a round that was cut short may have left.
	if err := o.Undo.Truncate(at); err != nil {
		return err
	}
	s := undoSection{number: uint32(len(done)), oldSize: p.old, newSize: p.size, name: o.Name, mtime: o.MTime}
	if s.head, err = headOf(p.f); err != nil {
		return err
	}
	w := undoWriter{f: o.Undo, at: at}
	if err := w.append(s.marshal()); err != nil {
		return err
	}
	sets := make([]*blockmap.Set, numPhases)
	for ph := range numPhases {
		sets[ph] = p.touched(ph)
	}
	holes := holeFinder{f: p.f}
	old, buf := make([]byte, undoBlock), make([]byte, undoBlock)
	// What is cut off needs no record where it is a hole: when the file is made
	// longer again it is one. There may be terabytes of it.
	cutHole := func(off int64) (int64, error) {
		if off < p.size {
			return off, nil
		}
		data, err := holes.next(off)
		return max(off, data&^(sector-1)), err
	}
	err = eachBlock(ctx, p.touched(allPhases...), p.old, cutHole, func(off, n int64) error {
		r := undoRecord{off: off, n: n, data: old[:n]}
		data, err := holes.next(off)
		if err != nil {
			return err
		}
		if r.hole = data >= off+n; r.hole {
			clear(r.data) // which costs less than reading it
		} else if err := p.readOld(r.data, off); err != nil {
			return err
		}
		b := buf[:n]
		copy(b, r.data)
		for ph := range numPhases {
			if !sets[ph].Overlaps(off, n) {
				continue
			}
			if err := p.apply(ph, b, off); err != nil {
				return err
			}
			if ph >= PhaseFree && p.size < off+n {
				clear(b[max(0, p.size-off):])
			}
			if r.hole && backend.IsZero(b) {
				// It is as it was before: the list would say nothing.
				continue
			}
			for i := 0; i < len(b); i += sector {
				r.crcs = append(r.crcs, crcOf(b[i:min(i+sector, len(b))]))
			}
		}
		if r.hole {
			r.data = nil
		}
		return w.record(&r)
	})
	if err != nil {
		return err
	}
	if err := w.append(marshalEnd(w.records)); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	if err := o.Undo.Sync(); err != nil {
		return err
	}
	if o.SyncDir != nil {
		if err := o.SyncDir(); err != nil {
			return err
		}
	}
	s.complete = true
	if _, err := o.Undo.WriteAt(s.marshal(), at); err != nil {
		return err
	}
	return o.Undo.Sync()
}

// undoWriter collects records for large writes.
type undoWriter struct {
	f       backend.File
	at      int64
	buf     []byte
	records int64
}

func (w *undoWriter) append(b []byte) error {
	w.buf = append(w.buf, b...)
	if len(w.buf) >= 1<<20 {
		return w.flush()
	}
	return nil
}

func (w *undoWriter) record(r *undoRecord) error {
	w.records++
	w.buf = r.marshal(w.buf)
	return w.append(nil)
}

func (w *undoWriter) flush() error {
	_, err := w.f.WriteAt(w.buf, w.at)
	w.at += int64(len(w.buf))
	w.buf = w.buf[:0]
	return err
}

// holeFinder finds the holes of a file, asked mostly in ascending order.
type holeFinder struct {
	f     backend.File
	from  int64
	data  int64 // first data at or behind from; valid when known
	known bool
}

// next is where the first data at off or behind it begins; far behind the end
// when there is none. A file that cannot tell is all data.
func (h *holeFinder) next(off int64) (int64, error) {
	if !h.known || off < h.from || off > h.data {
		at, err := h.f.SeekData(off)
		switch {
		case errors.Is(err, io.EOF):
			at = 1<<63 - 1
		case errors.Is(err, errors.ErrUnsupported):
			at = off
		case err != nil:
			return 0, err
		}
		h.from, h.data, h.known = off, at, true
	}
	return max(off, h.data), nil
}

// doPhase makes the changes of one phase durable.
func (p *Plan) doPhase(ctx context.Context, ph Phase) error {
	changed := false
	if ph > PhaseNew {
		ctx = context.WithoutCancel(ctx)
	} else if p.size > p.old {
		if err := p.f.Truncate(p.size); err != nil {
			return err
		}
		changed = true
	}
	limit := p.size
	if ph < PhaseFree {
		limit = max(p.size, p.old)
	}
	written := p.touched(ph)
	if ph == PhaseFree {
		for r := range p.punch.Ranges() {
			changed = true
			err := p.f.PunchHole(r.Off, r.Len)
			if errors.Is(err, errors.ErrUnsupported) {
				err = backend.WriteZeros(p.f, r.Off, r.Len)
			}
			if err != nil {
				return err
			}
		}
		written = p.touchedBytes(ph)
	}
	buf := make([]byte, undoBlock)
	err := eachBlock(ctx, written, limit, nil, func(off, n int64) error {
		b := buf[:n]
		if err := readZero(p.f, b, off); err != nil {
			return err
		}
		if err := p.apply(ph, b, off); err != nil {
			return err
		}
		changed = true
		_, err := p.f.WriteAt(b, off)
		return err
	})
	if err != nil {
		return err
	}
	if ph == PhaseFree && p.size < p.old {
		changed = true
		if err := p.f.Truncate(p.size); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	return p.f.Sync()
}

// readZero fills b from off on; behind the end of the file are zeros.
func readZero(f io.ReaderAt, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if n < len(b) && err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(b[n:])
	return nil
}
