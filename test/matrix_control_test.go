package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// shell is a command that does what the tools must not do; $1 is the
// directory.
func shell(script string) func(r *matrixRun) (outcome, error) {
	return func(r *matrixRun) (outcome, error) { return r.tool("/bin/sh", "-c", script, "sh", r.dir) }
}

// TestFaultMatrixNotices is the negative control of the matrix: programs that
// take faults badly are found out, each for its own fault.
func TestFaultMatrixNotices(t *testing.T) {
	imgtest.RequireRoot(t)
	imgtest.RequireFuse(t)
	quiet := func(script string) func(*matrixRun) error {
		return func(r *matrixRun) error {
			o, err := shell(script)(r)
			return errors.Join(err, r.exits(o, 1))
		}
	}
	untouched := func(but ...string) func(*matrixRun) error {
		return func(r *matrixRun) error { return r.untouched(but...) }
	}
	for _, c := range []struct {
		name, want string
		run        func(*matrixRun) error
		judge      func(*matrixRun) error
	}{
		{"half of the answer", "exit 0, want [1]", quiet(`cat "$1/disk.raw" 2>/dev/null | cksum`), untouched()},
		{"no reason given", "the message does not say", quiet(`cat "$1/disk.raw" >/dev/null 2>&1 || exit 1; echo well`), untouched()},
		{"no file named", "the message does not name", quiet(`cat "$1/disk.raw" >/dev/null 2>&1 || { echo "x: input/output error" >&2; exit 1; }; echo well`), untouched()},
		{"another exit code", "exit 7, want [1]", quiet(`cat "$1/disk.raw" >/dev/null || exit 7; echo well`), untouched()},
		{"a file left behind", "was left behind", quiet(`set -e; echo a > "$1/new"; cat "$1/disk.raw" > /dev/null; rm "$1/new"; echo well`), untouched()},
		{"written in place without an undo file", "there is no undo file", func(r *matrixRun) error {
			_, err := shell(`set -e; cat "$1/disk.raw" >/dev/null; printf x | dd of="$1/disk.raw" conv=notrunc status=none; sync "$1/disk.raw"`)(r)
			return err
		}, func(r *matrixRun) error {
			if r.mode == modeNone {
				return nil
			}
			return r.undone("disk.raw")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			pristine := filepath.Join(workDir(t), "files")
			if err := os.Mkdir(pristine, 0o755); err != nil {
				t.Fatal(err)
			}
			smallRaw(t, pristine)
			m := newMatrixRow(t, row{name: c.name, run: c.run, judge: c.judge}, pristine, 1)
			var said []string
			m.complain = func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) }
			full := *matrixFull
			*matrixFull = true
			m.all(new(tally))
			*matrixFull = full
			if !strings.Contains(strings.Join(said, "\n"), c.want) {
				t.Errorf("%q is not noticed, only\n%s", c.want, strings.Join(said, "\n"))
			}
		})
	}
}

// TestFaultGuestNotices is the negative control of what the guest of a mount
// knows: what was synced may not be anything else, what was not may.
func TestFaultGuestNotices(t *testing.T) {
	before := imgtest.PatternBytes(1, 0, matrixDisk)
	g := newFaultGuest(nil, before)
	s := guestStep{off: 8 << 10, n: 4 << 10}
	g.tried(1, s, true)
	disk := append([]byte{}, before...)
	if err := g.check(disk, 0, false); err != nil {
		t.Errorf("a write that was not synced may be lost: %v", err)
	}
	if g.check(disk, 0, true) == nil {
		t.Error("a write that is lost while the mount lives is not noticed")
	}
	g.synced()
	if g.check(disk, 0, false) == nil {
		t.Error("a synced write that is lost is not noticed")
	}
	for i := s.off / sector; i < (s.off+s.n)/sector; i++ {
		copy(disk[i*sector:], g.value(1, int(i)))
	}
	if err := g.check(disk, 0, false); err != nil {
		t.Error(err)
	}
	g.tried(2, s, false) // this one failed: both are possible, a third is not
	if err := g.check(disk, 0, false); err != nil {
		t.Error(err)
	}
	disk[s.off] ^= 1
	if g.check(disk, 0, false) == nil {
		t.Error("a byte that nobody wrote is not noticed")
	}
}
