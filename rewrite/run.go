package rewrite

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/RoaringBitmap/roaring/v2/roaring64"
	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/layers"
)

// job is one run or estimate.
type job struct {
	ctx  context.Context
	o    Options
	t    *target
	r    *Report
	pace pacer
	// beside is the length of an external data file, which is a part of
	// Before, After and Ideal and stays.
	beside int64
	// unsaved tells that there was no room for the record yet. A run that is
	// interrupted without one is begun again: the image is consistent anyway.
	unsaved bool
	// dropped is what need not be stored, by reason.
	dropped map[Phase]dropRun
}

func newJob(ctx context.Context, t *target, o Options) (*job, error) {
	if o.MaxExtra <= 0 {
		o.MaxExtra = DefaultMaxExtra
	}
	j := &job{ctx: ctx, o: o, t: t, pace: pacer{ctx: ctx, rate: o.RateLimit}, dropped: map[Phase]dropRun{}}
	j.r = &Report{Image: t.path, Format: t.format, Layer: o.Layer, VirtualSize: t.layer.Size(), ClusterSize: t.layer.HostUnit(), Notes: t.notes}
	var err error
	if j.beside, err = t.beside(); err == nil {
		j.r.Before, err = t.size()
	}
	return j, err
}

func (j *job) report(p Phase, done, total int64) {
	if j.o.Progress != nil {
		j.o.Progress(Progress{p, done, total})
	}
}

// dropPass finds what need not be stored, all over the disk, and calls do for
// each run, between two looks at the map.
func (j *job) dropPass(do func(dropRun) error) (blocked int64, err error) {
	l := j.t.layer
	d := newDrops(l, j.t.stack.Below(), j.canZero())
	d.zeros = !j.o.KeepZeros
	d.dedup = j.o.DedupParent && len(j.t.stack.Layers()) > 1
	d.pace = j.pace.add
	if j.o.Guest {
		if d.free, j.r.Guest, err = j.t.guestFree(j.ctx, &j.o); err != nil {
			return 0, err
		}
	}
	phase := PhaseGuest
	if d.zeros {
		phase = PhaseZeros
	} else if d.dedup {
		phase = PhaseDedup
	}
	window := max(l.Granule()*8192, 256<<20)
	for off := int64(0); off < l.Size(); {
		n := min(window, l.Size()-off)
		j.report(phase, off, l.Size())
		var runs []dropRun
		err := d.in(j.ctx, off, n, func(r dropRun) error {
			runs = append(runs, r)
			return nil
		})
		if err != nil {
			return 0, err
		}
		for _, r := range runs {
			if err := do(r); err != nil {
				return 0, err
			}
			sum := j.dropped[r.why]
			sum.Len, sum.host = sum.Len+r.Len, sum.host+r.host
			j.dropped[r.why] = sum
		}
		if err := j.ctx.Err(); err != nil {
			return 0, err
		}
		off += n
		if off > math.MaxInt64-window {
			break
		}
	}
	return d.blocked, nil
}

// canZero reports whether the format has clusters of zeros.
func (j *job) canZero() bool {
	c, ok := j.t.layer.(interface{ CanZero() bool })
	return ok && c.CanZero()
}

// steps enters what the steps reclaim, or have reclaimed.
func (j *job) steps(leaks, tail, blocked int64) {
	j.r.Steps = nil
	for _, p := range []Phase{PhaseGuest, PhaseZeros, PhaseDedup} {
		s := Step{Name: p, Bytes: j.dropped[p].host, Guest: j.dropped[p].Len}
		switch {
		case p == PhaseGuest && !j.o.Guest:
			s.Skipped = "not asked for"
		case p == PhaseZeros && j.o.KeepZeros:
			s.Skipped = "not asked for"
		case p == PhaseDedup && !j.o.DedupParent:
			s.Skipped = "not asked for"
		case p == PhaseDedup && len(j.t.stack.Layers()) == 1:
			s.Skipped = "there is no parent"
		}
		j.r.Steps = append(j.r.Steps, s)
	}
	j.r.Steps = append(j.r.Steps, Step{Name: PhaseLeaks, Bytes: leaks}, Step{Name: PhaseTail, Bytes: tail})
	if blocked > 0 {
		j.r.Notes = append(j.r.Notes, fmt.Sprintf("%d bytes are not needed but stay: the layers below would show through, and the format cannot record zeros", blocked))
	}
}

// estimate says what run would do.
func (j *job) estimate() error {
	l := j.t.layer
	j.report(PhaseCheck, 0, 1)
	now, err := takeUsage(j.ctx, l, l.Granule(), nil)
	if err != nil {
		return err
	}
	leaks, err := now.leaks(j.ctx, l, j.t.path)
	if err == nil && !j.t.pending {
		err = j.mayBeLeaks(now, leaks)
	}
	if err != nil {
		return err
	}
	drop := roaring64.New()
	g := l.Granule()
	blocked, err := j.dropPass(func(r dropRun) error {
		drop.AddRange(uint64(r.Off/g), uint64((r.End()+g-1)/g))
		return nil
	})
	if err != nil {
		return err
	}
	after := now
	if !drop.IsEmpty() {
		if after, err = takeUsage(j.ctx, l, g, drop); err != nil {
			return err
		}
	}
	ideal := after.ideal()
	j.r.Ideal, j.r.Move = ideal+j.beside, after.behind(ideal)
	j.r.Extra = min(j.r.Move, j.o.MaxExtra)
	tail := max(0, j.r.Before.Apparent-j.r.Ideal-leaks-(now.units()-after.units())*now.unit)
	if fixedPlaces(l) {
		j.r.Ideal, j.r.Move, j.r.Extra, tail = j.r.Before.Apparent, 0, 0, 0
	}
	j.steps(leaks, tail, blocked)
	return nil
}

// rounds bounds how often the tail is looked at again after tables have become
// shorter.
const rounds = 4

// run makes the layer smaller, for which begin was called.
func (j *job) run() error {
	l := j.t.reloc
	defer j.t.stack.Forget()
	blocked, err := j.dropPass(func(r dropRun) error {
		if r.why == PhaseDedup {
			return l.Unmap(j.ctx, r.Off, r.Len)
		}
		return l.ZeroAt(j.ctx, r.Off, r.Len, true, j.t.stack.Below())
	})
	if err == nil {
		err = l.Sync(j.ctx)
	}
	if err != nil {
		return err
	}
	if j.unsaved {
		j.unsaved = j.save() != nil // there is room now, or it is done without
	}
	j.report(PhaseLeaks, 0, 1)
	leaks, err := l.FreeLeaks(j.ctx)
	if err != nil {
		return err
	}
	if err := l.Shrink(j.ctx); err != nil {
		return err
	}
	if err := j.tail(); err != nil {
		return err
	}
	j.steps(leaks, 0, blocked)
	return nil
}

// tail pulls the end of the file into the holes.
func (j *job) tail() error {
	l := j.t.reloc
	if fixedPlaces(l) {
		j.r.Ideal = j.r.Before.Apparent
		return nil
	}
	// One half of the extra space is for copies; the other for what the
	// filesystem has not given back yet.
	batch := max(j.o.MaxExtra/2, l.HostUnit())
	for range rounds {
		u, err := takeUsage(j.ctx, l, l.Granule(), nil)
		if err != nil {
			return err
		}
		cut := u.ideal()
		j.r.Ideal = cut + j.beside
		total := u.behind(cut)
		if total == 0 {
			return nil
		}
		u = nil // it may be large
		var done int64
		j.report(PhaseTail, 0, total)
		moved, err := l.Evacuate(j.ctx, cut, layers.Relocation{Batch: batch, Moved: func(n int64) error {
			done += n
			j.report(PhaseTail, done, total)
			return j.pace.add(n)
		}})
		j.r.Move += moved
		j.r.Extra = max(j.r.Extra, min(moved, j.o.MaxExtra))
		if err != nil {
			return err
		}
		if err := l.Shrink(j.ctx); err != nil {
			return err
		}
		if moved == 0 {
			return nil
		}
	}
	return nil
}

// finish says how large the closed layer is now.
func (j *job) finish() error {
	size, err := j.t.size()
	if err != nil {
		return err
	}
	j.r.After = &size
	rest := j.r.Before.Apparent - size.Apparent
	for i := range j.r.Steps {
		s := &j.r.Steps[i]
		if s.Name == PhaseTail {
			s.Bytes = max(0, rest)
		}
		if j.beside == 0 || s.Name == PhaseLeaks { // else it was in the data file
			rest -= s.Bytes
		}
	}
	return nil
}

// compact runs a job whose target is open for writing, with its record, and
// closes the target.
func (j *job) compact(resume bool) error {
	j.r.Resumed, j.r.Pending = resume, resume
	// The record of a run that is resumed is there, and stays as it is.
	if !resume {
		if err := j.save(); errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			j.unsaved = true // who has no room needs this most
		} else if err != nil {
			return errors.Join(err, j.t.stack.Close())
		}
	}
	begun, err := j.begin()
	if err == nil && !resume {
		if err = j.plausible(); err != nil {
			begun = false
		}
	}
	if err == nil {
		err = j.run()
	}
	if err = errors.Join(err, j.t.stack.Close()); !begun && !resume {
		// The image was turned away as it is.
		return errors.Join(err, j.t.record.remove())
	}
	if !resume && errors.Is(err, layers.ErrCorrupt) {
		// Damage that was met on the way is for image-fsck, which frees what
		// the run may have left as well; there is nothing to go on with.
		return errors.Join(err, j.t.record.remove())
	}
	j.r.Pending = !j.unsaved
	if e := j.finish(); err == nil {
		err = e
	}
	if err == nil {
		err = j.t.record.remove()
	}
	j.r.Pending = err != nil && !j.unsaved
	return err
}

// save leaves the record.
func (j *job) save() error { return j.t.record.save(newRecord(j.t.name, &j.o)) }

// abandon frees what an interrupted run left, closes the target and removes
// the record.
func (j *job) abandon() error {
	j.r.Pending = true
	begun, err := j.begin()
	if !begun && !j.t.ours && j.ctx.Err() == nil {
		// The image was turned away as it is, and a record that is not its own
		// is of no use after the cause is gone either.
		err = errors.Join(err, j.t.stack.Close())
		gone := j.t.record.remove()
		j.r.Pending = gone != nil
		return errors.Join(err, gone)
	}
	var leaks int64
	if err == nil {
		leaks, err = j.t.reloc.FreeLeaks(j.ctx)
	}
	if err == nil {
		err = j.t.reloc.Shrink(j.ctx)
	}
	j.r.Steps = []Step{{Name: PhaseLeaks, Bytes: leaks}, {Name: PhaseTail}}
	if err = errors.Join(err, j.t.stack.Close()); err != nil {
		return err
	}
	if err := j.finish(); err != nil {
		return err
	}
	err = j.t.record.remove()
	j.r.Pending = err != nil
	return err
}

// fixedPlaces reports whether nothing can move in a layer's file (raw).
func fixedPlaces(l layers.HostSpace) bool {
	f, ok := l.(interface{ FixedPlaces() bool })
	return ok && f.FixedPlaces()
}

// fewLeaks is how many units may always be called leaks.
const fewLeaks = 16

// plausible asks mayBeLeaks before anything is changed.
func (j *job) plausible() error {
	if l, ok := j.t.reloc.(interface{ Leaked() int64 }); ok && l.Leaked() <= fewLeaks*j.t.reloc.HostUnit() {
		return nil // BeginRelocation has counted them
	}
	u, err := takeUsage(j.ctx, j.t.layer, j.t.layer.Granule(), nil)
	if err != nil {
		return err
	}
	leaks, err := u.leaks(j.ctx, j.t.layer, j.t.path)
	if err != nil {
		return err
	}
	return j.mayBeLeaks(u, leaks)
}

// mayBeLeaks refuses an image of which more is counted without a reference than
// is in use. Then it is likely that a part of the map is gone without a trace,
// and what looks like leaks is the disk. An interrupted run may leave as much.
func (j *job) mayBeLeaks(u *usage, leaks int64) error {
	if leaks <= fewLeaks*u.unit || leaks <= u.ideal() {
		return nil
	}
	if ok, err := j.mostLeaked(); ok || err != nil {
		return err
	}
	return &layers.ImageError{Path: j.t.path, Layer: -1, Offset: -1, Field: "leaks", Value: leaks,
		Err: fmt.Errorf("%w: more is counted without a reference than is in use, a part of the map may be lost", layers.ErrCorrupt)}
}

// begin reports whether the image lets itself be relocated.
func (j *job) begin() (bool, error) {
	if r, ok := j.t.reloc.(interface{ ResumeRelocation() }); ok && j.t.ours {
		r.ResumeRelocation() // the mark of an image in use is ours
	}
	size := j.r.Before.Apparent
	err := j.t.reloc.BeginRelocation(j.ctx, func(done, total int64) { j.report(PhaseCheck, size/max(total, 1)*done, size) })
	return err == nil, err
}
