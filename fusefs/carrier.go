package fusefs

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imagestack/imagestack/fusefs/uring"
)

// Requests that come over io_uring (package uring) are answered here. Reads
// and writes, which are nearly all of them, are decoded in place; the rest
// goes through go-fuse, as those that come over /dev/fuse do.

// Numbers of operations (linux/fuse.h).
const (
	opRead  = 15
	opWrite = 16
	opFsync = 20
	opInit  = 26
)

// capOverURing is the capability FUSE_OVER_IO_URING.
const capOverURing = 1 << 41

// CachedReader is a Device that can tell what it can read without waiting.
type CachedReader interface {
	// ReadCached fills p from off, inside the disk, if all of it is in
	// memory, and reports whether it did.
	ReadCached(p []byte, off int64) bool
}

// InPlaceWriter is a Device that can tell what it can write quickly.
type InPlaceWriter interface {
	// WriteInPlace stores p at off, inside the disk, if that needs no more
	// than copying it, and reports whether it did. After false any part of p
	// may have been stored.
	WriteInPlace(p []byte, off int64) bool
}

// carrier is a uring.Handler.
type carrier struct {
	fs *FS
	ps *fuse.ProtocolServer
	// rest is until when no write is made in place, in nanoseconds since the
	// epoch: the host made one wait, for room in its page cache or for its
	// journal, and reads must not wait behind the next ones.
	rest atomic.Int64
	// syncRest is until when no sync is made in place, as rest.
	syncRest atomic.Int64
	// reads tells that something was read since the last sync.
	reads atomic.Bool
}

const (
	// What is longer is worth another thread, which copies while the queue's
	// own takes requests.
	tryRead, tryWrite = 128 << 10, 64 << 10
	// slowWrite is how long a write in place may take without any being made
	// for the time of writeRest.
	slowWrite, writeRest = 500 * time.Microsecond, 50 * time.Millisecond
	// slowSync and syncRest are the same of syncs. Who makes one waits for it in
	// the kernel with the file locked, so that reads and other files of the mount
	// can be held up; after a read the next one is not made in place.
	slowSync, syncRest = 10 * time.Millisecond, 500 * time.Millisecond
)

// newCarrier answers requests of a kernel that srv has settled the protocol
// with.
func newCarrier(fs *FS, srv *fuse.Server, o *fuse.MountOptions) (*carrier, error) {
	c := &carrier{fs: fs, ps: fuse.NewProtocolServer(fs, o)}
	// Let it know what was settled.
	k := srv.KernelSettings()
	in := make([]byte, 40+64)
	binary.NativeEndian.PutUint32(in, uint32(len(in)))
	binary.NativeEndian.PutUint32(in[4:], opInit)
	binary.NativeEndian.PutUint64(in[8:], 1)
	for i, v := range []uint32{k.Major, k.Minor, k.MaxReadAhead, k.Flags, k.Flags2} {
		binary.NativeEndian.PutUint32(in[40+4*i:], v)
	}
	if _, status := c.ps.HandleRequest([][]byte{in}, [][]byte{make([]byte, 256)}); !status.Ok() {
		return nil, fmt.Errorf("settling the protocol: %v", status)
	}
	return c, nil
}

// span is what a read or a write is about: struct fuse_read_in and struct
// fuse_write_in begin alike.
func span(op []byte) (off uint64, size uint32) {
	return binary.NativeEndian.Uint64(op[8:]), binary.NativeEndian.Uint32(op[16:])
}

// Try answers reads of what is in memory, writes into what has a place, and
// syncs that are likely to be quick.
func (c *carrier) Try(r *uring.Request) bool {
	f := c.fs.file(r.Node())
	if f == nil {
		return false
	}
	switch r.Opcode() {
	case opRead:
		return c.tryRead(r, f)
	case opWrite:
		return c.tryWrite(r, f)
	case opFsync:
		return c.trySync(r)
	}
	return false
}

func (c *carrier) tryRead(r *uring.Request, f *file) bool {
	cached, ok := f.dev.(CachedReader)
	off, size := span(r.Op())
	if !c.reads.Load() {
		c.reads.Store(true)
	}
	if !ok || size > tryRead {
		return false
	}
	buf := r.Results()
	n := clip(f.size, off, uint64(min(int(size), len(buf))))
	if n > 0 && !cached.ReadCached(buf[:n], int64(off)) {
		return false
	}
	r.Reply(int(n), 0)
	return true
}

func (c *carrier) tryWrite(r *uring.Request, f *file) bool {
	w, ok := f.dev.(InPlaceWriter)
	off, size := span(r.Op())
	data := r.Arguments()
	if !ok || !c.fs.writable || size == 0 || size > tryWrite || int(size) > len(data) || clip(f.size, off, uint64(size)) != int64(size) {
		return false
	}
	begin := time.Now()
	if begin.UnixNano() < c.rest.Load() || !c.fs.gate.TryRLock() {
		return false
	}
	defer c.fs.gate.RUnlock()
	if c.fs.closed || !w.WriteInPlace(data[:size], int64(off)) {
		return false // Do follows, and notes the change
	}
	now := time.Now()
	if now.Sub(begin) > slowWrite {
		c.rest.Store(now.Add(writeRest).UnixNano())
	}
	c.fs.changed()
	c.written(r, size)
	return true
}

// trySync makes a sync in place while nobody reads and syncs are quick: to hand
// it to a goroutine and to get the reply back takes as long as many a disk needs
// for it, and who writes to the same file waits for it anyway, in the kernel.
func (c *carrier) trySync(r *uring.Request) bool {
	if c.reads.Swap(false) || !c.fs.writable {
		return false
	}
	begin := time.Now()
	if begin.UnixNano() < c.syncRest.Load() || !c.fs.gate.TryRLock() {
		return false
	}
	defer c.fs.gate.RUnlock()
	if c.fs.closed {
		return false
	}
	status := c.fs.syncOpen()
	if now := time.Now(); now.Sub(begin) > slowSync {
		c.syncRest.Store(now.Add(syncRest).UnixNano())
	}
	r.Reply(0, int32(status))
	return true
}

// written is the reply of a write: struct fuse_write_out.
func (c *carrier) written(r *uring.Request, n uint32) {
	binary.NativeEndian.PutUint32(r.Results(), n)
	binary.NativeEndian.PutUint32(r.Results()[4:], 0)
	r.Reply(8, 0)
}

// Do answers everything.
func (c *carrier) Do(r *uring.Request) {
	switch r.Opcode() {
	case opRead:
		in := fuse.ReadIn{InHeader: fuse.InHeader{NodeId: r.Node()}}
		in.Offset, in.Size = span(r.Op())
		res, status := c.fs.Read(nil, &in, r.Results())
		n := 0
		if status.Ok() {
			n = res.Size()
			res.Done()
		}
		r.Reply(n, int32(status))
	case opWrite:
		in := fuse.WriteIn{InHeader: fuse.InHeader{NodeId: r.Node()}}
		in.Offset, in.Size = span(r.Op())
		n, status := c.fs.Write(nil, &in, r.Arguments())
		if !status.Ok() {
			r.Reply(0, int32(status))
			return
		}
		c.written(r, n)
	default:
		c.dispatch(r)
	}
}

func (c *carrier) dispatch(r *uring.Request) {
	in := [][]byte{r.Header(), r.Op()[:r.OpLen()], r.Arguments()}
	n, status := c.ps.HandleRequest(in, [][]byte{r.ReplyHeader(), r.Results()})
	if !status.Ok() || n < len(r.ReplyHeader()) {
		r.Reply(0, int32(fuse.EIO))
		return
	}
	r.Replied(n - len(r.ReplyHeader()))
}
