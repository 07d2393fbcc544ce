package rewrite

import (
	"context"
	"fmt"
	"math"

	"github.com/RoaringBitmap/roaring/v2/roaring64"

	"github.com/imagestack/imagestack/layers"
)

// usage is which units of the image file are needed.
type usage struct {
	unit int64
	used *roaring64.Bitmap // numbers of units
}

// takeUsage walks the references of a layer, leaving out what the active map
// says about the guest clusters in drop (nil: none), whose size is granule.
func takeUsage(ctx context.Context, l layers.HostSpace, granule int64, drop *roaring64.Bitmap) (*usage, error) {
	u := &usage{unit: l.HostUnit(), used: roaring64.New()}
	var from, to uint64 // a run not entered yet
	flush := func() {
		if to-from == 1 { // runs of one are slow where they are many
			u.used.Add(from)
			return
		}
		u.used.AddRange(from, to)
	}
	enter := func(off, n int64) {
		a, b := uint64(off/u.unit), uint64((off+n-1)/u.unit)+1
		if a == to {
			to = b
			return
		}
		flush()
		from, to = a, b
	}
	err := l.WalkHost(ctx, func(h layers.HostRange) error {
		if h.Len <= 0 || h.Off < 0 || h.Off > math.MaxInt64-h.Len {
			return nil
		}
		if drop == nil || h.Guest < 0 {
			enter(h.Off, h.Len)
			return nil
		}
		if h.Role != layers.RoleData {
			if !drop.Contains(uint64(h.Guest / granule)) {
				enter(h.Off, h.Len)
			}
			return nil
		}
		// Neighbours may come in one piece.
		for h.Len > 0 {
			n := min(granule-h.Guest%granule, h.Len)
			if !drop.Contains(uint64(h.Guest / granule)) {
				enter(h.Off, n)
			}
			h.Off, h.Guest, h.Len = h.Off+n, h.Guest+n, h.Len-n
		}
		return nil
	})
	flush()
	return u, err
}

// units is the number of units in use.
func (u *usage) units() int64 { return int64(u.used.GetCardinality()) }

// ideal is where the file would end without a hole, in bytes.
func (u *usage) ideal() int64 { return u.units() * u.unit }

// behind is the number of bytes in use at or behind off, a multiple of the
// unit.
func (u *usage) behind(off int64) int64 {
	below := int64(0)
	if off > 0 {
		below = int64(u.used.Rank(uint64(off/u.unit) - 1))
	}
	return (u.units() - below) * u.unit
}

// leaks is the number of bytes that are counted and not used.
func (u *usage) leaks(ctx context.Context, l layers.HostSpace, path string) (int64, error) {
	var counted, missing int64
	used := u.used.Iterator()
	// until counts the used units below end that are not counted.
	until := func(end uint64) {
		for used.HasNext() && used.PeekNext() < end {
			missing++
			used.Next()
		}
	}
	err := l.Counted(ctx, func(off, n int64) error {
		a, b := uint64(off/u.unit), uint64((off+n+u.unit-1)/u.unit)
		counted += int64(b - a)
		until(a)
		used.AdvanceIfNeeded(b)
		return nil
	})
	if err != nil {
		return 0, err
	}
	until(math.MaxUint64)
	if missing > 0 {
		return 0, &layers.ImageError{Path: path, Layer: -1, Offset: -1, Field: "reference count",
			Err: fmt.Errorf("%w: %d clusters are in use and not counted", layers.ErrCorrupt, missing)}
	}
	return (counted - u.units()) * u.unit, nil
}
