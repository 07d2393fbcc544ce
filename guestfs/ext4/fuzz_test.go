package ext4

import (
	"context"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
)

// recorded are the filesystems that the fuzz targets start from.
func recorded(prefix string) (all []*mutate.Guest) {
	for _, g := range mutate.Guests() {
		if strings.HasPrefix(g.Name, prefix) {
			all = append(all, g)
		}
	}
	return all
}

// The recordings are judged as they are: what a target changes is seen.
func TestRecorded(t *testing.T) {
	for _, g := range recorded("ext") {
		s, err := free(g.Image, g.Image.Size())
		if err != nil || s.Len() == 0 {
			t.Errorf("%s: %v", g.Name, err)
		}
		info, err := Free(context.Background(), g.Image, g.Image.Size(), func(int64, int64) error { return nil })
		if dirty := g.Name == "ext4-dirty" || g.Name == "ext4-v2" || g.Name == "ext4-gdt"; err != nil || (info.Replayed > 0) != dirty {
			t.Errorf("%s: %d blocks replayed, %v", g.Name, info.Replayed, err)
		}
	}
}

// FuzzExt4 changes numbers of superblocks, descriptors, bitmaps, inodes and
// journals whose checksums are then made right again.
func FuzzExt4(f *testing.F) {
	guesttest.Recorded(f, recorded("ext"), Free, superOffset+superSize)
}
