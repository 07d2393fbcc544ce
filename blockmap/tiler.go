package blockmap

import (
	"errors"
	"fmt"
	"math"
)

// ErrRange reports a Lookup range that is empty, negative or overflows.
var ErrRange = errors.New("block map range out of bounds")

// CheckRange is the argument check that every Lookup begins with.
func CheckRange(guest, n int64) error {
	if guest < 0 || n <= 0 || guest > math.MaxInt64-n {
		return fmt.Errorf("%w: start %d length %d", ErrRange, guest, n)
	}
	return nil
}

// Tiler builds the answer of one Lookup and enforces its contract: extents
// arrive in ascending order without gap, are clipped to the range, joined with
// their predecessor where they can be, and stop at the capacity of the
// caller's slice. A format feeds it cluster after cluster (or, better, table
// after table) and stops when Add says so.
//
// The zero value is not usable; NewTiler returns a value, so that a Tiler
// lives on the caller's stack and costs no allocation.
type Tiler struct {
	dst  []Extent
	base int   // extents that were in dst before
	next int64 // first guest byte not tiled yet
	end  int64
	max  int // number of extents dst may hold
	full bool
}

// NewTiler begins the answer for [guest, guest+n), appending to dst.
// The range must have passed CheckRange.
func NewTiler(guest, n int64, dst []Extent) Tiler {
	limit := cap(dst)
	if limit == len(dst) {
		limit++
	}
	return Tiler{dst: dst, base: len(dst), next: guest, end: guest + n, max: limit}
}

// Next is the first guest byte that has not been tiled yet: where the extent
// given to the next Add has to begin.
func (t *Tiler) Next() int64 { return t.next }

// Add appends e, which must contain Next(); what lies before it or behind the
// range is cut off. It returns false when the answer is complete, because the
// range is tiled or the capacity is used up and e did not join.
//
// An extent that does not contain Next() is a defect of the caller and panics:
// nothing read from an image may decide it.
func (t *Tiler) Add(e Extent) bool {
	if t.full || t.next >= t.end {
		return false
	}
	if e.Guest > t.next || e.End() <= t.next {
		panic(fmt.Sprintf("blockmap: extent [%d,%d) does not continue at %d", e.Guest, e.End(), t.next))
	}
	e = e.Clip(t.next, t.end-t.next)
	if last := len(t.dst) - 1; last >= t.base && t.dst[last].Joins(e) {
		t.dst[last].Len += e.Len
	} else if len(t.dst) >= t.max {
		t.full = true
		return false
	} else {
		t.dst = append(t.dst, e)
	}
	t.next = e.End()
	return t.next < t.end
}

// Done reports whether Add would take no more.
func (t *Tiler) Done() bool { return t.full || t.next >= t.end }

// Extents returns dst with the answer appended.
func (t *Tiler) Extents() []Extent { return t.dst }
