package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// workDir is a directory on the disk that is swept when the test ends. What
// the sweeping finds is a failure: a test undoes its own mounts.
func workDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		// The loop device of mount -o loop goes a moment after its mount.
		for range 100 {
			if len(mountsUnder(dir)) == 0 && len(loopsUnder(dir)) == 0 {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		if left := sweep(dir); len(left) > 0 && !t.Failed() {
			t.Errorf("left behind: %q", left)
		}
	})
	return dir
}

// outcome is what a tool did.
type outcome struct {
	exit           int
	stdout, stderr string
	took           time.Duration
}

// runTool runs one of the tools to its end (or that of its foreground process).
func runTool(t *testing.T, name string, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// Files, not pipes: a server in the background that kept standard output
	// open would hold up a reader of a pipe for ever.
	out, errOut := logFile(t), logFile(t)
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, name), args...)
	cmd.Stdout, cmd.Stderr = out, errOut
	began := time.Now()
	err := cmd.Run()
	o := outcome{took: time.Since(began), stdout: slurp(t, out), stderr: slurp(t, errOut)}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Fatalf("%s %q: still running after a minute\n%s%s", name, args, o.stdout, o.stderr)
	case errors.As(err, &exit):
		o.exit = exit.ExitCode()
	case err != nil:
		t.Fatalf("%s %q: %v", name, args, err)
	}
	if strings.Contains(o.stderr, "goroutine ") || strings.Contains(o.stderr, "DATA RACE") {
		t.Fatalf("%s %q: a panic or a race\n%s", name, args, o.stderr)
	}
	return o
}

func logFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.CreateTemp("", "log")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close(); os.Remove(f.Name()) })
	return f
}

func slurp(t *testing.T, f *os.File) string {
	t.Helper()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// wantExit runs a tool that must exit with the given status.
func wantExit(t *testing.T, want int, name string, args ...string) outcome {
	t.Helper()
	o := runTool(t, name, args...)
	if o.exit != want {
		t.Fatalf("%s %q: exit %d, want %d\n%s%s", name, args, o.exit, want, o.stdout, o.stderr)
	}
	return o
}

// mounted is a running mount-image.
type mounted struct {
	t    *testing.T
	dir  string
	loop string // with --loop
	cmd  *exec.Cmd
	log  *os.File
}

// file is the virtual disk.
func (m *mounted) file() string { return filepath.Join(m.dir, "disk.raw") }

// mountImage runs mount-image in the background, as a user would.
func mountImage(t *testing.T, image string, flags ...string) *mounted {
	t.Helper()
	imgtest.RequireFuse(t)
	m := &mounted{t: t, dir: mountPoint(t)}
	o := wantExit(t, 0, "mount-image", append(flags, image, m.dir)...)
	for _, flag := range flags {
		if flag == "--loop" {
			m.loop = strings.TrimSpace(o.stdout)
			if !strings.HasPrefix(m.loop, "/dev/loop") || strings.ContainsAny(m.loop, " \n") {
				t.Fatalf("mount-image --loop printed %q, want the device", o.stdout)
			}
		}
	}
	if _, err := os.Stat(m.file()); err != nil {
		t.Fatalf("mount-image exited 0 but the disk does not answer: %v", err)
	}
	t.Cleanup(func() {
		if len(mountsUnder(m.dir)) > 0 {
			runTool(t, "mount-image", "-u", m.dir)
		}
	})
	return m
}

// serveImage runs mount-image -f, whose process the test may kill.
func serveImage(t *testing.T, image string, flags ...string) *mounted {
	t.Helper()
	imgtest.RequireFuse(t)
	m := &mounted{t: t, dir: mountPoint(t), log: logFile(t)}
	m.cmd = exec.Command(filepath.Join(binDir, "mount-image"), append(append([]string{"-f"}, flags...), image, m.dir)...)
	m.cmd.Stdout, m.cmd.Stderr = m.log, m.log
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if m.cmd.ProcessState == nil {
			m.kill()
			wantExit(t, 0, "mount-image", "-u", m.dir)
		}
	})
	m.waitUntilServed()
	return m
}

func (m *mounted) waitUntilServed() {
	m.t.Helper()
	for range 1000 {
		if _, err := os.Stat(m.file()); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.t.Fatalf("mount-image -f does not answer\n%s", slurp(m.t, m.log))
}

// kill is kill -9 of the server.
func (m *mounted) kill() {
	m.t.Helper()
	if err := m.cmd.Process.Kill(); err != nil {
		m.t.Fatal(err)
	}
	_ = m.cmd.Wait() // it was killed
}

// unmount is mount-image -u, which must succeed and leave nothing.
func (m *mounted) unmount() {
	m.t.Helper()
	wantExit(m.t, 0, "mount-image", "-u", m.dir)
	if left := append(mountsUnder(m.dir), loopsUnder(m.dir)...); len(left) > 0 {
		m.t.Fatalf("mount-image -u left %q", left)
	}
	if m.cmd != nil {
		if err := m.cmd.Wait(); err != nil {
			m.t.Fatalf("mount-image -f after -u: %v\n%s", err, slurp(m.t, m.log))
		}
	}
}

func mountPoint(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(workDir(t), "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// mountGuest mounts a guest filesystem with the kernel; the returned function
// unmounts it, at the latest when the test ends.
func mountGuest(t *testing.T, device string, options string) (dir string, umount func()) {
	t.Helper()
	dir = mountPoint(t)
	imgtest.Run(t, "mount", "-o", options, device, dir)
	umount = func() {
		t.Helper()
		imgtest.Umount(t, dir)
	}
	t.Cleanup(func() {
		if len(mountsUnder(dir)) > 0 {
			imgtest.Try(t, "umount", dir)
		}
	})
	return dir, umount
}

// readRange reads a part of a file.
func readRange(t *testing.T, path string, off int64, n int) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatalf("reading %s at %d: %v", path, off, err)
	}
	return p
}

// writeRange writes to a file and makes it durable.
func writeRange(t *testing.T, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatalf("writing %s at %d: %v", path, off, err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func wantBytes(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		i := 0
		for i < len(got) && i < len(want) && got[i] == want[i] {
			i++
		}
		t.Errorf("%s: %d bytes differ from the %d wanted, first at %d", what, len(got), len(want), i)
	}
}
