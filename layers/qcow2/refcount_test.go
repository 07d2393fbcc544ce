package qcow2

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"golang.org/x/sys/unix"
)

// nothing is a Below that shows zeros.
func nothing() layers.Below { return layertest.NewBelow(nil, 1) }

// memImage makes an image in memory and opens it for changing.
func memImage(t testing.TB, o CreateOptions) (*Image, *backend.Mem) {
	t.Helper()
	m := backend.NewMem("image")
	if err := Create(context.Background(), m, o); err != nil {
		t.Fatal(err)
	}
	return reopenMem(t, m, m), m
}

func reopenMem(t testing.TB, f backend.File, m *backend.Mem) *Image {
	t.Helper()
	img, err := Open(context.Background(), f, layers.OpenOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestRefcountWidths: entries of every width keep their neighbours.
func TestRefcountWidths(t *testing.T) {
	for order := uint(0); order <= maxRefcountOrder; order++ {
		b := make([]byte, 512)
		n := 512 * 8 >> order
		value := func(i int) uint64 { return uint64(i) * 0x9e3779b97f4a7c15 >> 3 & maxRefcount(order) }
		for i := range n {
			putRefcount(b, order, i, value(i))
		}
		for i := n - 1; i >= 0; i -= 3 {
			putRefcount(b, order, i, maxRefcount(order))
		}
		for i := range n {
			want := value(i)
			if (n-1-i)%3 == 0 {
				want = maxRefcount(order)
			}
			if got := getRefcount(b, order, i); got != want {
				t.Fatalf("order %d: entry %d is %#x, want %#x", order, i, got, want)
			}
		}
		clear(b)
		putRefcount(b, order, 5, 1)
		if i, k := freeRun(b, order, 3, n, 10); i != 3 || k != 2 {
			t.Errorf("order %d: run %d+%d", order, i, k)
		}
		if i, k := freeRun(b, order, 5, n, 10); i != 6 || k != min(10, n-6) {
			t.Errorf("order %d: run %d+%d behind a used one", order, i, k)
		}
		if _, k := freeRun(b, order, 5, 6, 10); k != 0 {
			t.Errorf("order %d: found %d free in a used entry", order, k)
		}
	}
	// The order of narrow entries is that of the format: from the lowest bit.
	b := make([]byte, 512)
	putRefcount(b, 0, 1, 1)
	putRefcount(b, 1, 5, 2)
	putRefcount(b, 2, 4, 7)
	if b[0] != 2 || b[1] != 2<<2 || b[2] != 7 {
		t.Errorf("% x", b[:3])
	}
}

// TestRefcountOverflow: a count that does not fit is refused, and the run is
// as it was.
func TestRefcountOverflow(t *testing.T) {
	img, _ := memImage(t, CreateOptions{Version: 3, ClusterSize: 4096, RefcountBits: 1, Size: 1 << 20})
	if err := img.WriteAt(context.Background(), make([]byte, 8192), 0, nothing()); err != nil {
		t.Fatal(err)
	}
	r := img.ed.ref
	run, _, err := r.allocate(1)
	if err != nil {
		t.Fatal(err)
	}
	r.undo(run.first, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.set(run.first, 1, 1); err != nil {
		t.Fatal(err)
	}
	if err := r.set(run.first-1, 2, 2); !errors.Is(err, layers.ErrUnsupported) {
		t.Fatalf("second reference with one bit: %v", err)
	}
	for c := run.first - 1; c <= run.first; c++ {
		if n, err := r.get(c); n != 1 || err != nil {
			t.Errorf("cluster %d: %d, %v", c, n, err)
		}
	}
	if err := r.decrement(0); err != nil {
		t.Fatal(err)
	}
	if err := r.decrement(0); !errors.Is(err, layers.ErrCorrupt) {
		t.Errorf("decrement of 0: %v", err)
	}
}

// TestTableGrowth fills images of tiny clusters until the refcount table has
// moved several times, over every width, and lets QEMU judge.
func TestTableGrowth(t *testing.T) {
	for _, bits := range []int{64, 32, 16} {
		t.Run(fmt.Sprint(bits), func(t *testing.T) {
			path := t.TempDir() + "/image.qcow2"
			f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
			if err != nil {
				t.Fatal(err)
			}
			size := int64(3<<20) * int64(64/bits)
			if err := Create(context.Background(), f, CreateOptions{Version: 3, ClusterSize: 512, RefcountBits: bits, Size: size}); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			img := openRW(t, path)
			before := tableClusters(t, img.f)
			model := make([]byte, size)
			imgtest.Pattern(model, 3, 0)
			for off := int64(0); off < size; off += 96 << 10 {
				n := min(96<<10, size-off)
				if err := img.WriteAt(context.Background(), model[off:off+n], off, nothing()); err != nil {
					t.Fatal(err)
				}
				if off%(480<<10) == 0 {
					if err := img.Sync(context.Background()); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := img.Sync(context.Background()); err != nil {
				t.Fatal(err)
			}
			after := tableClusters(t, img.f)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if after <= before {
				t.Fatalf("the table has %d clusters still", before)
			}
			checkClean(t, path)
			same(t, "QEMU", qemuRead(t, path, ""), model)
			same(t, "reopened", readImage(t, path, nil, ""), model)
		})
	}
}

// tableClusters is the length of the refcount table that the header names.
func tableClusters(t testing.TB, f backend.File) uint32 {
	t.Helper()
	h, err := readHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	return h.RefcountTableClusters
}

// nearGrowth is an image whose next allocations move the refcount table.
func nearGrowth(t testing.TB) (*backend.Mem, []byte) {
	t.Helper()
	const size = 3 << 20
	img, m := memImage(t, CreateOptions{Version: 3, ClusterSize: 512, RefcountBits: 64, Size: size})
	model := make([]byte, size)
	// 64 blocks of 64 clusters fit into the table of one cluster.
	n := int64(0)
	for img.ed.ref.hwm < 64*64-24 {
		imgtest.Pattern(model[n:n+2048], 9, n)
		if err := img.WriteAt(context.Background(), model[n:n+2048], n, nothing()); err != nil {
			t.Fatal(err)
		}
		n += 2048
	}
	if err := img.Sync(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := img.ed.ref.shrinkFile(); err != nil {
		t.Fatal(err)
	}
	if img.ed.ref.tableMoved || tableClusters(t, m) != 1 {
		t.Fatal("the table has moved already")
	}
	return m.Clone(), model[:n]
}

// TestTableGrowthPowerCut cuts the power at every moment of a run that moves
// the table, and proves that each sync of it is needed.
func TestTableGrowthPowerCut(t *testing.T) {
	ctx := context.Background()
	start, model := nearGrowth(t)
	rec := backend.NewRecorder()
	f, err := rec.Wrap(start)
	if err != nil {
		t.Fatal(err)
	}
	img := reopenMem(t, f, start)
	n := int64(len(model))
	if err := img.WriteAt(ctx, imgtest.PatternBytes(5, n, 32<<10), n, nothing()); err != nil {
		t.Fatal(err)
	}
	if err := img.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if tableClusters(t, f) == 1 {
		t.Fatal("the table has not moved")
	}
	verdict := func(ignore int) error {
		for s := range rec.States(backend.StateOptions{Exhaustive: 5, Random: 40, MaxPerEpoch: 120, Seed: 4, IgnoreSync: ignore}) {
			if err := inspect(ctx, s.Files[0], true); err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
			img, err := Open(ctx, s.Files[0], layers.OpenOptions{})
			if err != nil {
				return err
			}
			got, err := readAll(img, nil)
			if err != nil {
				return err
			}
			if string(got[:n]) != string(model) {
				return fmt.Errorf("%s: synced data is lost", s)
			}
		}
		return nil
	}
	if err := verdict(0); err != nil {
		t.Fatal(err)
	}
	if rec.SyncCalls() != 3 {
		t.Errorf("%d syncs, want 3: table, counts and data, map", rec.SyncCalls())
	}
	for i := 1; i < rec.SyncCalls(); i++ {
		if verdict(i) == nil {
			t.Errorf("nothing notices that sync %d is left out", i)
		}
	}
}

// TestTableGrowthFaults fails every operation of a run that moves the table.
func TestTableGrowthFaults(t *testing.T) {
	ctx := context.Background()
	start, model := nearGrowth(t)
	n := int64(len(model))
	for _, errno := range []error{unix.EIO, unix.ENOSPC} {
		step := 1
		if errno == unix.ENOSPC {
			step = 3
		}
		for i := 1; ; i += step {
			m := start.Clone()
			fault := backend.NewFault(m)
			img := reopenMem(t, fault, m)
			fault.Inject(backend.Rule{On: backend.OpRead | backend.OpChange, Nth: i, Err: errno, Short: 100})
			p := imgtest.PatternBytes(5, n, 32<<10)
			err := img.WriteAt(ctx, p, n, nothing())
			if err == nil {
				err = img.Sync(ctx)
			}
			fired := fault.Fired() > 0
			fault.Clear()
			if err != nil && !errors.Is(err, errno) {
				t.Fatalf("operation %d: %v, want %v", i, err, errno)
			}
			if err := inspect(ctx, m, true); err != nil {
				t.Fatalf("operation %d, %v, before the next sync: %v", i, errno, err)
			}
			// The editor is usable: the same again succeeds.
			if err := img.WriteAt(ctx, p, n, nothing()); err != nil {
				t.Fatalf("operation %d: write again: %v", i, err)
			}
			if err := img.Sync(ctx); err != nil {
				t.Fatalf("operation %d: sync again: %v", i, err)
			}
			if err := img.closeEditor(); err != nil {
				t.Fatal(err)
			}
			if err := inspect(ctx, m, true); err != nil {
				t.Fatalf("operation %d, %v, afterwards: %v", i, errno, err)
			}
			got, err := readAll(img, nil)
			if err != nil {
				t.Fatal(err)
			}
			same(t, "synced", got[:n], model)
			same(t, "written", got[n:n+int64(len(p))], p)
			if !fired {
				if i < 10 {
					t.Fatalf("only %d operations", i)
				}
				break
			}
		}
	}
}

// TestFixedSize: on a device the free clusters inside are used, then the
// answer is ENOSPC, and a discard makes room again.
func TestFixedSize(t *testing.T) {
	ctx := context.Background()
	m := backend.NewMem("device")
	if err := Create(ctx, m, CreateOptions{Version: 3, ClusterSize: 4096, Size: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := m.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	img, err := Open(ctx, fixedFile{m}, layers.OpenOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	p := imgtest.PatternBytes(1, 0, 4<<20)
	var n int64
	for ; n < int64(len(p)); n += 4096 {
		if err = img.WriteAt(ctx, p[n:n+4096], n, nothing()); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("after %d bytes: %v", n, err)
	}
	if n < 900<<10 {
		t.Errorf("only %d bytes fit", n)
	}
	if err := img.ZeroAt(ctx, 0, 64<<10, true, nothing()); err != nil {
		t.Fatal(err)
	}
	if err := img.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	if err := img.WriteAt(ctx, p[n:n+64<<10], n, nothing()); err != nil {
		t.Fatalf("after the discard: %v", err)
	}
	clear(p[:64<<10])
	clear(p[n+64<<10:])
	got, err := readAll(img, nil)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "content", got, p)
	if err := img.closeEditor(); err != nil {
		t.Fatal(err)
	}
	if err := inspect(ctx, m, false); err != nil {
		t.Fatal(err)
	}
}
