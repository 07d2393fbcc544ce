package fusefs

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs/uring"
)

// Type is the filesystem type under which mounts appear (fuse.mount-image in
// /proc/self/mountinfo).
const Type = "mount-image"

// MaxRequest is the largest read or write, in bytes, that the kernel sends.
const MaxRequest = 1 << 20

// readAhead is how far the kernel reads ahead of a sequential buffered reader,
// when the rights suffice to set more than its 128 KiB.
const readAhead = 4 << 20

// MountOptions of Mount.
type MountOptions struct {
	Source     string   // shown as the device in the table of mounts
	AllowOther bool     // processes of other users may use the mount; permissions are always checked
	Flags      []string // nodev, dev, nosuid, suid, noexec, exec, noatime, sync, … passed to the kernel
	Debug      bool     // log every request
	// Rings carry the requests, where the kernel offers it; they are taken
	// over, and closed where it does not.
	Rings *uring.Transport
	Log   *log.Logger
}

// Server is a mounted FS.
type Server struct {
	fs   *FS
	srv  *fuse.Server
	dir  string
	done chan struct{}
	// rings carry requests besides /dev/fuse, nil if they do not.
	rings *uring.Transport
}

// Mount mounts fs on dir, as root by itself, otherwise through fusermount3,
// and serves it in the background until it is unmounted. The mount answers
// when Mount returns.
func Mount(dir string, fs *FS, o MountOptions) (*Server, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	conn, err := Attach(dir, !fs.writable, o)
	if err != nil {
		if o.Rings != nil {
			err = errors.Join(err, o.Rings.Close())
		}
		return nil, err
	}
	s, err := Serve(conn, fs, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mounting on %s: %w", dir, err), Unmount(dir, true))
	}
	s.dir = dir
	SetReadAhead(dir)
	if fs.through.settled == nil {
		NoPoll(filepath.Join(dir, DiskName))
	}
	return s, nil
}

// NoPoll lets the kernel find out that files of the mount, of which path is
// one, cannot be polled. A process that serves a mount must have called it
// before it opens a file there by package os: that polls, and asked while
// Go's poller is busy with the question, the server cannot answer.
func NoPoll(path string) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return // whoever needs the file will see why
	}
	// The answer is of no interest.
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	_ = unix.Close(fd)
}

func (s *Server) serve() {
	s.srv.Serve()
	if s.rings != nil {
		s.rings.Wait(ringPatience)
	}
	close(s.done)
}

// ringPatience is how long the rings may take to end after the connection has.
const ringPatience = 10 * time.Second

// serverOptions are those of go-fuse, without what concerns mounting.
func serverOptions(o MountOptions) *fuse.MountOptions {
	if o.Log == nil {
		o.Log = log.New(io.Discard, "", 0)
	}
	opts := &fuse.MountOptions{
		AllowOther:    o.AllowOther,
		FsName:        o.Source,
		Name:          Type,
		MaxWrite:      MaxRequest,
		MaxBackground: 64,
		// Each part of a large direct I/O goes out at once, not one after
		// the other.
		ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		// A reply of 1 MiB does not fit a pipe, and small ones do not gain.
		DisableSplice:      true,
		DisableReadDirPlus: true,
		// Only changes through this mount change the disk, so a new mtime
		// is no reason to drop pages.
		ExplicitDataCacheControl: true,
		Debug:                    o.Debug,
		Logger:                   o.Log,
	}
	if o.Rings != nil {
		opts.ExtraCapabilities |= capOverURing
	}
	// The kernel checks permissions by owner and mode.
	opts.Options = []string{"default_permissions"}
	return opts
}

// directFlags are the bits of mount(2).
func directFlags(names []string, readOnly bool) (uintptr, error) {
	var flags uintptr = unix.MS_NOSUID | unix.MS_NODEV
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	for _, name := range names {
		f, ok := kernelFlags[name]
		if !ok {
			return 0, fmt.Errorf("mount option %q: %w", name, unix.EINVAL)
		}
		flags = flags&^f.clear | f.set
	}
	return flags, nil
}

// kernelFlags are the mount options that are bits of mount(2).
var kernelFlags = map[string]struct{ set, clear uintptr }{
	"nodev":         {set: unix.MS_NODEV},
	"dev":           {}, // mount(8) passes these two unasked; there is nothing here that needs them
	"nosuid":        {set: unix.MS_NOSUID},
	"suid":          {},
	"noexec":        {set: unix.MS_NOEXEC},
	"exec":          {clear: unix.MS_NOEXEC},
	"noatime":       {set: unix.MS_NOATIME},
	"atime":         {clear: unix.MS_NOATIME},
	"relatime":      {set: unix.MS_RELATIME},
	"norelatime":    {clear: unix.MS_RELATIME},
	"strictatime":   {set: unix.MS_STRICTATIME},
	"nostrictatime": {clear: unix.MS_STRICTATIME},
	"nodiratime":    {set: unix.MS_NODIRATIME},
	"diratime":      {clear: unix.MS_NODIRATIME},
	"sync":          {set: unix.MS_SYNCHRONOUS},
	"async":         {clear: unix.MS_SYNCHRONOUS},
	"dirsync":       {set: unix.MS_DIRSYNC},
}

// SetReadAhead raises the readahead of buffered readers of the mount on dir,
// where we may.
func SetReadAhead(dir string) {
	if os.Geteuid() != 0 {
		return
	}
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return
	}
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	// Best effort: without it the kernel's default holds.
	_ = os.WriteFile(path, fmt.Appendf(nil, "%d", readAhead>>10), 0)
}

// Passthrough registers fd as RegisterBacking does.
func (s *Server) Passthrough(fd int) (int32, error) {
	id, errno := s.srv.RegisterBackingFd(&fuse.BackingMap{Fd: int32(fd)})
	if errno != 0 {
		return 0, fmt.Errorf("passthrough: %w", errno)
	}
	return id, nil
}

// Dir is the absolute path of the mount point.
func (s *Server) Dir() string { return s.dir }

// Done is closed when the mount is gone and all requests are answered.
func (s *Server) Done() <-chan struct{} { return s.done }

// Unmount unmounts and waits until all requests are answered. A mount that is
// in use gives EBUSY.
func (s *Server) Unmount() error {
	if err := Unmount(s.dir, false); err != nil {
		return err
	}
	<-s.done
	return nil
}

// Detach takes the mount out of the directory tree even while it is in use;
// those who use it go on until they close it or the process ends.
func (s *Server) Detach() error { return Unmount(s.dir, true) }

// Unmount unmounts a FUSE filesystem, as root by itself, otherwise through
// fusermount3. lazy is MNT_DETACH. A mount in use gives an error that wraps
// EBUSY; so may one that was in use a moment ago, so it is tried for a while.
func Unmount(dir string, lazy bool) error {
	var err error
	for wait := time.Millisecond; wait < 300*time.Millisecond; wait *= 2 {
		if err = unmountOnce(dir, lazy); !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(wait)
	}
	return err
}

// fusermount finds fusermount3, also where there is no PATH (mount(8) clears it).
func fusermount() string {
	const name = "fusermount3"
	for _, path := range []string{name, "/usr/bin/" + name, "/bin/" + name} {
		if found, err := exec.LookPath(path); err == nil {
			return found
		}
	}
	return name
}

func unmountOnce(dir string, lazy bool) error {
	if os.Geteuid() == 0 {
		flags := unix.UMOUNT_NOFOLLOW
		if lazy {
			flags |= unix.MNT_DETACH
		}
		if err := unix.Unmount(dir, flags); err != nil {
			return fmt.Errorf("unmounting %s: %w", dir, err)
		}
		return nil
	}
	args := []string{"-u", "--", dir}
	if lazy {
		args[0] = "-uz"
	}
	cmd := exec.Command(fusermount(), args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	msg := strings.TrimSpace(string(out))
	if strings.Contains(msg, "busy") {
		return fmt.Errorf("%s: %w", msg, unix.EBUSY)
	}
	return fmt.Errorf("unmounting %s: %s: %w", dir, msg, err)
}
