// Package helper runs a program of somebody else, such as e2fsck, on a file
// whose content nobody trusts, with no more than it needs for that.
//
// Design note. Filesystem checkers are large C programs that parse what a guest
// wrote. One that the guest has taken over must be worth as little as one of
// our own parsers. Between the process that starts it (which itself parses
// nothing, see package keeper) and the program stands a stage: this program
// started anew, which sets the limits of resources, confines itself by package
// sandbox to the one file, the program's own files and the libraries, and then
// becomes the program. So the limits hold from its first instruction, and no
// other process is touched by them.
package helper

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/sandbox"
)

// Env carries the Spec to the stage. A test binary in whose environment it is
// set has to be the tool and not to run its tests.
const Env = "IMAGESTACK_HELPER"

// Spec is a program and what it may use.
type Spec struct {
	Mode sandbox.Mode
	User *sandbox.User // to become; nil stays
	Path string        // of the program, absolute
	Args []string      // without its name
	// View is the file that it works on, Size its length in bytes.
	View     string
	Size     int64
	Writable bool
	// AnyFile leaves the size of files without a limit, for a program that
	// insists on that: it can write to the view only, which has an end.
	AnyFile bool
	// KeepFD is how many descriptors from 3 up stay open.
	KeepFD int
}

// The limits of a program. Those of memory and time grow with the disk; what
// e2fsck and xfs_repair take for real filesystems is far below.
const (
	memory      = 4 << 30          // bytes of address space, for any disk
	perGiB      = 4 << 20          // more bytes for each GiB of the disk
	seconds     = 15 * 60          // of processor time, for any disk
	gibPerSec   = 1                // a second more for each GiB of the disk
	files       = 64               // open at a time
	cancelGrace = 10 * time.Second // between SIGTERM and SIGKILL
)

// Command is the program, not started yet. When ctx ends it gets SIGTERM, and
// later SIGKILL; it does not outlive the process that started it.
func Command(ctx context.Context, s Spec) (*exec.Cmd, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{os.Args[0], "(helper)", filepath.Base(s.Path)}
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", Env + "=" + string(text)}
	cmd.Dir = "/"
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = cancelGrace
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd, nil
}

// Wanted reports whether this process was started to become a helper.
func Wanted() bool { return os.Getenv(Env) != "" }

// ExitStage is the exit code of a stage that could not become the program.
const ExitStage = 126

// Be becomes the program when this process is a stage; else it returns.
func Be() {
	if !Wanted() {
		return
	}
	err := become(os.Getenv(Env))
	fmt.Fprintln(os.Stderr, "helper:", err)
	os.Exit(ExitStage)
}

func become(text string) error {
	var s Spec
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	// What was inherited without being meant to be.
	if err := unix.CloseRange(uint(3+s.KeepFD), ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("closing descriptors: %w", err)
	}
	policy, err := s.policy()
	if err != nil {
		return err
	}
	warnings, err := sandbox.Confine(policy)
	if err != nil {
		return err
	}
	for _, w := range warnings {
		fmt.Fprintln(os.Stderr, "helper:", w)
	}
	// Go's own runtime would not start new threads within the limits.
	for _, l := range s.limits() {
		if err := lower(l.resource, l.value); err != nil {
			return err
		}
	}
	args := append([]string{filepath.Base(s.Path)}, s.Args...)
	return fmt.Errorf("%s: %w", s.Path, unix.Exec(s.Path, args, []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}))
}

type limit struct {
	resource int
	value    uint64
}

func (s *Spec) limits() []limit {
	gib := uint64(max(s.Size, 0)) >> 30
	file := uint64(0)
	if s.Writable {
		file = uint64(max(s.Size, 0))
	}
	all := []limit{
		{unix.RLIMIT_CORE, 0},
		{unix.RLIMIT_NOFILE, files},
		{unix.RLIMIT_CPU, seconds + gib/gibPerSec},
		{unix.RLIMIT_AS, memory + gib*perGiB},
	}
	if !s.AnyFile {
		all = append(all, limit{unix.RLIMIT_FSIZE, file})
	}
	return all
}

// lower sets a limit that nobody raises again, if it is not lower already.
func lower(resource int, value uint64) error {
	var have unix.Rlimit
	if err := unix.Getrlimit(resource, &have); err != nil {
		return fmt.Errorf("limit %d: %w", resource, err)
	}
	value = min(value, have.Max)
	if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: value, Max: value}); err != nil {
		return fmt.Errorf("limit %d: %w", resource, err)
	}
	return nil
}

// libraries are where a program's own code, its data and its configuration
// lie, and what checkers of filesystems ask of the system.
var libraries = []string{
	"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/libexec", "/etc/ld.so.cache", "/etc/ld.so.preload",
	"/etc/e2fsck.conf", "/etc/mke2fs.conf", "/dev/zero", "/dev/urandom", "/dev/random",
	"/proc/self/mounts", "/proc/self/maps", "/proc/swaps", "/proc/meminfo", "/proc/cpuinfo", "/proc/filesystems", "/sys/devices/system/cpu",
}

func (s *Spec) policy() (sandbox.Policy, error) {
	p := sandbox.Policy{Mode: s.Mode, User: s.User}
	if s.Mode == sandbox.Off {
		return p, nil
	}
	program, err := filepath.EvalSymlinks(s.Path)
	if err != nil {
		return p, err
	}
	loader, err := interpreter(program)
	if err != nil {
		return p, err
	}
	p.Exec = []string{program}
	if loader != "" {
		p.Exec = append(p.Exec, loader)
	}
	for _, path := range libraries {
		if _, err := os.Stat(path); err == nil {
			p.Read = append(p.Read, path)
		}
	}
	p.Write = []string{"/dev/null"}
	if s.Writable {
		p.Write = append(p.Write, s.View)
	} else {
		p.Read = append(p.Read, s.View)
	}
	return p, nil
}

// Find finds a program also where only root's PATH leads.
func Find(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if p := filepath.Join(dir, name); unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	return "", &fs.PathError{Op: "find", Path: name, Err: fs.ErrNotExist}
}

// Tail keeps the last bytes that are written to it, made harmless for a
// terminal and short in JSON.
type Tail struct {
	Max int
	b   []byte
}

func (t *Tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - t.Max; over > 0 {
		t.b = slices.Delete(t.b, 0, over)
	}
	return len(p), nil
}

func (t *Tail) String() string { return Printable(string(t.b)) }

// Printable replaces what is not plain text of lines in what a program says.
func Printable(s string) string {
	b := []byte(s)
	for i, c := range b {
		if (c < ' ' || c > '~') && c != '\n' && c != '\t' {
			b[i] = '?'
		}
	}
	return string(b)
}
