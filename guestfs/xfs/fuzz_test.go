package xfs

import (
	"context"
	"testing"

	"github.com/imagestack/imagestack/guestfs/freespace"
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
	guests := []*mutate.Guest{mutate.ByName("xfs"), mutate.ByName("xfs-v4")}
	for i, g := range guests {
		for n := range g.Fields() {
			f.Add(byte(i), []byte{0, byte(n >> 8), byte(n), byte(n), byte(3 * n)})
		}
		f.Add(byte(i), []byte{1, 0, 3, 0, 3})
	}
	f.Fuzz(func(t *testing.T, which byte, script []byte) {
		s := guests[int(which)%len(guests)].Damage(script)
		c := freespace.NewCollector(1<<16, 1)
		if _, err := Free(context.Background(), s, s.Size(), c.Add); err != nil {
			if freespace.AsRefusal(err) == nil {
				t.Errorf("no refusal: %v", err)
			}
			return
		}
		last := int64(-1)
		for _, r := range c.Ranges() {
			if r.Off <= last || r.Len <= 0 || r.Off > s.Size()-r.Len || r.Off < minimumSize {
				t.Fatalf("range %+v behind %d on %d bytes", r, last, s.Size())
			}
			last = r.End()
		}
	})
}
