package ploopfsck_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

// TestRepairCutShort: whatever a power cut leaves of a repair can be undone,
// once the undo file is complete, and repaired.
func TestRepairCutShort(t *testing.T) {
	for _, d := range damage.Ploop() {
		switch d.Name {
		case "header/cluster doubled", "bat/duplicate v1", "bat/five owners", "bat/several at once", "bat/behind the disk",
			"file/last cluster cut off", "file/leak inside", "file/leak at the end, ragged", "extension/checksum":
		default:
			continue
		}
		t.Run(d.Name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			before := readFile(t, d.Build(t, dir))
			original := readFile(t, damage.Original(dir))
			rec := backend.NewRecorder()
			f, err := rec.Wrap(backend.NewMemBytes("image", before))
			if err != nil {
				t.Fatal(err)
			}
			undo, err := rec.Wrap(backend.NewMem("undo"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := fsck.Repair(context.Background(), checker, f, fsck.RepairOptions{
				Decide: fsck.DecideAll, Undo: func() (backend.File, error) { return undo, nil },
				Execute: fsck.ExecuteOptions{Lost: memLost{}},
			}); err != nil {
				t.Fatal(err)
			}
			undone, changed := 0, 0
			for s := range rec.States(backend.StateOptions{Exhaustive: 5, Random: 20, MaxPerEpoch: 10}) {
				img, undo := s.Files[0], s.Files[1]
				again := img.Clone()
				if !bytes.Equal(img.Bytes(), before) {
					changed++
				}
				switch _, err := fsck.ApplyUndo(context.Background(), undo, img, fsck.UndoOptions{}); {
				case errors.Is(err, fsck.ErrNothingToUndo):
				case err != nil:
					t.Fatalf("%s: undo: %v", s, err)
				default:
					undone++
				}
				if !bytes.Equal(img.Bytes(), before) {
					t.Fatalf("%s: not what it was", s)
				}
				res, _, _ := repair(t, checker, again, fsck.DecideAll, fsck.Options{})
				if res.Left.Worst() > fsck.Note {
					show(t, "left", res.Left)
					t.Fatalf("%s: not clean after another repair", s)
				}
				sameOutside(t, guestOf(t, again), original, d.Lost)
			}
			if undone < 3 || changed < 2 {
				t.Errorf("too few states: %d undone, %d changed", undone, changed)
			}
		})
	}
}

// TestNoRoom: the file cannot grow (a block device). Nothing is made worse,
// and what could not be done is still reported.
func TestNoRoom(t *testing.T) {
	p := damage.NewPloop(2, 64<<10, 16, 0, 3, 4).SetEntry(4, 2)
	f := backend.NewMemBytes("image", p.B)
	undo := backend.NewMem("undo")
	res, err := fsck.Repair(context.Background(), checker, f, fsck.RepairOptions{
		Decide: fsck.DecideAll, Undo: func() (backend.File, error) { return undo, nil },
		Execute: fsck.ExecuteOptions{Lost: memLost{}},
		Plan:    fsck.PlanOptions{MaxSize: int64(len(p.B))},
	})
	if err != nil {
		t.Fatal(err)
	}
	if res.Left == nil || !has(res.Left, "ploop.bat.duplicate") {
		t.Error("the duplicate is not reported")
	}
	if len(res.Later) > 0 {
		t.Error("repaired in vain")
	}
	if !bytes.Equal(f.Bytes(), p.B) {
		t.Error("the image was changed")
	}
}

// TestEvidence: what the guest proves not to use gives way, and nothing is
// lost.
func TestEvidence(t *testing.T) {
	const k = 64 << 10
	p := damage.NewPloop(2, k, 16, 0, 3, 4)
	want := p.Guest()
	p.SetEntry(9, 2).SetEntry(10, 2)
	f := backend.NewMemBytes("image", p.B)
	res, _, _ := repair(t, checker, f, fsck.DecideAll, fsck.Options{GuestFree: func(off, n int64) bool { return off != 3*k }})
	if res.Left.Worst() > fsck.Note || len(lostIn(res)) > 0 {
		show(t, "left", res.Left)
		t.Errorf("left %v, lost %v", res.Left.Worst(), lostIn(res))
	}
	sameOutside(t, guestOf(t, f), want, nil)
	if size, _ := f.Size(); size != int64(len(p.B)) {
		t.Errorf("the file grew to %d", size)
	}
	// Nobody uses it: the first keeps it.
	f = backend.NewMemBytes("image", p.B)
	res, _, _ = repair(t, checker, f, fsck.DecideAll, fsck.Options{GuestFree: func(int64, int64) bool { return true }})
	if res.Left.Worst() > fsck.Note {
		t.Error("not clean")
	}
	sameOutside(t, guestOf(t, f), want, nil)
}

// TestExtensionEvidence: an entry that claims a cluster of the format extension
// for a part of the disk that the guest does not use gives way, and nothing is
// lost; else the extension does, and the range is named.
func TestExtensionEvidence(t *testing.T) {
	const k = 64 << 10
	for _, free := range []bool{true, false} {
		p := damage.NewPloop(2, k, 16, 0, 3, 4).AddExtension()
		want := p.Guest()
		p.SetEntry(9, 4).SetEntry(11, 5) // the extension, and its bits
		f := backend.NewMemBytes("image", p.B)
		res, _, lost := repair(t, checker, f, fsck.DecideAll, fsck.Options{GuestFree: func(off, _ int64) bool { return free && off >= 5*k }})
		if res.Left.Worst() > fsck.Note {
			show(t, "left", res.Left)
			t.Fatal("not clean")
		}
		there := le32(f.Bytes()[56:]) != 0
		if there != free {
			t.Errorf("free %v: the extension is there: %v", free, there)
		}
		gone := lostIn(res)
		if free {
			if len(gone) > 0 || len(lost) > 0 {
				t.Errorf("lost %v, kept %d", gone, len(lost))
			}
			sameOutside(t, guestOf(t, f), want, nil)
			continue
		}
		for _, idx := range []int64{9, 11} {
			if !covers(gone, blockmap.Range{Off: idx * k, Len: k}) {
				t.Errorf("cluster %d is not named as lost: %v", idx, gone)
			}
		}
		if len(lost) == 0 {
			t.Error("the extension is not in lost+found")
		}
		sameOutside(t, guestOf(t, f), want, gone)
	}
}

// TestParent: over a parent a lost entry reads as zeros and not as the parent.
func TestParent(t *testing.T) {
	const k = 64 << 10
	for _, version := range []int{1, 2} {
		p := damage.NewPloop(version, k, 16, 0, 3, 4)
		want := p.Guest()
		clear(want[3*k : 4*k])
		p.Put32(64+4*3, 0xffff0000)
		f := backend.NewMemBytes("image", p.B)
		res, _, lost := repair(t, checker, f, fsck.DecideAll, fsck.Options{Parent: true})
		if res.Left.Worst() > fsck.Note {
			show(t, "left", res.Left)
			t.Error("not clean")
		}
		b := f.Bytes()
		if b[64+4*3] == 0 && b[64+4*3+1] == 0 {
			t.Error("the entry is empty")
		}
		sameOutside(t, guestOf(t, f), want, nil)
		// What it had lost is kept.
		found := false
		for _, l := range lost {
			found = found || bytes.Contains(l.Bytes(), p.B[2*k:3*k])
		}
		if !found {
			t.Error("the cluster that nothing refers to any more is not in lost+found")
		}
	}
}

// TestLostClusterIsKept: a damaged entry, then repair: its cluster is a leak
// afterwards, which must not be given back unsaved; and not at all by -p.
func TestLostClusterIsKept(t *testing.T) {
	const k = 64 << 10
	p := damage.NewPloop(2, k, 16, 0, 3, 4, 15).Put32(64+4*15, 4000)
	f := backend.NewMemBytes("image", p.B)
	if res, _, _ := repair(t, checker, f, fsck.DecidePreen, fsck.Options{}); res.Left.Worst() != fsck.Damage || !bytes.Equal(f.Bytes(), p.B) {
		t.Error("-p changed an image of which an entry is in doubt")
	}
	res, _, lost := repair(t, checker, f, fsck.DecideAll, fsck.Options{})
	if res.Left.Worst() > fsck.Note {
		t.Error("not clean")
	}
	found := false
	for _, l := range lost {
		found = found || bytes.Equal(l.Bytes(), p.B[4*k:])
	}
	if !found {
		t.Error("the lost cluster is not in lost+found")
	}
	if size, _ := f.Size(); size != 4*k {
		t.Errorf("the file has %d bytes", size)
	}
}

// TestLostBATIsNotGivenBack: a BAT of zeros is a valid one, and then the whole
// disk looks like leaks. -p leaves it alone, -y keeps the content.
func TestLostBATIsNotGivenBack(t *testing.T) {
	const k, n = 64 << 10, 40
	mapped := make([]int, n)
	for i := range mapped {
		mapped[i] = i
	}
	p := damage.NewPloop(2, k, n, mapped...)
	sound := bytes.Clone(p.B)
	clear(p.B[64 : 64+4*n])
	f := backend.NewMemBytes("image", p.B)
	res, _, _ := repair(t, checker, f, fsck.DecidePreen, fsck.Options{})
	if size, _ := f.Size(); size != int64(len(sound)) || res.Left.Worst() != fsck.Leak {
		show(t, "after -p", res.Left)
		t.Errorf("-p left %d bytes of %d", size, len(sound))
	}
	_, _, lost := repair(t, checker, f, fsck.DecideAll, fsck.Options{})
	kept := 0
	for _, l := range lost {
		kept += len(l.Bytes())
	}
	if kept < n*k {
		t.Errorf("-y kept %d bytes of %d", kept, n*k)
	}
}

// TestNeighbours: one bad entry in a row of good ones gets its cluster back.
func TestNeighbours(t *testing.T) {
	for version := 1; version <= 2; version++ {
		p := damage.NewPloop(version, 64<<10, 16, 2, 3, 4, 5)
		want := p.Guest()
		p.Put32(64+4*3, 0xfffffff1)
		f := backend.NewMemBytes("image", p.B)
		res, _, lost := repair(t, checker, f, fsck.DecideAll, fsck.Options{})
		if res.Left.Worst() > fsck.Note || len(lost) > 0 {
			show(t, "left", res.Left)
			t.Errorf("left %v, %d in lost+found", res.Left.Worst(), len(lost))
		}
		if l := lostIn(res); !covers(l, blockmap.Range{Off: 3 * 64 << 10, Len: 64 << 10}) {
			t.Errorf("the doubt is not named: %v", l)
		}
		sameOutside(t, guestOf(t, f), want, nil)
	}
}

// TestSectorLayout: an early Parallels image is refused, not repaired to
// death.
func TestSectorLayout(t *testing.T) {
	p := damage.NewPloop(1, 64<<10, 16, 0, 3, 4, 5, 6)
	for _, idx := range []int{0, 3, 4, 5, 6} {
		p.Put32(64+4*idx, uint32(idx+1)*128+1)
	}
	p.Append(3)
	f := backend.NewMemBytes("image", p.B)
	res, _, _ := repair(t, checker, f, fsck.DecideAll, fsck.Options{})
	if res.Left.Worst() != fsck.Fatal || !bytes.Equal(f.Bytes(), p.B) {
		t.Error("changed, or not fatal")
	}
}

// TestUnreadable: a place of the BAT that gives an I/O error is reported, and
// nothing is called unused.
func TestUnreadable(t *testing.T) {
	p := damage.NewPloop(2, 64<<10, 16, 0, 3, 4)
	p.Append(9)
	f := backend.NewFault(backend.NewMemBytes("image", p.B))
	f.Inject(backend.Rule{On: backend.OpRead, Nth: 2, Err: os.ErrClosed})
	r, err := fsck.CheckFile(context.Background(), f, "ploop")
	if err != nil {
		t.Fatal(err)
	}
	if !has(r, "ploop.io.unreadable") || has(r, "ploop.leak.tail") || r.Stats.CheckErrors == 0 {
		show(t, "found", r)
		t.Error("not reported, or too much")
	}
}
