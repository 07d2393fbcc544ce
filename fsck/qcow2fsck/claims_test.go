package qcow2fsck

import (
	"encoding/binary"
	"sync/atomic"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

// largeClusters is an image of clusters of 2 MiB: header, refcount table and
// block, L1 and L2 table, then the guest's. entry gives its L2 entries, the
// first `counted` clusters are counted once.
func largeClusters(t *testing.T, clusters, counted int64, entry func(i int) uint64) *backend.Mem {
	t.Helper()
	const cs = 2 << 20
	be := binary.BigEndian
	f := backend.NewMem("image")
	put := func(off int64, b []byte) {
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	h := make([]byte, 112)
	be.PutUint32(h, magic)
	be.PutUint32(h[4:], 3)
	be.PutUint32(h[20:], 21)
	be.PutUint64(h[24:], cs/8*cs)
	be.PutUint32(h[36:], 1)
	be.PutUint64(h[40:], 3*cs)
	be.PutUint64(h[48:], cs)
	be.PutUint32(h[56:], 1)
	be.PutUint32(h[96:], 4)
	be.PutUint32(h[100:], 104)
	put(0, h)
	put(cs, be.AppendUint64(nil, 2*cs))
	put(3*cs, be.AppendUint64(nil, entryCopied|4*cs))
	var counts, table []byte
	for range counted {
		counts = be.AppendUint16(counts, 1)
	}
	put(2*cs, counts)
	for i := range cs / 8 {
		table = be.AppendUint64(table, entry(i))
	}
	put(4*cs, table)
	if err := f.Truncate(clusters * cs); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestManyClaims: very many entries that name one cluster, or a few that name
// each of very many, do not make a repair that fills the host.
func TestManyClaims(t *testing.T) {
	const cs = 2 << 20
	for _, c := range []struct {
		name            string
		clusters, named int64
		each            int
		most            int64 // bytes that the image may grow by
	}{
		{"one cluster", 6, 1, 5000, 17 * cs},
		{"many clusters", 205, 200, 16, fsck.FreeCopies + 8*cs},
	} {
		f := largeClusters(t, c.clusters, c.clusters, func(i int) uint64 {
			if i >= int(c.named)*c.each {
				return 0
			}
			return entryCopied | uint64(5+i/c.each)*cs
		})
		for i := range c.named { // no hole, which would need no copy
			if _, err := f.WriteAt([]byte("data"), (5+i)*cs); err != nil {
				t.Fatal(err)
			}
		}
		plan, err := fsck.NewPlan(f, fsck.PlanOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer plan.Close()
		col := fsck.NewCollector(fsck.CollectorOptions{Decide: fsck.DecideAll, Details: 1000})
		if _, err := (Checker{}).Check(t.Context(), f, fsck.Options{Plan: plan}, col); err != nil {
			t.Fatal(err)
		}
		rep := col.Sum(fsck.Stats{})
		if n, err := plan.Size(); err != nil || n > c.clusters*cs+c.most {
			t.Fatalf("%s: an image of %d bytes would get %d, %v", c.name, c.clusters*cs, n, err)
		}
		lost := int64(0)
		for _, r := range lostOf(rep) {
			lost += r
		}
		if want := c.named * int64(c.each) * cs; lost != want {
			t.Errorf("%s: %d bytes are named as in doubt, want %d", c.name, lost, want)
		}
		if c.named > 1 {
			continue // as many bytes in memory
		}
		reps := repair(t, f, fsck.Options{}, fsck.DecideAll, nil)
		if last := reps[len(reps)-1]; last.Worst() > fsck.Note {
			t.Errorf("%s: not clean\n%s", c.name, list(last))
		}
	}
}

func lostOf(rep *fsck.Report) (all []int64) {
	for _, f := range rep.Findings {
		if f.Fix != nil && f.Code == codeL2Duplicate {
			for _, r := range f.Fix.Loses {
				all = append(all, r.Len)
			}
		}
	}
	return all
}

// counting counts the bytes that are read.
type counting struct {
	backend.File
	n atomic.Int64
}

func (c *counting) ReadAt(p []byte, off int64) (int, error) {
	c.n.Add(int64(len(p)))
	return c.File.ReadAt(p, off)
}

// TestLeakedHole: a leak of many gigabytes that is a hole is not read to see
// whether anything is in it.
func TestLeakedHole(t *testing.T) {
	const clusters = 10_000 // 20 GB
	f := &counting{File: largeClusters(t, clusters, clusters, func(int) uint64 { return 0 })}
	rep := checkFile(t, f, fsck.Options{}, fsck.DecideAll, nil)
	if rep.Stats.LeakedClusters < clusters-10 {
		t.Fatalf("not leaked:\n%s", list(rep))
	}
	if n := f.n.Load(); n > 1<<30 {
		t.Errorf("%d bytes were read", n)
	}
	if rep := checkFile(t, f, fsck.Options{}, nil, nil); rep.Worst() > fsck.Note {
		t.Errorf("not clean:\n%s", list(rep))
	}
}

// TestSpreadOnce: a compressed cluster that was moved because too many share
// its cluster is left where it is now, although its sector count reached into
// the next cluster as well.
func TestSpreadOnce(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	f := openMem(t, damage.Qcow2Image(t, t.TempDir(), "narrow"))
	const cs, mask = 4096, 1<<58 - 1
	b := f.Bytes()
	l2 := int64(be64(b[be64(b[offL1Offset:]):]) & entryOffset)
	entry := func(k int64) int64 { return l2 + 8*k }
	host := int64(be64(b[entry(0):])&mask) / cs * cs
	for k := range int64(3) {
		from := int64(be64(b[entry(k):]) & mask)
		copy(b[host+k<<10:host+(k+1)<<10], append([]byte(nil), b[from:from+1<<10]...))
		sectors := uint64(1)
		if k == 2 {
			sectors = 4 // to behind the end of the cluster
		}
		binary.BigEndian.PutUint64(b[entry(k):], 1<<62|sectors<<58|uint64(host+k<<10))
	}
	// Something plain has the next cluster.
	plain := entry(1 << 20 / cs)
	copy(b[host+cs:host+2*cs], b[be64(b[plain:])&entryOffset:][:cs])
	binary.BigEndian.PutUint64(b[plain:], entryCopied|uint64(host+cs))
	f = backend.NewMemBytes("image", b)
	want, err := content(f.Clone(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	first := checkFile(t, f, fsck.Options{}, fsck.DecideAll, nil)
	spread := false
	for _, d := range first.Findings {
		spread = spread || d.Fixed && d.Code == codeRefTooNarrow
	}
	if !spread {
		t.Fatalf("nothing was moved:\n%s", list(first))
	}
	if rep := checkFile(t, f, fsck.Options{}, nil, nil); rep.Worst() > fsck.Note {
		t.Errorf("one round is not enough:\n%sthen\n%s", list(first), list(rep))
	}
	got, err := content(f, t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if at := differs(got, want, nil); at >= 0 {
		t.Errorf("content differs at %#x", at)
	}
}
