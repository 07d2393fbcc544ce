package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// timer measures the peak of memory of commands. It is GNU time: a child's
// peak in getrusage(2) begins with what its parent had, so the parent has to
// be a small program, and not this one.
type timer struct {
	path    string
	figures string // what it writes
}

// newTimer finds GNU time, which leaves its figures in dir.
func newTimer(dir string) (timer, error) {
	path, err := exec.LookPath("time")
	if err != nil {
		return timer{}, fmt.Errorf("%w; scripts/deps bench installs or names what is missing", err)
	}
	return timer{path: path, figures: filepath.Join(dir, "figures")}, nil
}

// command is argv under the timer, with its own exit status.
func (t timer) command(ctx context.Context, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, t.path, append([]string{"-q", "-f", "%M", "-o", t.figures}, argv...)...)
	detach(cmd)
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGTERM) }
	return cmd
}

// peak is the largest resident memory, in bytes, of the command that ended
// last or of one of its children.
func (t timer) peak() (int64, error) {
	out, err := os.ReadFile(t.figures)
	if err != nil {
		return 0, err
	}
	kib, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	return kib << 10, err
}
