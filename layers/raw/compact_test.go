package raw

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// TestOwnIsWhatIsStored, in whole units, and dropping it punches.
func TestOwnIsWhatIsStored(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "disk.raw")
	const size = 1<<20 + 1000
	f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte{7}, 64<<10)
	for _, at := range []int64{0, 256 << 10, 1<<20 - 64<<10} {
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(data[:1000], 1<<20); err != nil {
		t.Fatal(err)
	}
	i, err := Open(ctx, f, layers.OpenOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := i.BeginRelocation(ctx, nil); err != nil {
		t.Fatal(err)
	}
	own := func() (found []blockmap.Range) {
		if err := i.Own(ctx, 0, size, func(e blockmap.Extent) error {
			if e.Kind != blockmap.Data || e.Host != e.Guest {
				t.Errorf("%+v", e)
			}
			found = append(found, blockmap.Range{Off: e.Guest, Len: e.Len})
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return found
	}
	want := []blockmap.Range{{Off: 0, Len: 64 << 10}, {Off: 256 << 10, Len: 64 << 10}, {Off: 960 << 10, Len: 64<<10 + 1000}}
	if got := own(); len(got) != 3 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Fatalf("%v, want %v", got, want)
	}
	if err := i.ZeroAt(ctx, 256<<10, 64<<10, true, nil); err != nil {
		t.Fatal(err)
	}
	if got := own(); len(got) != 2 {
		t.Errorf("after dropping: %v", got)
	}
	var counted int64
	if err := i.Counted(ctx, func(_, n int64) error { counted += n; return nil }); err != nil || counted != 132<<10 {
		t.Errorf("counted %d, %v", counted, err)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != size {
		t.Errorf("%v, %v", st, err)
	}
}
