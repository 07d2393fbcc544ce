package backend

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// LockDescriptor takes the lock by which ploop's tools (up to version 1.15)
// exclude each other from a bundle: an exclusive flock(2) on the empty file
// path + ".lck", where path is that of DiskDescriptor.xml. The file is made
// when missing and, as ploop does, never removed. Close gives the lock back.
//
// It does not wait: ErrInUse when somebody holds the lock (ploop itself then
// waits up to a minute). ploop holds it during an operation, not while an
// image is mounted, and does not take it to list or check. Later ploop
// versions lock the base image by QEMU's protocol instead: see Locker.
//
// Where the lock file cannot be made (a read-only filesystem, no permission)
// the error says so, and the caller decides whether reading needs a lock.
func LockDescriptor(path string) (io.Closer, error) {
	return lockDescriptor(path, unix.LOCK_EX)
}

// LockDescriptorShared is LockDescriptor for a reader: ploop and we refuse
// each other, but several shared holders do not.
func LockDescriptorShared(path string) (io.Closer, error) {
	return lockDescriptor(path, unix.LOCK_SH)
}

func lockDescriptor(path string, how int) (io.Closer, error) {
	name := path + ".lck"
	// The file may be replaced between open and flock; then we hold the lock
	// of a file that nobody else will ever see.
	for range 10 {
		f, err := openLockFile(name)
		if err != nil {
			return nil, err
		}
		err = flock(f, how|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w: another program holds the lock of the bundle (%w)", ErrInUse, err)
		}
		if err != nil {
			f.Close()
			return nil, pathErr("lock", name, err)
		}
		ours, err1 := f.Stat()
		now, err2 := os.Lstat(name)
		if err1 == nil && err2 == nil && os.SameFile(ours, now) {
			return f, nil
		}
		f.Close()
		if err := errors.Join(err1, err2); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return nil, pathErr("lock", name, fmt.Errorf("%w: the lock file keeps being replaced", ErrInUse))
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}

// openLockFile never follows a link out of the bundle, which is not trusted.
func openLockFile(name string) (*os.File, error) {
	const flags = unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|flags, 0o644)
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
		// A lock that exists can be taken without writing to it.
		if g, err2 := os.OpenFile(name, os.O_RDONLY|flags, 0); err2 == nil {
			f, err = g, nil
		}
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = pathErr("lock", name, fmt.Errorf("not a regular file (%w)", unix.EINVAL))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
