package ext4

import (
	"context"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/guestfs/freespace"
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
	guests := recorded("ext")
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
			switch {
			case r.Off <= last || r.Len <= 0 || r.Off > s.Size()-r.Len:
				t.Fatalf("range %+v behind %d on %d bytes", r, last, s.Size())
			case r.Off < superOffset+superSize:
				t.Fatalf("the superblock is free: %+v", r)
			}
			last = r.End()
		}
	})
}
