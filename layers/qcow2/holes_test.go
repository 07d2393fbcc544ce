package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
)

// readCounter counts the reads of a file, which stays open.
type readCounter struct {
	*backend.Mem
	reads int
}

func (c *readCounter) ReadAt(p []byte, off int64) (int, error) {
	c.reads++
	return c.Mem.ReadAt(p, off)
}

func (*readCounter) Close() error { return nil }

func walked(t *testing.T, img *Image, still bool) []layers.HostRange {
	t.Helper()
	var all []layers.HostRange
	if err := img.walkHost(t.Context(), still, func(h layers.HostRange) error {
		all = append(all, h)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestWalkPassesHoles: L2 tables in holes are not read by a walk that has the
// image for itself, which finds what another finds, also after tables in holes
// were written to.
func TestWalkPassesHoles(t *testing.T) {
	ctx := context.Background()
	const spans, span = 64, 512 << 20
	f := &readCounter{Mem: backend.NewMem("image")}
	if err := Create(ctx, f, CreateOptions{Size: spans * span}); err != nil {
		t.Fatal(err)
	}
	below := layertest.NewBelow(nil, 1)
	open := func() *Image {
		img, err := Open(ctx, f, layers.OpenOptions{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	write := func(img *Image, i int64) {
		if err := errors.Join(img.WriteAt(ctx, []byte("data"), i*span, below), img.Sync(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	img := open()
	for i := range int64(spans) {
		write(img, i)
	}
	var tables []int64
	if err := img.eachL1(ctx, func(_, _ int64, entry uint64) error {
		tables = append(tables, int64(entry&entryOffset))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	for _, off := range tables[:spans-2] {
		if err := f.PunchHole(off, img.clusterSize); err != nil {
			t.Fatal(err)
		}
	}
	img = open()
	if img.isStill() {
		t.Error("an editor may write while another walks")
	}
	same := func(what string, tables int) {
		t.Helper()
		got, want := walked(t, img, img.isStill()), walked(t, img, false)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
		data := 0
		for _, h := range got {
			if h.Role == layers.RoleData {
				data++
			}
		}
		if data != tables {
			t.Errorf("%s: %d data clusters, want %d", what, data, tables)
		}
	}
	same("before", 2)
	img.l2Pages.DropAll()
	if err := img.BeginRelocation(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if !img.isStill() {
		t.Error("who relocates has the image for himself")
	}
	cost := func(still bool) int {
		img.l2Pages.DropAll()
		before := f.reads
		walked(t, img, still)
		return f.reads - before
	}
	if passing, reading := cost(true), cost(false); passing > 16+2*16 || reading < spans {
		t.Errorf("%d reads past holes, %d without", passing, reading)
	}
	same("begun", 2)
	write(img, 1)
	same("written to", 3)
	if _, err := img.FreeLeaks(ctx); err != nil {
		t.Fatal(err)
	}
	if err := img.Shrink(ctx); err != nil {
		t.Fatal(err)
	}
	same("shrunk", 3)
	walkMatchesRefcounts(t, img)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// seekCounter counts the searches for data.
type seekCounter struct {
	*backend.Mem
	seeks int
}

func (c *seekCounter) SeekData(off int64) (int64, error) {
	c.seeks++
	return c.Mem.SeekData(off)
}

// TestStillHoles: a hole is looked for a few times only, whether tables go up
// through it or down, and what is no hole is never taken for one.
func TestStillHoles(t *testing.T) {
	ctx := context.Background()
	f := &seekCounter{Mem: backend.NewMem("image")}
	if err := Create(ctx, f, CreateOptions{Size: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	const cs, end = 64 << 10, 10_000
	data := []int64{100, 101, 4000, 9999}
	for _, c := range data {
		if _, err := f.WriteAt([]byte("data"), c*cs+cs/2); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(end * cs); err != nil {
		t.Fatal(err)
	}
	img, err := Open(ctx, f, layers.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	for _, c := range []struct {
		name string
		at   func(i int64) int64
		most int
	}{
		{"up", func(i int64) int64 { return i }, 20},
		{"down", func(i int64) int64 { return end - 20 - i }, 400},
		{"in no order", func(i int64) int64 { return 20 + i*7919%(end-20) }, 2 * end},
	} {
		h := stillHoles{img: img, still: true}
		f.seeks = 0
		for i := range int64(end - 40) {
			at := c.at(i)
			if at < 20 { // what an image begins with
				continue
			}
			if got, want := h.in(at*cs, cs), !slices.Contains(data, at); got != want {
				t.Fatalf("%s: cluster %d: a hole is %v, want %v", c.name, at, got, want)
			}
		}
		if f.seeks > c.most {
			t.Errorf("%s: %d searches, want at most %d", c.name, f.seeks, c.most)
		}
	}
	// As Lookup passes over tables.
	for at := int64(end - 20); at > 4000; at-- {
		if img.inHole(at * cs) {
			continue
		}
		if img.noteHole(at * cs); img.inHole(at*cs) != !slices.Contains(data, at) {
			t.Fatalf("cluster %d: in a hole: %v", at, img.inHole(at*cs))
		}
	}
	if h := (stillHoles{img: img}); h.in(50*cs, cs) {
		t.Error("a hole that somebody may be writing to")
	}
}

// TestSharedBlockIsRefused: what one block counts is not gone through for each
// of the entries that name it, by an estimate or by a relocation.
func TestSharedBlockIsRefused(t *testing.T) {
	ctx := context.Background()
	f := &readCounter{Mem: backend.NewMem("image")}
	if err := Create(ctx, f, CreateOptions{Size: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	for _, shared := range []bool{false, true} {
		img, err := Open(ctx, f, layers.OpenOptions{Path: "image"})
		if err != nil {
			t.Fatal(err)
		}
		count := func() error { return img.Counted(ctx, func(int64, int64) error { return nil }) }
		if !shared {
			if err := count(); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 8)
			if _, err := f.ReadAt(b, int64(img.hdr.RefcountTableOffset)); err != nil {
				t.Fatal(err)
			}
			if binary.BigEndian.Uint64(b) == 0 {
				t.Fatal("no block")
			}
			if _, err := f.WriteAt(b, int64(img.hdr.RefcountTableOffset)+8); err != nil {
				t.Fatal(err)
			}
		} else {
			wantImageError(t, count(), layers.ErrCorrupt, "refcount table entry")
			w, err := Open(ctx, f, layers.OpenOptions{Path: "image", Writable: true})
			if err != nil {
				t.Fatal(err)
			}
			wantImageError(t, w.BeginRelocation(ctx, nil), layers.ErrCorrupt, "refcount table entry")
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
