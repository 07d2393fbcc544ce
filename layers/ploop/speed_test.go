package ploop

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/maptest"
	"github.com/imagestack/imagestack/layers"
)

// hugeFile makes an image of 50 TiB with few clusters, whose BAT is a hole of
// the file but for the entries given.
func hugeFile(t testing.TB, cluster int64, entries map[int64]uint32) string {
	t.Helper()
	h := newHeader(2, cluster, MaxSize)
	path := tempPath(t, "huge.hds")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	put := func(b []byte, off int64) {
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	put(h.raw[:], 0)
	end := h.firstData
	for idx, slot := range entries {
		slot += uint32(h.firstData / cluster)
		put(binary.LittleEndian.AppendUint32(nil, slot), headerSize+4*idx)
		end = max(end, int64(slot+1)*cluster)
	}
	if err := f.Truncate(end); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestHugeImage: 50 TiB, in the default and in the smallest clusters (a BAT of
// 6.7 GB): open and a lookup of everything are quick and small, also beside
// pages that are changed and not written.
func TestHugeImage(t *testing.T) {
	ctx := context.Background()
	for _, cluster := range []int64{DefaultCluster, MinCluster} {
		last := int64(MaxSize)/cluster - 1
		path := hugeFile(t, cluster, map[int64]uint32{5: 0, last / 2: 1, last: 2})
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		f, err := backend.Open(path, backend.Options{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		i, err := Open(ctx, f, layers.OpenOptions{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		opened := time.Since(start)
		ext, err := i.Lookup(ctx, 0, i.Size(), make([]blockmap.Extent, 0, 16))
		took := time.Since(start)
		if err != nil || len(ext) != 6 || ext[1].Len != cluster || ext[5].Host == 0 || ext[3].Guest != last/2*cluster {
			t.Errorf("%v, %v", ext, err)
		}
		if opened > 100*time.Millisecond || took > 500*time.Millisecond {
			t.Errorf("open took %v, with a lookup of everything %v", opened, took)
		}
		runtime.ReadMemStats(&after)
		if grown := int64(after.TotalAlloc - before.TotalAlloc); grown > 8<<20 {
			t.Errorf("allocated %d bytes", grown)
		}
		// A change in the middle of a hole, not synced, is seen.
		if err := i.WriteAt(ctx, []byte{1}, last/4*cluster, bytesBelow(nil)); err != nil {
			t.Fatal(err)
		}
		if ext, err = i.Lookup(ctx, 0, i.Size(), make([]blockmap.Extent, 0, 16)); err != nil || len(ext) != 8 || ext[3].Guest != last/4*cluster {
			t.Errorf("after a change: %v, %v", ext, err)
		}
		start = time.Now()
		if err := i.ZeroAt(ctx, 0, i.Size(), true, bytesBelow(nil)); err != nil {
			t.Fatal(err)
		}
		closeImage(t, i)
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("discarding everything took %v", took)
		}
	}
}

// TestLookupOfADenseMap runs the conformance suite over many extents and
// clusters with a cache that holds a part of the BAT only, and a warm one
// without allocations.
func TestLookupOfADenseMap(t *testing.T) {
	const clusters = 20000 // 20 pages of entries
	entries := map[int]uint32{}
	kind := func(idx int64) blockmap.Kind {
		if idx/7%3 == 1 {
			return blockmap.Unmapped
		}
		return blockmap.Data
	}
	for idx := range clusters {
		if kind(int64(idx)) == blockmap.Data {
			entries[idx] = uint32(40000 - idx%9*4000 + idx/9)
		}
	}
	h := newHeader(2, 4096, clusters*4096)
	b := make([]byte, h.firstData)
	copy(b, h.raw[:])
	for idx, e := range entries {
		binary.LittleEndian.PutUint32(b[headerSize+4*idx:], e)
	}
	open := func(budget int64) func(t *testing.T) (blockmap.Map, maptest.Truth) {
		return func(t *testing.T) (blockmap.Map, maptest.Truth) {
			m := backend.NewMemBytes("dense.hds", b)
			if err := m.Truncate(50000 * 4096); err != nil {
				t.Fatal(err)
			}
			i := mustOpen(t, m, false, layers.NewCache(budget))
			t.Cleanup(func() { closeImage(t, i) })
			return i, func(guest int64) blockmap.Kind { return kind(guest / 4096) }
		}
	}
	t.Run("warm", func(t *testing.T) { maptest.Run(t, open(8<<20), maptest.AllocFree()) })
	t.Run("cold", func(t *testing.T) { maptest.Run(t, open(0), maptest.Rounds(50)) })
}

// TestWriteInPlaceDoesNotAllocate pins the hot path of writing.
func TestWriteInPlaceDoesNotAllocate(t *testing.T) {
	ctx := context.Background()
	m := newMem(t, CreateOptions{Size: 64 * k64, ClusterSize: k64})
	i := mustOpen(t, m, true, nil)
	p := bytes.Repeat([]byte{1}, 4*k64)
	var below layers.Below = bytesBelow(nil)
	if err := i.WriteAt(ctx, p, 0, below); err != nil {
		t.Fatal(err)
	}
	if err := i.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if err := i.WriteAt(ctx, p[:k64+100], 300, below); err != nil {
			t.Fatal(err)
		}
	}); n != 0 && !imgtest.RaceEnabled {
		t.Errorf("%v allocations for a write in place", n)
	}
}
