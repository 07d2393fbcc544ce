package fusefs

import (
	"errors"
	"io"
	"math"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// result is the reply of a read; it goes back to its pool once it was sent.
type result struct {
	data []byte
	pool *sync.Pool
}

func (r *result) Bytes([]byte) ([]byte, fuse.Status) { return r.data, fuse.OK }
func (r *result) Size() int                          { return len(r.data) }
func (r *result) Done()                              { r.data = nil; r.pool.Put(r) }

// Read reads straight into buf, which is the kernel's reply. Behind the end of
// the file it is short, as read(2).
func (fs *FS) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	f := fs.file(in.NodeId)
	if f == nil {
		return nil, fuse.EISDIR
	}
	n := clip(f.size, in.Offset, uint64(min(int(in.Size), len(buf))))
	if n > 0 {
		got, err := f.dev.ReadAt(fs.ctx, buf[:n], int64(in.Offset))
		if int64(got) < n {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF // the device is shorter than it says
			}
			return nil, fs.status(err)
		}
	}
	r := fs.results.Get().(*result)
	r.data = buf[:n]
	return r, fuse.OK
}

// clip returns how many of n bytes at off lie inside size.
func clip(size int64, off, n uint64) int64 {
	if off >= uint64(size) {
		return 0
	}
	return int64(min(n, uint64(size)-off))
}

// begin enters a change; the caller must end it with fs.gate.RUnlock when the
// status is OK.
func (fs *FS) begin() fuse.Status {
	if !fs.writable {
		return fuse.EROFS
	}
	fs.gate.RLock()
	if fs.closed {
		fs.gate.RUnlock()
		return fs.status(errShutDown)
	}
	return fuse.OK
}

// changed notes that there is something to sync and a new mtime. It comes
// after the change, also a failed one, so that the sync that takes the note
// covers the change.
func (fs *FS) changed() {
	now := time.Now().UnixNano()
	fs.mtime.Store(now)
	fs.flusher.mark(now)
}

// Write is short at the end of the file and EFBIG behind it.
func (fs *FS) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	f := fs.file(in.NodeId)
	if f == nil {
		return 0, fuse.EISDIR
	}
	if len(data) == 0 {
		return 0, fuse.OK
	}
	n := clip(f.size, in.Offset, uint64(min(len(data), math.MaxInt32)))
	if st := fs.begin(); st != fuse.OK {
		return 0, st
	}
	defer fs.gate.RUnlock()
	if n == 0 {
		return 0, fuse.Status(unix.EFBIG)
	}
	got, err := f.dev.WriteAt(fs.ctx, data[:n], int64(in.Offset))
	fs.changed()
	if err != nil && got <= 0 {
		return 0, fs.status(err)
	}
	if err != nil {
		fs.reporter.add(err) // a short write: the next one meets the error
	}
	return uint32(got), fuse.OK
}

// Fsync makes the whole disk durable, whichever file it is called on.
func (fs *FS) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fs.sync() }

// FsyncDir is Fsync.
func (fs *FS) FsyncDir(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fs.sync() }

func (fs *FS) sync() fuse.Status {
	if !fs.writable {
		return fuse.OK
	}
	if st := fs.begin(); st != fuse.OK {
		return st
	}
	defer fs.gate.RUnlock()
	return fs.syncOpen()
}

// syncOpen is sync for who holds the gate.
func (fs *FS) syncOpen() fuse.Status {
	return fs.status(errors.Join(fs.flusher.failure(), fs.flusher.flush(fs.syncDevice)))
}

func (fs *FS) syncDevice() error { return fs.dev.Sync(fs.ctx) }

// Fallocate knows punching holes and zeroing ranges. Allocating (mode 0) and
// moving data are EOPNOTSUPP; glibc's posix_fallocate then writes. A hole may
// reach behind the end and is clipped; zeroing behind the end is EFBIG.
func (fs *FS) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	f := fs.file(in.NodeId)
	if f == nil {
		return fuse.EISDIR
	}
	punch := in.Mode&unix.FALLOC_FL_PUNCH_HOLE != 0
	switch in.Mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE:
	default:
		return fuse.Status(unix.EOPNOTSUPP)
	}
	if in.Length == 0 || in.Offset > math.MaxInt64 || in.Length > math.MaxInt64-in.Offset {
		return fuse.EINVAL
	}
	if st := fs.begin(); st != fuse.OK {
		return st
	}
	defer fs.gate.RUnlock()
	n := clip(f.size, in.Offset, in.Length)
	if !punch && uint64(n) < in.Length {
		return fuse.Status(unix.EFBIG)
	}
	if n == 0 {
		return fuse.OK
	}
	err := f.dev.ZeroAt(fs.ctx, int64(in.Offset), n, punch)
	fs.changed()
	return fs.status(err)
}

// Lseek is SEEK_DATA and SEEK_HOLE; the kernel does the others.
func (fs *FS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	f := fs.file(in.NodeId)
	if f == nil {
		return fuse.EISDIR
	}
	if in.Offset >= uint64(f.size) {
		return fuse.Status(unix.ENXIO)
	}
	var at int64
	var err error
	switch in.Whence {
	case unix.SEEK_DATA:
		at, err = f.dev.SeekData(fs.ctx, int64(in.Offset))
	case unix.SEEK_HOLE:
		at, err = f.dev.SeekHole(fs.ctx, int64(in.Offset))
		if errors.Is(err, io.EOF) {
			at, err = f.size, nil
		}
	default:
		return fuse.EINVAL
	}
	if errors.Is(err, io.EOF) {
		return fuse.Status(unix.ENXIO)
	}
	out.Offset = uint64(at)
	return fs.status(err)
}
