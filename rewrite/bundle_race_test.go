package rewrite

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// TestBundleChangesMeanwhile: a snapshot that is taken between the first look
// and the lock is seen.
func TestBundleChangesMeanwhile(t *testing.T) {
	imgtest.RequirePloop(t)
	dir := t.TempDir()
	images := imgtest.PloopBundle(t, dir, "expanded", 2, 16<<20, 2)
	trace, err := open.Follow(t.Context(), dir, open.Options{})
	if err != nil || trace.Err != nil {
		t.Fatal(err, trace.Err)
	}
	now := func(layer int, opened string) error {
		return sameBundle(trace, &Options{Layer: layer}, opened)
	}
	for layer, image := range images {
		if err := now(layer, image.Path); err != nil {
			t.Errorf("layer %d: %v", layer, err)
		}
	}
	if err := now(1, images[0].Path); !errors.Is(err, layers.ErrInUse) {
		t.Errorf("another file: %v", err)
	}
	imgtest.PloopRun(t, "snapshot", filepath.Join(dir, ploop.DescriptorName))
	for layer, image := range images {
		if err := now(layer, image.Path); !errors.Is(err, ErrBase) {
			t.Errorf("layer %d: %v", layer, err)
		}
	}
}
