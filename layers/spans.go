package layers

import (
	"context"
	"math"
	"sync/atomic"

	"github.com/imagestack/imagestack/blockmap"
)

// spans is a read-only pile of layers whose resolved extents are cached: a
// region of the disk is resolved through all layers once, and from then on a
// lookup in it costs the same whatever the depth.
type spans struct {
	pile   *blockmap.Overlay
	base   uint16 // position of the pile's first layer in the stack
	owner  Owner
	region int64       // bytes of guest space per cached page, a power of two
	later  *background // resolves what a sequential reader will come to
	// last is the region that somebody came to last who was the first there.
	last atomic.Int64
}

// span is a resolved region.
type span struct {
	extents []blockmap.Extent
	ahead   atomic.Bool // resolved beforehand, and nobody has come here yet
}

// spanRegion bounds of one page: extents are rarely finer than a host block,
// so a page holds at most about a thousand.
const (
	minSpanRegion = 64 << 10
	maxSpanRegion = 4 << 20
	spanExtents   = 1024
)

// aheadRegions is how many regions are resolved before a sequential reader
// comes to them: enough for the time in which a disk answers once for each of
// many layers.
const aheadRegions = 4

// extentSize is what one extent of a cached page costs in bytes.
const extentSize = 40

func newSpans(pile *blockmap.Overlay, base int, cache *Cache, later *background) *spans {
	region := min(max(pile.Granule()*spanExtents, minSpanRegion), maxSpanRegion)
	if aheadRegions*extentSize*(region/pile.Granule()) > cache.Budget()/4 {
		later = nil
	}
	return &spans{pile: pile, base: uint16(base), owner: cache.NewOwner(), region: region, later: later}
}

// add gives t the resolved extents from t.Next() up to end at most, as far as
// one page reaches, and reports whether t takes more.
//
// An extent that reaches the end of its page while the range goes on for long
// behind it may be a hole of a terabyte: it is looked up in the pile whole
// instead of page by page.
func (s *spans) add(ctx context.Context, t *blockmap.Tiler, end int64) (bool, error) {
	from := t.Next()
	start, n := s.regionOf(from / s.region)
	extents, err := s.page(ctx, from/s.region)
	if err != nil && ctx.Err() == nil {
		// Something in the region cannot be read or is damaged; what was asked
		// for may be fine.
		return s.addWhole(ctx, t, end)
	}
	if err != nil {
		return false, err
	}
	pageEnd := start + n
	for i := firstEndingBehind(extents, from); i < len(extents) && extents[i].Guest < end; i++ {
		e := extents[i]
		if e.End() == pageEnd && end-pageEnd >= s.region {
			return s.addWhole(ctx, t, end)
		}
		if !t.Add(e.Clip(t.Next(), end-t.Next())) {
			return false, nil
		}
	}
	return true, nil
}

// addWhole gives t the one extent at t.Next(), to its very end.
func (s *spans) addWhole(ctx context.Context, t *blockmap.Tiler, end int64) (bool, error) {
	room := extentRoom.Get().(*[roomExtents]blockmap.Extent)
	defer extentRoom.Put(room)
	got, err := s.pile.Lookup(ctx, t.Next(), end-t.Next(), room[:0:1])
	if err != nil {
		return false, err
	}
	e := got[0]
	e.Layer += s.base
	return t.Add(e), nil
}

// regionOf is the start and length of the region with that number; the very
// last one is cut off where offsets end.
func (s *spans) regionOf(index int64) (start, n int64) {
	start = index * s.region
	return start, min(s.region, math.MaxInt64-start)
}

// page is the resolved region with that number. Who comes to one region after
// the other is a sequential reader, and finds the next ones resolved.
func (s *spans) page(ctx context.Context, index int64) ([]blockmap.Extent, error) {
	page := s.owner.Get(index)
	if page == nil {
		var err error
		if page, err = s.resolve(ctx, index, false); err != nil {
			return nil, err
		}
		if s.last.Swap(index) == index-1 {
			s.order(index, 1)
		}
	}
	p := page.Value.(*span)
	if p.ahead.Load() && p.ahead.Swap(false) && s.last.Swap(index) == index-1 {
		s.order(index, aheadRegions)
	}
	return p.extents, nil
}

// resolve makes the page of a region. It uses the same cache for the tables of
// the layers, hence Put; the layers do not change, so two that resolve the same
// region find the same.
func (s *spans) resolve(ctx context.Context, index int64, ahead bool) (*Page, error) {
	start, n := s.regionOf(index)
	found, err := s.pile.Resolve(ctx, start, n, nil)
	if err != nil {
		return nil, err
	}
	for i := range found {
		found[i].Layer += s.base
	}
	p := &span{extents: found}
	p.ahead.Store(ahead)
	return s.owner.Put(index, p, int64(cap(found))*extentSize), nil
}

// order has the n regions behind that with that number resolved. What is wrong
// with one is told to who reads there.
func (s *spans) order(index, n int64) {
	s.later.start(func(ctx context.Context) {
		for i := index + 1; i <= index+n && i*s.region < s.pile.Size() && ctx.Err() == nil; i++ {
			if s.owner.Get(i) != nil {
				continue
			}
			if _, err := s.resolve(ctx, i, true); err != nil {
				return
			}
		}
	})
}

// firstEndingBehind is the index of the first extent that ends behind guest.
func firstEndingBehind(extents []blockmap.Extent, guest int64) int {
	lo, hi := 0, len(extents)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if extents[mid].End() > guest {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}
