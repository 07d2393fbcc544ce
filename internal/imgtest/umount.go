package imgtest

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Umount unmounts the filesystem at dir and waits until it has really let go
// of its device. Another process with a mount namespace of its own, as Ploop
// starts one, holds a copy of every mount that there was when it began; until
// it ends the filesystem lives on.
func Umount(t testing.TB, dir string) {
	t.Helper()
	device := strings.TrimSpace(string(Run(t, "findmnt", "-n", "-o", "SOURCE", "--mountpoint", dir)))
	deadline := time.Now().Add(time.Minute)
	for {
		exit, out := Try(t, "umount", dir)
		if exit == 0 {
			break
		}
		// Between fork and exec a child that another goroutine starts still
		// has our files open.
		if !strings.Contains(out, "busy") || time.Now().After(deadline) {
			t.Fatalf("umount %s: exit %d\n%s", dir, exit, out)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if st, err := os.Stat(device); err != nil || st.Mode()&os.ModeDevice == 0 {
		return
	}
	for ; ; time.Sleep(10 * time.Millisecond) {
		// The kernel grants this to nobody while the device is mounted.
		f, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
		if err == nil {
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			return
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			t.Fatalf("%s after umount %s: %v", device, dir, err)
		}
	}
}
