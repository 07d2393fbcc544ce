package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/fusefs/uring"
	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/keeper"
	"github.com/imagestack/imagestack/internal/mounttab"
	"github.com/imagestack/imagestack/internal/sandbox"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
)

// server is one mount from opening the image to closing it.
type server struct {
	s     *settings
	dir   string // absolute
	stack *layers.Stack
	fs    *fusefs.FS
	mount *fusefs.Server
	place *place
	// keeper acts on the place for an isolated server, nil for one that is
	// not.
	keeper *keeper.Keeper
	loop   string           // device, "" when none
	rings  *uring.Transport // nil for /dev/fuse
	parts  []guestfs.Partition
	log    *log.Logger
}

// serve mounts the image and serves it until it is unmounted or ctx ends.
func serve(ctx context.Context, s *settings, daemon *cli.Daemon) (err error) {
	// Nobody reading what we print must not be the end of the mount.
	signal.Ignore(unix.SIGPIPE)
	srv := &server{s: s, log: log.New(os.Stderr, "mount-image: ", 0)}
	dir, err := lockDir(s.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if srv.dir, err = mountPoint(s.dir); err != nil {
		return err
	}
	if err := srv.confine(daemon); err != nil {
		return err
	}
	if srv.keeper != nil {
		defer srv.keeper.Close()
	}
	sandbox.Attack("parse") // of test builds
	if srv.stack, err = open.Open(ctx, s.image, s.open); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, srv.stack.Close()) }()
	if err := srv.start(ctx); err != nil {
		return err
	}
	if err := srv.announce(); err != nil {
		return errors.Join(err, srv.stop())
	}
	if daemon != nil {
		if err := daemon.Ready(s.log); err != nil {
			return errors.Join(err, srv.stop())
		}
	}
	if srv.keeper != nil {
		if _, err := srv.ask(askReady); err != nil {
			srv.report(err) // it was killed; the disk stays served
		}
	}
	select {
	case <-srv.mount.Done(): // somebody has unmounted it
		err = srv.fs.Shutdown()
	case <-ctx.Done():
		err = srv.stop()
		// SIGTERM is how a service manager ends a mount; Ctrl-C is told apart.
		if cause := context.Cause(ctx); err == nil && errors.Is(cause, cli.SignalError{Signal: unix.SIGINT}) {
			err = cause
		}
	}
	if err != nil && daemon != nil {
		srv.report(err)
	}
	return err
}

// lockDir locks the directory that will be mounted on, so that of several who
// want it at once one gets it. The lock is held until the file is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		if errors.Is(err, unix.ENOTCONN) {
			return nil, cli.WithHint(err, "the server of a mount there is dead; unmount it with: mount-image -u %s", dir)
		}
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		_ = f.Close()
		return nil, cli.WithExit(cli.ExitInUse, fmt.Errorf("%s: something is being mounted there: %w", dir, unix.EBUSY))
	}
	return f, nil // a filesystem without such locks has to do without
}

// mountPoint checks DIR and makes it absolute.
func mountPoint(dir string) (string, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return "", err
	}
	if !st.IsDir() {
		return "", fmt.Errorf("%s: %w", dir, unix.ENOTDIR)
	}
	abs, err := mounttab.Resolve(dir)
	if err != nil {
		return "", err
	}
	m, found, err := mounttab.Find(abs)
	if err != nil {
		return "", err
	}
	if found && m.Type == "fuse."+fusefs.Type {
		err := fmt.Errorf("%s: %s is mounted there already: %w", dir, m.Source, unix.EBUSY)
		return "", cli.WithExit(cli.ExitInUse, cli.WithHint(err, "unmount it with: mount-image -u %s", dir))
	}
	return abs, nil
}

// start mounts, makes sure that the disk answers, and attaches a loop device;
// when something fails, nothing stays behind but the open stack.
func (srv *server) start(ctx context.Context) (err error) {
	s := srv.s
	options := fusefs.Options{
		Image: srv.place.Source, PID: os.Getpid(), UID: s.uid, GID: s.gid, Umask: s.umask, Report: srv.report,
	}
	if s.partitions {
		if options.Partitions, err = srv.partitions(ctx); err != nil {
			return err
		}
	}
	// Through the mount all errors of the image would look the same.
	if _, err := srv.stack.ReadAt(ctx, make([]byte, 1), 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	whole, err := srv.wholeFile()
	if err != nil {
		return err
	}
	if options.Passthrough = whole != nil; options.Passthrough {
		if err := srv.dropRings(); err != nil {
			return err
		}
	}
	if srv.fs, err = fusefs.New(srv.stack, options); err != nil {
		return err
	}
	moreProcessors()
	if err := srv.attach(whole); err != nil {
		return errors.Join(err, srv.fs.Shutdown())
	}
	if err := srv.probe(); err != nil {
		return errors.Join(fmt.Errorf("the mount does not answer: %w", err), srv.stop())
	}
	if s.loop {
		if srv.loop, err = srv.attachLoop(); err != nil {
			return errors.Join(err, srv.stop())
		}
	}
	sandbox.Attack("serve")
	return nil
}

// report is told every distinct error of the disk once.
func (srv *server) report(err error) {
	var named *layers.ImageError
	if errors.As(err, &named) {
		srv.log.Print(err) // it names the file
		return
	}
	srv.log.Printf("%s: %v", srv.s.image, err)
}

// partitions reads the partition table of the disk.
func (srv *server) partitions(ctx context.Context) ([]fusefs.Partition, error) {
	parts, err := guestfs.Partitions(ctx, srv.stack.ReaderAt(ctx), srv.stack.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", srv.s.image, err)
	}
	var views []fusefs.Partition
	for _, p := range parts {
		if !p.Container {
			srv.parts = append(srv.parts, p)
			views = append(views, fusefs.Partition{Name: fmt.Sprintf("p%d", p.Number), Start: p.Start, Len: p.Size})
		}
	}
	if len(views) == 0 {
		srv.log.Printf("%s: no partitions found", srv.s.image)
	}
	return views, nil
}

// announcement is what --json prints.
type announcement struct {
	Mount      string          `json:"mount"`
	Disk       string          `json:"disk"`
	Size       int64           `json:"size"`
	Writable   bool            `json:"writable"`
	PID        int             `json:"pid"`
	Loop       string          `json:"loop,omitempty"`
	Partitions []partitionJSON `json:"partitions,omitempty"`
}

type partitionJSON struct {
	Number int    `json:"number"`
	File   string `json:"file"`
	Start  int64  `json:"start"`
	Size   int64  `json:"size"`
	Type   string `json:"type"`
	Name   string `json:"name,omitempty"`
	UUID   string `json:"uuid"`
}

// announce prints what was mounted, as far as it was asked for.
func (srv *server) announce() error {
	if srv.s.verbose {
		srv.log.Printf("%s: %d layers, %d bytes, writable: %v, mounted on %s by process %d",
			srv.s.image, len(srv.stack.Layers()), srv.stack.Size(), srv.stack.Writable(), srv.dir, os.Getpid())
	}
	if !srv.s.json {
		if srv.loop != "" {
			_, err := fmt.Println(srv.loop)
			return err
		}
		return nil
	}
	a := announcement{
		Mount: srv.dir, Disk: srv.place.disk(), Size: srv.stack.Size(), Writable: srv.stack.Writable(),
		PID: os.Getpid(), Loop: srv.loop,
	}
	for _, p := range srv.parts {
		a.Partitions = append(a.Partitions, partitionJSON{
			Number: p.Number, File: filepath.Join(srv.dir, fmt.Sprintf("p%d", p.Number)),
			Start: p.Start, Size: p.Size, Type: p.Type, Name: p.Name, UUID: p.UUID,
		})
	}
	return cli.PrintJSON(os.Stdout, a)
}

// stop ends the mount from the inside.
func (srv *server) stop() error {
	if !srv.leave() {
		<-srv.mount.Done()
	}
	return srv.fs.Shutdown()
}
