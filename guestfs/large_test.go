package guestfs

import (
	"os"
	"runtime"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

// Filesystems of 15 TiB (a file on ext4 cannot have more) are judged in little
// memory: everything that is allocated on the way counts, as if nothing of it
// were freed.
func TestLargeFilesystems(t *testing.T) {
	const size, limit = 15 << 40, 64 << 20
	for _, c := range [][]string{
		{"mke2fs", "-q", "-F", "-t", "ext4", "-O", "64bit,sparse_super2,^resize_inode", "-E", "lazy_itable_init=1,lazy_journal_init=1,num_backup_sb=1", "-J", "size=4", "-N", "2000000"},
		{"mkfs.xfs", "-q", "-l", "size=64m"},
		{"mkfs.btrfs", "-q"},
	} {
		t.Run(c[0], func(t *testing.T) {
			imgtest.Require(t, c[0])
			path := guesttest.Image(t, size)
			imgtest.Run(t, c[0], append(c[1:], path)...)
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			rep, err := Free(t.Context(), f, size, Options{})
			runtime.ReadMemStats(&after)
			if err != nil || rep.Areas[0].Refusal != nil || rep.Bytes() < size/100*99 {
				t.Fatalf("%v, %+v", err, rep.Areas)
			}
			if n := after.TotalAlloc - before.TotalAlloc; n > limit {
				t.Errorf("%d bytes were allocated", n)
			}
		})
	}
}
