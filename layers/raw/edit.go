package raw

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// canChange is the check that every changing method begins with.
func (i *Image) canChange(off, n int64) error {
	if !i.writable {
		return fmt.Errorf("%s: %w", i.path, layers.ErrReadOnly)
	}
	if p := i.failed.Load(); p != nil {
		return *p
	}
	if off < 0 || n < 0 || off > i.size || n > i.size-off {
		return fmt.Errorf("%s: %w: start %d length %d of %d", i.path, blockmap.ErrRange, off, n, i.size)
	}
	return nil
}

// WriteAt writes p in place. It never makes the image longer.
func (i *Image) WriteAt(_ context.Context, p []byte, off int64, _ layers.Below) error {
	if err := i.canChange(off, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	_, err := i.f.WriteAt(p, off)
	return err
}

// WriteInPlace implements layers.InPlaceWriter.
func (i *Image) WriteInPlace(p []byte, off int64) bool {
	if i.canChange(off, int64(len(p))) != nil {
		return false
	}
	_, err := i.f.WriteAt(p, off)
	return err == nil
}

// ZeroAt punches a hole, or zeroes the range keeping its storage, or writes
// zeros where the file can do neither.
func (i *Image) ZeroAt(_ context.Context, off, n int64, punch bool, _ layers.Below) error {
	if err := i.canChange(off, n); err != nil || n == 0 {
		return err
	}
	return zero(i.f, off, n, punch)
}

func zero(f backend.File, off, n int64, punch bool) error {
	if n == 0 {
		return nil
	}
	fast := f.ZeroRange
	if punch {
		fast = f.PunchHole
	}
	err := fast(off, n)
	if err == nil || !cannot(err) {
		return err
	}
	// A block device takes whole logical blocks only: zero the middle the fast
	// way and write the edges. Files are exact at any byte.
	start := (off + granule - 1) / granule * granule
	end := (off + n) / granule * granule
	if start >= end || start == off && end == off+n {
		return backend.WriteZeros(f, off, n)
	}
	if err := fast(start, end-start); err != nil {
		if !cannot(err) {
			return err
		}
		return backend.WriteZeros(f, off, n)
	}
	if err := backend.WriteZeros(f, off, start-off); err != nil {
		return err
	}
	return backend.WriteZeros(f, end, off+n-end)
}

// cannot tells an operation that the file does not do (at this alignment) from
// one that failed.
func cannot(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EINVAL)
}

// Sync makes every change that returned before it durable. After a failure
// every further change and Sync fails with the same error: what the host lost
// cannot be known.
func (i *Image) Sync(context.Context) error {
	if err := i.canChange(0, 0); err != nil {
		return err
	}
	if err := i.f.Sync(); err != nil {
		err = fmt.Errorf("%s: sync failed, nothing further is written: %w", i.path, err)
		i.failed.CompareAndSwap(nil, &err)
		return *i.failed.Load()
	}
	return nil
}
