package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/sandbox"
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
	// unread tells that a part of the disk could not be read, or that the new
	// top could not be written.
	unread bool
}

// guest checks the filesystems of one image.
func (r *run) guest(ctx context.Context) (err error) {
	o := r.options().Open
	doc := guestDoc{Version: fsck.DocumentVersion, Image: r.Images[0], Filesystems: []guestCheck{}}
	path := r.Images[0]
	if r.Yes {
		// Made before the rights to make it are gone, and the image is read.
		if r.top, err = emptyTop(path); err != nil {
			return err
		}
	} else if o.ScratchFile, err = open.NewScratchFile(path, o); err != nil {
		return err
	}
	if err := r.isolate(false); err != nil {
		if r.top != "" && r.keeper == nil {
			err = errors.Join(err, os.Remove(r.top))
		}
		return err
	}
	if r.top != "" {
		err = r.fillTop(ctx, path, o)
		path, o.Format, o.Writable = r.top, "qcow2", true
		if len(o.AllowPaths) == 0 {
			// The new top stands beside the image; what the image itself may
			// name is decided there.
			o.AllowPaths = []string{filepath.Dir(r.Images[0])}
		}
	} else {
		o.Scratch = true
	}
	if err == nil {
		err = r.guestStack(ctx, path, o, &doc)
	}
	if r.top != "" {
		act := actDropTop
		if err == nil && doc.Exit&fsck.ExitCorrected != 0 { // else nothing was repaired
			if why := doc.doubt(); why == "" {
				act, doc.NewTop = actKeepTop, r.top
			} else {
				doc.dropped()
				fmt.Fprintf(r.stderr, "image-fsck: %s is removed, with all repairs in it: %s\n", printable(r.top), why)
			}
		}
		err = errors.Join(err, r.keeper.Ask(context.WithoutCancel(ctx), assistRequest{Act: act}, nil))
	}
	if err != nil {
		return err
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

// doubt says why a new top layer is not to be kept, "" when it is.
func (doc *guestDoc) doubt() string {
	if doc.unread {
		return "a part of the disk could not be read or written"
	}
	for _, c := range doc.Filesystems {
		if c.Exit&fsck.ExitCorrected != 0 && c.Exit&fsck.ExitOperational != 0 {
			return "the repair of " + c.Partition + " was not finished"
		}
	}
	return ""
}

// dropped takes back what repairs say whose new top layer nobody keeps: what
// they have made of a disk that they could not read would do harm.
func (doc *guestDoc) dropped() {
	doc.Exit = doc.Exit&^fsck.ExitCorrected | fsck.ExitUncorrected
	for i := range doc.Filesystems {
		if c := &doc.Filesystems[i]; c.Exit&fsck.ExitCorrected != 0 {
			c.Exit = c.Exit&^fsck.ExitCorrected | fsck.ExitUncorrected
		}
	}
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

// emptyTop makes the file of a new top layer.
func emptyTop(path string) (string, error) {
	name := filepath.Clean(path) + ".guest.qcow2"
	if _, err := os.Stat(path); err != nil {
		return "", err
	}
	f, err := backend.Open(name, backend.Options{Writable: true, Create: true, Exclusive: true})
	if err != nil {
		return "", fmt.Errorf("new top layer: %w", err)
	}
	return name, f.Close()
}

// fillTop makes an empty layer over the image of the file.
func (r *run) fillTop(ctx context.Context, path string, o open.Options) (err error) {
	t, err := open.Follow(ctx, path, o)
	if err == nil {
		err = t.Err
	}
	if err != nil {
		return err
	}
	base := t.Images[0]
	rel, err := filepath.Rel(filepath.Dir(r.top), base.Path)
	if err != nil {
		return err
	}
	f, err := backend.Open(r.top, backend.Options{Writable: true})
	if err != nil {
		return fmt.Errorf("new top layer: %w", err)
	}
	format := base.Format
	if format == "ploop" {
		format = "parallels" // as QEMU calls it
	}
	err = qcow2.Create(ctx, f, qcow2.CreateOptions{Size: base.Size, BackingFile: rel, BackingFormat: format})
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// guestStack shows the stack in a directory and checks what is in it.
func (r *run) guestStack(ctx context.Context, path string, o open.Options, doc *guestDoc) (err error) {
	s, err := open.Open(ctx, path, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	parts, err := guestfs.Partitions(ctx, s.ReaderAt(ctx), s.Size())
	if err != nil {
		return fmt.Errorf("%s: %w", r.Images[0], err)
	}
	fo := fusefs.Options{Image: r.Images[0], PID: os.Getpid(), UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), Umask: 0o77}
	// Checkers do not stop at a part of the disk that cannot be read: e2fsck -y
	// empties what it finds there, and calls that repaired.
	var unread atomic.Bool
	fo.Report = func(err error) {
		unread.Store(true)
		fmt.Fprint(r.stderr, cli.Message("image-fsck", err))
	}
	if r.user != nil { // who runs the checkers
		fo.UID, fo.GID = uint32(r.user.UID), uint32(r.user.GID)
	}
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
	srv, err := r.showGuest(ctx, fs)
	if err != nil {
		return errors.Join(err, fs.Shutdown())
	}
	defer func() {
		err = errors.Join(err, r.keeper.Ask(context.WithoutCancel(ctx), assistRequest{Act: actLeave}, nil))
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
		if err := r.checkFS(ctx, &c, t.file); err != nil {
			return err
		}
		if unread.Load() {
			doc.unread = true
			c.Exit |= fsck.ExitOperational
		}
		doc.Exit |= c.Exit
		doc.Filesystems = append(doc.Filesystems, c)
	}
	return nil
}

// showGuest shows the disk in a directory that the keeper makes. From then on
// nothing is opened any more.
func (r *run) showGuest(ctx context.Context, fs *fusefs.FS) (*fusefs.Server, error) {
	conn, err := r.keeper.AskFile(ctx, assistRequest{Act: actAttach}, nil, -1)
	if err == nil && conn < 0 {
		err = errors.New("the keeper has sent no connection")
	}
	if err != nil {
		return nil, err
	}
	err = sandbox.Seal(r.Sandbox)
	var srv *fusefs.Server
	if err == nil {
		setup := assistSetup{User: r.user}
		srv, err = fusefs.Serve(conn, fs, setup.mountOptions())
	}
	if err != nil {
		return nil, errors.Join(err, r.keeper.Ask(ctx, assistRequest{Act: actLeave}, nil))
	}
	sandbox.Attack("serve") // of test builds
	return srv, nil
}

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
			code, err := r.program(ctx, c, "ext4 repair", file)
			c.Exit = ext4Bits(code)
			return err
		}
		// What the journal holds belongs to the filesystem: the layer on top,
		// which nobody keeps, takes it.
		if code, err := r.program(ctx, c, "ext4 journal", file); err != nil || code > 1 {
			c.Exit = ext4Bits(code)
			return err
		}
		code, err := r.program(ctx, c, "ext4 check", file)
		c.Exit = ext4Bits(code)
		return err
	case "xfs":
		code, err := r.program(ctx, c, "xfs check", file)
		if err != nil || code == 0 || !r.Yes {
			c.Exit = plainBits(code)
			return err
		}
		if code, err = r.program(ctx, c, "xfs repair", file); err != nil || code != 0 {
			c.Exit = plainBits(code) // 2: a log that only a mount can replay
			return err
		}
		code, err = r.program(ctx, c, "xfs check", file)
		c.Exit = fsck.ExitCorrected | plainBits(code)
		return err
	}
	// btrfs check --repair is not to be trusted: damage is only told.
	code, err := r.program(ctx, c, "btrfs check", file)
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

// program lets the keeper run a checker. Its output passes through, to stderr,
// but for --json, which collects the end of it; e2fsck gets the descriptor of
// -C. An error is one of running it at all.
func (r *run) program(ctx context.Context, c *guestCheck, name, file string) (int, error) {
	s := steps[name]
	shown := strings.Join(append(append([]string{s.program}, s.args...), c.Partition), " ")
	if !r.JSON {
		fmt.Fprintf(r.stderr, "image-fsck: %s\n", shown)
	}
	var done ran
	err := r.keeper.Ask(ctx, assistRequest{Act: actRun, Step: name, Name: file, Quiet: r.JSON}, &done)
	if cause := context.Cause(ctx); cause != nil {
		return 0, cause
	}
	if err != nil {
		return 0, err
	}
	run := guestRun{Command: shown, Exit: done.Exit}
	if r.JSON {
		run.Output = done.Output
	}
	c.Commands = append(c.Commands, run)
	return done.Exit, nil
}
