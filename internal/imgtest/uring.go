package imgtest

import (
	"os"
	"testing"
)

// RequireURing needs root and a kernel with FUSE over io_uring, which it
// switches on for the time of the test.
func RequireURing(t testing.TB) {
	t.Helper()
	RequireRoot(t)
	RequireFuse(t)
	const parameter = "/sys/module/fuse/parameters/enable_uring"
	before, err := os.ReadFile(parameter)
	if err != nil {
		missing(t, "FUSE over io_uring: %v", err)
	}
	if err := os.WriteFile(parameter, []byte("Y"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(parameter, before, 0); err != nil {
			t.Error(err)
		}
	})
}
