package maptest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/imagestack/imagestack/blockmap"
)

// walkLimit is the number of extents that the reference walk keeps.
const walkLimit = 1 << 16

// checker is one map under test with the reference walk and what was found.
type checker struct {
	m     blockmap.Map
	truth Truth
	o     options
	size  int64
	gran  int64
	ref   []blockmap.Extent // the walk: tiles [0, end)
	end   int64             // beyond Size, unless the walk limit was reached
	found []Violation
}

func newChecker(m blockmap.Map, truth Truth, o options) *checker {
	return &checker{m: m, truth: truth, o: o, size: m.Size(), gran: m.Granule()}
}

func newRandom(seed uint64) draw {
	r := rand.New(rand.NewPCG(seed, 0x6d61707465737421))
	return func(_ string, lo, hi int64) int64 {
		if hi-lo == math.MaxInt64 {
			return lo + r.Int64()
		}
		return lo + r.Int64N(hi-lo+1)
	}
}

func (c *checker) fail(rule Rule, format string, args ...any) {
	c.found = append(c.found, Violation{rule, fmt.Sprintf(format, args...)})
}

// lookup asks with an empty dst of the given capacity and checks what holds
// for every answer. ok is false when there is no answer to go on with.
func (c *checker) lookup(guest, n int64, capacity int) (got []blockmap.Extent, ok bool) {
	got, err, ok := c.ask(context.Background(), guest, n, make([]blockmap.Extent, 0, capacity))
	if !ok {
		return nil, false
	}
	if err != nil {
		c.fail(RuleArgs, "Lookup(%d, %d): error for a possible range: %v", guest, n, err)
		return nil, false
	}
	return got, c.answer(guest, n, capacity, got)
}

// answer checks the rules that need nothing but the question and the answer.
func (c *checker) answer(guest, n int64, room int, got []blockmap.Extent) bool {
	before := len(c.found)
	where := fmt.Sprintf("Lookup(%d, %d) with room for %d", guest, n, room)
	room = max(room, 1)
	if len(got) == 0 {
		c.fail(RuleProgress, "%s: no extent", where)
		return false
	}
	if len(got) > room {
		c.fail(RuleCap, "%s: %d extents", where, len(got))
	}
	next := guest
	for i, e := range got {
		switch {
		case e.Len < 1 || e.Guest > math.MaxInt64-e.Len:
			c.fail(RuleTile, "%s: extent %d %+v has a bad length", where, i, e)
			return false
		case e.Guest != next:
			c.fail(RuleTile, "%s: extent %d %+v does not begin at %d", where, i, e, next)
			return false
		case e.End() > guest+n:
			c.fail(RuleTile, "%s: extent %d %+v reaches behind the range", where, i, e)
			return false
		}
		next = e.End()
		if i > 0 && got[i-1].Joins(e) {
			c.fail(RuleCoalesce, "%s: extents %d %+v and %+v could be one", where, i-1, got[i-1], e)
		}
		c.fields(where, e)
	}
	if next < guest+n && len(got) < room {
		c.fail(RulePrefix, "%s: stops at %d after %d extents", where, next, len(got))
	}
	return len(c.found) == before
}

func (c *checker) fields(where string, e blockmap.Extent) {
	switch e.Kind {
	case blockmap.Unmapped, blockmap.Zero:
		if e.Host != 0 || e.PackedLen != 0 {
			c.fail(RuleFields, "%s: %+v has a place", where, e)
		}
	case blockmap.Data:
		if e.Host < 0 || e.Host > math.MaxInt64-e.Len || e.PackedLen != 0 {
			c.fail(RuleFields, "%s: %+v has an impossible place", where, e)
		}
	case blockmap.Packed:
		if e.Host < 0 || e.PackedLen == 0 {
			c.fail(RuleFields, "%s: %+v has an impossible place", where, e)
		}
		if !c.o.mixed && e.Guest/c.gran != (e.End()-1)/c.gran {
			c.fail(RuleFields, "%s: %+v is packed and crosses a cluster border", where, e)
		}
	default:
		c.fail(RuleFields, "%s: %+v has an unknown kind", where, e)
	}
	if e.End() > c.size && e.Kind != blockmap.Zero {
		c.fail(RuleBehind, "%s: %+v reaches behind the size %d", where, e, c.size)
	}
	c.compareTruth(where, e)
}

// compareTruth compares the ends of e, and up to 32 places between, with the
// truth.
func (c *checker) compareTruth(where string, e blockmap.Extent) {
	end := min(e.End(), c.size)
	if c.truth == nil || e.Guest >= end {
		return
	}
	check := func(at int64) bool {
		if want := c.truth(at); want != e.Kind {
			c.fail(RuleTruth, "%s: byte %d is %s, want %s", where, at, e.Kind, want)
			return false
		}
		return true
	}
	stride := max(c.gran, (end-e.Guest)/32)
	for at := e.Guest; at < end; at += min(stride, end-at) {
		if !check(at) {
			return
		}
	}
	check(end - 1)
}

// walk makes the reference: the map from 0 to two granules behind Size, asked
// in pieces of 256 extents.
func (c *checker) walk() bool {
	if c.ref != nil {
		return true
	}
	if c.gran < 1 || c.size < 0 || c.size > math.MaxInt64-2*c.gran {
		c.fail(RuleShape, "size %d, granule %d", c.size, c.gran)
		return false
	}
	end := c.size + 2*c.gran
	var ref []blockmap.Extent
	at := int64(0)
	for at < end && len(ref) < walkLimit {
		got, ok := c.lookup(at, end-at, 256)
		if !ok {
			return false
		}
		if len(ref) > 0 && ref[len(ref)-1].Joins(got[0]) {
			c.fail(RulePrefix, "the last extent %+v of an answer could be longer: %+v follows", ref[len(ref)-1], got[0])
			return false
		}
		ref = append(ref, got...)
		at = ref[len(ref)-1].End()
	}
	c.ref, c.end = ref, at
	return true
}

// want is what the walk says about [guest, guest+n), at most limit extents.
// The range must lie inside the walk.
func (c *checker) want(guest, n int64, limit int) []blockmap.Extent {
	lo, hi := 0, len(c.ref)
	for lo < hi {
		if mid := (lo + hi) / 2; c.ref[mid].End() <= guest {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	var out []blockmap.Extent
	for ; lo < len(c.ref) && c.ref[lo].Guest < guest+n && len(out) < limit; lo++ {
		out = append(out, c.ref[lo].Clip(guest, n))
	}
	return out
}

func same(a, b []blockmap.Extent) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// brief prints at most four extents.
func brief(e []blockmap.Extent) string {
	if len(e) > 4 {
		return fmt.Sprintf("%+v and %d more", e[:4], len(e)-4)
	}
	return fmt.Sprintf("%+v", e)
}

// pick draws an offset in [0, limit): an edge of an extent, a cluster border,
// the size, or anything, and one less or more than these.
func (c *checker) pick(d draw, label string, limit int64) int64 {
	var at int64
	switch d(label+" kind", 0, 3) {
	case 0:
		at = c.ref[d(label+" extent", 0, int64(len(c.ref)-1))].Guest
	case 1:
		at = d(label+" cluster", 0, limit/c.gran) * c.gran
	case 2:
		at = c.size
	default:
		at = d(label, 0, limit-1)
	}
	at += d(label+" off by", -1, 1)
	return min(max(at, 0), limit-1)
}

// span draws a range inside the walk.
func (c *checker) span(d draw) (guest, n int64) {
	a, b := c.pick(d, "from", c.end), c.pick(d, "to", c.end)
	if a > b {
		a, b = b, a
	}
	return a, b - a + 1
}

func isRange(err error) bool { return errors.Is(err, blockmap.ErrRange) }
