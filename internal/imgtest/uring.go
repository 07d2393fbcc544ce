package imgtest

import (
	"errors"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// RequireURing needs root and a kernel with FUSE over io_uring, which it
// switches on for the time of the test. Meanwhile no other test does, of this
// program or of another: each finds it as it wants it.
func RequireURing(t testing.TB) {
	t.Helper()
	RequireRoot(t)
	RequireFuse(t)
	f, err := os.OpenFile("/sys/module/fuse/parameters/enable_uring", os.O_RDWR, 0)
	if err != nil {
		missing(t, "FUSE over io_uring: %v", err)
	}
	t.Cleanup(func() { _ = f.Close() }) // and with it the lock
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	before := make([]byte, 16)
	n, err := f.ReadAt(before, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	set := func(value []byte) {
		if _, err := f.WriteAt(value, 0); err != nil {
			t.Error(err)
		}
	}
	set([]byte("Y"))
	t.Cleanup(func() { set(before[:n]) })
}
