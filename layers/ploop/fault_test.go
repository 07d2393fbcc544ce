package ploop

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// TestFullDisk: an allocation that runs out of space is ENOSPC, leaves a whole
// number of clusters behind, loses no slot, and the next one may succeed.
func TestFullDisk(t *testing.T) {
	ctx := context.Background()
	for _, n := range []int64{100, k64, 3 * k64, 3*k64 + 100} {
		m := newMem(t, CreateOptions{Size: 16 * k64, ClusterSize: k64})
		f := backend.NewFault(keep{m})
		i := mustOpen(t, f, true, nil)
		if err := i.WriteAt(ctx, []byte{1}, 0, bytesBelow(nil)); err != nil {
			t.Fatal(err)
		}
		f.Inject(backend.Rule{On: backend.OpWrite, Err: syscall.ENOSPC, Short: 5000})
		p := bytes.Repeat([]byte{7}, int(n))
		if err := i.WriteAt(ctx, p, 5*k64, bytesBelow(nil)); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if size, err := m.Size(); err != nil || size != 2*k64 {
			t.Errorf("%d bytes: length %d after ENOSPC, %v", n, size, err)
		}
		if err := i.WriteAt(ctx, p, 5*k64, bytesBelow(nil)); err != nil {
			t.Fatal(err)
		}
		if err := i.Close(); err != nil {
			t.Fatal(err)
		}
		checkFile(t, m, false)
		i = mustOpen(t, keep{m}, false, nil)
		want := make([]byte, i.Size())
		want[0] = 1
		copy(want[5*k64:], p)
		sameBytes(t, "after ENOSPC", stack{i}.content(t, nil), want)
	}
}

// TestNoHolesAfterAFailedWrite: a slot whose write failed lies below one that
// was written meanwhile; it stays free and is no hole of the closed file.
func TestNoHolesAfterAFailedWrite(t *testing.T) {
	ctx := context.Background()
	m := newMem(t, CreateOptions{Size: 16 * k64, ClusterSize: k64})
	i := mustOpen(t, keep{m}, true, nil)
	if err := i.WriteAt(ctx, []byte{1}, 0, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	a := &i.edit.alloc
	host, _, err := a.take(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.WriteAt(ctx, []byte{2}, 9*k64, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	if err := a.giveBack(host, 1); err != nil {
		t.Fatal(err)
	}
	holes := func() bool {
		size, _ := m.Size()
		allocated, _ := m.Allocated()
		return allocated != size
	}
	if !holes() {
		t.Fatal("the test makes no hole")
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, m, true)
	if holes() {
		t.Error("hole in the closed file")
	}
}

// TestFailedSyncIsFinal: nothing may claim later what a failed sync lost, and
// the image stays marked as in use.
func TestFailedSyncIsFinal(t *testing.T) {
	ctx := context.Background()
	for nth := 1; nth <= 2; nth++ { // of the data, of the BAT
		m := newMem(t, CreateOptions{Size: 16 * k64, ClusterSize: k64})
		f := backend.NewFault(keep{m})
		i := mustOpen(t, f, true, nil)
		if err := i.WriteAt(ctx, []byte{1}, 0, bytesBelow(nil)); err != nil {
			t.Fatal(err)
		}
		f.Inject(backend.Rule{On: backend.OpSync, Nth: nth, Err: syscall.EIO})
		err := i.Sync(ctx)
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "new.hds") {
			t.Fatalf("Sync: %v", err)
		}
		f.Clear()
		for what, err := range map[string]error{
			"Sync":    i.Sync(ctx),
			"WriteAt": i.WriteAt(ctx, []byte{1}, 0, bytesBelow(nil)),
			"ZeroAt":  i.ZeroAt(ctx, 0, 1, true, bytesBelow(nil)),
			"Close":   i.Close(),
		} {
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("%s after a failed sync: %v", what, err)
			}
		}
		if h, err := parseHeader(m.Bytes(), "x"); err != nil || h.inUse != inUseOpen {
			t.Errorf("m_DiskInUse %#x, %v", h.inUse, err)
		}
		// The next writer takes it over.
		next := mustOpen(t, keep{m}, true, nil)
		if err := next.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestFailedBATWriteIsRepeated: the pages stay dirty and the released slots
// are not free until a commit has succeeded.
func TestFailedBATWriteIsRepeated(t *testing.T) {
	ctx := context.Background()
	m := newMem(t, CreateOptions{Size: 16 * k64, ClusterSize: k64})
	f := backend.NewFault(keep{m})
	i := mustOpen(t, f, true, layers.NewCache(0))
	if err := i.WriteAt(ctx, bytes.Repeat([]byte{1}, 2*k64), 0, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	if err := i.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if err := i.ZeroAt(ctx, k64, k64, true, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	f.Inject(backend.Rule{On: backend.OpWrite, Err: syscall.ENOSPC})
	if err := i.Sync(ctx); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("Sync: %v", err)
	}
	if size, _ := m.Size(); size != 3*k64 {
		t.Errorf("length %d: freed although the BAT was not written", size)
	}
	if err := i.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if size, _ := m.Size(); size != 2*k64 {
		t.Errorf("length %d: not freed by the second commit", size)
	}
	if n := i.bat.dirtyPages.Load(); n != 0 {
		t.Errorf("%d pages still pinned", n)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, m, false)
}

// TestNoHolesAfterACrash: the same for a slot that somebody else's crash left.
func TestNoHolesAfterACrash(t *testing.T) {
	b := put32(offInUse, inUseOpen)(sample(2))
	m := backend.NewMemBytes("img.hds", b)
	const slot = 4 * k64 // the free one
	if err := m.PunchHole(slot, k64); err != nil {
		t.Fatal(err)
	}
	if err := mustOpen(t, keep{m}, true, nil).Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, m, true)
	if hole, err := m.SeekHole(slot); err != nil || hole < slot+k64 {
		t.Errorf("hole at %#x, %v", hole, err)
	}
}
