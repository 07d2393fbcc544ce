package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrShrunk reports that another program has cut off the end of a file that is
// open for writing.
var ErrShrunk = errors.New("another program has made the file shorter")

// A write behind the end makes a file longer, with a hole before it. Where the
// end is there because somebody has cut the file off, that write would look
// like a success and what was cut off would read as zeros. So a file that is
// written to remembers a length that it must have: it had it when it was
// opened, or has reached it by our own changes. A write, a copy or a sync that
// finds it shorter fails, and so do all after it. This costs an lseek(2) for
// each. Between that and the write the file may still be cut off: what guards
// images against other programs are the locks, this is for those that do not
// ask.

// length guards a regular file.
type length struct {
	mu    sync.Mutex
	least int64 // the file is at least this long
	cut   bool
}

// end is one question for the length of a file. It is pooled together with its
// closure, so that a write does not allocate.
type end struct {
	size int64
	err  error
	call func(fd uintptr)
}

var ends = sync.Pool{New: func() any {
	e := &end{}
	e.call = func(fd uintptr) {
		for {
			if e.size, e.err = unix.Seek(int(fd), 0, unix.SEEK_END); e.err != unix.EINTR {
				return
			}
		}
	}
	return e
}}

// size is the length of a file or a block device. It moves the file offset,
// which nobody uses. It is no fstat(2): that also reads the time of the last
// change, and since Linux 6.13 a time that somebody has seen must not be given
// twice (multigrain timestamps), so that the next write has to change the
// inode, and the next fdatasync(2) to write it.
func (o *osFile) size() (int64, error) {
	e := ends.Get().(*end)
	defer ends.Put(e)
	err := fs.ErrClosed
	if o.raw.Control(e.call) == nil {
		err = e.err
	}
	return e.size, pathErr("size", o.name, err)
}

// guarded tells whether the file's length is watched.
func (o *osFile) guarded() bool { return !o.block && o.direct == nil }

// whole fails when the file is shorter than it must be.
func (o *osFile) whole(op string) error {
	if !o.guarded() {
		return nil
	}
	o.length.mu.Lock()
	defer o.length.mu.Unlock()
	size, err := o.size()
	if err != nil {
		return nil // the operation itself will tell
	}
	if o.length.cut || size < o.length.least {
		o.length.cut = true
		return pathErr(op, o.name, fmt.Errorf("%w: %d bytes are left of %d (%w)", ErrShrunk, size, o.length.least, unix.EIO))
	}
	return nil
}

// reached notes that n bytes were written at off.
func (o *osFile) reached(off, n int64) {
	if n > 0 && o.guarded() {
		o.length.mu.Lock()
		defer o.length.mu.Unlock()
		o.length.least = max(o.length.least, off+n)
	}
}
