package blockmap

import (
	"cmp"
	"context"
	"math"
	"slices"
	"sync"
)

// Overlay is a pile of maps seen as one: what the first leaves Unmapped the
// next answers, and what none answers reads as zeros. Layer of its extents is
// the position in the pile, 0 for the first; zeros that no map answered for
// carry the position of the last.
//
// Its size is that of the first map, its granule the smallest in the pile.
// Lookup asks for one place at a time and allocates nothing; its cost is the
// number of extents of the answer times the depth. Resolve is the way to
// translate a whole region of a deep pile.
type Overlay struct {
	maps    []Map
	granule int64
}

// NewOverlay stacks maps, the top one first. There must be at least one and
// at most 65,536 (Extent.Layer is 16 bits wide).
func NewOverlay(maps ...Map) *Overlay {
	if len(maps) == 0 || len(maps) > math.MaxUint16+1 {
		panic("blockmap: an overlay takes 1 to 65,536 maps")
	}
	o := &Overlay{maps: maps, granule: maps[0].Granule()}
	for _, m := range maps[1:] {
		o.granule = min(o.granule, m.Granule())
	}
	return o
}

// Size is that of the first map.
func (o *Overlay) Size() int64 { return o.maps[0].Size() }

// Granule is the smallest granule in the pile.
func (o *Overlay) Granule() int64 { return o.granule }

// Lookup implements Map.
func (o *Overlay) Lookup(ctx context.Context, guest, n int64, dst []Extent) ([]Extent, error) {
	if err := CheckRange(guest, n); err != nil {
		return dst, err
	}
	one := scratch.Get().(*[1]Extent)
	defer scratch.Put(one)
	t := NewTiler(guest, n, dst)
	for more := true; more; {
		e, err := o.at(ctx, t.Next(), guest+n-t.Next(), one[:0])
		if err != nil {
			return dst, err
		}
		more = t.Add(e)
	}
	return t.Extents(), nil
}

// scratch holds the room for the answers of single maps, so that a Lookup
// through an overlay allocates nothing.
var scratch = sync.Pool{New: func() any { return new([1]Extent) }}

// at finds the extent at guest, as long as it is known within n.
func (o *Overlay) at(ctx context.Context, guest, n int64, room []Extent) (Extent, error) {
	last := len(o.maps) - 1
	for i, m := range o.maps {
		got, err := m.Lookup(ctx, guest, n, room)
		if err != nil {
			return Extent{}, err
		}
		e := got[0]
		if e.Kind != Unmapped {
			e.Layer = uint16(i)
			return e, nil
		}
		n = min(n, e.Len)
	}
	return Extent{Guest: guest, Len: n, Kind: Zero, Layer: uint16(last)}, nil
}

// Resolve translates [guest, guest+n) of the pile whole, appending to dst,
// which grows as needed. Every map is asked once for each stretch that the
// maps above it left open, so the cost is the number of extents found plus
// the depth, not their product.
func (o *Overlay) Resolve(ctx context.Context, guest, n int64, dst []Extent) ([]Extent, error) {
	if err := CheckRange(guest, n); err != nil {
		return dst, err
	}
	open := []Extent{{Guest: guest, Len: n}}
	var next, found []Extent
	buf := make([]Extent, 0, 64)
	for i, m := range o.maps {
		next = next[:0]
		for _, gap := range open {
			for gap.Len > 0 {
				if err := ctx.Err(); err != nil {
					return dst, err
				}
				var err error
				if buf, err = m.Lookup(ctx, gap.Guest, gap.Len, buf[:0]); err != nil {
					return dst, err
				}
				for _, e := range buf {
					gap.Guest += e.Len
					gap.Len -= e.Len
					if e.Kind != Unmapped {
						e.Layer = uint16(i)
						found = append(found, e)
					} else if last := len(next) - 1; last >= 0 && next[last].End() == e.Guest {
						next[last].Len += e.Len
					} else {
						next = append(next, e)
					}
				}
			}
		}
		open, next = next, open
		if len(open) == 0 {
			break
		}
	}
	for _, gap := range open {
		found = append(found, Extent{Guest: gap.Guest, Len: gap.Len, Kind: Zero, Layer: uint16(len(o.maps) - 1)})
	}
	slices.SortFunc(found, func(a, b Extent) int { return cmp.Compare(a.Guest, b.Guest) })
	return Coalesce(dst, found), nil
}

// Coalesce appends src, ascending and without gaps, to dst, joining what can
// be one extent. It does not join across the seam with what dst held before.
func Coalesce(dst, src []Extent) []Extent {
	base := len(dst)
	for _, e := range src {
		if last := len(dst) - 1; last >= base && dst[last].Joins(e) {
			dst[last].Len += e.Len
		} else {
			dst = append(dst, e)
		}
	}
	return dst
}
