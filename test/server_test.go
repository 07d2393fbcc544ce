package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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

// ringsOf are the io_urings that a process has.
func ringsOf(t *testing.T, pid int) (fds []string) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && strings.Contains(to, "io_uring") {
			fds = append(fds, e.Name())
		}
	}
	return fds
}
