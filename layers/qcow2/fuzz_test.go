package qcow2

import (
	"bytes"
	"context"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
	"github.com/imagestack/imagestack/layers"
)

// FuzzHeader: any bytes are an error or a header that marshals, and what was
// marshalled reads back as the same.
func FuzzHeader(f *testing.F) {
	for _, name := range goldenImages {
		b := golden(f, name+".qcow2")
		f.Add(b[:min(len(b), 1024)])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		_ = h.checkFeatures(true)
		g := newGeometry(h)
		_ = h.checkTables(&g)
		out, err := h.marshal()
		if err != nil {
			return // the end mark that was missing no longer fits
		}
		h2, err := parseHeader(out)
		if err != nil {
			t.Fatalf("%v after marshal", err)
		}
		out2, err := h2.marshal()
		if err != nil || !bytes.Equal(out, out2) {
			t.Fatalf("marshal differs, %v:\n%x\n%x", err, out, out2)
		}
	})
}

// FuzzOpenLookup: whatever the bytes, nothing panics, the map tiles, and work
// and memory are bounded. seed picks the golden image that patch goes over at
// off, so that the fuzzer need not invent a whole image.
func FuzzOpenLookup(f *testing.F) {
	var seeds [][]byte
	for _, name := range goldenImages {
		seeds = append(seeds, golden(f, name+".qcow2"))
	}
	data := golden(f, "data.data")
	for i := range seeds {
		f.Add(byte(i), uint32(0), []byte{}, "")
		f.Add(byte(i), uint32(20), []byte{0, 0, 0, 9}, "before")
		f.Add(byte(i), uint32(0x3000), []byte{0x80, 0, 0, 0, 0, 0, 0x80, 0}, "1")
		f.Add(byte(i), uint32(0x8000), []byte{0x40, 0, 0, 0, 0, 0, 0x80, 0}, "")
	}
	f.Fuzz(func(t *testing.T, seed byte, off uint32, patch []byte, snapshot string) {
		var b []byte
		if int(seed) < len(seeds) {
			b = bytes.Clone(seeds[seed])
			if int(off) < len(b) {
				copy(b[off:], patch)
			}
		} else {
			b = patch
		}
		explore(t, b, data, snapshot)
	})
}

// FuzzFields damages numbers that the golden images really have, so that
// almost every script reaches code behind the first check.
func FuzzFields(f *testing.F) {
	var seeds [][]byte
	for i, name := range goldenImages {
		seeds = append(seeds, golden(f, name+".qcow2"))
		for k := byte(0); k < 24; k++ {
			f.Add(byte(i), []byte{0, k, k, 3 * k, 0, 40 + k, 6, k}, "1")
		}
	}
	data := golden(f, "data.data")
	f.Fuzz(func(t *testing.T, seed byte, script []byte, snapshot string) {
		explore(t, mutate.Apply("qcow2", seeds[int(seed)%len(seeds)], script), data, snapshot)
	})
}

// explore opens an image and looks at all of it, within bounds.
func explore(t *testing.T, b, data []byte, snapshot string) {
	ctx := context.Background()
	cache := layers.NewCache(1)
	img, err := Open(ctx, backend.NewMemBytes("image", b), layers.OpenOptions{
		Cache: cache, Snapshot: snapshot,
		OpenFile: func(string, bool) (backend.File, error) { return backend.NewMemBytes("data", data), nil },
	})
	if err != nil {
		return
	}
	defer img.Close()
	buf := make([]blockmap.Extent, 0, 64)
	cluster := make([]byte, img.Granule())
	unpacked := 0
	for pos, steps := int64(0), 0; pos < img.Size() && steps < 2000; steps++ {
		got, err := img.Lookup(ctx, pos, img.Size()-pos, buf[:0])
		if err != nil {
			// The rest may be sound; go on behind the damaged cluster.
			pos = (pos/img.Granule() + 1) * img.Granule()
			continue
		}
		for _, e := range got {
			if e.Guest != pos || e.Len <= 0 || e.Kind == blockmap.Data && e.Host < 0 {
				t.Fatalf("extent %+v at %d", e, pos)
			}
			if e.Kind == blockmap.Data {
				if end, _ := img.Data().Size(); e.Host+e.Len > end {
					t.Fatalf("extent %+v reaches behind the end %d", e, end)
				}
			}
			if e.Kind == blockmap.Packed && unpacked < 20 {
				unpacked++
				_ = img.Unpack(ctx, e, 0, cluster)
			}
			pos = e.End()
		}
	}
	visits := 0
	_ = img.WalkHost(ctx, func(r layers.HostRange) error {
		if r.Len <= 0 || r.Off < 0 {
			t.Fatalf("range %+v", r)
		}
		if visits++; visits > 5000 {
			return context.Canceled
		}
		return nil
	})
	if len(b) < 1<<20 {
		_, _ = img.Describe(ctx)
	}
	if got := cache.Bytes(); got > cache.Budget()+64<<10 {
		t.Fatalf("%d bytes cached", got)
	}
}
