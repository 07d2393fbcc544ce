package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

// TestMemoryBudget: the tables of a disk of 1 TiB, of which random reads touch
// all, are twice the budget; the server stays within it and 64 MiB for all
// else.
func TestMemoryBudget(t *testing.T) {
	const size, readers, reads = 1 << 40, 4, 20_000
	const limit = layers.DefaultCacheSize + 64<<20
	image := filepath.Join(workDir(t), "large.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, strconv.Itoa(size))
	m := mountImage(t, image)
	f, err := os.OpenFile(m.file(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range uint64(readers) {
		p := imgtest.Aligned(t, 4096)
		all.Go(func() {
			r := rand.New(rand.NewPCG(1, i))
			for range reads {
				if _, err := f.ReadAt(p, r.Int64N(size/4096)*4096); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	peak, err := serverPeak(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	kib, err := strconv.ParseInt(peak, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d MiB at most", kib>>10)
	if kib > limit>>10 && !imgtest.RaceEnabled {
		t.Errorf("%d MiB, want at most %d", kib>>10, limit>>20)
	}
	m.unmount()
}

// serverPeak is the most resident memory, in KiB, that the server of the mount
// at dir has had.
func serverPeak(dir string) (kib string, err error) {
	pid := make([]byte, 32)
	n, err := syscall.Getxattr(dir, "user.imagestack.pid", pid)
	if err != nil {
		return "", err
	}
	status, err := os.ReadFile(filepath.Join("/proc", string(pid[:n]), "status"))
	if err != nil {
		return "", err
	}
	peak := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if peak == nil {
		return "", fmt.Errorf("process %s has no VmHWM", pid[:n])
	}
	return string(peak[1]), nil
}
