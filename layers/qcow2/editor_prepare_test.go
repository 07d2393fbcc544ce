package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// prepared runs change on an image with the recorder below it and judges
// every state that a power cut may leave, first with all syncs and then with
// each of the given ones left out, which judge has to notice.
func prepared(t *testing.T, path string, change func(*Image) error, needed []int, judge func(m *backend.Mem) error) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := backend.NewMemBytes("image", b)
	rec := backend.NewRecorder()
	f, err := rec.Wrap(m)
	if err != nil {
		t.Fatal(err)
	}
	img := reopenMem(t, f, m)
	if err := change(img); err != nil {
		t.Fatal(err)
	}
	if err := img.closeEditor(); err != nil {
		t.Fatal(err)
	}
	verdict := func(ignore int) error {
		for s := range rec.States(backend.StateOptions{Exhaustive: 5, Random: 40, MaxPerEpoch: 80, Seed: 1, IgnoreSync: ignore}) {
			if err := judge(s.Files[0]); err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
		}
		return nil
	}
	if err := verdict(0); err != nil {
		t.Fatal(err)
	}
	for _, i := range needed {
		if verdict(i) == nil {
			t.Errorf("nothing notices that sync %d of %d is left out", i, rec.SyncCalls())
		}
	}
}

// TestAutoclearPowerCut: at no moment do changed data stand beside a bit that
// calls the bitmaps consistent.
func TestAutoclearPowerCut(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "256k")
	imgtest.QemuIO(t, "qcow2", path, "write -P 1 0 256k")
	imgtest.QemuImg(t, "bitmap", "--add", path, "bm")
	before := qemuRead(t, path, "")
	prepared(t, path, func(img *Image) error {
		return img.WriteAt(context.Background(), []byte("changed"), 77777, nothing())
	}, []int{1}, func(m *backend.Mem) error {
		changed := !bytes.Equal(memContent(t, m, ""), before)
		if bits := be64(m.Bytes()[offAutoclear:]); changed && bits != 0 {
			return fmt.Errorf("changed, with autoclear bits %#x", bits)
		}
		return nil
	})
}

// TestDirtyPowerCut: while the counts are rebuilt the dirty bit stays until
// they are right and durable, and no content is lost.
func TestDirtyPowerCut(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, opts := range []string{"cluster_size=512,refcount_bits=64", "cluster_size=4096"} {
		t.Run(opts, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", opts+",lazy_refcounts=on", path, "256k")
			imgtest.QemuIO(t, "qcow2", path, "write -P 1 0 64k")
			imgtest.Try(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 128k 100k", "-c", "flush", "-c", "sigraise 9", path)
			if header64(t, path, offIncompatible)&incompatDirty == 0 {
				t.Fatal("QEMU left no dirty bit")
			}
			want := readImage(t, path, nil, "")
			ctx := context.Background()
			prepared(t, path, func(img *Image) error {
				return img.WriteAt(ctx, []byte("changed"), 250<<10, nothing())
			}, []int{1}, func(m *backend.Mem) error {
				got := memContent(t, m, "")
				if !bytes.Equal(got[:250<<10], want[:250<<10]) {
					return fmt.Errorf("content is lost")
				}
				if be64(m.Bytes()[offIncompatible:])&incompatDirty != 0 {
					return nil
				}
				return inspect(ctx, m, true)
			})
		})
	}
}
