package main

import (
	"errors"
	"io"
	"log/syslog"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/sandbox"
	"github.com/imagestack/imagestack/layers/open"
)

// confine opens what the server needs besides the image, starts the keeper
// and gives up every other right, before the image is looked at.
func (srv *server) confine(daemon *cli.Daemon) error {
	s := srv.s
	image, err := filepath.Abs(s.image)
	if err != nil {
		return err
	}
	srv.place = &place{
		Dir: srv.dir, Source: image, AllowOther: s.allowOther, Flags: s.mountFlags,
		ReadOnly: !s.open.Writable && !s.open.Scratch, UID: s.uid, SectorSize: s.sectorSize,
	}
	if daemon != nil {
		// Best effort: there may be no syslog.
		if w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_ERR, "mount-image"); err == nil {
			srv.log.SetOutput(io.MultiWriter(os.Stderr, w))
		}
	}
	if err := srv.makeRings(); err != nil {
		return err
	}
	if s.sandbox == sandbox.Off {
		return nil
	}
	access, err := open.AccessTo(s.image, s.open)
	if err != nil {
		return err
	}
	if s.open.Scratch || s.open.Flat {
		if s.open.ScratchFile, err = open.NewScratchFile(s.image, s.open); err != nil {
			return err
		}
	}
	if daemon != nil {
		if err := daemon.Prepare(s.log); err != nil {
			return err
		}
	}
	if srv.keeper, err = startKeeper(srv.place); err != nil {
		return err
	}
	return cli.Confine(sandbox.Policy{
		Mode: s.sandbox, List: access.List, Read: access.Read, Write: access.Write, User: s.user,
		Rings: srv.rings != nil,
	}, func(what string) { srv.log.Print(what) })
}

// attach mounts. An isolated server gives up opening files with it. The file
// whole, if not nil, is the disk, and read by the kernel where that works.
func (srv *server) attach(whole backend.File) (err error) {
	o := srv.place.options()
	o.Log, o.Rings = srv.log, srv.rings
	if srv.keeper == nil {
		if srv.mount, err = fusefs.Mount(srv.dir, srv.fs, o); err != nil || whole == nil {
			return err
		}
		var id int32
		err = backend.WithDescriptor(whole, func(fd int) (err error) {
			id, err = srv.mount.Passthrough(fd)
			return err
		})
		if err = srv.settle(err, id); err != nil {
			return errors.Join(err, srv.mount.Unmount())
		}
		return nil
	}
	conn := -1
	hand := func(fd int) (err error) {
		conn, err = srv.askAttach(fd)
		return err
	}
	if whole != nil {
		err = backend.WithDescriptor(whole, hand)
	} else {
		err = hand(-1)
	}
	if err == nil && conn < 0 {
		err = errors.New("the keeper has sent no connection")
	}
	if err != nil {
		return err
	}
	// Nor is the working directory kept busy.
	if err = os.Chdir("/"); err == nil {
		err = sandbox.Seal(srv.s.sandbox)
	}
	if err == nil {
		srv.mount, err = fusefs.Serve(conn, srv.fs, o)
	}
	if err == nil && whole != nil {
		a, askErr := srv.ask(askBacking)
		err = srv.settle(askErr, a.Backing)
	}
	if err != nil {
		_, leaveErr := srv.ask(askLeave)
		return errors.Join(err, leaveErr)
	}
	return nil
}

func (srv *server) probe() error {
	if srv.keeper == nil {
		return srv.place.probe()
	}
	_, err := srv.ask(askProbe)
	return err
}

func (srv *server) attachLoop() (string, error) {
	if srv.keeper == nil {
		return srv.place.attachLoop()
	}
	a, err := srv.ask(askLoop)
	return a.Loop, err
}

// leave ends the mount; lazy means that it still has users.
func (srv *server) leave() (lazy bool) {
	if srv.keeper == nil {
		lazy, troubles := srv.place.leave()
		for _, err := range troubles {
			srv.report(err)
		}
		return lazy
	}
	a, err := srv.ask(askLeave)
	if err != nil {
		srv.report(err)
		return true
	}
	for _, t := range a.Troubles {
		srv.report(errors.New(t))
	}
	return a.Lazy
}
