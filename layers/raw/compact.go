package raw

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// A raw image is made smaller by punching holes, and in no other way: every
// byte has its place. So its methods of layers.Relocator move nothing, and the
// space of the file is that of the host's filesystem.

var _ layers.Relocator = (*Image)(nil)

// FixedPlaces tells that nothing moves.
func (i *Image) FixedPlaces() bool { return true }

// HostUnit is 4096, as Granule.
func (i *Image) HostUnit() int64 { return granule }

// Counted visits what WalkHost does, in whole units.
func (i *Image) Counted(ctx context.Context, visit func(off, n int64) error) error {
	return i.Own(ctx, 0, i.size, func(e blockmap.Extent) error {
		return visit(e.Host, (e.Len+granule-1)&^(granule-1))
	})
}

// Own visits what is stored.
func (i *Image) Own(ctx context.Context, off, n int64, visit func(blockmap.Extent) error) error {
	if off < 0 || n < 0 || n > math.MaxInt64-off {
		return blockmap.CheckRange(off, n)
	}
	end := min(off+n, i.size)
	var last blockmap.Extent
	flush := func() error {
		if last.Len == 0 {
			return nil
		}
		return visit(last)
	}
	for start := off &^ (granule - 1); start < end; {
		for e, err := range blockmap.All(ctx, i, start, end-start) {
			if err != nil {
				return err
			}
			start = e.End()
			if e.Kind != blockmap.Data {
				continue
			}
			// Holes of the host may be finer than the unit.
			from, to := e.Guest&^(granule-1), min((e.End()+granule-1)&^(granule-1), i.size)
			if last.Len > 0 && from <= last.End() {
				last.Len = to - last.Guest
				continue
			}
			if err := flush(); err != nil {
				return err
			}
			last = blockmap.Extent{Guest: from, Len: to - from, Host: from, Kind: blockmap.Data}
		}
	}
	return flush()
}

// BeginRelocation makes sure that holes can be punched: else dropping would
// write zeros.
func (i *Image) BeginRelocation(context.Context, func(done, total int64)) error {
	if err := i.canChange(0, 0); err != nil {
		return err
	}
	// Behind the end there is nothing to punch.
	err := i.f.PunchHole((i.size+granule-1)&^(granule-1), granule)
	if errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("%s: %w: the filesystem or the device cannot punch holes", i.path, layers.ErrUnsupported)
	}
	return err
}

// CanZero is true: a hole reads as zeros.
func (i *Image) CanZero() bool { return true }

// Unmap fails: nothing lies below a raw image.
func (i *Image) Unmap(context.Context, int64, int64) error {
	return fmt.Errorf("%s: %w: a raw image has nothing below it", i.path, layers.ErrUnsupported)
}

// FreeLeaks has nothing to do.
func (i *Image) FreeLeaks(context.Context) (int64, error) { return 0, i.canChange(0, 0) }

// Evacuate moves nothing.
func (i *Image) Evacuate(context.Context, int64, layers.Relocation) (int64, error) {
	return 0, i.canChange(0, 0)
}

// Shrink does nothing: the length of the file is that of the disk.
func (i *Image) Shrink(context.Context) error { return i.canChange(0, 0) }
