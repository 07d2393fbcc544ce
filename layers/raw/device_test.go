package raw_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers/raw"
)

// TestBlockDevice: a device is an image of its own length, discarded exactly
// at any byte, never made longer.
func TestBlockDevice(t *testing.T) {
	imgtest.RequireLoop(t)
	ctx := context.Background()
	const size = 8 << 20
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, bytes.Repeat([]byte{9}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	dev := strings.TrimSpace(string(imgtest.Run(t, "losetup", "--find", "--show", path)))
	t.Cleanup(func() { imgtest.Run(t, "losetup", "--detach", dev) })
	f, err := backend.Open(dev, backend.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	i := open(t, f, true)
	if i.Size() != size {
		t.Errorf("size %d", i.Size())
	}
	want := bytes.Repeat([]byte{9}, size)
	for k, r := range [][2]int64{{100, 5000}, {1 << 20, 1 << 20}, {3<<20 + 512, 4096 + 511}, {size - 7, 7}} {
		if err := i.ZeroAt(ctx, r[0], r[1], k%2 == 0, nil); err != nil {
			t.Fatalf("ZeroAt %v: %v", r, err)
		}
		clear(want[r[0] : r[0]+r[1]])
	}
	if err := i.WriteAt(ctx, []byte{1, 2, 3}, 4<<20-1, nil); err != nil {
		t.Fatal(err)
	}
	copy(want[4<<20-1:], []byte{1, 2, 3})
	if err := i.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if _, err := i.Data().ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("content differs")
	}
	var covered int64
	for covered < size {
		ext, err := i.Lookup(ctx, covered, size-covered, nil)
		if err != nil {
			t.Fatal(err)
		}
		if ext[0].Kind != blockmap.Data && ext[0].Kind != blockmap.Zero {
			t.Fatalf("%+v", ext)
		}
		covered = ext[0].End()
	}
	if _, err := i.Describe(ctx); err != nil {
		t.Error(err)
	}
	if err := raw.Create(ctx, f, size+1); err == nil {
		t.Error("a device was created longer than it is")
	}
	if err := raw.Create(ctx, f, size); err != nil {
		t.Error(err)
	}
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, size)) {
		t.Errorf("not zeroed: %v", err)
	}
	if err := i.Close(); err != nil {
		t.Error(err)
	}
}
