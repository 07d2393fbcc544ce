package ploop

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/RoaringBitmap/roaring/v2"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

var _ layers.Relocator = (*Image)(nil)

// Relocation in this format: every slot behind the BAT that no entry names is
// free, so there is nothing to count and every free slot is a leak. Free slots
// keep their storage (see allocator), therefore a move into one needs no space,
// and only the end of the file is given back.

// HostUnit is the cluster size.
func (i *Image) HostUnit() int64 { return i.h.cluster }

// Counted visits the whole file in one piece: the format has no accounting.
func (i *Image) Counted(ctx context.Context, visit func(off, n int64) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	size, err := i.f.Size()
	if err != nil {
		return fmt.Errorf("%s: %w", i.path, err)
	}
	return visit(0, size&^(i.h.cluster-1))
}

// Own visits every mapped cluster: nothing in an image shares one.
func (i *Image) Own(ctx context.Context, off, n int64, visit func(blockmap.Extent) error) error {
	if off < 0 || n < 0 || n > math.MaxInt64-off {
		return blockmap.CheckRange(off, n)
	}
	start, end := off&^(i.h.cluster-1), min(off+n, i.h.size)
	if start >= end {
		return nil
	}
	for e, err := range blockmap.All(ctx, i, start, min((end+i.h.cluster-1)&^(i.h.cluster-1), i.h.size)-start) {
		if err != nil {
			return err
		}
		if e.Kind != blockmap.Data {
			continue
		}
		if err := visit(e); err != nil {
			return err
		}
	}
	return nil
}

// ResumeRelocation tells, before BeginRelocation, that the mark of an image in
// use is left from a relocation that was interrupted, and that nobody else has
// opened the image for writing since.
func (i *Image) ResumeRelocation() {
	if i.edit != nil {
		i.edit.resumed = true
	}
}

// BeginRelocation implements layers.Relocator: the whole BAT is verified, and
// the format extension if there is a valid one.
func (i *Image) BeginRelocation(ctx context.Context, step func(done, total int64)) error {
	e, err := i.change(0, 0)
	if err != nil {
		return err
	}
	if i.h.inUse != inUseClosed && i.h.inUse != inUseV21 && !e.resumed {
		e.refused = true
		return i.bat.bad(offInUse, "m_DiskInUse", i.h.inUse, "the image was not closed by who used it last")
	}
	if step != nil {
		step(0, i.h.batEnd())
	}
	if err := e.alloc.ready(ctx); err != nil {
		return err
	}
	if err := i.keepExtension(ctx, e.resumed); err != nil {
		return err
	}
	e.leaked = e.alloc.freeSlots()
	if step != nil {
		step(i.h.batEnd(), i.h.batEnd())
	}
	return nil
}

// CanZero is false: the format has no mark for zeros.
func (i *Image) CanZero() bool { return false }

// Unmap implements layers.Relocator. The last cluster of the disk counts as
// whole when the range reaches the end of the disk.
func (i *Image) Unmap(ctx context.Context, off, n int64) error {
	e, err := i.change(off, n)
	if err != nil {
		return err
	}
	// Before anything is released it must be known that no two entries share
	// it.
	if err := e.alloc.ready(ctx); err != nil {
		return err
	}
	shift := i.bat.shift
	idx, end := (off+i.h.cluster-1)>>shift, (off+n)>>shift
	if off+n == i.h.size {
		end = i.h.clusters()
	}
	for idx < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := i.bat.next(idx, end)
		if err != nil {
			return err
		}
		for k := int64(0); r.host != 0 && k < r.count; k++ {
			if err := i.begin(); err != nil {
				return err
			}
			if err := i.publish(idx+k, 0); err != nil {
				return err
			}
		}
		idx += r.count
		if err := e.relieve(i); err != nil {
			return err
		}
	}
	return nil
}

// FreeLeaks implements layers.Relocator. What was free when the relocation
// began is free already; here the end of the file is cut off.
func (i *Image) FreeLeaks(ctx context.Context) (int64, error) {
	e, err := i.change(0, 0)
	if err != nil {
		return 0, err
	}
	if e.leaked == 0 {
		return 0, nil
	}
	if err := i.Shrink(ctx); err != nil {
		return 0, err
	}
	n := e.leaked << i.bat.shift
	e.leaked = 0
	return n, nil
}

// Shrink implements layers.Relocator. The BAT has no other length than its
// disk, so this only cuts off what is free at the end of the file.
func (i *Image) Shrink(ctx context.Context) error {
	if _, err := i.change(0, 0); err != nil {
		return err
	}
	a := &i.edit.alloc
	if err := a.ready(ctx); err != nil {
		return err
	}
	if free, err := a.freeTail(); err != nil || !free {
		return err
	}
	if err := i.begin(); err != nil {
		return err
	}
	if err := i.flushChanges(); err != nil {
		return err
	}
	return a.cutTail()
}

// flushChanges commits if there is anything to commit.
func (i *Image) flushChanges() error {
	a := &i.edit.alloc
	a.mu.Lock()
	none := a.released.IsEmpty() && i.bat.dirtyPages.Load() == 0
	a.mu.Unlock()
	if none {
		return nil
	}
	return i.edit.commit.Do(i.flush)
}

// Evacuate implements layers.Relocator. The highest clusters go first, so that
// the file gets shorter even when there is no room for all, or no time.
func (i *Image) Evacuate(ctx context.Context, cut int64, o layers.Relocation) (int64, error) {
	e, err := i.change(0, 0)
	if err != nil {
		return 0, err
	}
	if err := e.alloc.ready(ctx); err != nil {
		return 0, err
	}
	if err := i.flushChanges(); err != nil { // what was dropped is room
		return 0, err
	}
	batch, memory := o.Batch, o.Memory
	if batch <= 0 {
		batch = layers.DefaultBatch
	}
	if memory <= 0 {
		memory = layers.DefaultRelocationMemory
	}
	ev := &evacuation{i: i, cut: max(cut, i.h.firstData), moved: o.Moved,
		batch: max(batch>>i.bat.shift, 1), limit: max(memory/sourceBytes, 1)}
	err = ev.run(ctx)
	return ev.total, err
}

// evacuation is one Evacuate.
type evacuation struct {
	i     *Image
	cut   int64 // bytes of the file
	batch int64 // clusters
	limit int64 // sources in memory
	moved func(n int64) error
	total int64 // bytes
}

// source is a cluster that has to go.
type source struct {
	slot int64
	idx  int64 // entry of the BAT
}

// sourceBytes is the memory of a source.
const sourceBytes = 16

func (ev *evacuation) run(ctx context.Context) error {
	for {
		sources, err := ev.sources(ctx)
		if err != nil {
			return err
		}
		if len(sources) == 0 {
			break
		}
		for len(sources) > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			// From the end, so that the file gets shorter with each batch.
			rest := max(int64(len(sources))-ev.batch, 0)
			n := int64(len(sources)) - rest
			done, err := ev.move(ctx, sources[rest:])
			if err != nil {
				return err
			}
			if err := ev.report(done << ev.i.bat.shift); err != nil {
				return err
			}
			if done < n {
				return nil // no room is left
			}
			sources = sources[:rest]
		}
	}
	return ev.extension(ctx)
}

func (ev *evacuation) report(n int64) error {
	ev.total += n
	if ev.moved == nil || n == 0 {
		return nil
	}
	return ev.moved(n)
}

// sources are the highest clusters at or behind the cut that there is room for
// below it, ascending, and no more than fit into memory.
func (ev *evacuation) sources(ctx context.Context) ([]source, error) {
	i, shift := ev.i, ev.i.bat.shift
	behind := roaring.New()
	cut := ev.cut >> shift
	if err := i.walk(ctx, func(r run) error {
		slot := r.host >> shift
		if from := max(slot, cut); from < slot+r.count {
			behind.AddRange(uint64(from), uint64(slot+r.count))
		}
		return nil
	}); err != nil {
		return nil, err
	}
	want := min(int64(behind.GetCardinality()), i.edit.alloc.freeBefore(ev.cut), ev.limit)
	if want == 0 {
		return nil, nil
	}
	first, err := behind.Select(uint32(int64(behind.GetCardinality()) - want))
	if err != nil {
		return nil, err
	}
	sources := make([]source, 0, want)
	if err := i.walk(ctx, func(r run) error {
		slot := r.host >> shift
		for k := max(int64(first)-slot, 0); k < r.count; k++ {
			sources = append(sources, source{slot + k, r.idx + k})
		}
		return nil
	}); err != nil {
		return nil, err
	}
	slices.SortFunc(sources, func(a, b source) int { return cmp.Compare(a.slot, b.slot) })
	return sources, nil
}

// move moves clusters to the lowest free slots before the cut, durably, and
// returns how many: fewer only when there is no room.
func (ev *evacuation) move(ctx context.Context, sources []source) (int64, error) {
	i := ev.i
	a, shift := &i.edit.alloc, i.bat.shift
	if err := i.begin(); err != nil {
		return 0, err
	}
	to := make([]int64, 0, len(sources))
	giveUp := func(published int, err error) (int64, error) {
		for _, host := range to[published:] {
			err = errors.Join(err, a.giveBack(host, 1))
		}
		return 0, err
	}
	for range sources {
		host, err := a.takeBelow(ctx, ev.cut)
		if err != nil {
			return giveUp(0, err)
		}
		if host == 0 {
			break
		}
		to = append(to, host)
	}
	for k := 0; k < len(to); {
		n := 1 // neighbours that stay neighbours are one copy
		for k+n < len(to) && sources[k+n].slot == sources[k].slot+int64(n) && to[k+n] == to[k]+int64(n)<<shift {
			n++
		}
		if _, err := i.f.CopyRange(i.f, sources[k].slot<<shift, to[k], int64(n)<<shift); err != nil {
			return giveUp(0, err)
		}
		k += n
	}
	for k, host := range to {
		if err := i.publish(sources[k].idx, host); err != nil {
			return giveUp(k, err)
		}
	}
	return int64(len(to)), i.edit.commit.Do(i.flush)
}

// extension moves the format extension, if it lies behind the cut.
func (ev *evacuation) extension(ctx context.Context) error {
	keep := ev.i.edit.keep
	if keep == nil || int64(keep.slots(ev.i.bat.shift).Maximum())<<ev.i.bat.shift < ev.cut {
		return nil
	}
	n, err := ev.i.lowerExtension(ctx)
	return errors.Join(err, ev.report(n))
}

// freeSlots is the number of free slots.
func (a *allocator) freeSlots() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return int64(a.free.GetCardinality())
}

// freeBefore is the number of free slots before byte cut of the file.
func (a *allocator) freeBefore(cut int64) int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	slot := cut >> a.i.bat.shift
	if slot <= 0 {
		return 0
	}
	return int64(a.free.Rank(uint32(min(slot-1, math.MaxUint32))))
}

// freeTail reports whether the file ends with something that is not used.
func (a *allocator) freeTail() (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	size, err := a.i.f.Size()
	if err != nil {
		return false, fmt.Errorf("%s: %w", a.i.path, err)
	}
	last := a.eof>>a.i.bat.shift - 1
	return size != a.eof || a.eof > a.i.h.firstData && (a.free.Contains(uint32(last)) || a.released.Contains(uint32(last))), nil
}

// cutTail makes the file end with the last slot in use.
func (a *allocator) cutTail() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.trim(); err != nil {
		return err
	}
	size, err := a.i.f.Size()
	if err != nil || size == a.eof {
		return err
	}
	return a.i.f.Truncate(a.eof)
}
