package fusefs

import (
	"encoding/binary"
	"os"
	"testing"

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
	} {
		r := uring.NewRequest(c.op, inoDisk, c.off, memBlock, 1<<20)
		again := func() {
			c.do(r)
			// The reply has the place of the request.
			binary.NativeEndian.PutUint32(r.Header()[4:], c.op)
		}
		if n := testing.AllocsPerRun(100, again); n != 0 && !imgtest.RaceEnabled {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
}
