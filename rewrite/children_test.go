package rewrite_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/rewrite"
)

// standsUnder expects a layer to be refused, because others than those that are
// known stand on it.
func standsUnder(t *testing.T, path string, layer int, dirs ...string) {
	t.Helper()
	o := rewrite.Options{Layer: layer, ChildDirs: dirs}
	for _, run := range []func() error{
		func() error { _, err := rewrite.Estimate(t.Context(), path, o); return err },
		func() error { _, err := rewrite.Compact(t.Context(), path, o); return err },
	} {
		if err := run(); !errors.Is(err, rewrite.ErrBase) {
			t.Errorf("layer %d of %s: %v", layer, path, err)
		}
	}
}

// mayCompact expects that nothing stands in the way.
func mayCompact(t *testing.T, path string, layer int, dirs ...string) {
	t.Helper()
	if _, err := rewrite.Estimate(t.Context(), path, rewrite.Options{Layer: layer, ChildDirs: dirs}); err != nil {
		t.Errorf("layer %d of %s: %v", layer, path, err)
	}
}

// TestForkAbove: what stands on a layer above the one to be worked on is one
// more view of it.
func TestForkAbove(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir, other := t.TempDir(), t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	small(t, path("base"))
	overlay := func(base, name string) {
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, name)
	}
	overlay("base", path("mid"))
	mayCompact(t, path("mid"), 1)
	overlay("mid", path("top"))
	mayCompact(t, path("top"), 2)
	standsUnder(t, path("mid"), 1)
	overlay(path("mid"), filepath.Join(other, "fork"))
	mayCompact(t, path("top"), 2)
	standsUnder(t, path("top"), 2, other)
	standsUnder(t, path("top"), 1, other)
	mayCompact(t, path("top"), 0, other)
}

// TestForkAboveInBundle is TestForkAbove for a bundle.
func TestForkAboveInBundle(t *testing.T) {
	dir := t.TempDir()
	xml := filepath.Join(dir, ploop.DescriptorName)
	images := imgtest.PloopBundle(t, dir, "expanded", 2, 16*mib, 3)
	mayCompact(t, dir, 2)
	standsUnder(t, images[1].Path, 1) // the top is not known then
	standsUnder(t, images[1].Path, 0)
	// An image that stands on the top.
	overlay := filepath.Join(dir, "overlay")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-F", "parallels", "-b", images[0].Path, overlay, "16M")
	standsUnder(t, dir, 2)
	mayCompact(t, overlay, 3)
	if err := os.Remove(overlay); err != nil {
		t.Fatal(err)
	}
	branch(t, xml)
	if now := imgtest.PloopChain(t, xml); len(now) != 3 || now[1] != images[1] || now[2] != images[2] {
		t.Fatalf("the bundle is at %v", now)
	}
	standsUnder(t, dir, 2)
	standsUnder(t, dir, 1)
	mayCompact(t, dir, 0)
}

// TestOtherDescriptors: which bundles an image belongs to is told by all
// descriptors around it, whatever they are called.
func TestOtherDescriptors(t *testing.T) {
	dir := t.TempDir()
	images := imgtest.PloopBundle(t, dir, "expanded", 2, 16*mib, 2)
	xml, other := filepath.Join(dir, ploop.DescriptorName), filepath.Join(dir, "other.xml")
	text, err := os.ReadFile(xml)
	if err != nil {
		t.Fatal(err)
	}
	write := func(path string, old, now string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(text), old, now)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	alone := func(path string, dirs ...string) error {
		_, err := rewrite.Compact(t.Context(), path, rewrite.Options{ChildDirs: dirs, Open: open.Options{Format: "ploop"}})
		return err
	}
	// A copy says the same.
	write(other, "", "")
	mayCompact(t, dir, 1)
	mayCompact(t, other, 1)
	// A branch that only the other one knows.
	upper := filepath.Base(images[0].Path)
	imgtest.Run(t, "cp", images[0].Path, filepath.Join(dir, "branch"))
	write(other, upper, "branch")
	standsUnder(t, dir, 1)
	standsUnder(t, other, 1)
	mayCompact(t, dir, 0)
	// The upper image is not taken for one that stands alone.
	if err := os.Remove(xml); err != nil {
		t.Fatal(err)
	}
	write(other, "", "")
	mayCompact(t, other, 1)
	if err := alone(images[0].Path); !errors.Is(err, layers.ErrUnsupported) || !strings.Contains(err.Error(), other) {
		t.Errorf("%v", err)
	}
	standsUnder(t, images[1].Path, 0)
	// The same from another directory, and the control.
	far := t.TempDir()
	write(filepath.Join(far, ploop.DescriptorName), "<File>", "<File>"+dir+"/")
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	if err := alone(images[0].Path, far); !errors.Is(err, layers.ErrUnsupported) {
		t.Errorf("%v", err)
	}
	standsUnder(t, images[1].Path, 0, far)
	if err := alone(images[0].Path); err != nil {
		t.Errorf("the control: %v", err)
	}
}

// TestDamagedDescriptorBeside: one beside a qcow2 image, which no bundle has,
// is nobody's business; one in a directory that was named is told of.
func TestDamagedDescriptorBeside(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	home, other := t.TempDir(), t.TempDir()
	for _, dir := range []string{home, other} {
		if err := os.WriteFile(filepath.Join(dir, ploop.DescriptorName), []byte("<"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(home, "image")
	small(t, image)
	mayCompact(t, image, 0, other)
	raw := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(raw, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := rewrite.Estimate(t.Context(), raw, rewrite.Options{ChildDirs: []string{other}, Open: open.Options{Format: "raw"}})
	if err != nil || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], other) {
		t.Errorf("%+v, %v", r, err)
	}
}
