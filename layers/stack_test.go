package layers_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest/maptest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/raw"
)

// fake is a layer made of clusters of all kinds over a Mem. Packed clusters
// hold one byte, which is that at the beginning of the cluster; each half KiB
// has the next one.
type fake struct {
	size, granule int64
	kind          []blockmap.Kind
	host          []int64
	f             *backend.Mem
	broken        bool         // Unpack fails
	damaged       int64        // as it does for this cluster of the host, unless 0
	unpacking     func()       // called by Unpack, unless nil
	unpacked      atomic.Int64 // bytes
	reached       atomic.Int64 // end of the furthest Lookup
	closed        atomic.Bool
}

func newFake(size, granule int64, r *rand.Rand, weights ...blockmap.Kind) *fake {
	n := (size + granule - 1) / granule
	l := &fake{size: size, granule: granule, f: backend.NewMem("fake")}
	next := granule
	for range n {
		k := weights[r.IntN(len(weights))]
		l.kind, l.host = append(l.kind, k), append(l.host, next)
		if k == blockmap.Data || k == blockmap.Packed {
			b := make([]byte, granule)
			for i := range b {
				b[i] = byte(r.Uint32())
			}
			if _, err := l.f.WriteAt(b, next); err != nil {
				panic(err)
			}
			next += granule * int64(1+r.IntN(2))
		}
	}
	return l
}

func (l *fake) Size() int64        { return l.size }
func (l *fake) Granule() int64     { return l.granule }
func (l *fake) Data() backend.File { return l.f }
func (l *fake) Close() error       { l.closed.Store(true); return nil }
func (l *fake) Describe(context.Context) (layers.Info, error) {
	return layers.Info{Path: "fake"}, nil
}
func (l *fake) WalkHost(context.Context, func(layers.HostRange) error) error { return nil }

func (l *fake) Unpack(_ context.Context, e blockmap.Extent, within int64, dst []byte) error {
	if l.closed.Load() {
		panic("Unpack after Close")
	}
	if l.unpacking != nil {
		l.unpacking()
	}
	if l.broken || l.damaged != 0 && l.damaged == e.Host {
		return layers.ErrCorrupt
	}
	var b [1]byte
	if _, err := l.f.ReadAt(b[:], e.Host); err != nil {
		return err
	}
	for i := range dst {
		dst[i] = b[0] + byte((within+int64(i))/512)
	}
	l.unpacked.Add(int64(len(dst)))
	return nil
}

func (l *fake) Lookup(_ context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return dst, err
	}
	for old := l.reached.Load(); guest+n > old && !l.reached.CompareAndSwap(old, guest+n); old = l.reached.Load() {
	}
	t := blockmap.NewTiler(guest, n, dst)
	for more := true; more; {
		at := t.Next()
		if at >= l.size {
			t.Add(blockmap.Extent{Guest: at, Len: guest + n - at, Kind: blockmap.Zero})
			break
		}
		c := at / l.granule
		e := blockmap.Extent{Guest: c * l.granule, Len: min(l.granule, l.size-c*l.granule), Kind: l.kind[c]}
		switch e.Kind {
		case blockmap.Data:
			e.Host = l.host[c]
		case blockmap.Packed:
			e.Host, e.PackedLen = l.host[c], 1
		}
		more = t.Add(e)
	}
	return t.Extents(), nil
}

// content is the layer's byte at off, and whether it has one.
func (l *fake) content(off int64) (byte, bool) {
	if off >= l.size {
		return 0, true
	}
	c := off / l.granule
	var b [1]byte
	at := l.host[c]
	switch l.kind[c] {
	case blockmap.Unmapped:
		return 0, false
	case blockmap.Zero:
		return 0, true
	case blockmap.Data:
		at += off % l.granule
	}
	_, _ = l.f.ReadAt(b[:], at)
	if l.kind[c] == blockmap.Packed {
		b[0] += byte(off % l.granule / 512)
	}
	return b[0], true
}

var (
	u, z, d, p = blockmap.Unmapped, blockmap.Zero, blockmap.Data, blockmap.Packed
	mixed      = []blockmap.Kind{u, u, u, z, d, d, p}
)

func fakes(seed uint64, depth int) []*fake {
	r := rand.New(rand.NewPCG(seed, uint64(depth)))
	var all []*fake
	for i := range depth {
		size := int64(300_000 + r.IntN(400_000))
		if i == 0 {
			size = 600_000
		}
		all = append(all, newFake(size, 4096<<r.IntN(3), r, mixed...))
	}
	return all
}

func stackOf(t testing.TB, all []*fake) *layers.Stack {
	t.Helper()
	var ls []layers.Layer
	for _, l := range all {
		ls = append(ls, l)
	}
	s, err := layers.NewStack(ls, layers.StackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func modelOf(all []*fake) []byte {
	want := make([]byte, all[0].size)
	for i := range want {
		for _, l := range all {
			if b, ok := l.content(int64(i)); ok {
				want[i] = b
				break
			}
		}
	}
	return want
}

func TestStackReads(t *testing.T) {
	ctx := context.Background()
	for _, depth := range []int{1, 2, 5, 64} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			all := fakes(9, depth)
			s, want := stackOf(t, all), modelOf(all)
			r := rand.New(rand.NewPCG(3, 4))
			for range 300 {
				off := r.Int64N(s.Size())
				got := make([]byte, 1+r.IntN(100_000))
				n, err := s.ReadAt(ctx, got, off)
				expect := want[off:min(off+int64(len(got)), s.Size())]
				if n != len(expect) || !bytes.Equal(got[:n], expect) {
					t.Fatalf("read of %d at %d: %d bytes, wrong content or length", len(got), off, n)
				}
				if (n < len(got)) != errors.Is(err, io.EOF) || err != nil && !errors.Is(err, io.EOF) {
					t.Fatalf("read of %d at %d: %d bytes, %v", len(got), off, n, err)
				}
			}
			if n, err := s.ReadAt(ctx, make([]byte, 1), s.Size()); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("read at the end: %d, %v", n, err)
			}
		})
	}
}

func TestStackMapConformance(t *testing.T) {
	for seed := range uint64(2) {
		for _, depth := range []int{1, 20} {
			maptest.Run(t, func(t *testing.T) (blockmap.Map, maptest.Truth) {
				all := fakes(seed, depth)
				return stackOf(t, all), func(off int64) blockmap.Kind {
					for _, l := range all {
						if off >= l.size {
							return z
						}
						if k := l.kind[off/l.granule]; k != u {
							return k
						}
					}
					return z
				}
			}, maptest.AllocFree(), maptest.MixedGranules(), maptest.Rounds(50))
		}
	}
}

// What image-stack map lists and what a read uses is one answer.
func TestStackSeek(t *testing.T) {
	ctx := context.Background()
	all := fakes(4, 6)
	s := stackOf(t, all)
	stored := func(off int64) bool {
		for _, l := range all {
			if off >= l.size {
				return false
			}
			if k := l.kind[off/l.granule]; k != u {
				return k == d || k == p
			}
		}
		return false
	}
	for off := int64(0); off < s.Size(); off += 1777 {
		for _, want := range []bool{true, false} {
			expect := off
			for expect < s.Size() && stored(expect) != want {
				expect++
			}
			seek := s.SeekHole
			if want {
				seek = s.SeekData
			}
			got, err := seek(ctx, off)
			if want && expect == s.Size() {
				if !errors.Is(err, io.EOF) {
					t.Fatalf("SeekData(%d) = %d, %v; want EOF", off, got, err)
				}
				continue
			}
			if err != nil || got != expect {
				t.Fatalf("seek stored=%v from %d: %d, %v; want %d", want, off, got, err, expect)
			}
		}
	}
}

func TestStackRefusesChanges(t *testing.T) {
	ctx := context.Background()
	s := stackOf(t, fakes(1, 2))
	if _, err := s.WriteAt(ctx, []byte{1}, 0); !errors.Is(err, layers.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if err := s.ZeroAt(ctx, 0, 1, true); !errors.Is(err, layers.ErrReadOnly) {
		t.Errorf("zero: %v", err)
	}
	if err := s.Sync(ctx); err != nil || s.Writable() {
		t.Errorf("sync: %v", err)
	}
	if _, err := layers.NewStack(nil, layers.StackOptions{}); err == nil {
		t.Error("a stack without layers")
	}
	if _, err := layers.NewStack(make([]layers.Layer, layers.MaxDepth+1), layers.StackOptions{}); !errors.Is(err, layers.ErrUnsupported) {
		t.Errorf("too deep: %v", err)
	}
	if _, err := layers.NewStack([]layers.Layer{fakes(1, 1)[0]}, layers.StackOptions{Writable: true}); !errors.Is(err, layers.ErrReadOnly) {
		t.Errorf("writable without an editor: %v", err)
	}
}

// Bytes that the map promises and the file does not have are damage, never
// zeros; neither is a compressed cluster that does not decompress.
func TestStackReportsMissingBytes(t *testing.T) {
	ctx := context.Background()
	r := rand.New(rand.NewPCG(1, 1))
	l := newFake(1<<20, 65536, r, d)
	if err := l.f.Truncate(l.host[8]); err != nil {
		t.Fatal(err)
	}
	var ie *layers.ImageError
	_, err := stackOf(t, []*fake{l}).ReadAt(ctx, make([]byte, 1<<20), 0)
	if !errors.Is(err, layers.ErrCorrupt) || !errors.As(err, &ie) || ie.Path != "fake" {
		t.Errorf("truncated file: %v", err)
	}
	pk := newFake(1<<20, 65536, r, p)
	pk.broken = true
	for _, n := range []int{4096, 65536} {
		if _, err := stackOf(t, []*fake{pk}).ReadAt(ctx, make([]byte, n), 0); !errors.Is(err, layers.ErrCorrupt) {
			t.Errorf("broken payload, read of %d: %v", n, err)
		}
	}
	m := backend.NewMemBytes("raw", make([]byte, 8192))
	flat, err := raw.Open(ctx, m, layers.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := layers.NewStack([]layers.Layer{flat}, layers.StackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	if n, err := s.ReadAt(ctx, make([]byte, 8192), 0); n > 4096 || !errors.Is(err, layers.ErrCorrupt) {
		t.Errorf("raw file that shrank: %d, %v", n, err)
	}
}

// A hostile map can let several clusters name the same compressed bytes; they
// are one extent then.
func TestStackReadsJoinedPackedClusters(t *testing.T) {
	l := newFake(8*65536, 65536, rand.New(rand.NewPCG(1, 1)), p)
	for c := range l.host {
		l.host[c] = l.host[0]
	}
	s, want := stackOf(t, []*fake{l}), modelOf([]*fake{l})
	for _, off := range []int64{0, 100, 65536, 70_000} {
		got := bytes.Repeat([]byte{0xee}, 200_000)
		if _, err := s.ReadAt(context.Background(), got, off); err != nil || !bytes.Equal(got, want[off:off+200_000]) {
			t.Errorf("read at %d: wrong content (%v)", off, err)
		}
	}
}

// Reads in the middle of a compressed cluster: the first decompresses no more
// than it asks for, the second the whole cluster, and then it is there. From
// the beginning it is the first.
func TestStackUnpacksOnce(t *testing.T) {
	const cluster = 65536
	l := newFake(4*cluster, cluster, rand.New(rand.NewPCG(1, 1)), p)
	s, want := stackOf(t, []*fake{l}), modelOf([]*fake{l})
	for _, step := range []struct{ off, unpacked int64 }{
		{8192, 4096}, {12288, 4096 + cluster}, {0, 4096 + cluster}, {4096, 4096 + cluster},
		{cluster, 4096 + 2*cluster}, {cluster + 4096, 4096 + 2*cluster},
		{2*cluster + 4096, 8192 + 2*cluster}, {2 * cluster, 8192 + 3*cluster},
	} {
		got := make([]byte, 4096)
		if _, err := s.ReadAt(context.Background(), got, step.off); err != nil || !bytes.Equal(got, want[step.off:step.off+4096]) {
			t.Fatalf("read at %d: wrong content (%v)", step.off, err)
		}
		if n := l.unpacked.Load(); n != step.unpacked {
			t.Fatalf("after the read at %d: %d bytes decompressed, want %d", step.off, n, step.unpacked)
		}
	}
}

// A read through a pile takes nothing from the heap once the map is known.
func TestStackReadAllocatesNothing(t *testing.T) {
	ctx := context.Background()
	s := stackOf(t, fakes(2, 8))
	buf := make([]byte, 65536)
	read := func() {
		if _, err := s.ReadAt(ctx, buf, 131072); err != nil {
			t.Fatal(err)
		}
	}
	read()
	if n := testing.AllocsPerRun(200, read); n != 0 {
		t.Errorf("%v allocations a read", n)
	}
}

func BenchmarkStackRead4K(b *testing.B) {
	ctx := context.Background()
	for _, depth := range []int{1, 8, 64} {
		b.Run(fmt.Sprint("depth", depth), func(b *testing.B) {
			s := stackOf(b, fakes(2, depth))
			buf := make([]byte, 4096)
			b.ReportAllocs()
			for i := int64(0); b.Loop(); i++ {
				if _, err := s.ReadAt(ctx, buf, i*4096%500_000&^4095); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestBelowLeavesTheTopOut, also when nothing is written.
func TestBelowLeavesTheTopOut(t *testing.T) {
	ctx := context.Background()
	r := rand.New(rand.NewPCG(5, 5))
	top, base := newFake(64<<10, 4096, r, blockmap.Data), newFake(64<<10, 4096, r, blockmap.Data, blockmap.Zero)
	for _, pile := range [][]layers.Layer{{top}, {top, base}} {
		s, err := layers.NewStack(pile, layers.StackOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got, want := make([]byte, 64<<10), make([]byte, 64<<10)
		if len(pile) > 1 {
			alone, err := layers.NewStack(pile[1:], layers.StackOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := alone.ReadAt(ctx, want, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Below().ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d layers: what lies below the top: %v, or other bytes", len(pile), err)
		}
		if zero, err := s.Below().IsZero(ctx, 0, 64<<10); err != nil || zero != (len(pile) == 1) {
			t.Errorf("%d layers: zero below the top: %v, %v", len(pile), zero, err)
		}
	}
}
