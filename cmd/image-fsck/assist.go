package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/helper"
	"github.com/imagestack/imagestack/internal/keeper"
	"github.com/imagestack/imagestack/internal/sandbox"
)

// The keeper of image-fsck: it makes undo files and dumps outside the
// directories of the images, mounts for --guest, and runs the checkers of
// filesystems, each in a process of its own with limits of its own. It never
// reads an image. What it can be asked for was settled before one was read.

// assistSetup is what the keeper may do.
type assistSetup struct {
	Mode sandbox.Mode
	User *sandbox.User
	// Images are those for which undo files may be made in the place Undo.
	Images []string
	Undo   *string
	// Dump is where a dump is put.
	Dump string
	// Guest: mount, and run checkers on what is shown. Top, if not "", is the
	// new top layer, which is removed unless it is to be kept.
	Guest      bool
	Top        string
	ProgressFD bool // descriptor 4 is that of -C
}

// The acts.
const (
	actUndo       = "undo"        // the file comes with its name
	actUndoSync   = "undo-sync"   // Name
	actUndoRemove = "undo-remove" // Name
	actDump       = "dump"        // the file comes
	actDumpDone   = "dump-done"   // it is complete
	actAttach     = "attach"      // the connection comes
	actRun        = "run"         // Step on the file Name
	actLeave      = "leave"
	actDropTop    = "drop-top"
	actKeepTop    = "keep-top"
)

type assistRequest struct {
	Act  string
	Name string `json:",omitempty"`
	Step string `json:",omitempty"`
	// Quiet collects the output, for --json.
	Quiet bool `json:",omitempty"`
}

// ran is the answer to actRun.
type ran struct {
	Exit   int
	Output string
}

// step is a program as it may be run; the file comes last.
type step struct {
	program  string
	args     []string
	writable bool
}

// steps are all of them.
var steps = map[string]step{
	"ext4 journal": {"e2fsck", []string{"-y", "-E", "journal_only"}, true},
	"ext4 check":   {"e2fsck", []string{"-f", "-n"}, false},
	"ext4 repair":  {"e2fsck", []string{"-f", "-y"}, true},
	"xfs check":    {"xfs_repair", []string{"-n", "-f"}, false},
	"xfs repair":   {"xfs_repair", []string{"-f"}, true},
	"btrfs check":  {"btrfs", []string{"check", "--readonly"}, false},
}

// shownFile matches the names of files in the mount.
var shownFile = regexp.MustCompile(`^p[1-9][0-9]{0,3}$`)

// assistant is the keeper's side.
type assistant struct {
	assistSetup
	undos   map[string]bool
	pending *renameio.PendingFile
	dir     string // of the mount, "" when there is none
	kept    bool   // Top
}

func newAssistant(setup json.RawMessage) (keeper.Service, error) {
	a := &assistant{undos: map[string]bool{}}
	return a, json.Unmarshal(setup, &a.assistSetup)
}

// Serve implements keeper.Service.
func (a *assistant) Serve(ctx context.Context, request json.RawMessage, _ keeper.Given) keeper.Reply {
	var q assistRequest
	r := keeper.Reply{FD: -1}
	if r.Err = json.Unmarshal(request, &q); r.Err != nil {
		return r
	}
	switch q.Act {
	case actUndo:
		r.Answer, r.FD, r.Err = a.undo(q.Name)
	case actUndoSync, actUndoRemove:
		u := fsck.UndoPlace("")
		switch {
		case !a.undos[q.Name]:
			r.Err = errors.New("no such undo file")
		case q.Act == actUndoSync:
			r.Err = u.Sync(q.Name)
		default:
			delete(a.undos, q.Name)
			r.Err = u.Remove(q.Name)
		}
	case actDump:
		r.FD, r.Err = a.dump(q.Name)
	case actDumpDone:
		if a.pending == nil {
			r.Err = errors.New("there is no dump")
		} else {
			r.Err = a.pending.CloseAtomicallyReplace()
		}
	case actAttach:
		r.FD, r.Err = a.attach()
	case actRun:
		r.Answer, r.Err = a.run(ctx, &q)
	case actLeave:
		r.Err = a.leave()
	case actKeepTop:
		a.kept = true
	case actDropTop:
		r.Err = a.dropTop()
	default:
		r.Err = fmt.Errorf("what is %q?", q.Act)
	}
	return r
}

// End implements keeper.Service: it removes what nobody will ask for any more.
func (a *assistant) End() {
	// Errors have nobody to be told to.
	_ = a.leave()
	if a.pending != nil {
		_ = a.pending.Cleanup()
	}
	_ = a.dropTop()
}

func (a *assistant) dropTop() error {
	if a.Top == "" || a.kept {
		return nil
	}
	a.kept = true
	return os.Remove(a.Top)
}

// undo makes an undo file for a file of the images that were named.
func (a *assistant) undo(path string) (string, int, error) {
	if a.Undo == nil || len(a.undos) >= maxUndos {
		return "", -1, errors.New("no undo files are to be made")
	}
	fd := -1
	name, err := fsck.UndoPlace(*a.Undo).Choose(a.undoFor(path), len(a.undos) > 0, func(name string) (err error) {
		fd, err = unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o666)
		return pathError(name, err)
	})
	if err == nil {
		a.undos[name] = true
	}
	return name, fd, err
}

func pathError(name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: "open", Path: name, Err: err}
}

// maxUndos is how many files an honest process may repair in one run.
const maxUndos = 10_000

// undoFor is the path by which an undo file is named: only its last element
// counts in a directory, and without one only the images themselves.
func (a *assistant) undoFor(path string) string {
	if *a.Undo != "" {
		return filepath.Base(path)
	}
	if slices.Contains(a.Images, path) {
		return path
	}
	return a.Images[0]
}

// dump makes the file of a dump of image. One that is complete replaces the one
// of the night before.
func (a *assistant) dump(image string) (fd int, err error) {
	if a.Dump == "" || a.pending != nil {
		return -1, errors.New("no dump is to be made")
	}
	if err := fsck.MayBeDump(a.Dump, image); err != nil {
		return -1, err
	}
	if a.pending, err = renameio.NewPendingFile(a.Dump, renameio.WithPermissions(0o600)); err != nil {
		a.pending = nil
		return -1, err
	}
	return unix.FcntlInt(a.pending.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}

// attach mounts.
func (a *assistant) attach() (int, error) {
	if !a.Guest || a.dir != "" {
		return -1, errors.New("nothing is to be mounted")
	}
	dir, err := os.MkdirTemp("", "image-fsck-")
	if err != nil {
		return -1, err
	}
	conn, err := fusefs.Attach(dir, false, a.mountOptions())
	if err != nil {
		return -1, errors.Join(err, os.Remove(dir))
	}
	a.dir = dir
	return conn, nil
}

func (a *assistSetup) mountOptions() fusefs.MountOptions {
	return fusefs.MountOptions{
		Source: "image-fsck", Flags: []string{"nodev", "nosuid", "noexec"},
		// Permissions keep all but that user out.
		AllowOther: a.User != nil && a.User.UID != os.Geteuid(),
	}
}

// leave unmounts; a mount that is in use is waited for a while.
func (a *assistant) leave() error {
	if a.dir == "" {
		return nil
	}
	dir := a.dir
	a.dir = ""
	var err error
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if err = fusefs.Unmount(dir, false); err == nil || time.Now().After(end) || !errors.Is(err, unix.EBUSY) {
			break
		}
	}
	if err != nil {
		err = errors.Join(err, fusefs.Unmount(dir, true))
	}
	return errors.Join(err, os.Remove(dir))
}

// maxOutput is how much of a program's output is kept for --json, bytes.
const maxOutput = 64 << 10

// run runs a checker. An error is one of running it at all.
func (a *assistant) run(ctx context.Context, q *assistRequest) (*ran, error) {
	s, ok := steps[q.Step]
	if !ok || a.dir == "" || q.Name != fusefs.DiskName && !shownFile.MatchString(q.Name) {
		return nil, fmt.Errorf("what is %q on %q?", q.Step, q.Name)
	}
	path, err := helper.Find(s.program)
	if err != nil {
		return nil, fmt.Errorf("%w: the checker of the filesystem is not installed", err)
	}
	view := filepath.Join(a.dir, q.Name)
	st, err := os.Stat(view)
	if err != nil {
		return nil, err
	}
	spec := helper.Spec{
		Mode: a.Mode, User: a.User, Path: path, View: view, Size: st.Size(), Writable: s.writable,
		AnyFile: s.program == "xfs_repair", // it ends when it cannot have that
		Args:    append(slices.Clone(s.args), view),
	}
	var extra []*os.File
	if a.ProgressFD && s.program == "e2fsck" {
		spec.Args = append([]string{"-C", "3"}, spec.Args...)
		spec.KeepFD = 1
		extra = []*os.File{os.NewFile(progressFD, "progress")}
	}
	cmd, err := helper.Command(ctx, spec)
	if err != nil {
		return nil, err
	}
	cmd.ExtraFiles = extra
	tail := &helper.Tail{Max: maxOutput}
	var out io.Writer = tail
	if !q.Quiet {
		out = harmless{os.Stderr}
	}
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || !exit.Exited() || exit.ExitCode() == helper.ExitStage) {
		return nil, fmt.Errorf("%s: %w", s.program, err)
	}
	return &ran{Exit: cmd.ProcessState.ExitCode(), Output: tail.String()}, nil
}

// progressFD is the descriptor of -C in the keeper.
const progressFD = 4

// harmless passes on text without what a terminal might obey.
type harmless struct{ w io.Writer }

func (h harmless) Write(p []byte) (int, error) {
	if _, err := io.WriteString(h.w, helper.Printable(string(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}
