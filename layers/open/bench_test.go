package open_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

// pileSize is the disk of the piles, wholly mapped: pileRun bytes in one
// layer, as many in the next one, and so on.
const (
	pileSize = 64 * mib
	pileRun  = 256 << 10
)

// formatsOfPiles are what the hot paths are pinned for.
var formatsOfPiles = map[string]struct {
	cluster int64
	create  func(context.Context, backend.File) error
	open    func(context.Context, backend.File, layers.OpenOptions) (layers.Editor, error)
}{
	"raw": {4096, func(_ context.Context, f backend.File) error { return f.Truncate(pileSize) },
		func(ctx context.Context, f backend.File, o layers.OpenOptions) (layers.Editor, error) {
			return raw.Open(ctx, f, o)
		}},
	"ploop": {1 * mib, func(ctx context.Context, f backend.File) error {
		return ploop.Create(ctx, f, ploop.CreateOptions{Size: pileSize})
	}, func(ctx context.Context, f backend.File, o layers.OpenOptions) (layers.Editor, error) {
		return ploop.Open(ctx, f, o)
	}},
	"qcow2": {64 << 10, func(ctx context.Context, f backend.File) error {
		return qcow2.Create(ctx, f, qcow2.CreateOptions{Size: pileSize})
	}, func(ctx context.Context, f backend.File, o layers.OpenOptions) (layers.Editor, error) {
		return qcow2.Open(ctx, f, o)
	}},
}

// pile makes a stack of a format on real files. fill says whether it is
// mapped.
func pile(tb testing.TB, format string, depth int, fill bool) *layers.Stack {
	tb.Helper()
	ctx := context.Background()
	kind := formatsOfPiles[format]
	cache := layers.NewCache(layers.DefaultCacheSize)
	p := make([]layers.Layer, depth)
	run := max(pileRun, kind.cluster)
	data := make([]byte, run)
	for i := range p {
		path := filepath.Join(tb.TempDir(), "image")
		f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
		if err != nil {
			tb.Fatal(err)
		}
		if err := kind.create(ctx, f); err != nil {
			tb.Fatal(err)
		}
		l, err := kind.open(ctx, f, layers.OpenOptions{Path: path, Writable: true, Cache: cache})
		if err != nil {
			tb.Fatal(err)
		}
		p[i] = l
		alone, err := layers.NewStack([]layers.Layer{l}, layers.StackOptions{Writable: true, Cache: cache})
		if err != nil {
			tb.Fatal(err)
		}
		for off := int64(i) * run; fill && off < pileSize; off += int64(depth) * run {
			for k := range data {
				data[k] = byte(i + k)
			}
			if _, err := alone.WriteAt(ctx, data, off); err != nil {
				tb.Fatal(err)
			}
		}
	}
	s, err := layers.NewStack(p, layers.StackOptions{Writable: true, Cache: cache})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := errors.Join(s.Sync(ctx), s.Close()); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// eachPile runs f for every format and depth.
func eachPile(run func(name, format string, depth int)) {
	for format := range formatsOfPiles {
		for _, depth := range []int{1, 8, 64} {
			if format != "raw" || depth == 1 { // raw has no parent
				run(fmt.Sprintf("%s/depth%d", format, depth), format, depth)
			}
		}
	}
}

// TestHotPathsAllocateNothing: a request of the steady state, whatever the
// format and the depth, takes nothing from the heap.
func TestHotPathsAllocateNothing(t *testing.T) {
	ctx := context.Background()
	eachPile(func(name, format string, depth int) {
		t.Run(name, func(t *testing.T) {
			s := pile(t, format, depth, true)
			buf := make([]byte, 64<<10)
			var extents [64]blockmap.Extent
			at := int64(0)
			next := func() int64 { at = (at + 5*pileRun + 4096) % (pileSize - 64<<10); return at &^ 4095 }
			for _, request := range []struct {
				name string
				do   func(off int64) error
			}{
				{"lookup", func(off int64) error { _, err := s.Lookup(ctx, off, 64<<10, extents[:0]); return err }},
				{"read 4K", func(off int64) error { _, err := s.ReadAt(ctx, buf[:4096], off); return err }},
				{"read 64K", func(off int64) error { _, err := s.ReadAt(ctx, buf, off); return err }},
				{"cached read", func(off int64) error { s.ReadCached(buf[:4096], off); return nil }},
				{"write in the top layer", func(off int64) error { _, err := s.WriteAt(ctx, buf[:4096], off%pileRun); return err }},
				{"write in place", func(off int64) error {
					if !s.WriteInPlace(buf[:4096], off%pileRun) {
						return errors.New("not in place")
					}
					return nil
				}},
			} {
				if format == "raw" && request.name == "lookup" {
					continue // lseek(2); no request needs it, since all lies in one place
				}
				one := func() {
					if err := request.do(next()); err != nil {
						t.Fatalf("%s: %v", request.name, err)
					}
				}
				for range 4 * pileSize / pileRun {
					one()
				}
				if n := testing.AllocsPerRun(200, one); n != 0 && !imgtest.RaceEnabled {
					t.Errorf("%s: %v allocations", request.name, n)
				}
			}
		})
	})
}

func BenchmarkPileLookup(b *testing.B) {
	ctx := context.Background()
	eachPile(func(name, format string, depth int) {
		b.Run(name, func(b *testing.B) {
			s := pile(b, format, depth, true)
			var extents [64]blockmap.Extent
			b.ReportAllocs()
			for i := int64(1); b.Loop(); i++ {
				if _, err := s.Lookup(ctx, i*7919*4096%pileSize, 4096, extents[:0]); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

// BenchmarkPileResolve asks layer after layer, as for what is not known yet.
func BenchmarkPileResolve(b *testing.B) {
	ctx := context.Background()
	eachPile(func(name, format string, depth int) {
		b.Run(name, func(b *testing.B) {
			var maps []blockmap.Map
			for _, l := range pile(b, format, depth, true).Layers() {
				maps = append(maps, l)
			}
			o := blockmap.NewOverlay(maps...)
			var extents [64]blockmap.Extent
			b.ReportAllocs()
			for i := int64(1); b.Loop(); i++ {
				if _, err := o.Lookup(ctx, i*7919*4096%pileSize, 4096, extents[:0]); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

func BenchmarkPileRead4K(b *testing.B) {
	ctx := context.Background()
	eachPile(func(name, format string, depth int) {
		b.Run(name, func(b *testing.B) {
			s := pile(b, format, depth, true)
			buf := make([]byte, 4096)
			b.SetBytes(4096)
			b.ReportAllocs()
			for i := int64(1); b.Loop(); i++ {
				if _, err := s.ReadAt(ctx, buf, i*7919*4096%pileSize); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

// BenchmarkPileAllocate writes the first block of a cluster that has no place
// yet, with another layer below.
func BenchmarkPileAllocate(b *testing.B) {
	ctx := context.Background()
	for _, format := range []string{"ploop", "qcow2"} {
		b.Run(format, func(b *testing.B) {
			buf := make([]byte, 4096)
			b.ReportAllocs()
			var s *layers.Stack
			step := formatsOfPiles[format].cluster
			off := int64(pileSize)
			for b.Loop() {
				if off >= pileSize {
					b.StopTimer()
					s, off = pile(b, format, 2, false), 0
					b.StartTimer()
				}
				if _, err := s.WriteAt(ctx, buf, off); err != nil {
					b.Fatal(err)
				}
				off += step
			}
		})
	}
}
