package maptest

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// listMap is a map that is right by inspection: a sorted list of extents that
// tiles [0, size), fed to a Tiler.
type listMap struct {
	size, gran int64
	list       []blockmap.Extent
}

func (m *listMap) Size() int64    { return m.size }
func (m *listMap) Granule() int64 { return m.gran }

func (m *listMap) Lookup(ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return dst, err
	}
	t := blockmap.NewTiler(guest, n, dst)
	for _, e := range m.list {
		if e.End() > guest && !t.Add(e) {
			return t.Extents(), nil
		}
	}
	t.Add(blockmap.Extent{Guest: m.size, Len: max(guest+n-m.size, 1), Kind: blockmap.Zero})
	return t.Extents(), nil
}

func (m *listMap) kind(guest int64) blockmap.Kind {
	for _, e := range m.list {
		if e.Guest <= guest && guest < e.End() {
			return e.Kind
		}
	}
	return blockmap.Zero
}

const gran = 4096

// sample has all kinds, runs of several clusters, runs that join and that do
// not, and a size in the middle of a cluster.
func sample() *listMap {
	m := &listMap{size: 40*gran + 100, gran: gran}
	add := func(n int64, kind blockmap.Kind, host int64) {
		at := int64(0)
		if len(m.list) > 0 {
			at = m.list[len(m.list)-1].End()
		}
		e := blockmap.Extent{Guest: at, Len: n, Kind: kind, Host: host}
		if kind == blockmap.Packed {
			e.PackedLen = 700
		}
		m.list = append(m.list, e)
	}
	add(3*gran, blockmap.Unmapped, 0)
	add(gran, blockmap.Data, 10*gran)
	add(gran, blockmap.Data, 11*gran) // joins
	add(gran, blockmap.Data, 5*gran)  // does not
	add(gran, blockmap.Packed, 777)
	add(gran, blockmap.Packed, 1500)
	add(2*gran, blockmap.Zero, 0)
	for i := range int64(20) {
		add(gran, blockmap.Data, (100+3*i)*gran)
	}
	add(8*gran, blockmap.Unmapped, 0)
	add(2*gran+100, blockmap.Data, 60*gran)
	return m
}

func empty(size int64) *listMap {
	m := &listMap{size: size, gran: gran}
	if size > 0 {
		m.list = []blockmap.Extent{{Len: size}}
	}
	return m
}

func TestRightMaps(t *testing.T) {
	for name, m := range map[string]*listMap{
		"sample": sample(), "nothing": empty(0), "one byte": empty(1), "64 TiB": empty(1 << 46),
	} {
		t.Run(name, func(t *testing.T) {
			Run(t, func(*testing.T) (blockmap.Map, Truth) { return m, m.kind }, AllocFree())
			if found := Check(m, m.kind, AllocFree()); len(found) > 0 {
				t.Errorf("Check: %v", found)
			}
		})
	}
}

// wrong is the sample map with one thing broken.
type wrong struct {
	*listMap
	lookup  func(m *listMap, ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error)
	granule int64
	grows   atomic.Int64 // added to Size at each call
	growing bool
}

func (w *wrong) Size() int64 {
	if w.growing {
		return w.size + w.grows.Add(1)
	}
	return w.size
}

func (w *wrong) Granule() int64 {
	if w.granule != 0 {
		return w.granule
	}
	return w.gran
}

func (w *wrong) Lookup(ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if w.lookup == nil {
		return w.listMap.Lookup(ctx, guest, n, dst)
	}
	return w.lookup(w.listMap, ctx, guest, n, dst)
}

// after breaks a right answer. It sees only the extents of the answer.
func after(f func(guest, n int64, got []blockmap.Extent) []blockmap.Extent) func(*listMap, context.Context, int64, int64, []blockmap.Extent) ([]blockmap.Extent, error) {
	return func(m *listMap, ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
		got, err := m.Lookup(ctx, guest, n, dst)
		if err != nil {
			return got, err
		}
		return append(got[:len(dst):cap(got)], f(guest, n, got[len(dst):])...), nil
	}
}

// TestWrongMaps is the negative control of every rule: one map that breaks it,
// which the rule must name.
func TestWrongMaps(t *testing.T) {
	type lookup = func(*listMap, context.Context, int64, int64, []blockmap.Extent) ([]blockmap.Extent, error)
	type extents = []blockmap.Extent
	each := func(f func(e *blockmap.Extent)) lookup {
		return after(func(_, _ int64, got extents) extents {
			got = slices.Clone(got)
			for i := range got {
				f(&got[i])
			}
			return got
		})
	}
	var remembered extents
	var calls atomic.Int64
	for _, c := range []struct {
		name    string
		rule    Rule
		lookup  lookup
		granule int64
		growing bool
		opts    []Option
	}{
		{name: "granule 3000", rule: RuleShape, granule: 3000},
		{name: "size changes", rule: RuleShape, growing: true},
		{name: "empty range is answered", rule: RuleArgs, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if n == 0 {
				return dst, nil
			}
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "overflow is another error", rule: RuleArgs, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if g > 0 && n > 0 && g+n < 0 {
				return dst, errors.New("no")
			}
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "behind the size is an error", rule: RuleArgs, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if n > 0 && g >= m.size {
				return dst, blockmap.ErrRange
			}
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "begins at the cluster", rule: RuleTile, lookup: after(func(g, _ int64, got extents) extents {
			got = slices.Clone(got)
			d := g % gran
			got[0].Guest -= d
			got[0].Len += d
			return got
		})},
		{name: "gap", rule: RuleTile, lookup: after(func(_, _ int64, got extents) extents {
			if len(got) < 3 {
				return got
			}
			return append(slices.Clone(got[:1]), got[2:]...)
		})},
		{name: "overlap", rule: RuleTile, lookup: after(func(_, _ int64, got extents) extents {
			got = slices.Clone(got)
			if len(got) > 1 {
				got[0].Len++
			}
			return got
		})},
		{name: "reaches behind the range", rule: RuleTile, lookup: after(func(_, n int64, got extents) extents {
			got = slices.Clone(got)
			if last := &got[len(got)-1]; n%gran != 0 {
				last.Len += gran - n%gran
			}
			return got
		})},
		{name: "nothing and no error", rule: RuleProgress, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if n == 1 {
				return dst, nil
			}
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "stops at a table of 16 clusters", rule: RulePrefix, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if g >= 0 && n > 0 {
				n = min(n, 16*gran-g%(16*gran))
			}
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "last extent not as long as it can be", rule: RulePrefix, lookup: after(func(g, n int64, got extents) extents {
			got = slices.Clone(got)
			if last := &got[len(got)-1]; last.End() < g+n && last.Len > gran {
				last.Len = gran
			}
			return got
		})},
		{name: "ignores cap", rule: RuleCap, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			return m.Lookup(ctx, g, n, slices.Grow(slices.Clip(dst), cap(dst)-len(dst)+3))
		}},
		{name: "a full dst is left as it is", rule: RuleProgress, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if n > 0 && g >= 0 && len(dst) == cap(dst) && len(dst) > 0 {
				return dst, nil
			}
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "begins dst anew", rule: RuleKeep, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			return m.Lookup(ctx, g, n, dst[:0])
		}},
		{name: "joins with what was in dst", rule: RuleKeep, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			got, err := m.Lookup(ctx, g, n, dst)
			if k := len(dst); err == nil && k > 0 && got[k-1].Joins(got[k]) {
				got[k-1].Len += got[k].Len
				got = append(got[:k], got[k+1:]...)
			}
			return got, err
		}},
		{name: "an extent per cluster", rule: RuleCoalesce, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			room := max(cap(dst)-len(dst), 1)
			got, err := m.Lookup(ctx, g, n, nil)
			if err != nil || got[0].Len <= gran || room < 2 {
				return m.Lookup(ctx, g, n, dst)
			}
			all, err := m.Lookup(ctx, g, n, make(extents, 0, room))
			if err != nil || len(all) == room {
				return append(dst, all...), err
			}
			one := all[0].Clip(all[0].Guest, gran)
			two := all[0].Clip(one.End(), all[0].Len-gran)
			return append(append(append(dst, one), two), all[1:]...), nil
		}},
		{name: "unmapped has a host", rule: RuleFields, lookup: each(func(e *blockmap.Extent) {
			if e.Kind == blockmap.Unmapped {
				e.Host = 4096
			}
		})},
		{name: "negative host", rule: RuleFields, lookup: each(func(e *blockmap.Extent) {
			if e.Kind == blockmap.Data {
				e.Host -= 1 << 40
			}
		})},
		{name: "packed without length", rule: RuleFields, lookup: each(func(e *blockmap.Extent) { e.PackedLen = 0 })},
		{name: "unknown kind", rule: RuleFields, lookup: each(func(e *blockmap.Extent) {
			if e.Kind == blockmap.Packed {
				e.Kind = 9
			}
		})},
		{name: "unmapped behind the size", rule: RuleBehind, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			long := &listMap{size: 1 << 62, gran: gran, list: append(slices.Clone(m.list), blockmap.Extent{Guest: m.size, Len: 1<<62 - m.size})}
			return long.Lookup(ctx, g, n, dst)
		}},
		{name: "data up to the end of the last cluster", rule: RuleBehind, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			long := &listMap{size: 41 * gran, gran: gran, list: slices.Clone(m.list)}
			long.list[len(long.list)-1].Len += gran - 100
			return long.Lookup(ctx, g, n, dst)
		}},
		{name: "zero where unmapped is", rule: RuleTruth, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			other := &listMap{size: m.size, gran: gran, list: slices.Clone(m.list)}
			other.list[0].Kind = blockmap.Zero
			return other.Lookup(ctx, g, n, dst)
		}},
		{name: "host of data not clipped", rule: RuleSplit, lookup: each(func(e *blockmap.Extent) {
			if e.Kind == blockmap.Data {
				e.Host -= e.Guest % gran
			}
		})},
		{name: "host of packed clipped", rule: RuleSplit, lookup: each(func(e *blockmap.Extent) {
			if e.Kind == blockmap.Packed {
				e.Host += e.Guest % gran
			}
		})},
		{name: "answers from the dst of the call before", rule: RuleRef, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			// A cache of the last answer that shares the caller's memory.
			if len(remembered) > 0 && n > 0 && len(dst) == 0 && cap(dst) == 32 && remembered[0].Guest == marker.Guest {
				return append(dst, remembered...), nil
			}
			got, err := m.Lookup(ctx, g, n, dst)
			if err == nil {
				remembered = got[len(dst):]
			}
			return got, err
		}},
		{name: "cancelled is another error", rule: RuleContext, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if ctx.Err() != nil {
				return dst, errors.New("failed")
			}
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "cancelled is half an answer", rule: RuleContext, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			got, err := m.Lookup(ctx, g, n, dst)
			if ctx.Err() != nil && err == nil {
				got = got[:len(dst)]
			}
			return got, err
		}},
		{name: "two calls at a time mix", rule: RuleParallel, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			busy := calls.Add(1)
			defer calls.Add(-1)
			if busy > 1 && n > 0 {
				return append(dst, blockmap.Extent{Guest: g, Len: n, Kind: blockmap.Zero}), nil
			}
			time.Sleep(10 * time.Microsecond)
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "walks the clusters", rule: RuleCost, opts: []Option{CostBound(20 * time.Millisecond)}, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if n > m.size {
				time.Sleep(30 * time.Millisecond)
			}
			return m.Lookup(ctx, g, n, dst)
		}},
		{name: "allocates", rule: RuleAllocs, opts: []Option{AllocFree()}, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			got, err := m.Lookup(ctx, g, n, make(extents, 0, cap(dst)-len(dst)))
			return append(dst, got...), err
		}},
		{name: "panics", rule: RulePanic, lookup: func(m *listMap, ctx context.Context, g, n int64, dst extents) (extents, error) {
			if g > m.size {
				panic("far out")
			}
			return m.Lookup(ctx, g, n, dst)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.rule == RuleAllocs && imgtest.RaceEnabled {
				t.Skip("allocations are not counted under the race detector")
			}
			if c.rule == RuleRef {
				// It keeps state that concurrent calls would race for, which
				// the race detector would report before the rule does.
				steps = slices.DeleteFunc(slices.Clone(allSteps), func(s step) bool { return s.name == "parallel" })
				defer func() { steps = allSteps }()
			}
			w := &wrong{listMap: sample(), lookup: c.lookup, granule: c.granule, growing: c.growing}
			found := Check(w, w.kind, c.opts...)
			if !slices.ContainsFunc(found, func(v Violation) bool { return v.Rule == c.rule }) {
				t.Errorf("not found out by %q; found: %v", c.rule, found)
			}
		})
	}
}

var allSteps = steps

// TestCheckIsRepeatable: the random ranges of Check come from a fixed seed.
func TestCheckIsRepeatable(t *testing.T) {
	w := &wrong{listMap: sample(), lookup: after(func(_, _ int64, got []blockmap.Extent) []blockmap.Extent { return got[:1] })}
	a, b := Check(w, w.kind), Check(w, w.kind)
	if len(a) == 0 || len(a) != len(b) || a[0] != b[0] {
		t.Errorf("two runs found %v and %v", a, b)
	}
}
