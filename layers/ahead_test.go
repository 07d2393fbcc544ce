package layers_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

// A sequential reader of pieces of a cluster or less finds the next clusters
// decompressed; each is decompressed once, whole reads leave nothing in the
// cache, and nothing goes on after Close.
func TestStackReadsAhead(t *testing.T) {
	const cluster, clusters = 65536, 40
	window := int64(max(2, min(runtime.GOMAXPROCS(0), 8)))
	for _, piece := range []int{4096, 5000, cluster} {
		t.Run(fmt.Sprint(piece), func(t *testing.T) {
			l := newFake(clusters*cluster, cluster, rand.New(rand.NewPCG(1, 1)), p)
			cache := layers.NewCache(layers.DefaultCacheSize)
			s, err := layers.NewStack([]layers.Layer{l}, layers.StackOptions{Cache: cache})
			if err != nil {
				t.Fatal(err)
			}
			want := modelOf([]*fake{l})
			got := make([]byte, piece)
			off := 0
			read := func(end int) {
				for ; off < end; off += piece {
					n, err := s.ReadAt(context.Background(), got, int64(off))
					if err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], want[off:min(off+piece, len(want))]) {
						t.Fatalf("read at %d: wrong content (%v)", off, err)
					}
				}
			}
			read(len(want) / 2)
			begun := int64(off+cluster-1) / cluster
			imgtest.Eventually(t, "some clusters more than were asked for", func() bool { return l.unpacked.Load() == (begun+window)*cluster })
			read(len(want))
			if n := l.unpacked.Load(); n != clusters*cluster {
				t.Errorf("%d bytes decompressed for %d clusters", n, clusters)
			}
			if piece == cluster && cache.Bytes() > window*cluster {
				t.Errorf("%d bytes are kept", cache.Bytes())
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// With a cache that is too small for it nothing is read ahead: it would be lost
// before it is asked for. (Some clusters such a cache forgets anyway.)
func TestStackReadsAheadWithinTheCache(t *testing.T) {
	const cluster, clusters = 131072, 24
	l := newFake(clusters*cluster, cluster, rand.New(rand.NewPCG(1, 1)), p)
	s, err := layers.NewStack([]layers.Layer{l}, layers.StackOptions{Cache: layers.NewCache(0)})
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < clusters*cluster; off += 4096 {
		if _, err := s.ReadAt(context.Background(), make([]byte, 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	if n := l.unpacked.Load(); n > clusters*cluster*5/4 {
		t.Errorf("%d bytes decompressed for %d clusters", n, clusters)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// Who reads here and there, or backwards, makes nobody decompress what was not
// asked for; nor does damage in what was not asked for concern the reader.
func TestStackReadsAheadOnlyForSequentialReaders(t *testing.T) {
	const cluster, clusters = 65536, 40
	for name, order := range map[string][]int64{"backwards": {20, 19, 18, 17, 16, 15}, "far": {0, 6, 12, 18, 24, 30}, "twice": {5, 5, 5, 5, 5}} {
		l := newFake(clusters*cluster, cluster, rand.New(rand.NewPCG(1, 1)), p)
		s := stackOf(t, []*fake{l})
		for _, c := range order {
			if _, err := s.ReadAt(context.Background(), make([]byte, cluster), c*cluster); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(5 * time.Millisecond)
		if n := l.unpacked.Load(); n != int64(len(order))*cluster {
			t.Errorf("%s: %d bytes decompressed for %d clusters", name, n, len(order))
		}
	}
	l := newFake(clusters*cluster, cluster, rand.New(rand.NewPCG(1, 1)), p)
	l.damaged = l.host[20]
	s := stackOf(t, []*fake{l})
	for c := range int64(clusters) {
		_, err := s.ReadAt(context.Background(), make([]byte, 4096), c*cluster)
		if errors.Is(err, layers.ErrCorrupt) != (c == 20) {
			t.Errorf("cluster %d: %v", c, err)
		}
	}
}

// The clusters of one long read are decompressed by several at a time.
func TestStackUnpacksTogether(t *testing.T) {
	const cluster, clusters = 65536, 32
	l := newFake(clusters*cluster, cluster, rand.New(rand.NewPCG(1, 1)), p, p, p, d, z)
	s, want := stackOf(t, []*fake{l}), modelOf([]*fake{l})
	var inside, most atomic.Int64
	l.unpacking = func() {
		inside.Add(1)
		defer inside.Add(-1)
		for end := time.Now().Add(time.Second); most.Load() < 2 && time.Now().Before(end); time.Sleep(time.Millisecond) {
			if n := inside.Load(); n > most.Load() {
				most.Store(n)
			}
		}
	}
	got := make([]byte, len(want)-10_000)
	if _, err := s.ReadAt(context.Background(), got, 5000); err != nil || !bytes.Equal(got, want[5000:5000+len(got)]) {
		t.Errorf("wrong content (%v)", err)
	}
	if most.Load() < 2 {
		t.Error("one cluster after the other")
	}
}

// What is in front of the first cluster that cannot be read is there.
func TestStackUnpacksTogetherUpToDamage(t *testing.T) {
	const cluster, clusters = 65536, 16
	l := newFake(clusters*cluster, cluster, rand.New(rand.NewPCG(1, 1)), p)
	want := modelOf([]*fake{l})
	for bad := range clusters {
		l.damaged = l.host[bad]
		s, err := layers.NewStack([]layers.Layer{l}, layers.StackOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want)-100)
		n, err := s.ReadAt(context.Background(), got, 100)
		if end := max(0, bad*cluster-100); n != end || !errors.Is(err, layers.ErrCorrupt) || !bytes.Equal(got[:n], want[100:100+n]) {
			t.Errorf("cluster %d is damaged: %d bytes (%v), want %d", bad, n, err, end)
		}
	}
}

// The map is resolved some regions before a sequential reader needs it, and
// nowhere else.
func TestStackResolvesAhead(t *testing.T) {
	const region = 4 << 20
	ctx := context.Background()
	l := newFake(64*region, 65536, rand.New(rand.NewPCG(1, 1)), z)
	s := stackOf(t, []*fake{l, l})
	read := func(at int64) {
		t.Helper()
		if _, err := s.ReadAt(ctx, make([]byte, 4096), at*region); err != nil {
			t.Fatal(err)
		}
	}
	for i, at := range []int64{0, 2, 4, 6} {
		read(at)
		time.Sleep(time.Millisecond)
		if end := l.reached.Load(); end != (at+1)*region {
			t.Fatalf("read %d, in region %d: the map is known up to region %d", i, at, end/region)
		}
	}
	read(7)
	imgtest.Eventually(t, "one region ahead", func() bool { return l.reached.Load() == 9*region })
	for at := int64(8); at < 64; at++ {
		read(at)
		want := min(at+5, 64) * region
		imgtest.Eventually(t, fmt.Sprintf("four regions ahead of region %d", at), func() bool { return l.reached.Load() == want })
	}
	time.Sleep(5 * time.Millisecond)
	if end := l.reached.Load(); end != 64*region {
		t.Errorf("looked up %d bytes behind the end of the disk", end-64*region)
	}
}

// Who comes by chance to a region behind one that is known is no sequential
// reader.
func TestStackResolvesNothingAheadByChance(t *testing.T) {
	const region = 4 << 20
	l := newFake(64*region, 65536, rand.New(rand.NewPCG(1, 1)), z)
	s := stackOf(t, []*fake{l})
	for _, at := range []int64{20, 10, 21} {
		if _, err := s.ReadAt(context.Background(), make([]byte, 4096), at*region); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(5 * time.Millisecond)
	if end := l.reached.Load(); end != 22*region {
		t.Errorf("the map is known up to region %d", end/region)
	}
}

// After Alone only who reads comes to the layers.
func TestStackAlone(t *testing.T) {
	const cluster, clusters = 65536, 256
	l := newFake(clusters*cluster, cluster, rand.New(rand.NewPCG(1, 1)), p)
	s := stackOf(t, []*fake{l})
	s.Alone()
	const n = 140 // some clusters behind the second region
	for c := range int64(n) {
		if _, err := s.ReadAt(context.Background(), make([]byte, 4096), c*cluster); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(5 * time.Millisecond)
	if l.unpacked.Load() != n*cluster || l.reached.Load() != 3*64*cluster {
		t.Errorf("%d clusters decompressed, the map known up to cluster %d", l.unpacked.Load()/cluster, l.reached.Load()/cluster)
	}
}
