package ploop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"

	"github.com/RoaringBitmap/roaring/v2"
)

// maxFreeMemory bounds what is remembered of free slots. Those beyond it stay
// unused until the next open.
const maxFreeMemory = 16 << 20

// allocator owns the clusters of the file that no entry of the BAT refers to.
// A cluster of the file is called a slot and is named by its number.
//
// Free slots inside the file are reused and never punched: ploop's check takes
// any hole of the host file for damage, also in a slot that nothing refers to.
// Free slots at the end are cut off.
type allocator struct {
	i  *Image
	mu sync.Mutex
	// scanned tells that the BAT was verified and free is filled.
	scanned bool
	// crashed: whoever wrote the image last, or a failed write of our own,
	// may have left slots that are holes.
	crashed  bool
	eof      int64           // end of the last slot that is in use or free, in bytes
	free     *roaring.Bitmap // slots that may be written at once
	released *roaring.Bitmap // slots unlinked since the last commit began
}

// ready verifies the BAT and finds the free slots, once.
func (a *allocator) ready(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.scan(ctx)
}

func (a *allocator) scan(ctx context.Context) error {
	if a.scanned {
		return nil
	}
	free, err := a.i.verify(ctx, a.eof)
	if err != nil {
		return err
	}
	a.free, a.released, a.scanned = free, roaring.New(), true
	return nil
}

// take returns between one and want neighbouring slots, for the caller to
// write completely and then to publish, or to give back.
func (a *allocator) take(ctx context.Context, want int64) (host, count int64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.scan(ctx); err != nil {
		return 0, 0, err
	}
	shift := a.i.bat.shift
	if !a.free.IsEmpty() {
		first := a.free.Minimum()
		count = 1
		for count < want && a.free.Contains(first+uint32(count)) {
			count++
		}
		a.free.RemoveRange(uint64(first), uint64(first)+uint64(count))
		return int64(first) << shift, count, nil
	}
	room := (a.i.bat.maxHost() - a.eof) >> shift
	if room <= 0 {
		return 0, 0, fmt.Errorf("%s: no BAT entry can point behind byte %d: %w", a.i.path, a.eof, syscall.EFBIG)
	}
	host, count = a.eof, min(want, room)
	a.eof += count << shift
	a.i.bat.limit.Store(a.eof)
	return host, count, nil
}

// giveBack returns slots that were taken and never published. They may have
// been written in part.
func (a *allocator) giveBack(host, count int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := uint64(host >> a.i.bat.shift)
	a.free.AddRange(first, first+uint64(count))
	a.crashed = true
	return a.trim()
}

// release notes a slot that was unlinked in the cached BAT.
func (a *allocator) release(host int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.released.Add(uint32(host >> a.i.bat.shift))
}

// takeReleased returns what was released before, which the commit that begins
// now will free.
func (a *allocator) takeReleased() *roaring.Bitmap {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.released
	a.released = roaring.New()
	if r == nil {
		r = roaring.New()
	}
	return r
}

// putReleased undoes takeReleased after a commit that failed.
func (a *allocator) putReleased(r *roaring.Bitmap) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.released.Or(r)
}

// freed makes slots reusable whose unlinking is durable and that no reader
// sees any more.
func (a *allocator) freed(r *roaring.Bitmap) error {
	if r.IsEmpty() {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.free.Or(r)
	return a.trim()
}

// trim cuts free slots off the end of the file.
func (a *allocator) trim() error {
	shift, eof := a.i.bat.shift, a.eof
	for eof > a.i.h.firstData && a.free.Contains(uint32(eof>>shift-1)) {
		eof -= a.i.h.cluster
	}
	if eof == a.eof {
		return nil
	}
	if err := a.i.f.Truncate(eof); err != nil {
		return err
	}
	a.free.RemoveRange(uint64(eof>>shift), uint64(a.eof>>shift))
	a.eof = eof
	a.i.bat.limit.Store(eof)
	return nil
}

// settle leaves the file as the old tools want to find it: a whole number of
// clusters long, and without holes in slots that a crash or a failed write
// left behind.
func (a *allocator) settle() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.scanned {
		return nil
	}
	if err := a.trim(); err != nil {
		return err
	}
	size, err := a.i.f.Size()
	if err != nil {
		return err
	}
	if size != a.eof {
		if err := a.i.f.Truncate(a.eof); err != nil {
			return err
		}
	}
	if !a.crashed {
		return nil
	}
	err = a.fillHoles()
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, errors.ErrUnsupported) {
		// The image is consistent with such holes, and only ploop's check
		// minds them.
		return nil
	}
	return err
}

// fillHoles writes zeros into the holes of free slots.
func (a *allocator) fillHoles() error {
	shift := a.i.bat.shift
	for it := a.free.Iterator(); it.HasNext(); {
		pos := int64(it.Next()) << shift
		for end := pos + a.i.h.cluster; pos < end; {
			hole, err := a.i.f.SeekHole(pos)
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if err != nil || hole >= end {
				break
			}
			data, err := a.i.f.SeekData(hole)
			if errors.Is(err, io.EOF) {
				data = end
			} else if err != nil {
				return err
			}
			pos = min(max(data, hole+1), end)
			if err := a.i.writeZeros(hole, pos-hole); err != nil {
				return err
			}
		}
	}
	return nil
}
