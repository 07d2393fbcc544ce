package ploopfsck_test

import (
	"encoding/binary"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

// TestManyClaims: a few entries that name each of very many clusters do not
// make a repair that fills the host.
func TestManyClaims(t *testing.T) {
	const k, slots, each = 1 << 20, 200, 16
	p := damage.NewPloop(2, k, slots*each).Put32(52, 0)
	for i := range slots * each {
		p.SetEntry(i, len(p.B)/k+i/each)
	}
	f := backend.NewMemBytes("image", p.B)
	size := int64(len(p.B) + slots*k)
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	plan, err := fsck.NewPlan(f, fsck.PlanOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer plan.Close()
	col := fsck.NewCollector(fsck.CollectorOptions{Decide: fsck.DecideAll})
	stats, err := checker.Check(t.Context(), f, fsck.Options{Plan: plan}, col)
	if err != nil {
		t.Fatal(err)
	}
	if rep := col.Sum(stats); !has(rep, "ploop.bat.duplicate") {
		show(t, "check", rep)
		t.Fatal("not found")
	}
	n, err := plan.Size()
	if err != nil || n > size+1<<30 || n < size+1<<29 {
		t.Errorf("an image of %d bytes would get %d, %v", size, n, err)
	}
}

// TestManyRuns: what is cut off is in lost+found before, in however many pieces
// it lies between holes, and in the round that cuts.
func TestManyRuns(t *testing.T) {
	const k, runs = 64 << 10, 5000
	for _, suspect := range []bool{false, true} {
		p := damage.NewPloop(2, k, 16, 0, 3)
		if suspect {
			p.SetEntry(5, 1<<20)
		}
		f := backend.NewMemBytes("image", p.B)
		end := int64(len(p.B))
		for i := range int64(runs) {
			b := binary.LittleEndian.AppendUint64([]byte("a page: "), uint64(i))
			if _, err := f.WriteAt(b, end+i*2*backend.MemPage); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Truncate(end + runs*2*backend.MemPage/k*k + k); err != nil {
			t.Fatal(err)
		}
		res, _, lost := repair(t, checker, f, fsck.DecideAll, fsck.Options{})
		if n, err := f.Size(); err != nil || n != end || res.Left.Worst() > fsck.Note {
			show(t, "left", res.Left)
			t.Errorf("%d bytes, want %d, %v", n, end, err)
		}
		found := map[uint64]bool{}
		for _, l := range lost {
			for b := l.Bytes(); len(b) >= backend.MemPage; b = b[backend.MemPage:] {
				if string(b[:8]) == "a page: " {
					found[binary.LittleEndian.Uint64(b[8:])] = true
				}
			}
		}
		if len(found) != runs {
			t.Errorf("suspect %t: %d pages of %d are in lost+found", suspect, len(found), runs)
		}
	}
}
