package ploopfsck_test

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// mapped makes a sparse image of version 2 with clusters of 1 MiB all of which
// are mapped, neighbours swapped so that runs are short.
func mapped(t testing.TB, clusters int64) string {
	t.Helper()
	const cluster = 1 << 20
	first := (64 + 4*clusters + cluster - 1) / cluster
	b := make([]byte, first*cluster)
	copy(b, "WithouFreSpacExt")
	put := binary.LittleEndian.PutUint32
	put(b[16:], 2)
	put(b[28:], cluster/512)
	put(b[32:], uint32(clusters))
	binary.LittleEndian.PutUint64(b[36:], uint64(clusters*cluster/512))
	put(b[48:], uint32(first*cluster/512))
	for i := range clusters {
		put(b[64+4*i:], uint32(first+(i^1)))
	}
	path := filepath.Join(t.TempDir(), "big.hds")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, (first+clusters)*cluster); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestLarge: 16 TiB (the largest file of ext4) are checked in seconds and in a
// few megabytes.
func TestLarge(t *testing.T) {
	path := mapped(t, 15<<20)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	start := time.Now()
	r := check(t, path)
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	if r.Worst() > fsck.Note || r.Stats.AllocatedClusters != 15<<20 {
		show(t, "large", r)
		t.Errorf("%+v", r.Stats)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 32<<20 {
		t.Errorf("%d MiB were allocated", n>>20)
	}
	t.Logf("%v", took)
}

func BenchmarkCheck(b *testing.B) {
	path := mapped(b, 1<<20)
	b.Run("ploopfsck", func(b *testing.B) {
		f := openFile(b, path, false)
		for b.Loop() {
			if _, err := fsck.CheckFile(context.Background(), f, "ploop"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("qemu-img", func(b *testing.B) {
		for b.Loop() {
			imgtest.QemuCheck(b, path, "ploop")
		}
	})
}
