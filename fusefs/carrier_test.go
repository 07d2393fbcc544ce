package fusefs

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs/uring"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// TestOverRings runs what is tested over /dev/fuse over io_uring too.
func TestOverRings(t *testing.T) {
	imgtest.RequireURing(t)
	overRings = true
	defer func() { overRings = false }()
	for name, test := range map[string]func(*testing.T){
		"operations": TestOperations, "seek": TestSeekAndBlocks, "read-only": TestReadOnly, "errnos": TestErrnos,
		"directory": TestDirectory, "partitions": TestPartitionCoherence, "flush": TestBackgroundFlush,
		"shutdown": TestShutdown, "parallel": TestParallelModel,
	} {
		t.Run(name, test)
	}
}

// TestRingsAreUsed: the requests do come that way.
func TestRingsAreUsed(t *testing.T) {
	imgtest.RequireURing(t)
	overRings = true
	defer func() { overRings = false }()
	srv, _ := mounted(t, newMemDevice(1<<20), Options{})
	if srv.rings == nil {
		t.Fatal("served over /dev/fuse")
	}
}

// TestRingsWithoutOffer: where the kernel does not offer it, /dev/fuse it is.
func TestRingsWithoutOffer(t *testing.T) {
	imgtest.RequireURing(t)
	rings, err := uring.New(2, MaxRequest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/sys/module/fuse/parameters/enable_uring", []byte("N"), 0); err != nil {
		t.Fatal(err)
	}
	fs, err := New(newMemDevice(1<<20), Options{})
	if err != nil {
		t.Fatal(err)
	}
	srv, err := Mount(t.TempDir(), fs, MountOptions{Source: "test", Rings: rings})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := srv.Unmount(); err != nil {
			t.Error(err)
		}
		_ = fs.Shutdown()
	}()
	if srv.rings != nil {
		t.Error("rings without the kernel's offer")
	}
	if st, err := os.Stat(srv.Dir() + "/" + DiskName); err != nil || st.Size() != 1<<20 {
		t.Error("no disk", err)
	}
}

// TestCarrierDoesNotAllocate: neither do requests over rings.
func TestCarrierDoesNotAllocate(t *testing.T) {
	dev := newMemDevice(4 << 20)
	fs, err := New(dev, Options{FlushAfter: -1})
	if err != nil {
		t.Fatal(err)
	}
	c := &carrier{fs: fs}
	for _, c := range []struct {
		name string
		op   uint32
		off  uint64
		do   func(*uring.Request)
	}{
		{"cached read", opRead, memBlock, func(r *uring.Request) {
			if !c.Try(r) {
				t.Fatal("not tried")
			}
		}},
		{"read", opRead, 0, c.Do},
		{"write", opWrite, 0, c.Do},
		{"write in place", opWrite, 0, func(r *uring.Request) {
			c.rest.Store(0) // the machine may be busy
			if !c.Try(r) {
				t.Fatal("not tried")
			}
		}},
	} {
		r := uring.NewRequest(c.op, inoDisk, c.off, memBlock, 1<<20)
		again := func() {
			c.do(r)
			// The reply has the place of the request.
			binary.NativeEndian.PutUint32(r.Header()[4:], c.op)
			if c.op == opWrite {
				r.Replied(memBlock)
			}
		}
		if n := testing.AllocsPerRun(100, again); n != 0 && !imgtest.RaceEnabled {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
}

// TestTryWrite: a write is answered in place only where that is allowed, is
// noted as a change then, and is done by Do otherwise, also one of which a part
// was stored.
func TestTryWrite(t *testing.T) {
	const mapped = 32 * memBlock
	dev := newMemDevice(64 * memBlock)
	if _, err := dev.WriteAt(t.Context(), bytes.Repeat([]byte{1}, mapped), 0); err != nil {
		t.Fatal(err)
	}
	fs, err := New(dev, Options{FlushAfter: -1})
	if err != nil {
		t.Fatal(err)
	}
	c := &carrier{fs: fs}
	write := func(fill byte, off uint64, size uint32) *uring.Request {
		c.rest.Store(0) // the machine may be busy
		fs.flusher.since.Store(0)
		r := uring.NewRequest(opWrite, inoDisk, off, size, 1<<20)
		for i := range r.Arguments() {
			r.Arguments()[i] = fill
		}
		return r
	}
	answered := func(what string, r *uring.Request, fill byte, off uint64, size uint32) {
		t.Helper()
		if errno := int32(binary.NativeEndian.Uint32(r.Header()[4:])); errno != 0 || binary.NativeEndian.Uint32(r.Results()) != size {
			t.Errorf("%s: errno %d, %d bytes", what, errno, binary.NativeEndian.Uint32(r.Results()))
		}
		if !bytes.Equal(dev.data[off:off+uint64(size)], bytes.Repeat([]byte{fill}, int(size))) {
			t.Errorf("%s: not stored", what)
		}
		if fs.flusher.since.Load() == 0 {
			t.Errorf("%s: nobody will sync it", what)
		}
	}
	refused := func(what string, r *uring.Request) {
		t.Helper()
		before := bytes.Clone(dev.data)
		if c.Try(r) {
			t.Errorf("%s: it was answered", what)
		}
		if !bytes.Equal(dev.data, before) {
			t.Errorf("%s: it was written", what)
		}
		if fs.flusher.since.Load() != 0 {
			t.Errorf("%s: a change is noted", what)
		}
	}

	r := write(2, 512, memBlock)
	if !c.Try(r) {
		t.Fatal("a place, and not written")
	}
	answered("in place", r, 2, 512, memBlock)

	r = write(3, mapped-memBlock, 2*memBlock)
	refused("no place", r)
	c.Do(r)
	answered("no place, done", r, 3, mapped-memBlock, 2*memBlock)

	refused("too long", write(4, 0, tryWrite+1))
	refused("nothing", write(4, 0, 0))
	refused("over the end", write(4, uint64(fs.dev.Size())-512, 1024))
	refused("behind the end", write(4, 1<<63, 512))
	cut := write(4, 0, memBlock)
	cut.Replied(512) // says less than it is to be
	refused("data cut off", cut)
	r = write(4, 0, memBlock)
	fs.gate.Lock()
	refused("during Shutdown", r)
	fs.gate.Unlock()
	fs.writable = false
	refused("read-only", write(4, 0, memBlock))
	fs.writable = true

	dev.inPlace = storeNone
	r = write(5, 0, memBlock)
	refused("by the disk", r)
	c.Do(r)
	answered("by the disk, done", r, 5, 0, memBlock)

	dev.inPlace = storeHalf
	r = write(6, memBlock, memBlock)
	if c.Try(r) || dev.data[memBlock] != 6 || dev.data[2*memBlock-1] == 6 {
		t.Error("half was stored, and it was answered")
	}
	c.Do(r)
	answered("half", r, 6, memBlock, memBlock)

	dev.inPlace, dev.wait = storeAll, 2*slowWrite
	r = write(7, 0, memBlock)
	before := time.Now().UnixNano()
	if !c.Try(r) {
		t.Error("slowly: not written")
	}
	answered("slowly", r, 7, 0, memBlock)
	rest := c.rest.Load()
	if rest < before+int64(writeRest) {
		t.Error("a write that took long has no consequence")
	}
	dev.wait = 0
	r = write(8, 0, memBlock)
	c.rest.Store(time.Now().Add(time.Hour).UnixNano())
	refused("after a slow one", r)

	if err := fs.Shutdown(); err != nil {
		t.Fatal(err)
	}
	refused("after Shutdown", write(9, 0, memBlock))
}

// TestTrySync: a sync is made in place only while nobody reads and syncs are
// quick, and its error is the reply.
func TestTrySync(t *testing.T) {
	dev := newMemDevice(4 * memBlock)
	fs, err := New(dev, Options{FlushAfter: -1})
	if err != nil {
		t.Fatal(err)
	}
	c := &carrier{fs: fs}
	rest := int64(0)
	try := func() (made bool, errno int32) {
		t.Helper()
		c.syncRest.Store(rest) // the machine may be busy
		fs.changed()
		before := dev.syncs
		r := uring.NewRequest(opFsync, inoDisk, 0, 0, memBlock)
		if tried := c.Try(r); tried != (dev.syncs == before+1) {
			t.Fatalf("answered: %v, %d syncs", tried, dev.syncs-before)
		} else if !tried {
			return false, 0
		}
		return true, -int32(binary.NativeEndian.Uint32(r.Header()[4:]))
	}
	want := func(what string, made bool, errno unix.Errno) {
		t.Helper()
		if got, e := try(); got != made || e != int32(errno) {
			t.Errorf("%s: made in place: %v, errno %d", what, got, e)
		}
	}
	want("a sync", true, 0)
	for _, off := range []uint64{memBlock, 0} { // cached and not
		c.Try(uring.NewRequest(opRead, inoDisk, off, memBlock, memBlock))
		want("after a read", false, 0)
		want("and then", true, 0)
	}
	dev.syncErr = unix.EIO
	want("one that fails", true, unix.EIO)
	dev.syncErr = nil
	want("after that", true, 0)
	fs.gate.Lock()
	want("during Shutdown", false, 0)
	fs.gate.Unlock()
	fs.writable = false
	want("read-only", false, 0)
	fs.writable = true
	dev.wait = 2 * slowSync
	before := time.Now().UnixNano()
	want("a slow one", true, 0)
	if c.syncRest.Load() < before+int64(syncRest) {
		t.Error("a sync that took long has no consequence")
	}
	dev.wait = 0
	rest = time.Now().Add(time.Hour).UnixNano()
	want("after a slow one", false, 0)
	rest = 0
	if err := fs.Shutdown(); err != nil {
		t.Fatal(err)
	}
	want("after Shutdown", false, 0)
}
