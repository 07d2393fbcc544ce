// Package imgtest is the test kit of imagestack: what a test needs of its
// machine, the programs of the trade as oracles (qemu-img, qemu-io, Debian's
// ploop), and reproducible content.
//
// Design note. A test that silently does not run is a defect, so a missing
// tool or right is reported in one place: Require and its sisters skip the
// test, and fail it where IMAGESTACK_REQUIRE=all promises that everything is
// there (make test sets it when run as root). Oracles fail the test with the
// command line and its output, so that a test reads as a list of facts.
// Nothing here knows the code under test; the conformance suites are in the
// sub-packages maptest and layertest.
package imgtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// requireAll reports whether this machine is promised to be complete.
func requireAll() bool { return os.Getenv("IMAGESTACK_REQUIRE") == "all" }

// missing skips the test, or fails it when the machine must be complete.
func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	msg := fmt.Sprintf(format, args...)
	if requireAll() {
		t.Fatalf("%s (and IMAGESTACK_REQUIRE=all)", msg)
	}
	t.Skip(msg)
}

// sbin holds the directories of system programs that the PATH of an ordinary
// user may lack.
var sbin = []string{"/usr/local/sbin", "/usr/sbin", "/sbin"}

// tool finds a program in PATH or among the system programs, "" when absent.
func tool(name string) string {
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	for _, dir := range sbin {
		if p, err := exec.LookPath(dir + "/" + name); err == nil {
			return p
		}
	}
	return ""
}

// Require needs the named programs.
func Require(t testing.TB, tools ...string) {
	t.Helper()
	var absent []string
	for _, name := range tools {
		if tool(name) == "" {
			absent = append(absent, name)
		}
	}
	if len(absent) > 0 {
		missing(t, "missing programs: %s (see make deps)", strings.Join(absent, ", "))
	}
}

// RequireRoot needs the superuser.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "needs root")
	}
}

// RequireFuse needs a usable /dev/fuse, and fusermount3 for those who are not
// root.
func RequireFuse(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		missing(t, "needs FUSE: %v", err)
		return
	}
	_ = f.Close() // only the right to open it was asked
	if os.Geteuid() != 0 {
		Require(t, "fusermount3")
	}
}

// RequireLandlock needs a kernel that can keep a process from files; available
// is what package sandbox says of that.
func RequireLandlock(t testing.TB, available bool) {
	t.Helper()
	if !available {
		missing(t, "this kernel has no Landlock")
	}
}

// RequireLoop needs the right to attach loop devices: root and
// /dev/loop-control.
func RequireLoop(t testing.TB) {
	t.Helper()
	RequireRoot(t)
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		missing(t, "needs loop devices: %v", err)
		return
	}
	_ = f.Close() // only the right to open it was asked
	Require(t, "losetup")
}

// RequireReserve needs a filesystem that can reserve space; err is what
// fallocate(2) has said.
func RequireReserve(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, unix.EOPNOTSUPP) {
		missing(t, "the filesystem of temporary files cannot reserve space")
	}
}
