package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/keeper"
	"github.com/imagestack/imagestack/internal/loopdev"
	"github.com/imagestack/imagestack/internal/mounttab"
)

// The test binary is mount-image when this is set.
const toolEnv = "IMAGESTACK_TEST_MOUNT_IMAGE"

func TestMain(m *testing.M) {
	// What the tool starts of itself must never run the tests: they would
	// start it again, and so on.
	if os.Getenv(toolEnv) != "" || keeper.Wanted() {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type outcome struct {
	exit           int
	stdout, stderr string
}

// command is mount-image with these arguments, not started yet.
func command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), toolEnv+"=1")
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

func runCmd(t *testing.T, cmd *exec.Cmd) outcome {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v\n%s%s", cmd.Args[1:], err, out.String(), errOut.String())
	}
	return outcome{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// want runs mount-image and fails the test unless it exits as wanted.
func want(t *testing.T, exit int, args ...string) outcome {
	t.Helper()
	o := runCmd(t, command(args...))
	if o.exit != exit {
		t.Fatalf("mount-image %q: exit %d, want %d\n%s%s", args, o.exit, exit, o.stdout, o.stderr)
	}
	return o
}

// mountDir makes a mount point that is cleared when the test ends.
func mountDir(t *testing.T) string {
	t.Helper()
	imgtest.RequireFuse(t)
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "m")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if isMounted(t, dir) {
			if o := runCmd(t, command("-u", "--force", dir)); o.exit != 0 {
				t.Errorf("cleaning up: exit %d %s", o.exit, o.stderr)
				_ = unix.Unmount(dir, unix.MNT_DETACH)
			}
		}
	})
	return dir
}

func isMounted(t *testing.T, dir string) bool {
	t.Helper()
	_, found, err := mounttab.Find(dir)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// unmounted checks that nothing is left of a mount.
func unmounted(t *testing.T, dir string) {
	t.Helper()
	if isMounted(t, dir) {
		t.Errorf("%s is still mounted", dir)
	}
	if loops, err := loopdev.Under(dir); err != nil || len(loops) > 0 {
		t.Errorf("loop devices left: %q %v", loops, err)
	}
}

func disk(dir string) string { return filepath.Join(dir, fusefs.DiskName) }

const (
	imageSize = 48 << 20
	grain     = 64 << 10
)

// rawImage makes a raw image with content and holes.
func rawImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	imgtest.RawFile(t, path, imageSize, grain, 42)
	return path
}

// kinds of images with the content of rawImage, and the flags that open them.
func images(t *testing.T) (raw string, paths map[string]string) {
	t.Helper()
	raw = rawImage(t)
	dir := t.TempDir()
	paths = map[string]string{"raw": raw}
	for format, name := range map[string]string{"qcow2": "disk.qcow2", "parallels": "disk.hds"} {
		paths[format] = filepath.Join(dir, name)
		imgtest.QemuImg(t, "convert", "-O", format, raw, paths[format])
	}
	top := filepath.Join(dir, "top.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", top)
	paths["qcow2 chain"] = top
	return raw, paths
}

// qcow2Image is a qcow2 image with the content of rawImage.
func qcow2Image(t *testing.T) (raw, qcow2 string) {
	t.Helper()
	raw = rawImage(t)
	qcow2 = filepath.Join(t.TempDir(), "disk.qcow2")
	imgtest.QemuImg(t, "convert", "-O", "qcow2", raw, qcow2)
	return raw, qcow2
}

// serverOf is the process id of the server of a mount.
func serverOf(t *testing.T, dir string) *process {
	t.Helper()
	p, _ := findServer(dir)
	if p == nil {
		t.Fatal("no server found")
	}
	t.Cleanup(p.close)
	return p
}

func contains(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s: %q does not say %q", what, text, part)
		}
	}
}
