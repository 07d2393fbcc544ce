package fsck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/imagestack/imagestack/backend"
)

// Errors of Restore.
var (
	// ErrNoFit says that a dump does not fit the image.
	ErrNoFit = errors.New("the dump does not fit the image")
	// ErrNotDamaged says that there is nothing to restore.
	ErrNotDamaged = errors.New("the image is clean, and what was written since the dump would be lost")
)

// Restoration is a plan to put a dump back.
type Restoration struct {
	ID DumpIdentity
	// All tells that all metadata is put back; else the roots of its trees
	// (header, L1 or BAT, refcount table) are enough, and what hangs below
	// them stays as it is now.
	All bool
	// Bytes is how much would change; 0 means that everything is as it was.
	Bytes int64
	// After is the report on the image as it would be.
	After *Report
	// Behind is how many bytes lie behind all that the dump knows: what was
	// added to the image since.
	Behind int64
	Plan   *Plan
}

// Close drops the plan.
func (r *Restoration) Close() error { return r.Plan.Close() }

// Restore plans to put the metadata in the dump back into f. It checks the
// image as it would be then, and takes the smaller of two ways that leads to
// one without damage: the roots of the trees alone, or everything. When
// neither does, it returns the better one with ErrNoFit.
//
// What a check cannot see: clusters that were given to another place of the
// disk since the dump was made.
//
// A clean image is refused with ErrNotDamaged.
func Restore(ctx context.Context, dump io.ReaderAt, f backend.File, o Options, po PlanOptions) (*Restoration, error) {
	if err := restorable(ctx, dump, f, o); err != nil {
		return nil, err
	}
	var best *Restoration
	for _, all := range []bool{false, true} {
		r, err := planRestore(ctx, dump, f, all, o, po)
		if err != nil {
			if best != nil {
				err = errors.Join(err, best.Close())
			}
			return nil, err
		}
		if best == nil || r.After.Worst() < best.After.Worst() {
			best, r = r, best
		}
		if r != nil {
			if err := r.Close(); err != nil {
				return nil, errors.Join(err, best.Close())
			}
		}
		if best.After.Worst() < Damage {
			return best, nil
		}
	}
	return best, fmt.Errorf("%w: with it the image would be damaged (%s)", ErrNoFit, best.After.Worst())
}

// restorable checks that something is wrong, in an image as the dump knows it.
func restorable(ctx context.Context, dump io.ReaderAt, f backend.File, o Options) error {
	d, err := newDumpReader(io.NewSectionReader(dump, 0, math.MaxInt64))
	if err != nil {
		return err
	}
	d.close()
	c, err := CheckerFor(d.id.Format)
	if err != nil {
		return err
	}
	col := NewCollector(CollectorOptions{File: f.Name()})
	stats, err := c.Check(ctx, f, o, col)
	if err != nil {
		return err
	}
	rep := col.Sum(stats)
	switch now := rep.Worst(); {
	case now < Fatal && stats.VirtualSize != d.id.VirtualSize && stats.CheckErrors > 0 && len(rep.Findings) > 0:
		return fmt.Errorf("what the image is cannot be read: %s", rep.Findings[0].Text)
	case now < Fatal && stats.VirtualSize != d.id.VirtualSize:
		return fmt.Errorf("%w: it is of a disk of %d bytes, this one has %d", ErrNoFit, d.id.VirtualSize, stats.VirtualSize)
	case now < Leak: // a table that reads as zeros leaks all that it named
		return ErrNotDamaged
	}
	return nil
}

func planRestore(ctx context.Context, dump io.ReaderAt, f backend.File, all bool, o Options, po PlanOptions) (_ *Restoration, err error) {
	d, err := newDumpReader(io.NewSectionReader(dump, 0, math.MaxInt64))
	if err != nil {
		return nil, err
	}
	defer d.close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size < d.id.End {
		return nil, fmt.Errorf("%w: it knows %d bytes of the file, which has only %d", ErrNoFit, d.id.End, size)
	}
	c, err := CheckerFor(d.id.Format)
	if err != nil {
		return nil, err
	}
	r := &Restoration{ID: d.id, All: all, Behind: size - d.id.End}
	if r.Plan, err = NewPlan(f, po); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Plan.Close())
		}
	}()
	now := make([]byte, dumpPiece)
	for {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		rec, err := d.next()
		if err != nil {
			return nil, err
		}
		if rec == nil {
			break
		}
		if !all && !rec.top {
			continue
		}
		b := now[:len(rec.data)]
		if err := readZero(f, b, rec.off); err != nil {
			return nil, err
		}
		// Only what differs is changed, by sectors.
		for i := 0; i < len(b); i += sector {
			end := min(i+sector, len(b))
			if bytes.Equal(b[i:end], rec.data[i:end]) {
				continue
			}
			r.Bytes += int64(end - i)
			if err := r.Plan.Write(PhaseMap, rec.off+int64(i), rec.data[i:end]); err != nil {
				return nil, err
			}
		}
	}
	o.Plan = r.Plan
	col := NewCollector(CollectorOptions{File: f.Name()})
	stats, err := c.Check(ctx, f, o, col)
	if err != nil {
		return nil, err
	}
	r.After = col.Sum(stats)
	return r, nil
}

// RestoreFile puts the metadata dump back into the image at path, behind an
// undo file. Without o.Decide it only plans. It returns the name of the undo
// file.
func RestoreFile(ctx context.Context, path, dump string, o RunOptions) (_ *Restoration, undo string, err error) {
	df, err := backend.Open(dump, backend.Options{})
	if err != nil {
		return nil, "", err
	}
	defer df.Close()
	d, err := newDumpReader(io.NewSectionReader(df, 0, math.MaxInt64))
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", dump, err)
	}
	d.close()
	h := &holder{}
	defer func() { err = errors.Join(err, h.close()) }()
	target := FileResult{StackFile: StackFile{Path: path, Format: d.id.Format, Own: true}}
	if err := h.open([]FileResult{target}, o.Decide != nil); err != nil {
		return nil, "", err
	}
	r, err := Restore(ctx, df, h.find(path), Options{Memory: o.Memory}, PlanOptions{Spill: o.Spill})
	if err != nil {
		if r != nil {
			err = errors.Join(err, r.Close())
		}
		return nil, "", err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if o.Decide == nil || r.Bytes == 0 {
		return r, "", nil
	}
	undos := o.undos()
	uf, undo, err := undos.Create(path, false)
	if err != nil {
		return r, "", err
	}
	undone, err := r.Plan.Execute(ctx, ExecuteOptions{Undo: uf, Name: baseName(path), MTime: mtimeOf(path),
		SyncDir: func() error { return undos.Sync(undo) }})
	err = errors.Join(err, uf.Close())
	if undone && err != nil {
		return r, "", errors.Join(err, undos.Remove(undo))
	}
	return r, undo, err
}
