package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
)

// openRW opens the image at path for changing, data files beside it allowed.
func openRW(t testing.TB, path string) *Image {
	t.Helper()
	f, err := backend.Open(path, backend.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	img, err := Open(context.Background(), f, layers.OpenOptions{Path: path, Writable: true,
		OpenFile: func(name string, writable bool) (backend.File, error) {
			return backend.Open(filepath.Join(filepath.Dir(path), filepath.Base(name)), backend.Options{Writable: writable})
		}})
	if err != nil {
		f.Close()
		t.Fatal(err)
	}
	return img
}

// readImage is the content of the image at path as this package reads it.
func readImage(t testing.TB, path string, below []byte, snapshot string) []byte {
	t.Helper()
	img := openRO(t, path, layers.OpenOptions{Snapshot: snapshot})
	got, err := readAll(img, below)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	return got
}

// qemuRead is the content as QEMU reads it.
func qemuRead(t testing.TB, path, snapshot string) []byte {
	t.Helper()
	out := path + ".raw"
	defer os.Remove(out)
	args := []string{"convert", "-f", "qcow2", "-O", "raw"}
	if snapshot != "" {
		args = append(args, "-l", "snapshot.name="+snapshot)
	}
	imgtest.QemuImg(t, append(args, path, out)...)
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %#x is %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

// fileLength is the length of a file, 0 when there is none.
func fileLength(t testing.TB, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if os.IsNotExist(err) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func checkClean(t testing.TB, path string) {
	t.Helper()
	if status, out := imgtest.QemuCheck(t, path, "qcow2"); status != 0 {
		t.Fatalf("qemu-img check: status %d\n%s", status, out)
	}
}

// change makes one random change of img and of the model.
func change(t testing.TB, rng *rand.Rand, img *Image, model []byte, below layers.Below) string {
	t.Helper()
	ctx := context.Background()
	size, cs := int64(len(model)), img.Granule()
	off := rng.Int64N(size)
	var n int64
	switch rng.IntN(5) {
	case 0:
		n = 1 + rng.Int64N(700)
	case 1:
		off, n = off&^511, 512*(1+rng.Int64N(8))
	case 2:
		off, n = off&^(cs-1), cs*(1+rng.Int64N(4))
	case 3:
		n = 1 + rng.Int64N(3*cs)
	case 4:
		off, n = off&^(cs/32|511), 1+rng.Int64N(cs)
	}
	n = min(n, size-off)
	switch k := rng.IntN(10); {
	case k < 5:
		p := make([]byte, n)
		imgtest.Pattern(p, rng.Uint64(), off)
		if err := img.WriteAt(ctx, p, off, below); err != nil {
			t.Fatalf("write %d +%d: %v", off, n, err)
		}
		copy(model[off:], p)
		return fmt.Sprintf("write %d +%d", off, n)
	case k < 9:
		punch := k < 7
		if err := img.ZeroAt(ctx, off, n, punch, below); err != nil {
			t.Fatalf("zero %d +%d: %v", off, n, err)
		}
		clear(model[off : off+n])
		return fmt.Sprintf("zero %d +%d punch %v", off, n, punch)
	}
	if err := img.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	return "sync"
}

// TestEditQemuImages changes images that QEMU made, of every shape, and lets
// QEMU judge and change the result.
func TestEditQemuImages(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, c := range []struct {
		name    string
		cluster int
		opts    string
		kinds   string // z zero clusters, c compressed ones, s a snapshot, b a backing file
	}{
		{"v3-512", 512, "", "zcs"},
		{"v3-512-rc64", 512, "refcount_bits=64", "zcb"},
		{"v3-1k-rc1", 1 << 10, "refcount_bits=1", "zb"},
		{"v3-4k-rc2", 4 << 10, "refcount_bits=2", "zsb"},
		{"v3-4k-rc4", 4 << 10, "refcount_bits=4", "zcb"},
		{"v3-4k-rc8", 4 << 10, "refcount_bits=8", "zcsb"},
		{"v3-4k-rc32", 4 << 10, "refcount_bits=32", "zcs"},
		{"v3-64k", 64 << 10, "lazy_refcounts=on", "zcsb"},
		{"v3-2m", 2 << 20, "", "zcs"},
		{"v2-512", 512, "compat=0.10", "cs"},
		{"v2-4k", 4 << 10, "compat=0.10", "csb"},
		{"v2-64k", 64 << 10, "compat=0.10", "csb"},
		{"zstd-4k", 4 << 10, "compression_type=zstd", "zcsb"},
		{"zstd-64k", 64 << 10, "compression_type=zstd", "zcs"},
		{"extl2-16k", 16 << 10, "extended_l2=on", "zcsb"},
		{"extl2-64k-zstd", 64 << 10, "extended_l2=on,compression_type=zstd", "zcsb"},
		{"data-4k", 4 << 10, "data_file=DATA", "zb"},
		{"data-64k-extl2", 64 << 10, "data_file=DATA,extended_l2=on", "zb"},
		{"data-raw-4k", 4 << 10, "data_file=DATA,data_file_raw=on", "z"},
		{"data-raw-64k-extl2", 64 << 10, "data_file=DATA,data_file_raw=on,extended_l2=on", "z"},
		{"prealloc-4k", 4 << 10, "preallocation=metadata", "zs"},
		{"prealloc-16k-extl2", 16 << 10, "preallocation=metadata,extended_l2=on", "zs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			has := func(k string) bool { return strings.Contains(c.kinds, k) }
			dir := t.TempDir()
			path := filepath.Join(dir, "image.qcow2")
			data := filepath.Join(dir, "image.data")
			cs := int64(c.cluster)
			size := min(60*cs, 8<<20) + cs/2 + 512
			opts := fmt.Sprintf("cluster_size=%d", cs)
			if c.opts != "" {
				opts += "," + strings.ReplaceAll(c.opts, "DATA", data)
			}
			args := []string{"create", "-q", "-f", "qcow2", "-o", opts}
			var back []byte
			if has("b") {
				back = make([]byte, size*3/4/512*512) // shorter than the image
				imgtest.Pattern(back, 7, 0)
				clear(back[len(back)/3 : len(back)/2])
				base := filepath.Join(dir, "base.raw")
				if err := os.WriteFile(base, back, 0o600); err != nil {
					t.Fatal(err)
				}
				args = append(args, "-b", base, "-F", "raw")
			}
			imgtest.QemuImg(t, append(args, path, fmt.Sprint(size))...)
			seed := uint64(len(c.name)) + uint64(c.cluster)
			rng := rand.New(rand.NewPCG(seed, 1))
			fill := func(first bool) {
				var cmds []string
				if first && has("c") { // QEMU compresses into free clusters only
					for at := int64(0); at < size/cs; at += 2 + rng.Int64N(3) {
						cmds = append(cmds, fmt.Sprintf("write -c -P %d %d %d", 1+rng.IntN(250), at*cs, cs))
					}
				}
				for range 14 {
					off := rng.Int64N(size/cs) * cs
					n := min(cs*(1+rng.Int64N(3)), size/cs*cs-off)
					switch k := rng.IntN(6); {
					case k == 2 && has("z"):
						cmds = append(cmds, fmt.Sprintf("write -z %d %d", off, n))
					case k == 3 && has("z"):
						cmds = append(cmds, fmt.Sprintf("write -z -u %d %d", off, n))
					default:
						off += rng.Int64N(cs/512) * 512
						n = min(512*(1+rng.Int64N(n/512)), size/512*512-off)
						cmds = append(cmds, fmt.Sprintf("write -P %d %d %d", 1+rng.IntN(250), off, n))
					}
				}
				imgtest.QemuIO(t, "qcow2", path, cmds...)
			}
			fill(true)
			var snap []byte
			if has("s") {
				snap = qemuRead(t, path, "")
				imgtest.QemuImg(t, "snapshot", "-c", "before", path)
				fill(false)
			}
			below := layertest.NewBelow(back, 1)
			model := qemuRead(t, path, "")
			same(t, "before", readImage(t, path, back, ""), model)
			for round := range 2 {
				length := fileLength(t, data) // QEMU rounds it up
				img := openRW(t, path)
				var log []string
				for range 40 {
					log = append(log, change(t, rng, img, model, below))
				}
				got, err := readAll(img, back)
				if err != nil {
					t.Fatal(err)
				}
				same(t, fmt.Sprintf("round %d, open, after %s", round, strings.Join(log, "; ")), got, model)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				checkClean(t, path)
				same(t, "reopened", readImage(t, path, back, ""), model)
				same(t, "QEMU", qemuRead(t, path, ""), model)
				if strings.Contains(c.opts, "raw=on") {
					raw, err := os.ReadFile(data)
					if err != nil {
						t.Fatal(err)
					}
					if int64(len(raw)) != max(length, size) {
						t.Fatalf("the data file of %d bytes has %d now", length, len(raw))
					}
					same(t, "raw data file", raw[:size], model)
				}
				if has("s") {
					same(t, "snapshot", readImage(t, path, back, "before"), snap)
					same(t, "snapshot, by QEMU", qemuRead(t, path, "before"), snap)
				}
				fill(false) // QEMU goes on with what we left
				checkClean(t, path)
				model = qemuRead(t, path, "")
				same(t, "after QEMU", readImage(t, path, back, ""), model)
			}
			if has("s") {
				imgtest.QemuImg(t, "snapshot", "-a", "before", path)
				checkClean(t, path)
				if got := readImage(t, path, back, ""); !bytes.Equal(got, snap) {
					t.Fatal("the snapshot, applied by QEMU, differs")
				}
			}
		})
	}
}
