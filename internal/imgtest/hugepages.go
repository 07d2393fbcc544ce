package imgtest

import (
	"testing"

	"golang.org/x/sys/unix"
)

// RequireHugePages needs a kernel that makes huge pages of small ones when it
// is told to, and has memory for it.
func RequireHugePages(t testing.TB) {
	t.Helper()
	const page = 2 << 20
	m, err := unix.Mmap(-1, 0, 2*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	for i := range m {
		m[i] = 1
	}
	if err := unix.Madvise(m, unix.MADV_COLLAPSE); err != nil {
		missing(t, "huge pages: %v", err)
	}
}
