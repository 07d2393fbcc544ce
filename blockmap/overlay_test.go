package blockmap_test

import (
	"context"
	"slices"
	"sort"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest/maptest"
)

// listMap is a map given by its extents; gaps are Unmapped.
type listMap struct {
	size, granule int64
	list          []blockmap.Extent
}

func (m *listMap) Size() int64    { return m.size }
func (m *listMap) Granule() int64 { return m.granule }

func (m *listMap) Lookup(_ context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return dst, err
	}
	t := blockmap.NewTiler(guest, n, dst)
	for more := true; more; {
		at := t.Next()
		if at >= m.size {
			t.Add(blockmap.Extent{Guest: at, Len: guest + n - at, Kind: blockmap.Zero})
			break
		}
		i := sort.Search(len(m.list), func(i int) bool { return m.list[i].End() > at })
		if i < len(m.list) && m.list[i].Guest <= at {
			more = t.Add(m.list[i])
			continue
		}
		end := m.size
		if i < len(m.list) {
			end = m.list[i].Guest
		}
		more = t.Add(blockmap.Extent{Guest: at, Len: end - at, Kind: blockmap.Unmapped})
	}
	return t.Extents(), nil
}

// randomMap draws a map with clusters of all kinds.
func randomMap(t *rapid.T, label string, granule, clusters int64) *listMap {
	m := &listMap{size: granule*clusters - rapid.Int64Range(0, granule-1).Draw(t, label+" short"), granule: granule}
	for c := int64(0); c < clusters; c++ {
		e := blockmap.Extent{Guest: c * granule, Len: min(granule, m.size-c*granule)}
		switch e.Kind = blockmap.Kind(rapid.IntRange(0, 3).Draw(t, label+" kind")); e.Kind {
		case blockmap.Unmapped:
			continue
		case blockmap.Data:
			e.Host = rapid.Int64Range(1, clusters).Draw(t, label+" host") * granule
		case blockmap.Packed:
			e.Host, e.PackedLen = 1<<40+c*granule, 512
		}
		if e.Len > 0 {
			m.list = append(m.list, e)
		}
	}
	m.list = blockmap.Coalesce(nil, m.list)
	return m
}

func fixedPile(seed int, depth int) ([]blockmap.Map, maptest.Truth) {
	return rapid.Custom(func(t *rapid.T) pile {
		var p pile
		for range depth {
			p = append(p, randomMap(t, "layer", 4096<<rapid.IntRange(0, 2).Draw(t, "bits"), rapid.Int64Range(1, 40).Draw(t, "clusters")))
		}
		return p
	}).Example(seed).split()
}

type pile []blockmap.Map

func (p pile) split() ([]blockmap.Map, maptest.Truth) {
	return p, func(guest int64) blockmap.Kind {
		for _, m := range p {
			e, err := m.Lookup(context.Background(), guest, 1, nil)
			if err != nil {
				panic(err)
			}
			if e[0].Kind != blockmap.Unmapped {
				return e[0].Kind
			}
		}
		return blockmap.Zero
	}
}

func TestOverlayConformance(t *testing.T) {
	for seed := range 5 {
		for _, depth := range []int{1, 2, 7} {
			maptest.Run(t, func(*testing.T) (blockmap.Map, maptest.Truth) {
				maps, truth := fixedPile(seed, depth)
				return blockmap.NewOverlay(maps...), truth
			}, maptest.AllocFree(), maptest.MixedGranules())
		}
	}
}

func collect(t *rapid.T, m blockmap.Map, guest, n int64) []blockmap.Extent {
	var all []blockmap.Extent
	for e, err := range blockmap.All(context.Background(), m, guest, n) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	return blockmap.Coalesce(nil, all)
}

// Resolve and the walk by Lookup are two ways to the same answer.
func TestResolveEqualsLookup(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var maps []blockmap.Map
		for range rapid.IntRange(1, 6).Draw(t, "depth") {
			maps = append(maps, randomMap(t, "layer", 4096<<rapid.IntRange(0, 3).Draw(t, "bits"), rapid.Int64Range(1, 30).Draw(t, "clusters")))
		}
		o := blockmap.NewOverlay(maps...)
		guest := rapid.Int64Range(0, o.Size()).Draw(t, "guest")
		n := rapid.Int64Range(1, o.Size()+8192).Draw(t, "n")
		got, err := o.Resolve(context.Background(), guest, n, nil)
		if err != nil {
			t.Fatal(err)
		}
		if d := gocmp.Diff(collect(t, o, guest, n), got); d != "" {
			t.Fatal(d)
		}
	})
}

func TestSeekRunsDiff(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const granule = 4096
		a, b := randomMap(t, "a", granule, 20), randomMap(t, "b", granule, 20)
		ctx := context.Background()
		kind := func(m blockmap.Map, at int64) blockmap.Extent {
			e, err := m.Lookup(ctx, at, 1, nil)
			if err != nil {
				t.Fatal(err)
			}
			return e[0]
		}
		stored, differ := new(blockmap.Set), new(blockmap.Set)
		for at := int64(0); at < a.Size(); at++ {
			if at%granule != 0 && at != b.Size() {
				continue
			}
			n := min(granule-at%granule, a.Size()-at)
			if at < b.Size() {
				n = min(n, b.Size()-at)
			}
			ea, eb := kind(a, at), kind(b, at)
			if ea.Stored() {
				stored.Add(at, n)
			}
			switch {
			case ea.Stored() != eb.Stored():
				differ.Add(at, n)
			case ea.Stored() && (ea.Kind != eb.Kind || ea.Host != eb.Host):
				differ.Add(at, n)
			}
		}
		check := func(what string, want []blockmap.Range, got func(func(blockmap.Range, error) bool)) {
			var have []blockmap.Range
			for r, err := range got {
				if err != nil {
					t.Fatal(err)
				}
				have = append(have, r)
			}
			if d := gocmp.Diff(want, have); d != "" {
				t.Fatalf("%s: %s", what, d)
			}
		}
		check("runs", slices.Collect(stored.Ranges()), blockmap.Runs(ctx, a, 0, a.Size(), true))
		check("holes", slices.Collect(stored.Gaps(0, a.Size())), blockmap.Runs(ctx, a, 0, a.Size(), false))
		check("diff", slices.Collect(differ.Ranges()),
			blockmap.Diff(ctx, a, b, 0, a.Size(), func(uint16, uint16) bool { return true }))
		for _, want := range []bool{true, false} {
			from := rapid.Int64Range(0, a.Size()).Draw(t, "from")
			got, err := blockmap.Seek(ctx, a, from, want)
			if err != nil {
				t.Fatal(err)
			}
			expect := from
			for expect < a.Size() && stored.Contains(expect, 1) != want {
				expect++
			}
			if got != expect {
				t.Fatalf("seek stored=%v from %d: %d, want %d", want, from, got, expect)
			}
		}
	})
}

func TestSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 64
		var s blockmap.Set
		var model [size]bool
		t.Repeat(map[string]func(*rapid.T){
			"change": func(t *rapid.T) {
				off := rapid.Int64Range(0, size-1).Draw(t, "off")
				n := rapid.Int64Range(0, size-off).Draw(t, "n")
				add := rapid.Bool().Draw(t, "add")
				if add {
					s.Add(off, n)
				} else {
					s.Remove(off, n)
				}
				for i := off; i < off+n; i++ {
					model[i] = add
				}
			},
			"": func(t *rapid.T) {
				var have [size]bool
				last := int64(-1)
				for r := range s.Ranges() {
					if r.Len <= 0 || r.Off <= last {
						t.Fatalf("range %v after end %d", r, last)
					}
					last = r.End()
					for i := r.Off; i < r.End(); i++ {
						have[i] = true
					}
				}
				if have != model {
					t.Fatalf("have %v\nwant %v", have, model)
				}
				off := rapid.Int64Range(0, size-1).Draw(t, "query")
				n := rapid.Int64Range(1, size-off).Draw(t, "length")
				in := slices.Index(model[off:off+n], true) >= 0
				all := slices.Index(model[off:off+n], false) < 0
				if s.Overlaps(off, n) != in || s.Contains(off, n) != all {
					t.Fatalf("[%d,+%d): overlaps %v contains %v", off, n, s.Overlaps(off, n), s.Contains(off, n))
				}
				gaps := int64(0)
				for r := range s.Gaps(off, n) {
					gaps += r.Len
					for i := r.Off; i < r.End(); i++ {
						if model[i] || i < off || i >= off+n {
							t.Fatalf("gap %v", r)
						}
					}
				}
				for _, x := range model[off : off+n] {
					if x {
						gaps++
					}
				}
				if gaps != n {
					t.Fatalf("gaps and ranges make %d of %d", gaps, n)
				}
			},
		})
	})
}

func BenchmarkOverlayLookup(b *testing.B) {
	for _, depth := range []int{1, 8, 64} {
		b.Run(map[int]string{1: "depth1", 8: "depth8", 64: "depth64"}[depth], func(b *testing.B) {
			maps, _ := fixedPile(1, depth)
			o := blockmap.NewOverlay(maps...)
			buf := make([]blockmap.Extent, 0, 64)
			b.ReportAllocs()
			for b.Loop() {
				buf, _ = o.Lookup(context.Background(), 0, o.Size(), buf[:0])
			}
		})
	}
}
