package ploop

import (
	"context"
	"errors"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
	"github.com/imagestack/imagestack/layers"
)

// classified fails unless err is of one of the classes an image may cause.
func classified(t *testing.T, err error) {
	t.Helper()
	for _, class := range []error{layers.ErrFormat, layers.ErrUnsupported, layers.ErrCorrupt} {
		if errors.Is(err, class) {
			return
		}
	}
	t.Errorf("unclassified error: %v", err)
}

func FuzzHeader(f *testing.F) {
	for _, v := range []int{1, 2} {
		b := sample(v)
		f.Add(b[:headerSize])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b, "fuzz")
		if err != nil {
			classified(t, err)
			return
		}
		if !Probe(b) || h.size < 0 || h.cluster < sectorSize || h.firstData < h.batEnd() || h.entries < h.clusters() || 1<<h.shift() != h.cluster {
			t.Errorf("accepted %+v", h)
		}
		if got := h.encode(); string(got[:]) != string(b[:headerSize]) {
			t.Errorf("header does not survive: %x, was %x", got, b[:headerSize])
		}
	})
}

// FuzzOpenLookup reads all of a hostile image, and then writes to it.
func FuzzOpenLookup(f *testing.F) {
	small := func(version int) []byte {
		b := rawImage(version, MinCluster, 8*MinCluster-512, map[int]uint32{1: uint32(2 - version%2), 7: 2}, 2)
		return b[:600] // the rest is made up by the target
	}
	f.Add(small(1), uint32(3*MinCluster))
	f.Add(small(2), uint32(3*MinCluster))
	f.Add(withExtension(sample(2))[:1000], uint32(8*k64))
	f.Fuzz(func(t *testing.T, head []byte, size uint32) {
		m := backend.NewMemBytes("fuzz", head[:min(len(head), 64<<10)])
		length := int64(max(size%(4<<20), uint32(min(len(head), 64<<10))))
		if err := m.Truncate(length); err != nil {
			t.Fatal(err)
		}
		explore(t, m, length, int64(size))
	})
}

// FuzzFields damages numbers that images really have, those of the format
// extension included, whose checksum is then made right again.
func FuzzFields(f *testing.F) {
	seeds := [][]byte{sample(1), sample(2), withExtension(sample(2)), extended(sample(2), 0x1234567)}
	for i := range seeds {
		for k := byte(0); k < 48; k++ {
			f.Add(byte(i), []byte{0, k, k, 3 * k, 0, 40 + k, 6, k}, uint32(k)<<12)
		}
	}
	f.Fuzz(func(t *testing.T, seed byte, script []byte, at uint32) {
		b := mutate.Apply("ploop", seeds[int(seed)%len(seeds)], script)
		explore(t, backend.NewMemBytes("fuzz", b), int64(len(b)), int64(at))
	})
}

// explore reads all of an image in a file of length bytes, and then writes to
// the disk at an offset.
func explore(t *testing.T, m *backend.Mem, length, at int64) {
	ctx := context.Background()
	i, err := Open(ctx, keep{m}, layers.OpenOptions{Cache: layers.NewCache(0)})
	if err != nil {
		classified(t, err)
		return
	}
	buf := make([]blockmap.Extent, 0, 8)
	for pos, steps := int64(0), 0; pos < i.Size() && steps < 10000; steps++ {
		ext, err := i.Lookup(ctx, pos, i.Size()-pos, buf)
		if err != nil {
			classified(t, err)
			break
		}
		for _, e := range ext {
			if e.Kind == blockmap.Data && (e.Host < i.h.firstData || e.Host+(e.Len+i.h.cluster-1)&^(i.h.cluster-1) > length) {
				t.Fatalf("extent outside of the file: %+v", e)
			}
		}
		pos = ext[len(ext)-1].End()
	}
	if _, err := i.Describe(ctx); err != nil {
		classified(t, err)
	}
	if err := i.WalkHost(ctx, func(layers.HostRange) error { return nil }); err != nil {
		classified(t, err)
	}
	w, err := Open(ctx, keep{m}, layers.OpenOptions{Writable: true})
	if err != nil {
		classified(t, err)
		return
	}
	if w.Size() == 0 || w.Granule() > 1<<20 {
		return
	}
	off := at % w.Size()
	n := min(w.Size()-off, 70000)
	if err := w.WriteAt(ctx, make([]byte, n), off, bytesBelow(nil)); err != nil {
		classified(t, err)
	}
	if err := w.ZeroAt(ctx, off, n, true, bytesBelow(nil)); err != nil {
		classified(t, err)
	}
	if err := w.Close(); err != nil {
		classified(t, err)
	}
}

func FuzzDescriptor(f *testing.F) {
	f.Add([]byte(threeLayers))
	f.Add(descriptorOf(3))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseDescriptor(b)
		if err != nil {
			classified(t, err)
			return
		}
		for _, s := range append(d.Snapshots(), layers.Snapshot{}) {
			chain, err := d.Chain(s.ID)
			if err != nil || len(chain) == 0 || len(chain) > maxDepth {
				t.Errorf("Chain(%q): %d, %v", s.ID, len(chain), err)
			}
		}
		out, err := d.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseDescriptor(out)
		if err != nil || again.Top() != d.Top() || len(again.shots) != len(d.shots) {
			t.Errorf("does not survive: %v\n%s", err, out)
		}
	})
}
