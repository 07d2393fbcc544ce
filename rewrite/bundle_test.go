package rewrite_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/rewrite"
)

const mib = 1 << 20

// bundleWriter writes into one image of a bundle as if it stood alone.
func bundleWriter(t *testing.T, image imgtest.Image, write func(s *layers.Stack) error) {
	t.Helper()
	s, err := open.Open(t.Context(), image.Path, open.Options{Writable: true, Format: image.Format})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(write(s), s.Close()); err != nil {
		t.Fatal(err)
	}
}

// fill writes a pattern, zeros for seed 0.
func fill(s *layers.Stack, seed uint64, off, n int) error {
	p := make([]byte, n)
	if seed != 0 {
		imgtest.Pattern(p, seed, int64(off))
	}
	_, err := s.WriteAt(context.Background(), p, int64(off))
	return err
}

// views is what every image of a bundle shows, the top first.
func views(t *testing.T, images []imgtest.Image) [][]byte {
	t.Helper()
	var all [][]byte
	for _, i := range images {
		o := open.Options{}
		if i.Format == "raw" {
			o.Format = "raw" // its name is that of a ploop image
		}
		s, err := open.Open(t.Context(), i.Path, o)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, s.Size())
		_, err = s.ReadAt(t.Context(), p, 0)
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

func sameViews(t *testing.T, images []imgtest.Image, want [][]byte) {
	t.Helper()
	for i, now := range views(t, images) {
		if !bytes.Equal(now, want[i]) {
			t.Errorf("%s shows something else", images[i].Path)
		}
	}
	for _, i := range images {
		if i.Format == "raw" {
			continue
		}
		if exit, out := imgtest.PloopCheck(t, i.Path); exit != 0 {
			t.Errorf("ploop check: exit %d\n%s", exit, out)
		}
	}
}

// TestLayersOfABundle: each image of a bundle can be worked on, and every one
// shows what it did.
func TestLayersOfABundle(t *testing.T) {
	for _, mode := range []string{"expanded", "raw"} {
		t.Run(mode, func(t *testing.T) {
			dir := t.TempDir()
			images := imgtest.PloopBundle(t, dir, mode, 2, 32*mib, 3)
			bundleWriter(t, images[2], func(s *layers.Stack) error {
				return errors.Join(fill(s, 1, 0, 8*mib), fill(s, 0, 8*mib, 4*mib), fill(s, 2, 16*mib, 2*mib))
			})
			bundleWriter(t, images[1], func(s *layers.Stack) error {
				// Zeros over data stay, zeros over nothing go.
				return errors.Join(fill(s, 0, 4*mib, mib), fill(s, 0, 20*mib, 3*mib), fill(s, 3, 24*mib, mib))
			})
			bundleWriter(t, images[0], func(s *layers.Stack) error {
				return errors.Join(fill(s, 4, 2*mib, mib), fill(s, 0, 28*mib, 2*mib), fill(s, 5, 30*mib, mib))
			})
			want := views(t, images)
			zeros := []int64{2 * mib, 3 * mib, 4 * mib}
			if mode == "raw" {
				zeros[2] = 22 * mib // all but the patterns was allocated
			}
			// From below: over zeros that are stored none can be dropped.
			for layer := len(images) - 1; layer >= 0; layer-- {
				sums := make([]string, len(images))
				for i, img := range images {
					sums[i] = imgtest.SHA256File(t, img.Path)
				}
				o := rewrite.Options{Layer: layer}
				est, err := rewrite.Estimate(t.Context(), dir, o)
				if err != nil {
					t.Fatal(err)
				}
				for i, img := range images {
					if imgtest.SHA256File(t, img.Path) != sums[i] {
						t.Errorf("the estimate of layer %d has changed layer %d", layer, i)
					}
				}
				r, err := rewrite.Compact(t.Context(), dir, o)
				if err != nil {
					t.Fatal(err)
				}
				for _, got := range []*rewrite.Report{est, r} {
					if step(got, rewrite.PhaseZeros) != zeros[layer] || got.Image != images[layer].Path {
						t.Errorf("layer %d: %+v", layer, got)
					}
				}
				for i, img := range images {
					// (Holes in a raw image do not show.)
					same := imgtest.SHA256File(t, img.Path) == sums[i]
					if want := i != layer || img.Format == "raw"; same != want {
						t.Errorf("layer %d: the image of layer %d has changed: %v", layer, i, !same)
					}
				}
				sameViews(t, images, want)
			}
		})
	}
}

// step is how much a step gives back.
func step(r *rewrite.Report, name rewrite.Phase) int64 {
	for _, s := range r.Steps {
		if s.Name == name {
			return s.Bytes
		}
	}
	return -1
}

// branch gives the bundle a new top on the image below the old one, which stays
// as a branch.
func branch(t *testing.T, xml string) {
	t.Helper()
	d, err := ploop.ReadDescriptor(xml)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := d.Chain("")
	if err != nil {
		t.Fatal(err)
	}
	imgtest.PloopRun(t, "snapshot", xml) // keeps the branch that the next command leaves
	imgtest.PloopRun(t, "snapshot-switch", "-u", chain[1].GUID, xml)
}

// TestBranchesOfABundle: an image on which two others stand is never touched,
// whichever branch the bundle is at.
func TestBranchesOfABundle(t *testing.T) {
	dir := t.TempDir()
	xml := filepath.Join(dir, "DiskDescriptor.xml")
	images := imgtest.PloopBundle(t, dir, "expanded", 2, 16*mib, 2)
	bundleWriter(t, images[1], func(s *layers.Stack) error { return fill(s, 0, 0, 2*mib) })
	if _, err := rewrite.Estimate(t.Context(), dir, rewrite.Options{Layer: 1}); err != nil {
		t.Fatal(err)
	}
	sum := imgtest.SHA256File(t, images[1].Path)
	branch(t, xml)
	if now := imgtest.PloopChain(t, xml); len(now) != 2 || now[1] != images[1] || now[0] == images[0] {
		t.Fatalf("the bundle is at %v", now)
	}
	for _, path := range []string{dir, xml} {
		if _, err := rewrite.Compact(t.Context(), path, rewrite.Options{Layer: 1}); !errors.Is(err, rewrite.ErrBase) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if imgtest.SHA256File(t, images[1].Path) != sum {
		t.Error("it was changed")
	}
}

// TestGuestOfABundle: of a lower image only what is free in every view goes.
func TestGuestOfABundle(t *testing.T) {
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "e2fsck")
	disk := filepath.Join(t.TempDir(), "disk")
	imgtest.Run(t, "truncate", "-s", "96M", disk)
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", disk)
	// before returns the disk as it is, then the guest works on.
	before := func(work func(dir string)) []byte {
		t.Helper()
		b, err := os.ReadFile(disk)
		if err != nil {
			t.Fatal(err)
		}
		dir, umount := guesttest.Mount(t, disk)
		work(dir)
		imgtest.Run(t, "sync", "-f", dir)
		umount()
		return b
	}
	remove := func(dir, name string) { imgtest.Run(t, "rm", filepath.Join(dir, name)) }
	fresh := before(func(dir string) {
		guesttest.Write(dir, "gone", 1, 12<<20)
		guesttest.Write(dir, "snapshot", 2, 12<<20)
		guesttest.Write(dir, "kept", 3, 4<<20)
		imgtest.Run(t, "sync", "-f", dir)
		remove(dir, "gone")
	})
	base := before(func(dir string) { remove(dir, "snapshot") })
	top := before(func(string) {})

	home := t.TempDir()
	images := imgtest.PloopBundle(t, home, "expanded", 2, int64(len(top)), 2)
	put := func(image imgtest.Image, old, now []byte) {
		t.Helper()
		bundleWriter(t, image, func(s *layers.Stack) error {
			for off := 0; off < len(now); off += mib {
				if bytes.Equal(now[off:off+mib], old[off:off+mib]) {
					continue
				}
				if _, err := s.WriteAt(t.Context(), now[off:off+mib], int64(off)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	put(images[1], make([]byte, len(fresh)), base)
	put(images[0], base, top)
	want := views(t, images)
	if !bytes.Equal(want[0], top) || !bytes.Equal(want[1], base) {
		t.Fatal("the bundle does not show the disks")
	}
	r, err := rewrite.Compact(t.Context(), home, rewrite.Options{Guest: true, Layer: 1})
	if err != nil {
		t.Fatal(err)
	}
	// "gone" goes, and "snapshot", which only the top calls free, stays.
	if got := step(r, rewrite.PhaseGuest); got < 8*mib || got > 20*mib {
		t.Errorf("%d bytes were given back: %+v", got, r)
	}
	for i, now := range views(t, images) {
		path := filepath.Join(t.TempDir(), "view")
		if err := os.WriteFile(path, now, 0o600); err != nil {
			t.Fatal(err)
		}
		imgtest.Run(t, "e2fsck", "-fn", path)
		dir, umount := guesttest.Mount(t, path)
		for name, f := range map[string]struct {
			seed uint64
			n    int
		}{"snapshot": {2, 12 << 20}, "kept": {3, 4 << 20}} {
			if i == 0 && name == "snapshot" {
				continue // removed in this view
			}
			got, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || !bytes.Equal(got, imgtest.PatternBytes(f.seed, 0, f.n)) {
				t.Errorf("view %d: %s: %v", i, name, err)
			}
		}
		umount()
	}
}
