package imgtest

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Aligned returns n bytes that O_DIRECT accepts everywhere, for the time of
// the test.
func Aligned(t testing.TB, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}
