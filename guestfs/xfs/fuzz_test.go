package xfs

import (
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
)

// The recordings are judged as they are: what the target changes is seen.
func TestRecorded(t *testing.T) {
	for _, name := range []string{"xfs", "xfs-v4"} {
		g := mutate.ByName(name)
		if s, err := free(g.Image, g.Image.Size()); err != nil || s.Len() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzXFS changes numbers of group headers, trees and the log, whose checksums
// are then made right again.
func FuzzXFS(f *testing.F) {
	guesttest.Recorded(f, []*mutate.Guest{mutate.ByName("xfs"), mutate.ByName("xfs-v4")}, Free, minimumSize)
}
