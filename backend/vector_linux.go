package backend

import (
	"errors"
	"io"
	"io/fs"
	"sync"

	"golang.org/x/sys/unix"
)

// iovMax is IOV_MAX of Linux (UIO_MAXIOV): more buffers in one call are EINVAL.
const iovMax = 1024

// The system calls; tests put others here that transfer less than asked for.
var preadv, pwritev = unix.Preadv, unix.Pwritev

// vector is one preadv or pwritev. It is pooled together with its closure,
// so that a request does not allocate.
type vector struct {
	bufs  [][]byte
	off   int64
	write bool
	flags int // of a read: RWF_NOWAIT, RWF_DONTCACHE
	n     int
	err   error
	call  func(fd uintptr)
}

var vectors = sync.Pool{New: func() any {
	v := &vector{}
	v.call = func(fd uintptr) {
		for {
			switch {
			case v.write:
				v.n, v.err = pwritev(int(fd), v.bufs, v.off)
			case v.flags != 0:
				v.n, v.err = unix.Preadv2(int(fd), v.bufs, v.off, v.flags)
			default:
				v.n, v.err = preadv(int(fd), v.bufs, v.off)
			}
			if v.err != unix.EINTR {
				return
			}
		}
	}
	return v
}}

// ReadvAt is File.
func (o *osFile) ReadvAt(bufs [][]byte, off int64) (int, error) {
	switch {
	case o.direct != nil:
		return o.directReadvAt(bufs, off)
	case len(bufs) == 1:
		return o.ReadAt(bufs[0], off)
	}
	return o.vectored(bufs, off, false)
}

// WritevAt is File.
func (o *osFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	switch {
	case o.direct != nil:
		return o.directWritevAt(bufs, off)
	case len(bufs) == 1:
		return o.WriteAt(bufs[0], off)
	}
	if err := o.whole("write"); err != nil {
		return 0, err
	}
	n, err := o.vectored(bufs, off, true)
	o.reached(off, int64(n))
	return n, err
}

// vectored runs calls of at most iovMax buffers until everything is done.
func (o *osFile) vectored(bufs [][]byte, off int64, write bool) (done int, err error) {
	op := "readv"
	if write {
		op = "writev"
	}
	if off < 0 {
		return 0, pathErr(op, o.name, unix.EINVAL)
	}
	v := vectors.Get().(*vector)
	defer func() {
		clear(v.bufs) // keep no reference to the caller's memory
		v.bufs = v.bufs[:0]
		vectors.Put(v)
	}()
	skip := 0 // bytes of bufs[0] that are done
	for {
		for len(bufs) > 0 && skip >= len(bufs[0]) {
			skip -= len(bufs[0])
			bufs = bufs[1:]
		}
		if len(bufs) == 0 {
			return done, nil
		}
		v.bufs = append(v.bufs[:0], bufs[:min(len(bufs), iovMax)]...)
		v.bufs[0] = v.bufs[0][skip:]
		v.off, v.write = off, write
		if cerr := o.raw.Control(v.call); cerr != nil {
			return done, pathErr(op, o.name, fs.ErrClosed)
		}
		switch {
		case v.err != nil:
			return done, pathErr(op, o.name, v.err)
		case v.n <= 0 && write:
			return done, pathErr(op, o.name, io.ErrShortWrite)
		case v.n <= 0:
			return done, io.EOF
		}
		done += v.n
		off += int64(v.n)
		skip += v.n
	}
}

// ReadCached fills p with the bytes of f at off if all of them are in the page
// cache, and reports whether it did; it never waits for a disk. Files that
// cannot tell say no.
func ReadCached(f File, p []byte, off int64) bool {
	o, is := f.(*osFile)
	if !is || o.direct != nil || o.untold.Load() {
		return false
	}
	flags, transient := unix.RWF_NOWAIT, o.transient.Load()
	if transient {
		flags |= unix.RWF_DONTCACHE // it may start reading ahead
	}
	n, err := o.preadv2(p, off, flags)
	switch {
	case !errors.Is(err, errors.ErrUnsupported):
	case transient:
		o.transient.Store(false)
	default:
		o.untold.Store(true)
	}
	return err == nil && n == len(p)
}

// preadv2 is one preadv2(2).
func (o *osFile) preadv2(p []byte, off int64, flags int) (int, error) {
	v := vectors.Get().(*vector)
	v.bufs, v.off, v.write, v.flags = append(v.bufs[:0], p), off, false, flags
	err := o.raw.Control(v.call)
	n := v.n
	if err == nil {
		err = v.err
	}
	v.flags = 0
	clear(v.bufs) // keep no reference to the caller's memory
	v.bufs = v.bufs[:0]
	vectors.Put(v)
	return n, err
}

// DontCache has later reads of f, of one buffer, leave in the page cache only
// what was there before (RWF_DONTCACHE: Linux 6.14, where the filesystem can;
// elsewhere nothing changes).
func DontCache(f File) {
	if o, is := f.(*osFile); is && o.direct == nil && !o.block {
		o.transient.Store(true)
	}
}

// transientReadAt is ReadAt of a file for which there was DontCache.
func (o *osFile) transientReadAt(p []byte, off int64) (done int, err error) {
	if off < 0 {
		return 0, pathErr("read", o.name, unix.EINVAL)
	}
	for done < len(p) {
		n, err := o.preadv2(p[done:], off+int64(done), unix.RWF_DONTCACHE)
		switch {
		case errors.Is(err, errors.ErrUnsupported):
			o.transient.Store(false)
			n, err := o.f.ReadAt(p[done:], off+int64(done))
			return done + n, err
		case err != nil:
			return done, pathErr("read", o.name, err)
		case n <= 0:
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}
