package fusefs

import (
	"context"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs/uring"
)

// memDevice is a disk in memory with a block map of 4 KiB, so that holes are
// exact, and with hooks for faults.
type memDevice struct {
	mu       sync.RWMutex
	data     []byte
	used     []bool
	readOnly bool
	syncs    int
	dirty    bool
	readErr  error
	writeErr error
	syncErr  error
	zeroErr  error
	punches  int
	inPlace  inPlace       // what writes in place do
	wait     time.Duration // how long they take
}

// inPlace is how a memDevice writes in place.
type inPlace uint8

const (
	storeAll  inPlace = iota // what has a place
	storeHalf                // one half, and gives up
	storeNone
)

const memBlock = 4096

func newMemDevice(size int64) *memDevice {
	return &memDevice{data: make([]byte, size), used: make([]bool, (size+memBlock-1)/memBlock)}
}

func (d *memDevice) Size() int64    { return int64(len(d.data)) }
func (d *memDevice) Writable() bool { return !d.readOnly }

func (d *memDevice) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.readErr != nil {
		return 0, d.readErr
	}
	n := copy(p, d.data[min(off, int64(len(d.data))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *memDevice) WriteAt(_ context.Context, p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.writeErr != nil {
		return 0, d.writeErr
	}
	if off+int64(len(p)) > int64(len(d.data)) {
		return 0, unix.EINVAL
	}
	d.dirty = true
	for b := off / memBlock; b*memBlock < off+int64(len(p)); b++ {
		d.used[b] = true
	}
	return copy(d.data[off:], p), nil
}

func (d *memDevice) ZeroAt(_ context.Context, off, n int64, punch bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.zeroErr != nil {
		return d.zeroErr
	}
	if off+n > int64(len(d.data)) {
		return unix.EINVAL
	}
	d.dirty = true
	clear(d.data[off : off+n])
	if punch {
		d.punches++
		for b := (off + memBlock - 1) / memBlock; (b+1)*memBlock <= off+n; b++ {
			d.used[b] = false
		}
	}
	return nil
}

func (d *memDevice) Sync(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.syncs++
	time.Sleep(d.wait)
	if d.syncErr != nil {
		return d.syncErr
	}
	d.dirty = false
	return nil
}

func (d *memDevice) seek(off int64, used bool) (int64, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if off >= int64(len(d.data)) {
		return 0, io.EOF
	}
	for b := off / memBlock; b < int64(len(d.used)); b++ {
		if d.used[b] == used {
			return max(off, b*memBlock), nil
		}
	}
	if used {
		return 0, io.EOF
	}
	return int64(len(d.data)), nil
}

func (d *memDevice) SeekData(_ context.Context, off int64) (int64, error) { return d.seek(off, true) }
func (d *memDevice) SeekHole(_ context.Context, off int64) (int64, error) { return d.seek(off, false) }

func (d *memDevice) Allocated() (int64, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var n int64
	for _, u := range d.used {
		if u {
			n += memBlock
		}
	}
	return n, nil
}

func (d *memDevice) isDirty() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.dirty
}

// set changes a field under the lock.
func (d *memDevice) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

// overRings lets mounted serve over io_uring.
var overRings bool

// ReadCached knows every other read beforehand.
func (d *memDevice) ReadCached(p []byte, off int64) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.readErr != nil || off/memBlock%2 == 0 {
		return false
	}
	copy(p, d.data[off:])
	return true
}

// WriteInPlace implements InPlaceWriter.
func (d *memDevice) WriteInPlace(p []byte, off int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.writeErr != nil || d.inPlace == storeNone {
		return false
	}
	for b := off / memBlock; b*memBlock < off+int64(len(p)); b++ {
		if !d.used[b] {
			return false
		}
	}
	d.dirty = true
	if d.inPlace == storeHalf {
		p = p[:len(p)/2]
	}
	copy(d.data[off:], p)
	time.Sleep(d.wait)
	return d.inPlace == storeAll
}

// mounted mounts dev for the time of a test and returns the path of disk.raw.
func mounted(t *testing.T, dev Device, o Options) (*Server, string) {
	t.Helper()
	o.UID, o.GID = uint32(os.Geteuid()), uint32(os.Getegid())
	fs, err := New(dev, o)
	if err != nil {
		t.Fatal(err)
	}
	m := MountOptions{Source: "test"}
	if overRings {
		if m.Rings, err = uring.New(4, MaxRequest); err != nil {
			t.Fatal(err)
		}
	}
	srv, err := Mount(t.TempDir(), fs, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
			_ = srv.Detach()
		}
		_ = fs.Shutdown()
	})
	return srv, srv.Dir() + "/" + DiskName
}
