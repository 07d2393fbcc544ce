package ploopfsck_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/fsck/ploopfsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
)

var checker = ploopfsck.Checker{}

// memLost is a LostStore in memory.
type memLost map[string]*backend.Mem

func (m memLost) Create(name string) (backend.File, string, error) {
	for m[name] != nil {
		name += "+"
	}
	m[name] = backend.NewMem(name)
	return m[name], name, nil
}

func (m memLost) Remove(name string) error { delete(m, name); return nil }

func (m memLost) Sync() error { return nil }

// repair runs all rounds of a repair of f.
func repair(t testing.TB, c fsck.Checker, f backend.File, decide fsck.Decide, opt fsck.Options) (*fsck.Result, *backend.Mem, memLost) {
	t.Helper()
	undo, lost := backend.NewMem("undo"), memLost{}
	res, err := fsck.Repair(context.Background(), c, f, fsck.RepairOptions{
		Options: opt, Decide: decide,
		Undo:    func() (backend.File, error) { return undo, nil },
		Execute: fsck.ExecuteOptions{Name: "image", Lost: lost},
	})
	if err != nil {
		t.Fatal(err)
	}
	return res, undo, lost
}

// stateOf sums up a report.
func stateOf(r *fsck.Report) damage.State {
	switch r.Worst() {
	case fsck.Fatal:
		return damage.Fatal
	case fsck.Damage:
		return damage.Damaged
	case fsck.Leak:
		return damage.Leaks
	}
	return damage.Clean
}

// show logs a report.
func show(t testing.TB, what string, r *fsck.Report) {
	t.Helper()
	for _, d := range r.Findings {
		fix := "-"
		if d.Fix != nil {
			fix = d.Fix.Level.String() + ": " + d.Fix.Text
		}
		t.Logf("%s: %s %s %s: %s (%s; fixed %v) %v", what, d.Sev(), d.Code, d.Place, d.Text, fix, d.Fixed, d.Guest)
	}
}

func has(r *fsck.Report, code string) bool {
	for _, n := range r.Counts {
		if n.Code.Name == code {
			return true
		}
	}
	return false
}

// open opens a file of the host and closes it in the end.
func openFile(t testing.TB, path string, writable bool) backend.File {
	t.Helper()
	f, err := backend.Open(path, backend.Options{Writable: writable})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // a second Close is harmless
	return f
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// copyOf copies an image with its holes.
func copyOf(t testing.TB, path string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy.hds")
	imgtest.Run(t, "cp", "--sparse=never", path, to)
	if src, dst := openFile(t, path, false), openFile(t, to, true); true {
		// cp cannot copy holes exactly.
		size, err := src.Size()
		if err != nil {
			t.Fatal(err)
		}
		for at := int64(0); at < size; {
			hole, err := src.SeekHole(at)
			if err != nil || hole >= size {
				break
			}
			data, err := src.SeekData(hole)
			if err != nil {
				data = size
			}
			if err := dst.PunchHole(hole, data-hole); err != nil {
				t.Fatal(err)
			}
			at = data
		}
	}
	return to
}

// guestOf is what the image shows alone; what is not mapped reads as zeros.
func guestOf(t testing.TB, f backend.File) []byte {
	t.Helper()
	ctx := context.Background()
	i, err := ploop.Open(ctx, f, layers.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, i.Size())
	buf := make([]blockmap.Extent, 0, 16)
	for pos := int64(0); pos < i.Size(); {
		ext, err := i.Lookup(ctx, pos, i.Size()-pos, buf)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range ext {
			if e.Kind == blockmap.Data {
				if _, err := f.ReadAt(p[e.Guest:e.End()], e.Host); err != nil {
					t.Fatal(err)
				}
			}
			pos = e.End()
		}
	}
	return p
}

// sameOutside compares outside the ranges.
func sameOutside(t testing.TB, got, want []byte, lost []blockmap.Range) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("a disk of %d bytes, want %d", len(got), len(want))
	}
	got, want = bytes.Clone(got), bytes.Clone(want)
	for _, r := range lost {
		clear(got[r.Off:r.End()])
		clear(want[r.Off:r.End()])
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("content differs at %#x, which was not named as lost", i)
		}
	}
}

// lostIn are the ranges that the repair named as lost.
func lostIn(r *fsck.Result) (all []blockmap.Range) {
	for _, rep := range append([]*fsck.Report{r.Found}, r.Later...) {
		for _, d := range rep.Findings {
			if d.Fixed {
				all = append(all, d.Fix.Loses...)
			}
		}
	}
	return all
}

func covers(all []blockmap.Range, want blockmap.Range) bool {
	var s blockmap.Set
	for _, r := range all {
		s.Add(r.Off, r.Len)
	}
	return s.Contains(want.Off, want.Len)
}

// TestDamage runs every case through check, preen, full repair, undo, and the
// other checkers.
func TestDamage(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	imgtest.RequirePloop(t)
	for _, d := range damage.Ploop() {
		t.Run(d.Name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := d.Build(t, dir)
			before := readFile(t, path)

			// A check writes nothing, and finds it.
			rep, err := fsck.CheckFile(context.Background(), openFile(t, path, false), "ploop")
			if err != nil {
				t.Fatal(err)
			}
			for _, code := range d.Codes {
				if !has(rep, code) {
					t.Errorf("%s is not found", code)
				}
			}
			show(t, "check", rep)
			if !bytes.Equal(readFile(t, path), before) {
				t.Fatal("the check changed the image")
			}

			// What the others say.
			for _, o := range []struct {
				name string
				want int
				run  func(testing.TB, string) (int, string)
			}{
				{"qemu-img check", d.Foreign, func(t testing.TB, p string) (int, string) { return imgtest.QemuCheck(t, p, "ploop") }},
				{"ploop check", d.Tool, imgtest.PloopCheck},
			} {
				if o.want < 0 {
					continue
				}
				if exit, out := o.run(t, copyOf(t, path)); exit != o.want {
					t.Errorf("%s before: exit %d, recorded was %d\n%s", o.name, exit, o.want, out)
				}
			}

			undone := func(f backend.File, undo backend.File, res *fsck.Result) {
				t.Helper()
				if !res.Changed {
					return
				}
				if _, err := fsck.ApplyUndo(context.Background(), undo, f, fsck.UndoOptions{}); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(readFile(t, f.Name()), before) {
					t.Error("undo does not restore the image")
				}
			}

			// -p
			f := openFile(t, copyOf(t, path), true)
			res, undo, _ := repair(t, checker, f, fsck.DecidePreen, fsck.Options{})
			if got := stateOf(res.Left); got != d.Preen {
				show(t, "after preen", res.Left)
				t.Errorf("after preen: %v, want %v", got, d.Preen)
			}
			if l := lostIn(res); len(l) > 0 {
				t.Errorf("preen lost %v", l)
			}
			if d.Preen == damage.Clean {
				sameOutside(t, guestOf(t, f), readFile(t, damage.Original(dir)), d.Lost)
			}
			undone(f, undo, res)

			// -y
			f = openFile(t, copyOf(t, path), true)
			res, undo, _ = repair(t, checker, f, fsck.DecideAll, fsck.Options{})
			if got := stateOf(res.Left); got != d.Full {
				show(t, "after full", res.Left)
				t.Errorf("after full: %v, want %v", got, d.Full)
			}
			if d.Full == damage.Clean {
				sameOutside(t, guestOf(t, f), readFile(t, damage.Original(dir)), d.Lost)
				for _, l := range lostIn(res) {
					if !covers(d.Lost, l) {
						t.Errorf("%v was named as lost needlessly", l)
					}
				}
				if exit, out := imgtest.QemuCheck(t, f.Name(), "ploop"); exit != 0 && !d.Extension {
					t.Errorf("qemu-img check after: exit %d\n%s", exit, out)
				}
				if exit, out := imgtest.PloopCheck(t, copyOf(t, f.Name())); exit != 0 && !d.Extension {
					t.Errorf("ploop check after: exit %d\n%s", exit, out)
				}
			}
			undone(f, undo, res)
		})
	}
}
