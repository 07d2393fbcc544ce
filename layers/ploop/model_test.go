package ploop

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// bytesBelow is a lower layer made of bytes; behind them it reads as zeros.
type bytesBelow []byte

func (b bytesBelow) ReadAt(_ context.Context, p []byte, off int64) error {
	n := 0
	if off < int64(len(b)) {
		n = copy(p, b[off:])
	}
	clear(p[n:])
	return nil
}

func (b bytesBelow) IsZero(_ context.Context, off, n int64) (bool, error) {
	for k := off; k < min(off+n, int64(len(b))); k++ {
		if b[k] != 0 {
			return false, nil
		}
	}
	return true, nil
}

// newMem makes an empty image in memory.
func newMem(t testing.TB, o CreateOptions) *backend.Mem {
	t.Helper()
	m := backend.NewMem("new.hds")
	if err := Create(context.Background(), m, o); err != nil {
		t.Fatal(err)
	}
	return m
}

// keep is a Mem that survives Close.
type keep struct{ *backend.Mem }

func (keep) Close() error { return nil }

func mustOpen(t testing.TB, f backend.File, writable bool, cache *layers.Cache) *Image {
	t.Helper()
	i, err := Open(context.Background(), f, layers.OpenOptions{Writable: writable, Cache: cache})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// checkFile looks at a closed image as a strict foreign reader would: header
// fields, length, entries in range and unique, no cluster lost.
func checkFile(t testing.TB, m *backend.Mem, leaks bool) {
	t.Helper()
	b := m.Bytes()
	h, err := parseHeader(b, "check")
	if err != nil {
		t.Fatal(err)
	}
	if h.inUse != inUseClosed {
		t.Errorf("m_DiskInUse = %#x after close", h.inUse)
	}
	if int64(len(b))%h.cluster != 0 {
		t.Errorf("length %d is not a multiple of the cluster %d", len(b), h.cluster)
	}
	seen := map[int64]int64{}
	for idx := range h.entries {
		e := int64(binary.LittleEndian.Uint32(b[headerSize+4*idx:]))
		if e == 0 {
			continue
		}
		host := e * h.cluster
		if h.version == 1 {
			host = e * sectorSize
		}
		if other, dup := seen[host]; dup {
			t.Errorf("BAT[%d] and BAT[%d] share %#x", idx, other, host)
		}
		if host%h.cluster != 0 || host < h.firstData || host+h.cluster > int64(len(b)) {
			t.Errorf("BAT[%d] points to %#x of %d", idx, host, len(b))
		}
		seen[host] = idx
	}
	if (h.flags&flagEmpty != 0) != (len(seen) == 0) {
		t.Errorf("CIF_Empty: flags %#x with %d clusters", h.flags, len(seen))
	}
	if lost := (int64(len(b))-h.firstData)/h.cluster - int64(len(seen)); lost != 0 && !leaks {
		t.Errorf("%d of the file's clusters are not referenced", lost)
	}
}

// TestModel: random operations against a byte array, over an empty and a
// non-empty lower layer, with reopening, in both versions.
func TestModel(t *testing.T) {
	left := 25 // the conformance kit does the rest
	rapid.Check(t, func(rt *rapid.T) {
		if left--; left < 0 && !t.Failed() {
			return
		}
		ctx := context.Background()
		cluster := int64(rapid.SampledFrom([]int{32 << 10, 64 << 10}).Draw(rt, "cluster"))
		size := int64(rapid.IntRange(1, 40).Draw(rt, "clusters")) * cluster
		if cut := int64(rapid.IntRange(0, 3).Draw(rt, "cut")) * 4608; cut < size {
			size -= cut
		}
		o := CreateOptions{Size: size, ClusterSize: cluster, Version: rapid.IntRange(1, 2).Draw(rt, "version")}
		var below bytesBelow
		if rapid.Bool().Draw(rt, "below") {
			below = make([]byte, int64(rapid.IntRange(1, int(size)).Draw(rt, "below size")))
			for k := range below {
				if k/50000%2 == 0 {
					below[k] = byte(k%251) + 1
				}
			}
		}
		want := make([]byte, size)
		copy(want, below)
		m := newMem(t, o)
		img := mustOpen(t, keep{m}, true, nil)
		compare := func(what string) {
			got := make([]byte, size)
			copy(got, below)
			readLayer(t, img, got, 0)
			if !bytes.Equal(got, want) {
				for k := range got {
					if got[k] != want[k] {
						rt.Fatalf("%s: byte %#x is %#x, want %#x", what, k, got[k], want[k])
					}
				}
			}
		}
		span := func() (int64, int64) {
			off := int64(rapid.IntRange(0, int(size)-1).Draw(rt, "off"))
			n := int64(rapid.IntRange(1, int(size-off)).Draw(rt, "n"))
			if rapid.Bool().Draw(rt, "align") {
				off, n = off/cluster*cluster, (n+cluster-1)/cluster*cluster
				n = min(n, size-off)
			}
			return off, n
		}
		seed := byte(1)
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				off, n := span()
				seed++
				p := bytes.Repeat([]byte{seed | 1}, int(n))
				if err := img.WriteAt(ctx, p, off, below); err != nil {
					rt.Fatal(err)
				}
				copy(want[off:], p)
			},
			"zero": func(rt *rapid.T) {
				off, n := span()
				if err := img.ZeroAt(ctx, off, n, rapid.Bool().Draw(rt, "punch"), below); err != nil {
					rt.Fatal(err)
				}
				clear(want[off : off+n])
			},
			"sync": func(rt *rapid.T) {
				if err := img.Sync(ctx); err != nil {
					rt.Fatal(err)
				}
			},
			"reopen": func(rt *rapid.T) {
				if err := img.Close(); err != nil {
					rt.Fatal(err)
				}
				checkFile(t, m, true)
				img = mustOpen(t, keep{m}, true, nil)
			},
			"": func(*rapid.T) { compare("after a step") },
		})
		if err := img.Close(); err != nil {
			rt.Fatal(err)
		}
		checkFile(t, m, true)
		img = mustOpen(t, keep{m}, false, nil)
		compare("reopened")
		if t.Failed() {
			rt.Fatal("file is not as it should be")
		}
	})
}

// TestReleaseReuseAndTrim follows one slot through its life.
func TestReleaseReuseAndTrim(t *testing.T) {
	ctx := context.Background()
	const cl = 32 << 10
	m := newMem(t, CreateOptions{Size: 16 * cl, ClusterSize: cl})
	img := mustOpen(t, keep{m}, true, nil)
	write := func(idx int64, b byte) {
		t.Helper()
		if err := img.WriteAt(ctx, bytes.Repeat([]byte{b}, cl), idx*cl, bytesBelow(nil)); err != nil {
			t.Fatal(err)
		}
	}
	zero := func(idx int64) {
		t.Helper()
		if err := img.ZeroAt(ctx, idx*cl, cl, true, bytesBelow(nil)); err != nil {
			t.Fatal(err)
		}
	}
	size := func() int64 {
		n, err := m.Size()
		if err != nil {
			t.Fatal(err)
		}
		return n/cl - 1
	}
	host := func(idx int64) int64 {
		r, err := img.bat.next(idx, idx+1)
		if err != nil {
			t.Fatal(err)
		}
		return r.host / cl
	}
	for idx := range int64(4) {
		write(idx, 1)
	}
	zero(1)
	write(8, 2)
	if host(8) != 5 {
		t.Errorf("slot of a release that is not durable was reused: %d", host(8))
	}
	if err := img.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	write(9, 3)
	if host(9) != 2 {
		t.Errorf("free slot 2 was not reused but %d", host(9))
	}
	zero(8)
	zero(3)
	if err := img.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if size() != 3 {
		t.Errorf("%d clusters of data after the tail was released, want 3", size())
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, m, false)
	// Everything released: empty again.
	img = mustOpen(t, keep{m}, true, nil)
	if err := img.ZeroAt(ctx, 0, img.Size(), true, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, m, false)
	if size() != 0 {
		t.Errorf("%d clusters left of an empty image", size())
	}
}

// TestNoRoomForEntries: a slot that no entry can name is not allocated, and
// the error is the one of a file that is too long.
func TestNoRoomForEntries(t *testing.T) {
	ctx := context.Background()
	for version, limit := range map[int]int64{1: 1<<41 - MinCluster, 2: (1<<32 - 2) * MinCluster} {
		m := newMem(t, CreateOptions{Size: 16 * MinCluster, ClusterSize: MinCluster, Version: version})
		i := mustOpen(t, m, true, nil)
		if err := i.edit.alloc.ready(ctx); err != nil {
			t.Fatal(err)
		}
		if got := i.bat.maxHost(); got != limit {
			t.Errorf("version %d: entries reach to %#x, want %#x", version, got, limit)
		}
		i.edit.alloc.eof = limit - MinCluster
		if err := i.WriteAt(ctx, make([]byte, 2*MinCluster), 0, bytesBelow(nil)); !errors.Is(err, syscall.EFBIG) {
			t.Errorf("version %d: %v", version, err)
		}
		r, err := i.bat.next(0, 1)
		if err != nil || r.host != limit-MinCluster {
			t.Errorf("version %d: the last slot was not used: %+v, %v", version, r, err)
		}
	}
}
