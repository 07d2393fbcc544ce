package qcow2fsck

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
)

// fullyMapped makes a sparse image of size bytes in which every cluster of 64
// KiB is mapped.
func fullyMapped(t testing.TB, path string, size int64) {
	t.Helper()
	const cs = 64 << 10
	clusters := size / cs
	tables := clusters / (cs / 8)
	l1Clusters := (tables*8 + cs - 1) / cs
	be := binary.BigEndian
	// header, reftable, L1, blocks, L2 tables, data.
	total := 1 + 1 + l1Clusters + tables + clusters
	blocks := (total + total/(cs/2)*2 + cs/2) / (cs / 2)
	total += blocks
	l1 := int64(2)
	block := l1 + l1Clusters
	l2 := block + blocks
	data := l2 + tables
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	put := func(b []byte, off int64) {
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	h := make([]byte, 112)
	be.PutUint32(h, magic)
	be.PutUint32(h[4:], 3)
	be.PutUint32(h[20:], 16)
	be.PutUint64(h[24:], uint64(size))
	be.PutUint32(h[36:], uint32(tables))
	be.PutUint64(h[40:], uint64(l1*cs))
	be.PutUint64(h[48:], cs)
	be.PutUint32(h[56:], 1)
	be.PutUint32(h[96:], 4)
	be.PutUint32(h[100:], 104)
	put(h, 0)
	b := make([]byte, cs)
	for i := range blocks {
		be.PutUint64(b[8*i:], uint64((block+i)*cs))
	}
	put(b, cs)
	b = make([]byte, l1Clusters*cs)
	for i := range tables {
		be.PutUint64(b[8*i:], entryCopied|uint64((l2+i)*cs))
	}
	put(b, l1*cs)
	b = make([]byte, cs)
	for i := range blocks {
		clear(b)
		for k := range int64(cs / 2) {
			if i*cs/2+k < total {
				be.PutUint16(b[2*k:], 1)
			}
		}
		put(b, (block+i)*cs)
	}
	for i := range tables {
		for k := range int64(cs / 8) {
			be.PutUint64(b[8*k:], entryCopied|uint64((data+i*cs/8+k)*cs))
		}
		put(b, (l2+i)*cs)
	}
	if err := f.Truncate(total * cs); err != nil {
		t.Fatal(err)
	}
}

// TestLarge: a disk of 1 TiB, all of it mapped, in little memory and time; and
// qemu-img check for comparison when it is asked for.
func TestLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	path := filepath.Join(t.TempDir(), "image")
	fullyMapped(t, path, 1<<40)
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var peak uint64
	stop := make(chan struct{})
	done := make(chan struct{})
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	go func() {
		defer close(done)
		var m runtime.MemStats
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapInuse)
			}
		}
	}()
	start := time.Now()
	col := fsck.NewCollector(fsck.CollectorOptions{})
	stats, err := Checker{}.Check(context.Background(), f, fsck.Options{}, col)
	took := time.Since(start)
	close(stop)
	<-done
	if err != nil {
		t.Fatal(err)
	}
	rep := col.Sum(stats)
	if len(rep.Counts) > 0 || stats.AllocatedClusters != 1<<24 {
		t.Fatalf("%d allocated\n%s", stats.AllocatedClusters, list(rep))
	}
	t.Logf("%v, %d MiB of heap at most", took, (peak-min(peak, before.HeapInuse))>>20)
	if peak > before.HeapInuse+64<<20 {
		t.Errorf("%d MiB of heap", (peak-before.HeapInuse)>>20)
	}
}
