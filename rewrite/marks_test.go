package rewrite

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
)

// TestMarks: a view that was written to, replaced or removed is noticed.
func TestMarks(t *testing.T) {
	changes := map[string]func(path string) error{
		"written": func(path string) error {
			return errors.Join(os.WriteFile(path, []byte("0123"), 0o600), os.Chtimes(path, time.Time{}, time.Now().Add(time.Second)))
		},
		"longer": func(path string) error { return os.Truncate(path, 10) },
		"replaced": func(path string) error {
			return errors.Join(os.WriteFile(path+".new", []byte("abcd"), 0o600), os.Rename(path+".new", path))
		},
	}
	for name, change := range changes {
		path := filepath.Join(t.TempDir(), "view")
		if err := os.WriteFile(path, []byte("abcd"), 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := marksOf([]open.Traced{{Path: path}})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.check(); err != nil {
			t.Errorf("%s: before: %v", name, err)
		}
		if err := change(path); err != nil {
			t.Fatal(err)
		}
		if err := m.check(); !errors.Is(err, layers.ErrInUse) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := marks(nil).check(); err != nil {
		t.Error(err)
	}
}

func TestIntersect(t *testing.T) {
	a := []blockmap.Range{{Off: 0, Len: 10}, {Off: 20, Len: 10}, {Off: 40, Len: 5}}
	b := []blockmap.Range{{Off: 5, Len: 20}, {Off: 29, Len: 12}, {Off: 44, Len: 9}}
	want := []blockmap.Range{{Off: 5, Len: 5}, {Off: 20, Len: 5}, {Off: 29, Len: 1}, {Off: 40, Len: 1}, {Off: 44, Len: 1}}
	for _, p := range [][2][]blockmap.Range{{a, b}, {b, a}} {
		got := intersect(p[0], p[1])
		if len(got) != len(want) {
			t.Fatalf("%v", got)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("%v", got)
			}
		}
	}
}
