package fusefs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs/uring"
)

// Attach and Serve are the two halves of Mount, for a server that may not
// mount: another process attaches, and passes it the connection.

// Attach mounts on dir, as root by itself, otherwise through fusermount3, and
// returns the connection to the kernel, which is the caller's. Nobody can look
// at the mount before Serve answers; when the last copy of the connection is
// closed, the mount is dead, and has to be unmounted.
func Attach(dir string, readOnly bool, o MountOptions) (conn int, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return -1, err
	}
	if os.Geteuid() == 0 {
		conn, err = attachDirect(dir, readOnly, o)
	} else {
		conn, err = attachHelper(dir, readOnly, o)
	}
	if err != nil {
		return -1, fmt.Errorf("mounting on %s: %w", dir, err)
	}
	return conn, nil
}

// Serve serves fs over a connection of Attach, which it takes over, and
// answers when it returns. The Server it returns knows nothing of a directory:
// Unmount and Detach are not for it.
func Serve(conn int, fs *FS, o MountOptions) (_ *Server, err error) {
	opts := serverOptions(o)
	second := -1
	if o.Rings != nil {
		if second, err = unix.FcntlInt(uintptr(conn), unix.F_DUPFD_CLOEXEC, 3); err != nil {
			return nil, errors.Join(err, unix.Close(conn), o.Rings.Close())
		}
	}
	// A name that go-fuse understands; nothing is opened.
	srv, err := fuse.NewServer(fs, fmt.Sprintf("/dev/fd/%d", conn), opts)
	if err != nil {
		if o.Rings != nil {
			err = errors.Join(err, unix.Close(second), o.Rings.Close())
		}
		return nil, fmt.Errorf("serving: %w", err)
	}
	s := &Server{fs: fs, srv: srv, done: make(chan struct{})}
	var ringErr error
	if o.Rings != nil {
		ringErr = s.startRings(second, opts, o.Rings)
	}
	go s.serve()
	if err := errors.Join(srv.WaitMount(), ringErr); err != nil {
		return nil, fmt.Errorf("serving: %w", err)
	}
	return s, nil
}

// startRings lets the rings carry the requests. Without the kernel's offer it
// closes them.
func (s *Server) startRings(conn int, o *fuse.MountOptions, rings *uring.Transport) error {
	if s.srv.KernelSettings().Flags64()&capOverURing == 0 {
		return errors.Join(unix.Close(conn), rings.Close())
	}
	c, err := newCarrier(s.fs, s.srv, o)
	if err != nil {
		return errors.Join(err, unix.Close(conn), rings.Close())
	}
	s.rings = rings
	return rings.Start(conn, c)
}

// attachDirect mounts by mount(2).
func attachDirect(dir string, readOnly bool, o MountOptions) (int, error) {
	flags, err := directFlags(o.Flags, readOnly)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return -1, err
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("/dev/fuse: %w", err)
	}
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,max_read=%d,default_permissions",
		fd, st.Mode&unix.S_IFMT, os.Geteuid(), os.Getegid(), MaxRequest)
	if o.AllowOther {
		data += ",allow_other"
	}
	if err := unix.Mount(o.Source, dir, "fuse."+Type, flags, data); err != nil {
		_ = unix.Close(fd) // never used
		return -1, err
	}
	return fd, nil
}

// attachHelper mounts through fusermount3, which sends the connection over a
// socket.
func attachHelper(dir string, readOnly bool, o MountOptions) (int, error) {
	options := []string{"default_permissions"}
	if readOnly {
		options = append(options, "ro")
	}
	options = append(options, o.Flags...)
	if o.AllowOther {
		options = append(options, "allow_other")
	}
	options = append(options, "fsname="+o.Source, "subtype="+Type, fmt.Sprintf("max_read=%d", MaxRequest))
	escape := strings.NewReplacer(`\`, `\\`, ",", `\,`)
	for i := range options {
		options[i] = escape.Replace(options[i])
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pair[0])
	remote := os.NewFile(uintptr(pair[1]), "fusermount3")
	cmd := exec.Command(fusermount(), "-o", strings.Join(options, ","), "--", dir)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{remote}
	out, err := cmd.CombinedOutput()
	_ = remote.Close() // so that a helper that has sent nothing is noticed
	if err != nil {
		if msg := strings.TrimSpace(string(out)); msg != "" {
			err = errors.New(msg)
		}
		return -1, err
	}
	return receiveFD(pair[0])
}

// receiveFD waits on the socket for a message of one byte with one descriptor.
func receiveFD(socket int) (int, error) {
	buf, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(socket, buf, oob, unix.MSG_CMSG_CLOEXEC)
	for errors.Is(err, unix.EINTR) {
		n, oobn, _, _, err = unix.Recvmsg(socket, buf, oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return -1, err
	}
	if n != 1 || len(messages) != 1 {
		return -1, errors.New("fusermount3 has sent no connection")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	if len(fds) != 1 {
		return -1, fmt.Errorf("fusermount3 has sent %d descriptors", len(fds))
	}
	return fds[0], nil
}
