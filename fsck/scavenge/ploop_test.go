package scavenge_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/fsck/scavenge"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

func TestLostBAT(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, kind string
		size       int64
		args       []string
		fs         []string
	}{
		{"ext4 1M", "ext4", 1 << 30, nil, nil},
		{"ext4 blocks of 1K", "ext4", 128 << 20, []string{"-o", "cluster_size=64k"}, []string{"-b", "1024"}},
		{"ext4 bigalloc", "ext4", 256 << 20, []string{"-o", "cluster_size=64k"}, []string{"-O", "bigalloc"}},
		{"xfs 1M", "xfs", 1 << 30, nil, nil},
		{"btrfs 1M", "btrfs", 1 << 30, nil, nil},
		{"ext4 64K", "ext4", 512 << 20, []string{"-o", "cluster_size=64k"}, nil},
		{"xfs 64K", "xfs", 512 << 20, []string{"-o", "cluster_size=64k"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := mkfs(t, c.kind, c.size, c.fs...)
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

// Files that are there several times have ends alike, of which none tells.
func TestCopies(t *testing.T) {
	t.Parallel()
	guesttest.Require(t, "mkfs.ext4")
	disk := guesttest.Image(t, 256<<20)
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", disk)
	dir, umount := guesttest.Mount(t, disk)
	first := filepath.Join(dir, "first")
	if err := os.Mkdir(first, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		guesttest.Write(first, fmt.Sprint("file", i), uint64(i), int64(i*37%20000+1))
	}
	for i := range 4 {
		imgtest.Run(t, "cp", "-a", first, filepath.Join(dir, fmt.Sprint("copy", i)))
	}
	umount()
	for _, size := range []string{"32k", "64k", "256k"} {
		img := convert(t, disk, "parallels", "-o", "cluster_size="+size)
		loseBAT(t, img)
		name, r := run(t, img, scavenge.Options{})
		if r.New == "" {
			t.Fatal("nothing was rebuilt")
		}
		same(t, r, "parallels", name, disk)
	}
}
