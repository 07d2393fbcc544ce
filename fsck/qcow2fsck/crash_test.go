package qcow2fsck

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

func damageNamed(t testing.TB, name string) damage.Damage {
	t.Helper()
	all := damage.Qcow2()
	i := slices.IndexFunc(all, func(d damage.Damage) bool { return d.Name == name })
	if i < 0 {
		t.Fatalf("no damage %q", name)
	}
	return all[i]
}

// TestCrash cuts the power at every moment of some repairs: what is left can
// be repaired to the same content, and undone.
func TestCrash(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, name := range []string{"reftable-offset-0", "l2-duplicate", "block-zeros", "snapshot-extra-0", "l2-several", "bitmaps-stale"} {
		t.Run(name, func(t *testing.T) {
			d := damageNamed(t, name)
			dir := t.TempDir()
			damaged := openMem(t, d.Build(t, dir))
			original, err := os.ReadFile(damage.Original(dir))
			if err != nil {
				t.Fatal(err)
			}
			rec := backend.NewRecorder()
			f, err := rec.Wrap(damaged.Clone())
			if err != nil {
				t.Fatal(err)
			}
			undo, err := rec.Wrap(backend.NewMem("undo"))
			if err != nil {
				t.Fatal(err)
			}
			checkFile(t, f, options(dir), fsck.DecideAll, undo)
			n := 0
			for s := range rec.States(backend.StateOptions{Exhaustive: 3, Random: 4, MaxPerEpoch: 10, Seed: 1}) {
				n++
				img, undo := s.Files[0], s.Files[1]
				undone := img.Clone()
				if undone.Hash() != damaged.Hash() {
					if _, err := fsck.ApplyUndo(context.Background(), undo.Clone(), undone, fsck.UndoOptions{}); err != nil {
						t.Fatalf("%v: undo: %v", s, err)
					}
					if !bytes.Equal(undone.Bytes(), damaged.Bytes()) {
						t.Fatalf("%v: undo does not restore the image", s)
					}
				}
				reps := repair(t, img, options(dir), fsck.DecideAll, nil)
				if last := reps[len(reps)-1]; last.Worst() > fsck.Note {
					t.Fatalf("%v: not clean after the second repair\n%s", s, list(last))
				}
				got, err := content(img, dir, nil)
				if err != nil {
					t.Fatalf("%v: %v", s, err)
				}
				if at := differs(got, original, append(slices.Clone(d.Lost), lost(reps)...)); at >= 0 {
					t.Fatalf("%v: content differs at %#x\n%s", s, at, list(reps[0]))
				}
			}
			if n < 5 {
				t.Errorf("only %d states", n)
			}
		})
	}
}

// TestFullDisk repairs images that cannot become longer: what is free or
// leaked inside has to do.
func TestFullDisk(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, name := range []string{"reftable-0", "reftable-offset-0", "reftable-unaligned", "l2-duplicate"} {
		t.Run(name, func(t *testing.T) {
			d := damageNamed(t, name)
			dir := t.TempDir()
			f := openMem(t, d.Build(t, dir))
			// Some leaks in the middle are all the room there is.
			checkSize, err := f.Size()
			if err != nil {
				t.Fatal(err)
			}
			be := make([]byte, 8)
			if _, err := f.ReadAt(be, offL1Offset); err != nil {
				t.Fatal(err)
			}
			l1 := int64(be64(be))
			if _, err := f.ReadAt(be, l1+8*3); err != nil {
				t.Fatal(err)
			}
			table := int64(be64(be) & entryOffset)
			if _, err := f.WriteAt(make([]byte, 4096), table); err != nil {
				t.Fatal(err)
			}
			ctx := context.Background()
			for round := range 3 {
				plan, err := fsck.NewPlan(f, fsck.PlanOptions{MaxSize: checkSize})
				if err != nil {
					t.Fatal(err)
				}
				o := options(dir)
				o.Plan = plan
				col := fsck.NewCollector(fsck.CollectorOptions{Decide: fsck.DecideAll})
				stats, err := Checker{}.Check(ctx, f, o, col)
				if err != nil {
					t.Fatalf("round %d: %v\n%s", round, err, list(col.Sum(stats)))
				}
				if plan.Empty() {
					break
				}
				if _, err := plan.Execute(ctx, fsck.ExecuteOptions{Undo: backend.NewMem("undo"), Lost: &memory{files: map[string]*backend.Mem{}}}); err != nil {
					t.Fatal(err)
				}
			}
			if rep := checkFile(t, f, options(dir), nil, nil); rep.Worst() > fsck.Note {
				t.Errorf("not clean:\n%s", list(rep))
			}
			if n, _ := f.Size(); n > checkSize {
				t.Errorf("the file has grown from %d to %d", checkSize, n)
			}
			if exit, out := qemuCheck(t, dir, f.Bytes()); exit != 0 {
				t.Errorf("qemu-img check: %d\n%s", exit, out)
			}
		})
	}
}

// TestGuestFree: the guest's word decides between two owners.
func TestGuestFree(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	d := damageNamed(t, "l2-duplicate")
	for _, which := range []int64{0, 16 << 12} {
		dir := t.TempDir()
		f := openMem(t, d.Build(t, dir))
		o := options(dir)
		o.GuestFree = func(off, n int64) bool { return off == which }
		reps := repair(t, f, o, fsck.DecideAll, nil)
		if last := reps[len(reps)-1]; last.Worst() > fsck.Note {
			t.Fatalf("not clean:\n%s", list(last))
		}
		if l := lost(reps); len(l) != 1 || l[0].Off != which || l[0].Len != 4096 {
			t.Errorf("%#x is free: lost %v", which, l)
		}
		got, err := content(f, dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[which:which+4096], make([]byte, 4096)) {
			t.Errorf("%#x does not read as zeros", which)
		}
	}
}

// TestDataFile: what is wrong with the external data file.
func TestDataFile(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, shape := range []string{"data", "raw"} {
		dir := t.TempDir()
		f := openMem(t, damage.Qcow2Image(t, dir, shape))
		if rep := checkFile(t, f, options(dir), nil, nil); len(rep.Counts) > 0 {
			t.Errorf("findings:\n%s", list(rep))
		}
		if err := os.Truncate(filepath.Join(dir, "image.data"), 6<<20); err != nil {
			t.Fatal(err)
		}
		if rep := checkFile(t, f, options(dir), nil, nil); len(rep.Counts) != 1 || rep.Counts[0].Code != codeDataShort {
			t.Errorf("short data file:\n%s", list(rep))
		}
		o := options(dir)
		o.OpenFile = func(string) (backend.File, error) { return nil, fs.ErrPermission }
		if rep := checkFile(t, f, o, nil, nil); len(rep.Counts) != 1 || rep.Counts[0].Code != codeDataMissing || rep.Worst() != fsck.Note {
			t.Errorf("data file without permission:\n%s", list(rep))
		}
	}
}

// TestEditor: what our own editor leaves has no findings either.
func TestEditor(t *testing.T) {
	ctx := context.Background()
	for _, o := range []qcow2.CreateOptions{
		{Size: 16 << 20}, {Size: 4 << 20, ClusterSize: 512}, {Size: 16 << 20, Version: 2}, {Size: 16 << 20, ClusterSize: 16 << 10, ExtendedL2: true},
		{Size: 16 << 20, RefcountBits: 1, ClusterSize: 4096}, {Size: 16 << 20, LazyRefcounts: true}, {Size: 1 << 40, RefcountBits: 64},
	} {
		f := backend.NewMem("image")
		if err := qcow2.Create(ctx, f, o); err != nil {
			t.Fatal(err)
		}
		img, err := qcow2.Open(ctx, f, layers.OpenOptions{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		stack, err := layers.NewStack([]layers.Layer{img}, layers.StackOptions{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		for i := range int64(40) {
			if _, err := stack.WriteAt(ctx, imgtest.PatternBytes(uint64(i), 0, 7000), i*97_001); err != nil {
				t.Fatal(err)
			}
			if i%3 == 0 {
				if err := stack.ZeroAt(ctx, i*50_000&^511, 64<<10, i%2 == 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := stack.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		if rep := checkFile(t, f, fsck.Options{Data: true}, nil, nil); rep.Worst() > fsck.Note {
			t.Errorf("%+v:\n%s", o, list(rep))
		}
	}
}
