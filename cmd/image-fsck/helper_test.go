package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// exitStatus is the exit status of a program that ended by itself.
func exitStatus(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		return exit.ExitCode()
	}
	return 0
}

// TestFsckHelper: fsck(8) finds the program by the link that make install
// makes, and passes its modes, several images and exit bits.
func TestFsckHelper(t *testing.T) {
	imgtest.Require(t, "fsck", "qemu-img")
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.Symlink(os.Args[0], filepath.Join(dir, "fsck.imagestack")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"good.hds", "bad.hds", "third.hds"} {
		ploopImage(t, name)
	}
	poke(t, "bad.hds", 64+4*2, []byte{0xff, 0xff, 0xff, 0x7f})
	fsck := func(want int, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "fsck", append([]string{"-T", "-t", "imagestack"}, args...)...)
		cmd.Env = append(os.Environ(), toolEnv+"=1", "PATH="+dir+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if got := exitStatus(t, err); got != want {
			t.Errorf("fsck %q: exit %d, want %d\n%s", args, got, want, out)
		}
		return string(out)
	}
	good, bad, third := filepath.Join(dir, "good.hds"), filepath.Join(dir, "bad.hds"), filepath.Join(dir, "third.hds")
	if out := fsck(0, good); !strings.Contains(out, "good.hds: clean") {
		t.Error(out)
	}
	fsck(4, bad, "--", "-n")
	out := fsck(4, good, bad, third, "--", "-n")
	for _, line := range []string{"good.hds: clean", "bad.hds: NOT CLEAN", "third.hds: clean"} {
		if !strings.Contains(out, line) {
			t.Errorf("%q is missing:\n%s", line, out)
		}
	}
	fsck(4, bad, "--", "-a")
	fsck(1, good, bad, "--", "-y", "-f")
	fsck(0, good, bad, third, "--", "-n")
}

// terminal opens a pair of a pseudo-terminal.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	m, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(m.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(m.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	s, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return m, s
}

// Ctrl-C at a question, and during a check, exits 32 and leaves everything as
// it was.
func TestInterrupted(t *testing.T) {
	t.Chdir(t.TempDir())
	ploopImage(t, "bad.hds")
	poke(t, "bad.hds", 64+4*2, []byte{0xff, 0xff, 0xff, 0x7f})
	before := imgtest.SHA256File(t, "bad.hds")
	master, slave := terminal(t)
	defer master.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "bad.hds")
	cmd.Env = append(os.Environ(), toolEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	cmd.WaitDelay = 20 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := slave.Close(); err != nil {
		t.Fatal(err)
	}
	asked := make(chan bool)
	go func() {
		var all strings.Builder
		b := make([]byte, 4096)
		for told := false; ; {
			n, err := master.Read(b)
			all.Write(b[:n])
			if !told && strings.Contains(all.String(), "[y]es") {
				told = true
				asked <- true
			}
			if err != nil {
				if !told {
					asked <- false
				}
				return
			}
		}
	}()
	select {
	case ok := <-asked:
		if !ok {
			t.Fatal("nothing was asked")
		}
	case <-time.After(20 * time.Second):
		t.Fatal("nothing was asked in time")
	}
	if _, err := io.WriteString(master, "\x03"); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if got := exitStatus(t, err); got != 32 {
			t.Errorf("exit %d, want 32", got)
		}
	case <-time.After(20 * time.Second):
		_ = cmd.Process.Kill()
		t.Fatal("Ctrl-C did not end it: ", <-done) // killed
	}
	if names, _ := filepath.Glob("*"); imgtest.SHA256File(t, "bad.hds") != before || len(names) != 1 {
		t.Errorf("not as it was: %q", names)
	}
}
