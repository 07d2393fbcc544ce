package qcow2

import (
	"errors"
	"testing"

	"github.com/imagestack/imagestack/layers"
)

// TestCensusWords: both widths count alike, up to where a byte is full.
func TestCensusWords(t *testing.T) {
	for _, wide := range []bool{false, true} {
		w := newCensusWords(4, wide)
		if w.len() != 4 {
			t.Fatalf("%d words", w.len())
		}
		add := func(i int64, class layers.Role, active bool, want error) {
			t.Helper()
			if err := w.add(i, class, active); !errors.Is(err, want) {
				t.Errorf("wide %v: %v, want %v", wide, err, want)
			}
		}
		add(1, layers.RoleData, true, nil)
		add(1, layers.RoleData, false, nil)
		add(1, layers.RoleMap, false, errOtherClass)
		add(1, layers.RoleData, true, errActive)
		for range narrowCount {
			add(2, layers.RoleExtension, false, nil)
		}
		full := errNarrow
		if wide {
			full = nil
			w.wide[3] = uint32(layers.RoleData)<<wideShift | wideCount
			add(3, layers.RoleData, false, errMany)
		}
		add(2, layers.RoleExtension, false, full)
		if class, n := w.get(2); class != layers.RoleExtension || n < narrowCount {
			t.Errorf("wide %v: %v %d", wide, class, n)
		}
		if class, n := w.get(0); class != 0 || n != 0 {
			t.Errorf("wide %v: %v %d of nothing", wide, class, n)
		}
		w.clear()
		if _, n := w.get(1); n != 0 {
			t.Errorf("wide %v: %d behind clear", wide, n)
		}
	}
}

// TestCensusInParts: counted a few clusters at a time, in bytes or in words,
// the same leaks are found, and freed wherever they are.
func TestCensusInParts(t *testing.T) {
	ctx := t.Context()
	for _, part := range []int64{0, 7, 64} {
		for _, wide := range []bool{false, true} {
			img, _ := holey(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096})
			ed := img.ed
			ed.part, ed.wide = part, wide
			leak := func(c int64) int64 {
				t.Helper()
				n, err := ed.ref.count(c)
				if err == nil && n == 0 {
					ed.ref.mu.Lock()
					err = ed.ref.set(c, 1, 1)
					ed.ref.mu.Unlock()
				}
				if err != nil {
					t.Fatal(err)
				}
				return 1 - int64(n)
			}
			leaked := int64(0)
			for c := int64(0); c < ed.ref.hwm+30; c += 5 {
				leaked += leak(c)
			}
			if leaked < 20 {
				t.Fatalf("%d leaks", leaked)
			}
			if err := img.BeginRelocation(ctx, nil); err != nil {
				t.Fatal(err)
			}
			if part > 0 && ed.census.parts.GetCardinality() < 2 {
				t.Errorf("%v parts", ed.census.parts)
			}
			if n := img.Leaked(); n != leaked*img.clusterSize {
				t.Errorf("%d bytes leaked, want %d clusters", n, leaked)
			}
			got := ed.census.leaked
			freed, err := img.FreeLeaks(ctx)
			if err != nil || got != leaked || freed != leaked*img.clusterSize {
				t.Errorf("parts of %d, wide %v: %d leaks, %d bytes freed, %v; want %d", part, wide, got, freed, err, leaked)
			}
			if err := img.BeginRelocation(ctx, nil); err != nil || ed.census.leaked != 0 {
				t.Errorf("afterwards: %+v, %v", ed.census, err)
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestCensusIsBounded: by clusters, however many of them are counted at a time.
func TestCensusIsBounded(t *testing.T) {
	img, _ := holey(t, CreateOptions{Size: 16 << 20, ClusterSize: 2 << 20, RefcountBits: 1})
	ed := img.ed
	if err := img.BeginRelocation(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	defer func(table []uint64) {
		ed.ref.table = table
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}(ed.ref.table)
	for _, n := range []int64{censusBytes, censusBytes / 4, 8 << 20} {
		for clusters, fits := range map[int64]bool{maxCensus / 2: true, maxCensus * 2: false} {
			ed.ref.table = make([]uint64, clusters>>ed.ref.blockBits)
			for i := range ed.ref.table {
				ed.ref.table[i] = uint64(img.clusterSize)
			}
			parts, err := ed.censusParts(t.Context(), n)
			if fits != (err == nil) || err != nil && !errors.Is(err, layers.ErrUnsupported) {
				t.Errorf("%d clusters, %d at a time: %v", clusters, n, err)
			}
			if fits && int64(parts.GetCardinality()) != (clusters+n-1)/n {
				t.Errorf("%d clusters, %d at a time: %d parts", clusters, n, parts.GetCardinality())
			}
		}
	}
}
