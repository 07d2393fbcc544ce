package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
)

// header64 reads a field of the header of the image at path.
func header64(t testing.TB, path string, off int64) uint64 {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint64(b[off:])
}

// poke64 changes a field.
func poke64(t testing.TB, path string, off int64, v uint64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, v), off); err != nil {
		t.Fatal(err)
	}
}

// TestDirtyImages: an image that QEMU left with lazy reference counts is made
// right before the first change, and only then.
func TestDirtyImages(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, opts := range []string{
		"cluster_size=65536", "cluster_size=512,refcount_bits=64", "cluster_size=4096,refcount_bits=1", "cluster_size=16384,extended_l2=on",
	} {
		t.Run(opts, func(t *testing.T) {
			path := t.TempDir() + "/image.qcow2"
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", opts+",lazy_refcounts=on", path, "8M")
			imgtest.QemuIO(t, "qcow2", path, "write -P 1 0 100k", "write -P 2 4M 3M")
			// Killed in the middle: what was flushed counts as written.
			imgtest.Try(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 1M", "-c", "write -z 5M 64k", "-c", "flush", "-c", "sigraise 9", path)
			if header64(t, path, offIncompatible)&incompatDirty == 0 {
				t.Fatal("QEMU left no dirty bit")
			}
			if status, _ := imgtest.QemuCheck(t, path, "qcow2"); status == 0 {
				t.Fatal("QEMU left the counts right")
			}
			model := make([]byte, 8<<20)
			fill := func(off, n int, c byte) { copy(model[off:off+n], bytes.Repeat([]byte{c}, n)) }
			fill(0, 100<<10, 1)
			fill(4<<20, 3<<20, 2)
			fill(1<<20, 1<<20, 3)
			clear(model[5<<20 : 5<<20+64<<10])

			before := imgtest.SHA256File(t, path)
			img := openRW(t, path)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if imgtest.SHA256File(t, path) != before {
				t.Fatal("opening and closing changed the image")
			}
			img = openRW(t, path)
			if err := img.WriteAt(context.Background(), model[1<<20:1<<20+5], 7<<20+77, nothing()); err != nil {
				t.Fatal(err)
			}
			copy(model[7<<20+77:], model[1<<20:1<<20+5])
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if header64(t, path, offIncompatible)&incompatDirty != 0 {
				t.Error("the dirty bit is set still")
			}
			checkClean(t, path)
			same(t, "QEMU", qemuRead(t, path, ""), model)
		})
	}
}

// TestDirtyCounts: counts that are wrong in both directions, and COPIED flags
// that do not fit them, are mended with the dirty bit.
func TestDirtyCounts(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	path := t.TempDir() + "/image.qcow2"
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "4M")
	imgtest.QemuIO(t, "qcow2", path, "write -P 1 0 64k")
	imgtest.QemuImg(t, "snapshot", "-c", "s", path)
	imgtest.QemuIO(t, "qcow2", path, "write -P 2 0 32k", "write -P 3 2M 64k")
	want := qemuRead(t, path, "")
	snap := qemuRead(t, path, "s")
	img := openRW(t, path)
	if err := img.ed.ref.load(); err != nil {
		t.Fatal(err)
	}
	first := int64(img.ed.ref.table[0])
	size, err := img.f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2*(size>>12))
	for i := range b {
		b[i] = byte(i * 7 % 3)
	}
	if _, err := img.f.WriteAt(b, first); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	poke64(t, path, offIncompatible, incompatDirty)
	img = openRW(t, path)
	if err := img.ZeroAt(context.Background(), 0, 1, false, nothing()); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	want[0] = 0
	checkClean(t, path)
	same(t, "content", qemuRead(t, path, ""), want)
	same(t, "snapshot", qemuRead(t, path, "s"), snap)
}

// TestAutoclear: bits that we do not maintain are cleared with the first
// change and not before; the one of a raw data file stays.
func TestAutoclear(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	path := t.TempDir() + "/image.qcow2"
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "4M")
	imgtest.QemuIO(t, "qcow2", path, "write -P 1 0 64k")
	imgtest.QemuImg(t, "bitmap", "--add", path, "bm")
	if header64(t, path, offAutoclear) != autoclearBitmaps {
		t.Fatal("no bitmap")
	}
	poke64(t, path, offAutoclear, autoclearBitmaps|1<<40)
	before := imgtest.SHA256File(t, path)
	for _, change := range []func(*Image) error{
		func(img *Image) error { return nil },
		func(img *Image) error { return img.Sync(context.Background()) },
		func(img *Image) error { // in place: no entry changes
			return img.WriteAt(context.Background(), []byte{9}, 3, nothing())
		},
	} {
		if imgtest.SHA256File(t, path) != before {
			t.Fatal("changed without a change")
		}
		img := openRW(t, path)
		if err := errors.Join(change(img), img.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if got := header64(t, path, offAutoclear); got != 0 {
		t.Errorf("autoclear bits %#x", got)
	}
	// The stale bitmap is ignored by QEMU, and what it occupies is a leak.
	if status, out := imgtest.QemuCheck(t, path, "qcow2"); status != 3 {
		t.Errorf("qemu-img check: %d\n%s", status, out)
	}
	imgtest.QemuIO(t, "qcow2", path, "read -P 9 3 1", "write -P 4 1M 64k")
}

// TestDirtyBitmap: rebuilding the counts of an image does not free the place
// of its bitmaps, which become stale only with the change that follows.
func TestDirtyBitmap(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	path := t.TempDir() + "/image.qcow2"
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "4M")
	imgtest.QemuIO(t, "qcow2", path, "write -P 1 0 64k")
	imgtest.QemuImg(t, "bitmap", "--add", path, "bm")
	_, leaks := imgtest.QemuCheck(t, path, "qcow2")
	poke64(t, path, offIncompatible, incompatDirty)
	img := openRW(t, path)
	if err := img.WriteAt(context.Background(), []byte{9}, 3, nothing()); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if got := header64(t, path, offAutoclear) | header64(t, path, offIncompatible); got != 0 {
		t.Errorf("feature bits %#x", got)
	}
	if status, out := imgtest.QemuCheck(t, path, "qcow2"); status != 3 {
		t.Errorf("qemu-img check: %d\n%s\nbefore:\n%s", status, out, leaks)
	}
}

func poke(m *backend.Mem, b []byte, off int64) error {
	_, err := m.WriteAt(b, off)
	return err
}

// TestReadOnlyRules: what must not be written is refused by name.
func TestReadOnlyRules(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		poke func(m *backend.Mem) error
		want error
	}{
		"corrupt bit": {func(m *backend.Mem) error { return putHeader64(m, offIncompatible, incompatCorrupt) }, layers.ErrCorrupt},
		"encryption":  {func(m *backend.Mem) error { return poke(m, []byte{0, 0, 0, 2}, offCryptMethod) }, layers.ErrUnsupported},
		"unknown bit": {func(m *backend.Mem) error { return putHeader64(m, offIncompatible, 1<<33) }, layers.ErrUnsupported},
	} {
		m := backend.NewMem("image")
		if err := Create(ctx, m, CreateOptions{Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if err := c.poke(m); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(ctx, m, layers.OpenOptions{Writable: true}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	// Damage that is met later ends the change, not the program.
	for name, damage := range map[string]func(m *backend.Mem) error{
		"no refcount table":      func(m *backend.Mem) error { return putHeader64(m, offRefcountTableOffset, 0) },
		"table behind the end":   func(m *backend.Mem) error { return putHeader64(m, offRefcountTableOffset, 1<<40) },
		"header counted as free": func(m *backend.Mem) error { return poke(m, make([]byte, 8), 2<<16) },
		"crooked block":          func(m *backend.Mem) error { return poke(m, []byte{0, 0, 0, 0, 0, 2, 2, 0}, 1<<16) },
		"block behind the end":   func(m *backend.Mem) error { return poke(m, []byte{0, 1, 0, 0, 0, 0, 0, 0}, 1<<16) },
		"L1 counted as free":     func(m *backend.Mem) error { return poke(m, make([]byte, 2), 2<<16+6) },
	} {
		m := backend.NewMem("image")
		if err := Create(ctx, m, CreateOptions{Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if err := damage(m); err != nil {
			t.Fatal(err)
		}
		img, err := Open(ctx, m, layers.OpenOptions{Writable: true})
		if err == nil {
			err = img.WriteAt(ctx, []byte{1}, 0, nothing())
		}
		if !errors.Is(err, layers.ErrCorrupt) && !errors.Is(err, layers.ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestInPlaceAllocatesNothing pins the cost of the hot path.
func TestInPlaceAllocatesNothing(t *testing.T) {
	ctx := context.Background()
	for _, ext := range []bool{false, true} {
		path := t.TempDir() + "/image.qcow2"
		f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := Create(ctx, f, CreateOptions{Version: 3, Size: 16 << 20, ExtendedL2: ext}); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		img := openRW(t, path)
		p := make([]byte, 1<<20)
		below := nothing()
		if err := img.WriteAt(ctx, p, 0, below); err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{512, 4096, 1 << 20} {
			off := int64(0)
			if got := testing.AllocsPerRun(50, func() {
				if err := img.WriteAt(ctx, p[:n], off, below); err != nil {
					t.Fatal(err)
				}
				off = (off + 4608) % int64(len(p)-n+1)
			}); got != 0 {
				t.Errorf("extended %v: writing %d bytes in place allocates %v times", ext, n, got)
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSmallCache: what an editor keeps pinned stays bounded by the cache, also
// while it zeroes and writes all over a large image.
func TestSmallCache(t *testing.T) {
	ctx := context.Background()
	const size = 1 << 40
	m := backend.NewMem("image")
	if err := Create(ctx, m, CreateOptions{Version: 3, Size: size}); err != nil {
		t.Fatal(err)
	}
	cache := layers.NewCache(256 << 10)
	img, err := Open(ctx, m, layers.OpenOptions{Writable: true, Cache: cache})
	if err != nil {
		t.Fatal(err)
	}
	below := nothing()
	for i := range int64(400) {
		if err := img.WriteAt(ctx, []byte{byte(i), 1}, i*(size/400)+i*1000, below); err != nil {
			t.Fatal(err)
		}
		if b := cache.Bytes(); b > cache.Budget()+cache.Budget()/8 {
			t.Fatalf("%d bytes cached of %d", b, cache.Budget())
		}
	}
	if err := img.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range int64(400) {
		got, err := img.Lookup(ctx, i*(size/400)+i*1000, 2, nil)
		if err != nil {
			t.Fatal(err)
		}
		var b [2]byte
		if _, err := m.ReadAt(b[:], got[0].Host); err != nil || b != [2]byte{byte(i), 1} {
			t.Fatalf("write %d reads % x, %v", i, b, err)
		}
	}
	// One discard of it all.
	if err := img.ZeroAt(ctx, 0, size, true, below); err != nil {
		t.Fatal(err)
	}
	got, err := img.Lookup(ctx, 0, size, nil)
	if err != nil || len(got) != 1 || got[0].Len != size {
		t.Fatalf("after the discard: %v %v", got, err)
	}
	if err := img.closeEditor(); err != nil {
		t.Fatal(err)
	}
	if err := inspect(ctx, m, false); err != nil {
		t.Fatal(err)
	}
}

// TestZeroWholeTables: zeroing over data below makes zero clusters in L2
// tables that did not exist, exactly as far as asked.
func TestZeroWholeTables(t *testing.T) {
	ctx := context.Background()
	for _, o := range []CreateOptions{
		{Version: 3, ClusterSize: 512, Size: 300 << 10},
		{Version: 2, ClusterSize: 512, Size: 300 << 10},
		{Version: 3, ClusterSize: 16384, ExtendedL2: true, Size: 40 << 20},
	} {
		t.Run(fmt.Sprintf("v%d %d", o.Version, o.ClusterSize), func(t *testing.T) {
			img, m := memImage(t, o)
			back := imgtest.PatternBytes(1, 0, int(o.Size))
			below := layertest.NewBelow(back, 1)
			want := bytes.Clone(back)
			off, n := o.Size/10+3, o.Size*8/10
			if err := img.ZeroAt(ctx, off, n, true, below); err != nil {
				t.Fatal(err)
			}
			clear(want[off : off+n])
			got, err := readAll(img, back)
			if err != nil {
				t.Fatal(err)
			}
			same(t, "content", got, want)
			if err := img.closeEditor(); err != nil {
				t.Fatal(err)
			}
			if err := inspect(ctx, m, false); err != nil {
				t.Fatal(err)
			}
		})
	}
}
