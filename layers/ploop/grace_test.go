package ploop

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/imagestack/imagestack/backend"
)

// gate lets a write at off wait until it is opened.
type gate struct {
	backend.File
	off     int64
	arrived chan struct{}
	open    chan struct{}
}

func (g *gate) WriteAt(p []byte, off int64) (int, error) {
	if off == g.off {
		g.arrived <- struct{}{}
		<-g.open
	}
	return g.File.WriteAt(p, off)
}

// TestCommitWaitsForWritersInPlace: a slot is not free while somebody who
// looked it up before it was unlinked still writes to it.
func TestCommitWaitsForWritersInPlace(t *testing.T) {
	ctx := context.Background()
	ones := bytesBelow(bytes.Repeat([]byte{1}, k64))
	for name, change := range map[string]func(*Image) error{
		"write":        func(i *Image) error { return i.WriteAt(ctx, []byte{5}, 0, bytesBelow(nil)) },
		"zero part":    func(i *Image) error { return i.ZeroAt(ctx, 0, 100, true, ones) },
		"zero cluster": func(i *Image) error { return i.ZeroAt(ctx, 0, k64, true, ones) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMem(t, CreateOptions{Size: 16 * k64, ClusterSize: k64})
			g := &gate{File: keep{m}, off: -1, arrived: make(chan struct{}), open: make(chan struct{})}
			i := mustOpen(t, g, true, nil)
			for _, idx := range []int64{0, 1} {
				if err := i.WriteAt(ctx, bytes.Repeat([]byte{2}, k64), idx*k64, bytesBelow(nil)); err != nil {
					t.Fatal(err)
				}
			}
			if err := i.Sync(ctx); err != nil {
				t.Fatal(err)
			}
			g.off = k64 // where cluster 0 lies
			writer := make(chan error, 1)
			go func() { writer <- change(i) }()
			<-g.arrived
			if err := i.ZeroAt(ctx, 0, k64, true, bytesBelow(nil)); err != nil {
				t.Fatal(err)
			}
			synced := make(chan error, 1)
			go func() { synced <- i.Sync(ctx) }()
			select {
			case err := <-synced:
				t.Errorf("slot freed under the writer (%v)", err)
				synced <- nil
			case <-time.After(100 * time.Millisecond):
			}
			close(g.open)
			if err := <-writer; err != nil {
				t.Error(err)
			}
			if err := <-synced; err != nil {
				t.Error(err)
			}
			if !i.edit.alloc.free.Contains(1) {
				t.Error("slot not free after the writer ended")
			}
			closeImage(t, i)
		})
	}
}

// TestNothingStaleBehindTheDisk: the part of the last cluster that lies behind
// the end of the disk is zeros, not what a buffer held before.
func TestNothingStaleBehindTheDisk(t *testing.T) {
	ctx := context.Background()
	m := newMem(t, CreateOptions{Size: 2*k64 - 512, ClusterSize: k64})
	i := mustOpen(t, keep{m}, true, nil)
	below := bytesBelow(bytes.Repeat([]byte{0xff}, 2*k64))
	for _, off := range []int64{5, k64 + 5} {
		if err := i.WriteAt(ctx, []byte{1}, off, below); err != nil {
			t.Fatal(err)
		}
	}
	closeImage(t, i)
	b := m.Bytes()
	sameBytes(t, "behind the disk", b[len(b)-512:], make([]byte, 512))
	sameBytes(t, "before", b[len(b)-1024:len(b)-512], bytes.Repeat([]byte{0xff}, 512))
}
