package qcow2fsck

import (
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestRuns: runs of tables say the same as the tables one by one, whatever else
// names some of them, and however little room there is to take them apart.
func TestRuns(t *testing.T) {
	cut, kept := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		var singles, runs []tableRec
		for owner := range rapid.Int32Range(1, 3).Draw(t, "L1 tables") {
			idx := uint32(0)
			for range rapid.IntRange(0, 20).Draw(t, "stretches") {
				idx += rapid.Uint32Range(0, 3).Draw(t, "gap")
				at := rapid.Int64Range(0, 40).Draw(t, "cluster")
				same := rapid.Bool().Draw(t, "at its index") // as snapshots share tables
				copied := owner == 0 && rapid.Bool().Draw(t, "copied")
				for k := range rapid.Uint32Range(1, 30).Draw(t, "tables") {
					r := tableRec{cluster: at + int64(k), idx: idx, owner: owner, weight: 1, copied: copied}
					if same {
						r.cluster = int64(idx)
					}
					idx++
					singles = append(singles, r)
					if n := len(runs); n == 0 || !runs[n-1].extend(&r) {
						runs = append(runs, r)
					}
				}
			}
		}
		if tablesIn(runs) != int64(len(singles)) {
			t.Fatalf("%d tables in runs, want %d", tablesIn(runs), len(singles))
		}
		most := rapid.IntRange(1, 200).Draw(t, "most")
		wantCrowds, crowds := map[int64]*crowd{}, map[int64]*crowd{}
		want, _ := merge(singles, wantCrowds, most, math.MaxInt64)
		records := len(runs)
		list, hi := merge(runs, crowds, most, math.MaxInt64)
		var got []tableRec
		for i := range list {
			if list[i].more > 0 {
				kept++
			}
			for k := range list[i].n() {
				got = append(got, list[i].table(k))
			}
		}
		if hi < math.MaxInt64 {
			cut++
			// At least the first table has to be done.
			if len(want) == 0 || hi <= want[0].cluster || len(list) > most+records {
				t.Fatalf("%d records up to %d", len(list), hi)
			}
			want = slices.DeleteFunc(want, func(r tableRec) bool { return r.cluster >= hi })
			maps.DeleteFunc(wantCrowds, func(at int64, _ *crowd) bool { return at >= hi })
		}
		if !slices.Equal(got, want) {
			t.Fatalf("up to %d: got %v, want %v", hi, got, want)
		}
		if !maps.EqualFunc(crowds, wantCrowds, func(a, b *crowd) bool {
			return a.entries == b.entries && a.lo == b.lo && a.hi == b.hi && a.credit == b.credit && slices.Equal(a.rivals, b.rivals)
		}) {
			t.Fatalf("crowds: got %v, want %v", crowds, wantCrowds)
		}
	})
	if cut == 0 || kept == 0 {
		t.Fatalf("the list was cut %d times, %d runs stayed", cut, kept)
	}
}

// TestSortRecs: long lists are sorted in heaps, whatever is in them.
func TestSortRecs(t *testing.T) {
	for _, most := range []int64{1, 1000, 1 << 20, 1 << 47} {
		r := rand.New(rand.NewPCG(1, uint64(most)))
		list := make([]tableRec, 1<<17)
		for i := range list {
			list[i] = tableRec{cluster: r.Int64N(most) + 1, idx: r.Uint32N(1 << 22), owner: r.Int32N(3)}
		}
		want := slices.Clone(list)
		slices.SortFunc(want, byPlace)
		if sortRecs(list); !slices.Equal(list, want) {
			t.Errorf("clusters below %d: not sorted", most)
		}
	}
}

// TestDropRun: a table that is none is taken out of a run.
func TestDropRun(t *testing.T) {
	l := tableList{bad: map[int64]bool{}, whole: []tableRec{{cluster: 10, idx: 3, weight: 1, more: 4}, {cluster: 20, weight: 1}}}
	l.drop([]tableRec{{cluster: 12}, {cluster: 14}, {cluster: 20}})
	want := []tableRec{{cluster: 10, idx: 3, weight: 1, more: 1}, {cluster: 13, idx: 6, weight: 1}}
	if !slices.Equal(l.whole, want) {
		t.Errorf("got %v, want %v", l.whole, want)
	}
}
