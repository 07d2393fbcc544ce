package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/cli"
)

// When the disk is one file, byte for byte, the kernel can read that file
// itself instead of asking the server (FUSE passthrough). It takes
// CAP_SYS_ADMIN to say so; an isolated server has given that up, and its
// keeper says it, for the file that was handed over with the request to mount.

// passthrough says whether the kernel reads a disk that is one file by itself.
type passthrough string

const (
	throughAuto passthrough = "auto" // for a disk that is read-only, where it is possible
	throughOn   passthrough = "on"   // also for a writable one, or fail
	throughOff  passthrough = "off"
)

// backing is what the keeper holds until the server asks for askBacking.
type backing struct{ conn, disk int }

// registerBacking is askBacking.
func (p *place) registerBacking() (int32, error) {
	b := p.backing
	if b == nil {
		return 0, errors.New("there is no file to pass through to")
	}
	p.backing = nil
	id, err := fusefs.RegisterBacking(b.conn, b.disk)
	return id, errors.Join(err, unix.Close(b.disk), unix.Close(b.conn))
}

// wholeFile is the file that can stand in for the disk, nil when there is none
// or it is not wanted.
func (srv *server) wholeFile() (backend.File, error) {
	mode := srv.s.passthrough
	if mode == throughOff || mode == throughAuto && srv.stack.Writable() {
		return nil, nil
	}
	f := srv.stack.Whole()
	if f != nil {
		err := backend.WithDescriptor(f, func(int) error { return nil })
		if err == nil {
			return f, nil
		}
	}
	if mode == throughOn {
		err := fmt.Errorf("%s: the disk is not one regular file, byte for byte: --passthrough=on is impossible", srv.s.image)
		return nil, cli.WithHint(err, "--passthrough=auto goes on without")
	}
	return nil, nil
}

// settle tells the filesystem how disk.raw is read. Without passthrough,
// which may need rights or a kernel that are not there, it is served.
func (srv *server) settle(err error, id int32) error {
	if err == nil {
		srv.fs.Settle(id)
		return nil
	}
	srv.fs.Settle(0)
	if srv.s.passthrough == throughOn {
		return err
	}
	if srv.s.verbose {
		srv.log.Print(err)
	}
	return nil
}
