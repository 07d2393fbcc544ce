package fusefs

import (
	"context"
	"errors"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/layers"
)

// maxReported bounds the memory spent on remembering what was reported.
const maxReported = 1000

// reporter passes each distinct message on once.
type reporter struct {
	report func(error)
	mu     sync.Mutex
	seen   map[string]struct{}
}

func (r *reporter) add(err error) {
	if r.report == nil {
		return
	}
	r.mu.Lock()
	_, known := r.seen[err.Error()]
	fresh := !known && len(r.seen) < maxReported
	if fresh {
		if r.seen == nil {
			r.seen = make(map[string]struct{})
		}
		r.seen[err.Error()] = struct{}{}
	}
	r.mu.Unlock()
	if fresh {
		r.report(err)
	}
}

// status turns an error of the device into the errno of the reply, and
// reports it unless it is one that the caller provoked knowingly.
func (fs *FS) status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	errno := errnoOf(err)
	if errno != unix.EROFS && errno != unix.EINTR {
		fs.reporter.add(err)
	}
	return fuse.Status(errno)
}

// errnoOf finds the errno for an error: damage is EIO whatever else the error
// wraps; an errno of the operating system comes through, unless it would speak
// of our own descriptors and memory, or is one to which the kernel's FUSE
// client attaches a meaning of its own (ENOSYS: never ask again).
func errnoOf(err error) unix.Errno {
	switch {
	case errors.Is(err, layers.ErrCorrupt), errors.Is(err, layers.ErrFormat):
		return unix.EIO
	case errors.Is(err, layers.ErrReadOnly):
		return unix.EROFS
	case errors.Is(err, context.Canceled):
		return unix.EINTR
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		switch errno {
		case unix.ENOSYS, unix.EBADF, unix.EFAULT, unix.ENOENT, unix.EINTR, unix.EAGAIN, 0:
			return unix.EIO
		}
		return errno
	}
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, layers.ErrUnsupported) {
		return unix.EOPNOTSUPP
	}
	return unix.EIO
}
