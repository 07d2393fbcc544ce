package backend

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"sync"

	"golang.org/x/sys/unix"
)

// copyBuffers are what copyLoop moves bytes through.
var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

func overlap(a, b, n int64) bool { return a < b+n && b < a+n }

func checkCopy(src File, srcOff, off, n int64) error {
	if src == nil || srcOff < 0 || off < 0 || n < 0 || n > math.MaxInt64-srcOff || n > math.MaxInt64-off {
		return unix.EINVAL
	}
	return nil
}

// copyLoop is CopyRange by reading and writing, for files that have nothing
// better in common.
func copyLoop(dst, src File, srcOff, off, n int64) (int64, error) {
	b := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(b)
	var done int64
	for done < n {
		p := (*b)[:min(n-done, int64(len(*b)))]
		r, rerr := src.ReadAt(p, srcOff+done)
		if r > 0 {
			w, err := dst.WriteAt(p[:r], off+done)
			done += int64(w)
			if err != nil {
				return done, err
			}
		}
		if r < len(p) {
			if rerr == nil || errors.Is(rerr, io.EOF) {
				rerr = io.ErrUnexpectedEOF
			}
			return done, rerr
		}
	}
	return done, nil
}

// IDOf returns the identity of f, looking through wrappers such as Fault; ok
// is false when there is none.
func IDOf(f File) (dev, ino uint64, ok bool) {
	for f != nil {
		if i, is := f.(Identified); is {
			return i.ID()
		}
		f = unwrap(f)
	}
	return 0, 0, false
}

// LockerOf returns the Locker of f, looking through wrappers such as Fault, or
// nil when f cannot be locked (a Mem, which nobody else can open).
func LockerOf(f File) Locker {
	for f != nil {
		if l, is := f.(Locker); is {
			return l
		}
		f = unwrap(f)
	}
	return nil
}

// WithDescriptor calls use with the descriptor of the regular file that f is,
// which stays open for as long. For anything else (memory, block devices, what
// is wrapped for a test, files opened Direct) it is an ErrUnsupported.
func WithDescriptor(f File, use func(fd int) error) error {
	o, is := f.(*osFile)
	if !is || o.block || o.direct != nil {
		return fmt.Errorf("%s: %w: no regular file", f.Name(), errors.ErrUnsupported)
	}
	var err error
	if cerr := o.raw.Control(func(fd uintptr) { err = use(int(fd)) }); cerr != nil {
		return fs.ErrClosed
	}
	return err
}

func unwrap(f File) File {
	if w, is := f.(interface{ Unwrap() File }); is {
		return w.Unwrap()
	}
	return nil
}

// pathErr gives err the usual form.
func pathErr(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}
