package rewrite_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/rewrite"
)

// saved writes a random image to a file.
func saved(t *testing.T, o qcow2.CreateOptions, seed uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.qcow2")
	if err := os.WriteFile(path, scribbled(t, o, seed).Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// plain is what qemu-img reads of an image, as a file.
func plain(t *testing.T, path string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "plain")
	imgtest.QemuRaw(t, "qcow2", path, out)
	return out
}

// estimated is the estimate for the image at path, and compacted what is
// reported of its compaction; both without options.
func estimated(t *testing.T, path string) *rewrite.Report {
	t.Helper()
	r, err := rewrite.Estimate(t.Context(), path, rewrite.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func compacted(t *testing.T, path string) *rewrite.Report {
	t.Helper()
	r, err := rewrite.Compact(t.Context(), path, rewrite.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestEstimateComesTrue(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	path := saved(t, qcow2.CreateOptions{Size: 8 << 20}, 11)
	before, content := imgtest.SHA256File(t, path), plain(t, path)
	est := estimated(t, path)
	if imgtest.SHA256File(t, path) != before || exists(path+".compact") {
		t.Fatal("the estimate has written")
	}
	r := compacted(t, path)
	if exists(path + ".compact") {
		t.Error("the record stayed")
	}
	if est.Move != r.Move || r.Move == 0 || est.Ideal < r.Ideal {
		t.Errorf("moved %d to %d bytes, estimated %d to %d", r.Move, r.Ideal, est.Move, est.Ideal)
	}
	if est.Steps[1] != r.Steps[1] || r.Steps[1].Bytes == 0 {
		t.Errorf("zeros: %+v, estimated %+v", r.Steps[1], est.Steps[1])
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() != r.After.Apparent || r.After.Apparent >= r.Before.Apparent {
		t.Errorf("%v, %+v", err, r)
	}
	imgtest.SameContent(t, content, plain(t, path))
}

func TestInterrupted(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	for _, how := range []struct {
		name string
		run  func(context.Context, string, rewrite.Options) (*rewrite.Report, error)
	}{{"resume", rewrite.Resume}, {"abandon", rewrite.Abandon}} {
		path := saved(t, qcow2.CreateOptions{Size: 4 << 20, ClusterSize: 4096}, 12)
		content := plain(t, path)
		if _, err := how.run(t.Context(), path, rewrite.Options{}); !errors.Is(err, rewrite.ErrNotPending) {
			t.Errorf("%s without a record: %v", how.name, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		o := rewrite.Options{MaxExtra: 16 << 10, Progress: func(p rewrite.Progress) {
			if p.Phase == rewrite.PhaseTail && p.Done > 0 {
				cancel()
			}
		}}
		if _, err := rewrite.Compact(ctx, path, o); !errors.Is(err, context.Canceled) {
			t.Fatalf("stopped: %v", err)
		}
		cancel()
		if !exists(path + ".compact") {
			t.Fatal("no record")
		}
		if _, err := rewrite.Compact(t.Context(), path, rewrite.Options{}); !errors.Is(err, rewrite.ErrPending) {
			t.Errorf("again: %v", err)
		}
		if _, err := rewrite.Estimate(t.Context(), path, rewrite.Options{}); err != nil {
			t.Errorf("estimate: %v", err)
		}
		r, err := how.run(t.Context(), path, rewrite.Options{})
		if err != nil {
			t.Fatalf("%s: %v", how.name, err)
		}
		if exists(path + ".compact") {
			t.Errorf("%s: the record stayed", how.name)
		}
		if how.name == "resume" && (r.After.Apparent > r.Ideal || !r.Resumed) {
			t.Errorf("resumed: %+v", r)
		}
		imgtest.SameContent(t, content, plain(t, path))
		if exit, out := imgtest.QemuCheck(t, path, "qcow2"); exit != 0 {
			t.Errorf("%s: qemu-img check: %d\n%s", how.name, exit, out)
		}
	}
}

func TestTurnedAway(t *testing.T) {
	ctx := t.Context()
	path := saved(t, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 4096}, 13)
	f, err := backend.Open(path, backend.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := backend.LockerOf(f).Lock(backend.WriterUse, backend.WriterUnshare); err != nil {
		t.Fatal(err)
	}
	if _, err := rewrite.Compact(ctx, path, rewrite.Options{}); !errors.Is(err, layers.ErrInUse) {
		t.Errorf("in use: %v", err)
	}
	f.Close()

	change := func(off int64, b byte) {
		t.Helper()
		f, err := backend.Open(path, backend.Options{Writable: true})
		if err == nil {
			_, err = f.WriteAt([]byte{b}, off)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, bit := range []byte{1, 2} { // dirty, corrupt
		change(79, bit)
		sum := imgtest.SHA256File(t, path)
		if _, err := rewrite.Compact(ctx, path, rewrite.Options{}); !errors.Is(err, layers.ErrCorrupt) {
			t.Errorf("incompatible bit %d: %v", bit, err)
		}
		if _, err := rewrite.Estimate(ctx, path, rewrite.Options{}); !errors.Is(err, layers.ErrCorrupt) {
			t.Errorf("estimate with incompatible bit %d: %v", bit, err)
		}
		if imgtest.SHA256File(t, path) != sum || exists(path+".compact") {
			t.Errorf("incompatible bit %d: written", bit)
		}
		change(79, 0)
	}

	// A table of zeros is a valid one, but then the disk would be leaks.
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l1 := int64(b[46])<<8 | int64(b[45])<<16 | int64(b[44])<<24 | int64(b[47])
	clear(b[l1 : l1+4096])
	lost := filepath.Join(t.TempDir(), "lost.qcow2")
	if err := os.WriteFile(lost, b, 0o600); err != nil {
		t.Fatal(err)
	}
	sum := imgtest.SHA256File(t, lost)
	if _, err := rewrite.Compact(ctx, lost, rewrite.Options{}); !errors.Is(err, layers.ErrCorrupt) || imgtest.SHA256File(t, lost) != sum {
		t.Errorf("an L1 table of zeros: %v", err)
	}
}

// TestLayers: a layer with a child is touched only when the child is known, and
// then nothing that the child may need is dropped.
func TestLayers(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	guesttest.Require(t, "mkfs.ext4")
	ctx := t.Context()
	disk := guesttest.Image(t, 64<<20)
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "4096", disk)
	dir, umount := guesttest.Mount(t, disk)
	guesttest.Age(t, dir, 3, 60, 600<<10)
	guesttest.Write(dir, "victim", 98, 5<<20)
	imgtest.Run(t, "sync", "-f", dir)
	imgtest.Run(t, "rm", filepath.Join(dir, "victim"))
	umount()
	home := t.TempDir()
	base, top := filepath.Join(home, "base.qcow2"), filepath.Join(home, "top.qcow2")
	imgtest.QemuImg(t, "convert", "-q", "-O", "qcow2", disk, base)
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	full := filepath.Join(t.TempDir(), "full")
	imgtest.QemuRaw(t, "qcow2", top, full)

	if _, err := rewrite.Compact(ctx, base, rewrite.Options{Guest: true}); !errors.Is(err, rewrite.ErrBase) {
		t.Errorf("a base: %v", err)
	}
	r, err := rewrite.Compact(ctx, top, rewrite.Options{Guest: true, Layer: 1})
	if err != nil {
		t.Fatal(err)
	}
	if r.Image != base || r.Steps[0].Bytes == 0 || r.After.Apparent >= r.Before.Apparent {
		t.Errorf("%+v", r)
	}
	now := filepath.Join(t.TempDir(), "now")
	imgtest.QemuRaw(t, "qcow2", top, now)
	sameFiles(t, full, now)

	// A file that only the upper layer knows lies in the lower one: the
	// metadata of a running guest is written later than its data.
	imgtest.Run(t, "cp", "--sparse=always", full, disk)
	dir, umount = guesttest.Mount(t, disk)
	guesttest.Write(dir, "late", 99, 12<<20) // beyond where the victim was, too
	guesttest.Write(dir, "another", 97, 4<<20)
	imgtest.Run(t, "sync", "-f", dir)
	imgtest.Run(t, "rm", filepath.Join(dir, "another"))
	umount()
	late := filepath.Join(home, "late.qcow2")
	imgtest.QemuImg(t, "convert", "-q", "-O", "qcow2", disk, late)
	// lower: the old metadata with all data of the new; upper: what differs.
	lower := filepath.Join(home, "lower.qcow2")
	mixed := filepath.Join(t.TempDir(), "mixed")
	mix(t, full, disk, mixed)
	imgtest.QemuImg(t, "convert", "-q", "-O", "qcow2", mixed, lower)
	upper := filepath.Join(home, "upper.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", late, "-F", "qcow2", upper)
	imgtest.QemuImg(t, "rebase", "-q", "-f", "qcow2", "-b", lower, "-F", "qcow2", upper)
	want := plain(t, upper)
	imgtest.SameContent(t, disk, want)
	r, err = rewrite.Compact(ctx, upper, rewrite.Options{Guest: true, Layer: 1})
	if err != nil {
		t.Fatal(err)
	}
	if r.Steps[0].Bytes == 0 {
		t.Error("nothing was dropped")
	}
	sameFiles(t, want, plain(t, upper))
	// The control: the lower layer alone says more is free.
	imgtest.Run(t, "rm", upper)
	alone, err := rewrite.Estimate(ctx, lower, rewrite.Options{Guest: true})
	if err != nil {
		t.Fatal(err)
	}
	if alone.Steps[0].Bytes < 2<<20 {
		t.Errorf("the lower layer alone has only %d bytes more to drop", alone.Steps[0].Bytes)
	}
}

// mix takes the filesystem's metadata from one image and the rest from another
// that has been written to since: what differs and was zeros before is data.
func mix(t *testing.T, old, late, to string) {
	t.Helper()
	a, err := os.ReadFile(old)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(late)
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off+4096 <= len(a); off += 4096 {
		zero := true
		for _, c := range a[off : off+4096] {
			if c != 0 {
				zero = false
				break
			}
		}
		if zero {
			copy(a[off:off+4096], b[off:off+4096])
		}
	}
	if err := os.WriteFile(to, a, 0o600); err != nil {
		t.Fatal(err)
	}
}

// sameFiles compares the files of two ext4 disks, and checks the second.
func sameFiles(t *testing.T, a, b string) {
	t.Helper()
	imgtest.Run(t, "e2fsck", "-fn", b)
	da, ua := guesttest.Mount(t, a, "ro")
	db, ub := guesttest.Mount(t, b, "ro")
	imgtest.Run(t, "diff", "-r", "--no-dereference", da, db)
	ua()
	ub()
}
