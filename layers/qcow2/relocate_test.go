package qcow2

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
)

// holey is an image whose second half is full and whose first half has holes.
func holey(t *testing.T, o CreateOptions) (*Image, []byte) {
	t.Helper()
	ctx := t.Context()
	m := backend.NewMem("image")
	if err := Create(ctx, m, o); err != nil {
		t.Fatal(err)
	}
	img, err := Open(ctx, m, layers.OpenOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	below := layertest.NewBelow(nil, 1)
	want := imgtest.PatternBytes(1, 0, int(o.Size))
	err = img.WriteAt(ctx, want, 0, below)
	for off := int64(0); off < o.Size/2 && err == nil; off += 3 * img.clusterSize {
		err = img.ZeroAt(ctx, off, 2*img.clusterSize, true, below)
		clear(want[off : off+2*img.clusterSize])
	}
	if err = errors.Join(err, img.Sync(ctx)); err != nil {
		t.Fatal(err)
	}
	return img, want
}

// TestEvacuateInWindows: with memory for few references the end of the file is
// moved in many windows, and ends where it would have.
func TestEvacuateInWindows(t *testing.T) {
	ctx := t.Context()
	var sizes []int64
	for _, memory := range []int64{0, 1} {
		img, want := holey(t, CreateOptions{Size: 1 << 20, ClusterSize: 512})
		if _, err := img.Evacuate(ctx, 0, layers.Relocation{}); !errors.Is(err, layers.ErrUnsupported) {
			t.Fatalf("not begun: %v", err)
		}
		if err := img.BeginRelocation(ctx, nil); err != nil {
			t.Fatal(err)
		}
		used := map[int64]bool{}
		if err := img.WalkHost(ctx, func(h layers.HostRange) error {
			for c := h.Off; c < h.Off+h.Len; c += 512 {
				used[c] = true
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		batches := 0
		moved, err := img.Evacuate(ctx, int64(len(used))*512, layers.Relocation{Memory: memory, Batch: 8 << 10, Moved: func(n int64) error {
			if n > 8<<10 {
				t.Errorf("a batch of %d bytes", n)
			}
			batches++
			return nil
		}})
		if err == nil {
			err = img.Shrink(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if err := layertest.ReadLayer(ctx, img, layertest.NewBelow(nil, 1), got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Error("the content has changed")
		}
		size, err := img.f.Size()
		if err != nil || moved == 0 || batches < 10 {
			t.Fatalf("%d bytes moved in %d batches, %v", moved, batches, err)
		}
		sizes = append(sizes, size)
		// It goes on as an editor.
		if err := img.WriteAt(ctx, want[:4096], 77, layertest.NewBelow(nil, 1)); err != nil {
			t.Error(err)
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
	if sizes[0] != sizes[1] {
		t.Errorf("%d bytes, with little memory %d", sizes[0], sizes[1])
	}
}

// TestWindowKeepsWholeClusters: what a window holds of a cluster is all that
// names it.
func TestWindowKeepsWholeClusters(t *testing.T) {
	img := &Image{geometry: newGeometry(&Header{ClusterBits: 9, Version: 3})}
	w := refWindow{img: img, limit: 16}
	all := map[int64]int{}
	for i := range int64(400) {
		target := (i * 7919 % 61) * 512
		all[target]++
		if err := w.add(ref{target: target, at: i * 8}); err != nil {
			t.Fatal(err)
		}
	}
	got := map[int64]int{}
	for _, r := range w.refs {
		got[r.target]++
	}
	if len(got) == 0 || len(w.refs) > 16 {
		t.Fatalf("%d references to %d clusters", len(w.refs), len(got))
	}
	for target, n := range got {
		if n != all[target] {
			t.Errorf("%d of %d references to %d", n, all[target], target)
		}
	}
	for target := range all {
		if _, ok := got[target]; !ok && target>>9 >= w.low {
			t.Errorf("nothing of %d, and the window begins at %d", target, w.low<<9)
		}
	}
	// One cluster with more references than fit.
	w = refWindow{img: img, limit: 16}
	var err error
	for i := range int64(17) {
		err = errors.Join(err, w.add(ref{target: 512, at: i * 8}))
	}
	if !errors.Is(err, layers.ErrUnsupported) {
		t.Errorf("too many references: %v", err)
	}
}

func TestUnmap(t *testing.T) {
	ctx := context.Background()
	img, want := holey(t, CreateOptions{Size: 64 << 10, ClusterSize: 4096})
	if err := img.BeginRelocation(ctx, nil); err != nil {
		t.Fatal(err)
	}
	under := imgtest.PatternBytes(4, 0, len(want))
	if err := img.Unmap(ctx, 40<<10+1, 12<<10); err != nil { // two whole clusters
		t.Fatal(err)
	}
	copy(want[44<<10:52<<10], under[44<<10:])
	got := make([]byte, len(want))
	below := layertest.NewBelow(under, 1)
	if err := layertest.ReadLayer(ctx, img, below, got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[32<<10:], want[32<<10:]) {
		t.Error("not what lies below the unmapped clusters, and the rest as it was")
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}
