package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// The check of the filesystems in an image. The stack is shown through FUSE
// with a layer on top that takes all writes: one that is thrown away, or with
// -y a new file beside the image, which the user may keep as the new top. So
// neither the check nor the repair of a filesystem ever writes to the image.

// guestCheck is one filesystem that was checked.
type guestCheck struct {
	Partition  string     `json:"partition"` // p1, …, or disk for the whole disk
	Filesystem string     `json:"filesystem"`
	Commands   []guestRun `json:"commands"`
	Exit       int        `json:"exit"` // fsck(8) bits
}

// guestRun is a program that was run on it.
type guestRun struct {
	Command string `json:"command"`
	Exit    int    `json:"exit"` // its own code
	Output  string `json:"output,omitempty"`
}

// guestDoc is what --guest --json prints.
type guestDoc struct {
	Version     int          `json:"version"`
	Image       string       `json:"image"`
	Exit        int          `json:"exit"`
	NewTop      string       `json:"new-top,omitempty"`
	Filesystems []guestCheck `json:"filesystems"`
}

// guest checks the filesystems of one image.
func (r *run) guest(ctx context.Context) (err error) {
	o := r.options().Open
	doc := guestDoc{Version: fsck.DocumentVersion, Image: r.Images[0], Filesystems: []guestCheck{}}
	path := r.Images[0]
	if r.Yes {
		if doc.NewTop, err = createTop(ctx, path, o); err != nil {
			return err
		}
		path, o.Format, o.Writable = doc.NewTop, "qcow2", true
		if len(o.AllowPaths) == 0 {
			// The new top stands beside the image; what the image itself may
			// name is decided there.
			o.AllowPaths = []string{filepath.Dir(r.Images[0])}
		}
	} else {
		o.Scratch = true
	}
	if err := r.guestStack(ctx, path, o, &doc); err != nil {
		if doc.NewTop != "" {
			err = errors.Join(err, os.Remove(doc.NewTop))
		}
		return err
	}
	if doc.NewTop != "" && doc.Exit&fsck.ExitCorrected == 0 {
		if err := os.Remove(doc.NewTop); err != nil { // nothing was repaired
			return err
		}
		doc.NewTop = ""
	}
	if r.JSON {
		err = cli.PrintJSON(r.stdout, doc)
	} else {
		err = r.printGuest(&doc)
	}
	if err != nil {
		return err
	}
	return cli.Exit(doc.Exit)
}

func (r *run) printGuest(doc *guestDoc) error {
	for _, c := range doc.Filesystems {
		state := "clean"
		switch {
		case c.Exit&fsck.ExitOperational != 0:
			state = "could not be checked"
		case c.Exit&fsck.ExitUncorrected != 0:
			state = "NOT CLEAN"
		case c.Exit&fsck.ExitCorrected != 0:
			state = "repaired"
		}
		fmt.Fprintf(r.stdout, "%s: %s: %s: %s\n", printable(doc.Image), c.Partition, c.Filesystem, state)
	}
	if len(doc.Filesystems) == 0 {
		fmt.Fprintf(r.stdout, "%s: no filesystem found that can be checked\n", printable(doc.Image))
	}
	if doc.NewTop != "" {
		fmt.Fprintf(r.stdout, "%s: the repaired filesystems are in %s, a new top layer over the unchanged image: use it in its place, or remove it\n",
			printable(doc.Image), printable(doc.NewTop))
	}
	return nil
}

// createTop makes an empty layer over the image.
func createTop(ctx context.Context, path string, o open.Options) (_ string, err error) {
	t, err := open.Follow(ctx, path, o)
	if err == nil {
		err = t.Err
	}
	if err != nil {
		return "", err
	}
	base := t.Images[0]
	name := filepath.Clean(path) + ".guest.qcow2"
	rel, err := filepath.Rel(filepath.Dir(name), base.Path)
	if err != nil {
		return "", err
	}
	f, err := backend.Open(name, backend.Options{Writable: true, Create: true, Exclusive: true})
	if err != nil {
		return "", fmt.Errorf("new top layer: %w", err)
	}
	format := base.Format
	if format == "ploop" {
		format = "parallels" // as QEMU calls it
	}
	err = qcow2.Create(ctx, f, qcow2.CreateOptions{Size: base.Size, BackingFile: rel, BackingFormat: format})
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err != nil {
		return "", errors.Join(err, os.Remove(name))
	}
	return name, nil
}

// guestStack shows the stack in a directory and checks what is in it.
func (r *run) guestStack(ctx context.Context, path string, o open.Options, doc *guestDoc) (err error) {
	s, err := open.Open(ctx, path, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	parts, err := guestfs.Partitions(ctx, stackReader{ctx, s}, s.Size())
	if err != nil {
		return fmt.Errorf("%s: %w", r.Images[0], err)
	}
	fo := fusefs.Options{Image: r.Images[0], PID: os.Getpid(), UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), Umask: 0o77}
	type target struct {
		name, file string
		start, n   int64
	}
	var targets []target
	for _, p := range parts {
		if p.Container {
			continue
		}
		name := fmt.Sprintf("p%d", p.Number)
		fo.Partitions = append(fo.Partitions, fusefs.Partition{Name: name, Start: p.Start, Len: p.Size})
		targets = append(targets, target{name, name, p.Start, p.Size})
	}
	if len(targets) == 0 {
		targets = append(targets, target{"disk", fusefs.DiskName, 0, s.Size()})
	}
	fs, err := fusefs.New(s, fo)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "image-fsck-")
	if err != nil {
		return errors.Join(err, fs.Shutdown())
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	srv, err := fusefs.Mount(dir, fs, fusefs.MountOptions{Source: "image-fsck", Flags: []string{"nodev", "nosuid", "noexec"}})
	if err != nil {
		return errors.Join(err, fs.Shutdown())
	}
	defer func() {
		err = errors.Join(err, srv.Unmount())
		<-srv.Done()
		err = errors.Join(err, fs.Shutdown())
	}()
	for _, t := range targets {
		kind, err := detectFS(ctx, s, t.start, t.n)
		if err != nil {
			return err
		}
		if kind == "" {
			continue
		}
		c := guestCheck{Partition: t.name, Filesystem: kind}
		if err := r.checkFS(ctx, &c, filepath.Join(dir, t.file)); err != nil {
			return err
		}
		doc.Exit |= c.Exit
		doc.Filesystems = append(doc.Filesystems, c)
	}
	return nil
}

// stackReader is a stack as an io.ReaderAt.
type stackReader struct {
	ctx   context.Context // of the one call that it serves
	stack *layers.Stack
}

func (s stackReader) ReadAt(p []byte, off int64) (int, error) { return s.stack.ReadAt(s.ctx, p, off) }

// detectFS tells what a partition holds, "" for nothing that can be checked.
func detectFS(ctx context.Context, s *layers.Stack, start, n int64) (string, error) {
	for _, m := range []struct {
		name, magic string
		off         int64
	}{
		{"ext4", "\x53\xef", 1080},
		{"xfs", "XFSB", 0},
		{"btrfs", "_BHRfS_M", 65536 + 64},
	} {
		b := make([]byte, len(m.magic))
		if m.off+int64(len(b)) > n {
			continue
		}
		if _, err := s.ReadAt(ctx, b, start+m.off); err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		if string(b) == m.magic {
			return m.name, nil
		}
	}
	return "", nil
}

// checkFS runs the filesystem's own checker.
func (r *run) checkFS(ctx context.Context, c *guestCheck, file string) error {
	switch c.Filesystem {
	case "ext4":
		if r.Yes {
			code, err := r.program(ctx, c, "e2fsck", "-f", "-y", file)
			c.Exit = ext4Bits(code)
			return err
		}
		// What the journal holds belongs to the filesystem: the layer on top,
		// which nobody keeps, takes it.
		if code, err := r.program(ctx, c, "e2fsck", "-y", "-E", "journal_only", file); err != nil || code > 1 {
			c.Exit = ext4Bits(code)
			return err
		}
		code, err := r.program(ctx, c, "e2fsck", "-f", "-n", file)
		c.Exit = ext4Bits(code)
		return err
	case "xfs":
		code, err := r.program(ctx, c, "xfs_repair", "-n", "-f", file)
		if err != nil || code == 0 || !r.Yes {
			c.Exit = plainBits(code)
			return err
		}
		if code, err = r.program(ctx, c, "xfs_repair", "-f", file); err != nil || code != 0 {
			c.Exit = plainBits(code) // 2: a log that only a mount can replay
			return err
		}
		code, err = r.program(ctx, c, "xfs_repair", "-n", "-f", file)
		c.Exit = fsck.ExitCorrected | plainBits(code)
		return err
	}
	// btrfs check --repair is not to be trusted: damage is only told.
	code, err := r.program(ctx, c, "btrfs", "check", "--readonly", file)
	c.Exit = plainBits(code)
	return err
}

// ext4Bits are those of fsck(8) from the beginning; 2 asks for a reboot, and
// 128 is a library that is missing.
func ext4Bits(code int) int {
	bits := code & (fsck.ExitCorrected | fsck.ExitUncorrected | fsck.ExitOperational | fsck.ExitCancelled)
	if code&2 != 0 {
		bits |= fsck.ExitCorrected
	}
	if code&(16|128) != 0 || code < 0 {
		bits |= fsck.ExitOperational
	}
	return bits
}

// plainBits is for programs that only say yes or no.
func plainBits(code int) int {
	if code == 0 {
		return 0
	}
	return fsck.ExitUncorrected
}

// program runs a checker. Its output passes through, to stderr, but for
// --json, which collects the end of it; e2fsck gets the descriptor of -C. An
// error is one of running it at all.
func (r *run) program(ctx context.Context, c *guestCheck, name string, args ...string) (int, error) {
	path, err := lookProgram(name)
	if err != nil {
		return 0, err
	}
	shown := strings.Join(append([]string{name}, args[:len(args)-1]...), " ") + " " + c.Partition
	if name == "e2fsck" && r.fd != nil {
		args = append([]string{"-C", "3"}, args...)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	if name == "e2fsck" && r.fd != nil {
		cmd.ExtraFiles = []*os.File{r.fd.f}
	}
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out tailBuffer
	if r.JSON {
		cmd.Stdout, cmd.Stderr = &out, &out
	} else {
		fmt.Fprintf(r.stderr, "image-fsck: %s\n", shown)
		cmd.Stdout, cmd.Stderr = r.stderr, r.stderr
	}
	err = cmd.Run()
	if cause := context.Cause(ctx); cause != nil {
		return 0, cause
	}
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || !exit.Exited()) {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	code := cmd.ProcessState.ExitCode()
	c.Commands = append(c.Commands, guestRun{Command: shown, Exit: code, Output: string(out.b)})
	return code, nil
}

// lookProgram finds a program also where only root's PATH leads.
func lookProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if p := filepath.Join(dir, name); unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: the checker of the filesystem is not installed", err)
}

// tailBuffer keeps the last 64 KiB.
type tailBuffer struct{ b []byte }

const tailBytes = 64 << 10

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - tailBytes; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}
