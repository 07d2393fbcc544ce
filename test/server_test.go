package e2e

import (
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// serverPID asks a mount for its server.
func serverPID(t *testing.T, dir string) int {
	t.Helper()
	buf := make([]byte, 32)
	n, err := unix.Getxattr(dir, "user.imagestack.pid", buf)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(buf[:n]))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
