package ploop

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// TestCloseIsOrdered: an image taken over after a crash, with a ragged tail,
// is not marked as closed before its length is right; and after Close it is
// marked. Both hold in every state that a power cut leaves, and each of the
// two syncs is needed for it.
func TestCloseIsOrdered(t *testing.T) {
	ctx := context.Background()
	b := append(put32(offInUse, inUseOpen)(sample(2)), 1, 2, 3)
	rec := backend.NewRecorder()
	f, err := rec.Wrap(backend.NewMemBytes("img.hds", b))
	if err != nil {
		t.Fatal(err)
	}
	i, err := Open(ctx, f, layers.OpenOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	last := rec.SyncCalls()
	examine := func(ignore int) error {
		for s := range rec.States(backend.StateOptions{IgnoreSync: ignore}) {
			b := s.Files[0].Bytes()
			h, err := parseHeader(b, "cut")
			if err != nil {
				return err
			}
			if h.inUse == inUseClosed && int64(len(b))%h.cluster != 0 {
				return fmt.Errorf("%s: closed with a length of %d", s, len(b))
			}
			if s.Completed == last && h.inUse != inUseClosed {
				return fmt.Errorf("%s: Close has returned but the image is in use", s)
			}
		}
		return nil
	}
	if err := examine(0); err != nil {
		t.Error(err)
	}
	for _, ignore := range []int{last - 1, last} {
		if examine(ignore) == nil {
			t.Errorf("nothing notices when sync %d of %d is left out", ignore, last)
		}
	}
}

// TestExtensionIsGoneBeforeTheFirstChange: no state holds both a changed BAT
// and the offset of an extension that no longer describes the image.
func TestExtensionIsGoneBeforeTheFirstChange(t *testing.T) {
	ctx := context.Background()
	b := withExtension(sample(2))
	rec := backend.NewRecorder()
	f, err := rec.Wrap(backend.NewMemBytes("img.hds", b))
	if err != nil {
		t.Fatal(err)
	}
	i, err := Open(ctx, f, layers.OpenOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := i.WriteAt(ctx, []byte{1, 2, 3}, 5, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	examine := func(ignore int) error {
		for s := range rec.States(backend.StateOptions{IgnoreSync: ignore}) {
			got := s.Files[0].Bytes()
			h, err := parseHeader(got, "cut")
			if err != nil {
				return err
			}
			if h.extension != 0 && string(got[k64:2*k64]) != string(b[k64:2*k64]) {
				return fmt.Errorf("%s: data changed under the extension", s)
			}
		}
		return nil
	}
	if err := examine(0); err != nil {
		t.Error(err)
	}
	if examine(1) == nil {
		t.Error("nothing notices when the first sync is left out")
	}
}

// duringSync runs something in the middle of the next Sync, after all that it
// covers.
type duringSync struct {
	backend.File
	do func()
}

func (d *duringSync) Sync() error {
	err := d.File.Sync()
	if do := d.do; do != nil {
		d.do = nil
		do()
	}
	return err
}

// TestChangesDuringACommit: what is changed while a commit syncs the data is
// not part of it: its entries are not written by it, because their data is not
// durable, and its slots are not freed, because their unlinking is not.
func TestChangesDuringACommit(t *testing.T) {
	ctx := context.Background()
	m := newMem(t, CreateOptions{Size: 16 * k64, ClusterSize: k64})
	rec := backend.NewRecorder()
	r, err := rec.Wrap(m)
	if err != nil {
		t.Fatal(err)
	}
	f := &duringSync{File: r}
	i := mustOpen(t, f, true, nil)
	write := func(idx int64, b byte) {
		t.Helper()
		if err := i.WriteAt(ctx, bytes.Repeat([]byte{b}, k64), idx*k64, bytesBelow(nil)); err != nil {
			t.Fatal(err)
		}
	}
	for idx := range int64(4) {
		write(idx, byte(idx+1))
	}
	if err := i.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	write(4, 5)
	f.do = func() {
		write(5, 6)
		if err := i.ZeroAt(ctx, k64, k64, true, bytesBelow(nil)); err != nil {
			t.Error(err)
		}
	}
	if err := i.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if f.do != nil {
		t.Fatal("the commit did not sync")
	}
	write(6, 7) // would take the slot of cluster 1 if that were free
	if err := i.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	n := 0
	for s := range rec.States(backend.StateOptions{Exhaustive: 4, Random: 30, MaxPerEpoch: 60}) {
		n++
		got := mustOpen(t, s.Files[0], false, nil)
		p := make([]byte, got.Size())
		readLayer(t, got, p, 0)
		for idx := range int64(7) {
			for _, b := range p[idx*k64 : (idx+1)*k64] {
				if b != 0 && b != byte(idx+1) {
					t.Fatalf("%s: cluster %d holds %d", s, idx, b)
				}
			}
			if b := p[idx*k64]; bytes.Count(p[idx*k64:(idx+1)*k64], []byte{b}) != k64 {
				t.Fatalf("%s: cluster %d is mixed", s, idx)
			}
		}
	}
	if n < 20 {
		t.Errorf("only %d states", n)
	}
}
