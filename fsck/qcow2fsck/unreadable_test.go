package qcow2fsck

import (
	"errors"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

// broken is a file of which a range cannot be read.
type broken struct {
	*backend.Mem
	off, n int64
}

func (b *broken) ReadAt(p []byte, off int64) (int, error) {
	if off < b.off+b.n && b.off < off+int64(len(p)) {
		return 0, errors.New("medium error")
	}
	return b.Mem.ReadAt(p, off)
}

// TestUnreadable: what a table that cannot be read may refer to is not freed.
func TestUnreadable(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	mem := openMem(t, damage.Qcow2Image(t, dir, "v3"))
	head := make([]byte, 8)
	for _, entry := range []int64{0, 1} {
		if _, err := mem.ReadAt(head, offL1Offset); err != nil {
			t.Fatal(err)
		}
		l1 := int64(be64(head))
		if _, err := mem.ReadAt(head, l1+8*entry); err != nil {
			t.Fatal(err)
		}
		f := &broken{mem.Clone(), int64(be64(head) & entryOffset), 4096}
		before := f.Hash()
		plan, err := fsck.NewPlan(f, fsck.PlanOptions{})
		if err != nil {
			t.Fatal(err)
		}
		o := options(dir)
		o.Plan = plan
		col := fsck.NewCollector(fsck.CollectorOptions{Decide: fsck.DecideAll})
		stats, err := Checker{}.Check(t.Context(), f, o, col)
		if err != nil {
			t.Fatal(err)
		}
		rep := col.Sum(stats)
		if stats.CheckErrors == 0 || stats.LeakedClusters == 0 || rep.Remaining() < fsck.Damage {
			t.Errorf("%d errors, %d leaks:\n%s", stats.CheckErrors, stats.LeakedClusters, list(rep))
		}
		if !plan.Empty() || f.Hash() != before {
			t.Errorf("something was to be repaired:\n%s", list(rep))
		}
		plan.Close()
	}
}

// TestMapGone: when the L1 table has become zeros, which is a valid one, the
// disk looks like leaks; -p does not free it, and -y keeps it.
func TestMapGone(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	f := openMem(t, damage.Qcow2Image(t, dir, "v3"))
	head := make([]byte, 8)
	if _, err := f.ReadAt(head, offL1Offset); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 4096), int64(be64(head))); err != nil {
		t.Fatal(err)
	}
	before := f.Hash()
	reps := repair(t, f, options(dir), fsck.DecidePreen, nil)
	if f.Hash() != before || reps[0].Worst() != fsck.Leak {
		t.Errorf("-p has freed the disk:\n%s", list(reps[0]))
	}
	plan, err := fsck.NewPlan(f, fsck.PlanOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer plan.Close()
	o := options(dir)
	o.Plan = plan
	if _, err := (Checker{}).Check(t.Context(), f, o, fsck.NewCollector(fsck.CollectorOptions{Decide: fsck.DecideAll})); err != nil {
		t.Fatal(err)
	}
	store := &memory{files: map[string]*backend.Mem{}}
	if _, err := plan.Execute(t.Context(), fsck.ExecuteOptions{Undo: backend.NewMem("undo"), Lost: store}); err != nil {
		t.Fatal(err)
	}
	var kept int64
	for _, l := range store.files {
		kept += int64(len(l.Bytes()))
	}
	if kept < 2<<20 {
		t.Errorf("only %d bytes are kept", kept)
	}
}
