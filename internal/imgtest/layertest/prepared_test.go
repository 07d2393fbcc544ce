package layertest_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// eighth is what QEMU puts into clusters 0 to 7 of every eight: what the
// snapshot holds and what the active state holds. nothing is not written.
var eighth = [8]struct{ snapshot, active int }{
	{60, 60},           // data, shared
	{60, 59},           // data, written again
	{61, 61},           // compressed, shared
	{nothing, nothing}, //
	{62, 58},           // compressed, written again
	{0, 0},             // zero cluster
	{nothing, 57},      // compressed after the snapshot, its own
	{63, 63},           // data, shared
}

const nothing = -1

// preparedFactory opens images that QEMU has filled: data, zero and compressed
// clusters, and an internal snapshot which shares some of them and must show
// the same for ever.
func preparedFactory(t *testing.T, name, options string, granule int64) layertest.Factory {
	imgtest.Require(t, "qemu-img", "qemu-io")
	f := qcow2Factory(name, qcow2Options{CreateOptions: qcow2.CreateOptions{ClusterSize: granule}})
	f.SizeUnit = 4 * granule
	f.Initial = func(content []byte) {
		for i := range content {
			if v := eighth[int64(i)/granule%8].active; v != nothing {
				content[i] = byte(v)
			}
		}
	}
	var mu sync.Mutex
	templates := map[int64][]byte{}
	f.Create = func(_ context.Context, dir *layertest.Dir, size int64) error {
		mu.Lock()
		b, ok := templates[size]
		if !ok {
			b = template(t, options, size, granule)
			templates[size] = b
		}
		mu.Unlock()
		return create(dir, qcow2File, func(f backend.File) error {
			_, err := f.WriteAt(b, 0)
			return err
		})
	}
	f.Inspect = func(ctx context.Context, dir *layertest.Dir) error {
		l, err := open(dir, qcow2File, false, func(f backend.File) (*qcow2.Image, error) {
			return qcow2.Open(ctx, f, layers.OpenOptions{Snapshot: "s1"})
		})
		if err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
		defer func() { _ = l.Close() }() // read only
		got, want := make([]byte, l.Size()), make([]byte, l.Size())
		// Where the snapshot has nothing the layer below answers with 0xaa.
		if err := layertest.ReadLayer(ctx, l, layertest.NewBelow(bytes.Repeat([]byte{0xaa}, len(got)), 0), got, 0); err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
		for i := range want {
			want[i] = 0xaa
			if v := eighth[int64(i)/granule%8].snapshot; v != nothing {
				want[i] = byte(v)
			}
		}
		if !bytes.Equal(got, want) {
			for i := range want {
				if got[i] != want[i] {
					return fmt.Errorf("byte %d of the snapshot is %d, was %d", i, got[i], want[i])
				}
			}
		}
		return nil
	}
	return f
}

// template makes the image with QEMU.
func template(t *testing.T, options string, size, granule int64) []byte {
	path := filepath.Join(t.TempDir(), "t.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, strconv.FormatInt(size, 10))
	var first, second []string
	for i := range size / granule {
		write := func(list *[]string, how string, value int) {
			*list = append(*list, fmt.Sprintf("write -q %s -P %d %d %d", how, value, i*granule, granule))
		}
		switch i % 8 {
		case 0, 1, 7:
			write(&first, "", eighth[i%8].snapshot)
		case 2, 4:
			write(&first, "-c", eighth[i%8].snapshot)
		case 5:
			first = append(first, fmt.Sprintf("write -q -z %d %d", i*granule, granule))
		}
		switch i % 8 {
		case 1, 4:
			write(&second, "", eighth[i%8].active)
		case 6:
			write(&second, "-c", eighth[i%8].active)
		}
	}
	imgtest.QemuIO(t, "qcow2", path, first...)
	imgtest.QemuImg(t, "snapshot", "-c", "s1", path)
	if len(second) > 0 {
		imgtest.QemuIO(t, "qcow2", path, second...)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestPrepared: the suite over images that hold compressed clusters and a
// snapshot when they are opened.
func TestPrepared(t *testing.T) {
	for _, c := range []struct {
		name, options string
		granule       int64
	}{
		{"deflate", "cluster_size=4k", 4096},
		{"zstd, 1 KiB", "cluster_size=1k,compression_type=zstd", 1024},
		{"extended L2", "cluster_size=16k,extended_l2=on", 16 << 10},
		{"refcounts of 8 bits", "cluster_size=4k,refcount_bits=8", 4096},
	} {
		t.Run(c.name, func(t *testing.T) { layertest.Run(t, preparedFactory(t, c.name, c.options, c.granule)) })
	}
}

// TestTemplate: the images are what the suite believes them to be.
func TestTemplate(t *testing.T) {
	f := preparedFactory(t, "deflate", "cluster_size=4k", 4096)
	dir := layertest.NewMemDir()
	if err := f.Create(t.Context(), dir, 64<<10); err != nil {
		t.Fatal(err)
	}
	l, err := f.Open(t.Context(), dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // read only
	kinds := map[blockmap.Kind]int64{}
	for e, err := range blockmap.All(t.Context(), l, 0, l.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		kinds[e.Kind] += e.Len / 4096
	}
	for kind, n := range map[blockmap.Kind]int64{blockmap.Data: 8, blockmap.Packed: 4, blockmap.Zero: 2, blockmap.Unmapped: 2} {
		if kinds[kind] != n {
			t.Errorf("%d clusters are %s, want %d", kinds[kind], kind, n)
		}
	}
	if err := f.Inspect(t.Context(), dir); err != nil {
		t.Error(err)
	}
}
