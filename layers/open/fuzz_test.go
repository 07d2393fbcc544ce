package open_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// seeds are small images of all formats with some content.
func seeds(f *testing.F) [][]byte {
	ctx := context.Background()
	var all [][]byte
	add := func(m *backend.Mem, l layers.Editor, err error) {
		if err != nil {
			f.Fatal(err)
		}
		s, err := layers.NewStack([]layers.Layer{l}, layers.StackOptions{Writable: true})
		if err != nil {
			f.Fatal(err)
		}
		_, err = s.WriteAt(ctx, imgtest.PatternBytes(1, 0, 5000), 10_000)
		err = errors.Join(err, s.ZeroAt(ctx, 11_000, 70_000, true), s.Sync(ctx))
		if err := errors.Join(err, s.Close()); err != nil {
			f.Fatal(err)
		}
		all = append(all, bytes.Clone(m.Bytes()))
	}
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 512}, {ClusterSize: 4096, Version: 2}, {ClusterSize: 16384, ExtendedL2: true}, {ClusterSize: 4096, RefcountBits: 1},
	} {
		m := backend.NewMem("seed")
		o.Size = 1 << 18
		if err := qcow2.Create(ctx, m, o); err != nil {
			f.Fatal(err)
		}
		l, err := qcow2.Open(ctx, m, layers.OpenOptions{Writable: true})
		add(m, l, err)
	}
	for _, v := range []int{1, 2} {
		m := backend.NewMem("seed")
		if err := ploop.Create(ctx, m, ploop.CreateOptions{Size: 1 << 18, ClusterSize: 32768, Version: v}); err != nil {
			f.Fatal(err)
		}
		l, err := ploop.Open(ctx, m, layers.OpenOptions{Writable: true})
		add(m, l, err)
	}
	return all
}

// fuzzFile is where the targets put their images: one file for each process,
// in memory where that is possible.
func fuzzFile(t testing.TB) string {
	dir := "/dev/shm"
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		dir = os.TempDir()
	}
	path := filepath.Join(dir, fmt.Sprintf("imagestack-fuzz-%d", os.Getpid()))
	t.Cleanup(func() { _ = os.Remove(path) })
	return path
}

// FuzzImage gives images whose fields were damaged, and any bytes, to the
// tools' entry: opening and reading them ends, in bounded time, with content
// or an error, and changes nothing; so does changing them, except that then the
// file may change.
//
// which is an image of seeds, whose fields the script changes; behind the
// last one the script is the image.
func FuzzImage(f *testing.F) {
	images := seeds(f)
	formats := []string{"qcow2", "qcow2", "qcow2", "qcow2", "ploop", "ploop"}
	for i := range images {
		for k := byte(0); k < 24; k++ {
			f.Add(byte(i), []byte{0, k, k, 3 * k, 0, 40 + k, 6, k}, k&1 == 0)
		}
	}
	f.Add(byte(255), []byte("raw"), false)
	f.Add(byte(255), []byte("KDMV"), false)
	f.Add(byte(255), images[0][:600], true)
	f.Add(byte(0), []byte("100010z000\f\x00"), true) // data whose reference count says that its place is free
	path := fuzzFile(f)
	for i := range images {
		if !sound(context.Background(), f, path, images[i]) {
			f.Fatalf("seed %d is not sound", i)
		}
	}
	f.Fuzz(func(t *testing.T, which byte, script []byte, change bool) {
		ctx := context.Background()
		image := script
		if int(which) < len(formats) {
			image = mutate.Apply(formats[which], images[which], script)
		}
		if err := os.WriteFile(path, image, 0o600); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		s, err := open.Open(ctx, path, open.Options{CacheSize: 1 << 20, Writable: change})
		if err == nil {
			if off := exercise(ctx, t, s, change); off >= 0 && sound(ctx, t, path, image) {
				t.Errorf("what was written at %d does not read back", off)
			}
			err = s.Close()
			if err != nil && !change {
				t.Errorf("closing: %v", err)
			}
		}
		if _, err := open.Inspect(ctx, path, open.Options{}, nil); err != nil && err.Error() == "" {
			t.Error("an error without words")
		}
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("took %v", d)
		}
		if after, err := os.ReadFile(path); !change && (err != nil || !bytes.Equal(after, image)) {
			t.Errorf("a read-only open changed the file (%v)", err)
		}
	})
}

// sound tells whether every reference of the image is counted once. In one
// where that is not so, a write may meet what has another owner.
func sound(ctx context.Context, t testing.TB, path string, image []byte) bool {
	path += "-again"
	defer func() { _ = os.Remove(path) }()
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := open.Open(ctx, path, open.Options{Writable: true})
	if err != nil {
		return false
	}
	defer func() { _ = s.Close() }() // looked at only
	r, ok := s.Layers()[0].(layers.Relocator)
	return !ok || r.BeginRelocation(ctx, nil) == nil
}

// exercise reads both ends and some middle of the disk, and changes it. It
// returns where a write did not read back, -1 for nowhere.
func exercise(ctx context.Context, t *testing.T, s *layers.Stack, change bool) int64 {
	buf := make([]byte, 300_000)
	for _, off := range []int64{0, s.Size() / 2, s.Size() - int64(len(buf))} {
		off = max(off, 0)
		n, err := s.ReadAt(ctx, buf, off)
		if n < len(buf) && err == nil {
			t.Fatalf("read of %d bytes at %d: short without an error", n, off)
		}
		if !change {
			continue
		}
		n = int(min(s.Size()-off, 20_000))
		if _, err := s.WriteAt(ctx, buf[:n], off); err == nil && n > 0 {
			got := make([]byte, n)
			if _, err := s.ReadAt(ctx, got, off); err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(got, buf[:n]) {
				return off
			}
		}
		_ = s.ZeroAt(ctx, off, min(s.Size()-off, 200_000), true) // may fail on damage
		_ = s.Sync(ctx)
	}
	return -1
}
