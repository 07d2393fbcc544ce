// Package e2e tests imagestack from end to end: the real binaries on real
// FUSE mounts, real loop devices, with real mkfs and fsck.
//
// Design note. The binaries are built once, by TestMain. Everything that a
// test makes (images, mount points, loop devices) lies under one directory,
// and a parent process sweeps that directory when the tests have ended in
// whatever way, a panic or a timeout included, so that no mount and no loop
// device outlives a run. Each test also cleans up after itself, and what it
// forgot is its failure.
package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// childEnv names the directory of a run to the process that runs the tests.
const childEnv = "IMAGESTACK_E2E_DIR"

// binDir holds the tools under test; it is first in PATH.
var binDir string

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		binDir = filepath.Join(dir, "bin")
		os.Exit(m.Run())
	}
	status, err := supervise()
	if err != nil {
		fmt.Fprintln(os.Stderr, "test:", err)
		status = max(status, 1)
	}
	os.Exit(status)
}

// supervise builds the tools, runs the tests in a child process and sweeps up.
func supervise() (status int, err error) {
	dir, err := os.MkdirTemp("", "imagestack-e2e-")
	if err != nil {
		return 1, err
	}
	defer func() {
		left := sweep(dir)
		if rm := os.RemoveAll(dir); rm != nil {
			err = errors.Join(err, rm)
		}
		if len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("the tests left behind: %q", left))
		}
	}()
	_, self, _, _ := runtime.Caller(0)
	build := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(dir, "bin")+"/", "./cmd/...")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as the Makefile does
	if imgtest.RaceEnabled {
		build.Args = append(build.Args[:2], append([]string{"-race"}, build.Args[2:]...)...)
		build.Env = nil // that of the tests
	}
	build.Dir = filepath.Dir(filepath.Dir(self))
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		return 1, err
	}
	if out, err := build.CombinedOutput(); err != nil {
		return 1, fmt.Errorf("building the tools: %w\n%s", err, out)
	}
	// Interrupts reach the child as well; here they must not end the sweeping.
	signal.Ignore(os.Interrupt, syscall.SIGTERM)
	child := exec.Command(os.Args[0], os.Args[1:]...)
	child.Env = append(os.Environ(),
		childEnv+"="+dir,
		"TMPDIR="+dir,
		"PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := child.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() < 0 {
			return 1, err // it could not be started, or a signal ended it
		}
		return exit.ExitCode(), nil
	}
	return 0, nil
}
