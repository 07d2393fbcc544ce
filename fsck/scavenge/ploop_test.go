package scavenge_test

import (
	"testing"

	"github.com/imagestack/imagestack/fsck/scavenge"
	"github.com/imagestack/imagestack/internal/imgtest"
)

func TestLostBAT(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, kind string
		size       int64
		args       []string
	}{
		{"ext4 1M", "ext4", 2 << 30, nil},
		{"xfs 1M", "xfs", 1 << 30, nil},
		{"btrfs 1M", "btrfs", 1 << 30, nil},
		{"ext4 64K", "ext4", 512 << 20, []string{"-o", "cluster_size=64k"}},
		{"xfs 64K", "xfs", 512 << 20, []string{"-o", "cluster_size=64k"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := mkfs(t, c.kind, c.size)
			img := convert(t, disk, "parallels", c.args...)
			loseBAT(t, img)
			name, r := run(t, img, scavenge.Options{})
			if r.New == "" {
				t.Fatal("nothing was rebuilt")
			}
			if code, out := imgtest.PloopCheck(t, name); code != 0 {
				t.Errorf("ploop check: %d: %s", code, out)
			}
			same(t, r, "parallels", name, disk)
		})
	}
}
