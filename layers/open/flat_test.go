package open

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// A flat view on a filesystem that shares no storage is refused, and nothing
// stays open.
func TestFlatRefused(t *testing.T) {
	ctx := context.Background()
	dir, err := os.MkdirTemp("/dev/shm", "flat")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "image.qcow2")
	f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(qcow2.Create(ctx, f, qcow2.CreateOptions{Size: 64 << 20}), f.Close()); err != nil {
		t.Fatal(err)
	}
	s, err := Open(ctx, path, Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.WriteAt(ctx, make([]byte, 1<<20), 32<<20)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	if s, err := Open(ctx, path, Options{Flat: true}); !errors.Is(err, backend.ErrNotShared) {
		t.Errorf("%v, %v; want %v", s, err, backend.ErrNotShared)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, %d were before", after, before)
	}
}
