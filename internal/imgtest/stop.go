package imgtest

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Stop stops the process pid and returns when none of its threads runs any
// more: one that has not noticed yet may take a last request from the kernel,
// and who made that waits for the answer beyond any signal. The test continues
// the process when it ends.
func Stop(t testing.TB, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGCONT) }) // it may have gone
	for end := time.Now().Add(time.Minute); !stopped(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("process %d does not stop", pid)
		}
	}
}

// stopped tells whether all threads of a process are.
func stopped(pid int) bool {
	stats, _ := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			return false
		}
		// The state follows the name, which is in parentheses (proc(5)).
		if _, after, _ := bytes.Cut(b[bytes.LastIndexByte(b, ')'):], []byte(" ")); !bytes.HasPrefix(after, []byte("T")) {
			return false
		}
	}
	return len(stats) > 0
}
