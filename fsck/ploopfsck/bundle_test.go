package ploopfsck_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers/open"
)

// forks keeps other programs from being started while a lock is held: the
// child has it too, until it has become the other program.
var forks sync.RWMutex

// runOn checks, or repairs, the bundle in dir.
func runOn(t testing.TB, dir string, decide fsck.Decide) (res *fsck.ImageResult) {
	t.Helper()
	forks.RLock()
	defer forks.RUnlock()
	fsck.Run(context.Background(), []string{dir}, fsck.RunOptions{Decide: decide}, func(r *fsck.ImageResult) { res = r })
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	for i := range res.Files {
		if err := res.Files[i].Err; err != nil {
			t.Fatalf("%s: %v", res.Files[i].Path, err)
		}
	}
	return res
}

// stateOfAll sums up what is left of a bundle; first is what was found.
func stateOfAll(res *fsck.ImageResult) (left damage.State, codes map[string]bool, texts string) {
	codes = map[string]bool{}
	see := func(r *fsck.Report) {
		for _, d := range r.Findings {
			codes[d.Code.Name] = true
			texts += d.Text + "\n"
		}
	}
	worse := func(r *fsck.Report) { left = max(left, stateOf(r)) }
	for i := range res.Files {
		if r := res.Files[i].Result; r != nil {
			see(r.Found)
			worse(r.Left)
		}
	}
	if res.Stack != nil {
		see(res.Stack)
		worse(res.Stack)
	}
	return left, codes, texts
}

func showAll(t testing.TB, res *fsck.ImageResult) {
	t.Helper()
	for i := range res.Files {
		show(t, "found", res.Files[i].Found)
		for _, r := range res.Files[i].Later {
			show(t, "later", r)
		}
		show(t, "left", res.Files[i].Left)
	}
	if res.Stack != nil {
		show(t, "stack", res.Stack)
	}
}

// files are the contents of a directory.
func files(t testing.TB, dir string) map[string]string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, e := range list {
		if e.Type().IsRegular() && !strings.HasSuffix(e.Name(), ".lck") {
			all[e.Name()] = string(readFile(t, filepath.Join(dir, e.Name())))
		}
	}
	return all
}

// showsDisk is what the current state of a bundle shows.
func showsDisk(t testing.TB, dir string) []byte {
	t.Helper()
	forks.RLock()
	defer forks.RUnlock()
	s, err := open.Open(context.Background(), dir, open.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b := make([]byte, s.Size())
	if _, err := s.ReadAt(context.Background(), b, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return b
}

// undoAll takes back what a run has done.
func undoAll(t testing.TB, res *fsck.ImageResult) {
	t.Helper()
	for i := range res.Files {
		f := &res.Files[i]
		if f.Undo == "" {
			continue
		}
		u, err := backend.Open(f.Undo, backend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		img, err := backend.Open(f.Path, backend.Options{Writable: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fsck.ApplyUndo(context.Background(), u, img, fsck.UndoOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(u.Close(), img.Close(), os.Remove(f.Undo)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBundles: every case is found, repaired as far as it can be, accepted by
// ploop's own tools, and taken back.
func TestBundles(t *testing.T) {
	imgtest.RequirePloop(t)
	for _, d := range damage.Bundles() {
		t.Run(d.Name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "disk.hdd")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			damage.WriteBundle(t, dir)
			want := readFile(t, damage.Original(filepath.Dir(dir)))
			d.Hurt(t, dir)
			before := files(t, dir)

			res := runOn(t, dir, nil)
			left, codes, texts := stateOfAll(res)
			for _, c := range d.Codes {
				if !codes[c] {
					t.Errorf("%s is not found", c)
				}
			}
			for i := range res.Files {
				show(t, "check", res.Files[i].Found)
			}
			if clean := len(d.Codes) == 0; clean && left != damage.Clean {
				t.Error("a sound bundle has findings")
			}
			if !strings.Contains(texts, d.Remedy) {
				t.Errorf("%q is not said", d.Remedy)
			}
			same(t, "a check", files(t, dir), before)

			res = runOn(t, dir, fsck.DecidePreen)
			if left, _, _ = stateOfAll(res); left != d.Preen {
				showAll(t, res)
				t.Errorf("after preen: %v, want %v", left, d.Preen)
			}
			if left == damage.Clean {
				compareDisk(t, showsDisk(t, dir), want, d)
			}
			undoAll(t, res)
			same(t, "undo after preen", files(t, dir), before)

			res = runOn(t, dir, fsck.DecideAll)
			if left, _, _ = stateOfAll(res); left != d.Full {
				showAll(t, res)
				t.Errorf("after full: %v, want %v", left, d.Full)
			}
			if left == damage.Clean {
				compareDisk(t, showsDisk(t, dir), want, d)
				xml := string(readFile(t, filepath.Join(dir, "DiskDescriptor.xml")))
				for _, kept := range []string{"<!-- a comment, & nothing more -->", `<Miscellaneous   Unknown="yes"/>`, "<![CDATA[<kept>]]>", "Version='1.0' >"} {
					if !strings.Contains(xml, kept) {
						t.Errorf("%s is gone:\n%s", kept, xml)
					}
				}
				for i := range res.Files {
					for _, r := range append([]*fsck.Report{res.Files[i].Found}, res.Files[i].Later...) {
						for _, f := range r.Findings {
							for _, l := range lostOf(f) {
								if !covers(d.Lost, l) {
									t.Errorf("%v was named as lost needlessly", l)
								}
							}
						}
					}
				}
				again := runOn(t, dir, nil)
				if left, _, _ := stateOfAll(again); left != damage.Clean {
					t.Error("the second run is not clean")
				}
				forks.Lock()
				defer forks.Unlock()
				copyDir := filepath.Join(t.TempDir(), "copy.hdd")
				imgtest.Run(t, "cp", "-r", dir, copyDir)
				if exit, out := imgtest.Ploop(t, "check", filepath.Join(copyDir, "DiskDescriptor.xml")); exit != 0 {
					t.Errorf("ploop check: %d %s", exit, out)
				}
			}
			undoAll(t, res)
			same(t, "undo after full", files(t, dir), before)
		})
	}
}

func lostOf(d fsck.Detail) []blockmap.Range {
	if !d.Fixed {
		return nil
	}
	return d.Fix.Loses
}

// compareDisk compares as far as nothing was to be lost; a disk may have become
// shorter only by that.
func compareDisk(t testing.TB, got, want []byte, d damage.BundleDamage) {
	t.Helper()
	n := min(len(got), len(want))
	for _, l := range d.Lost {
		n = min(n, int(l.Off))
	}
	if n == 0 || !bytes.Equal(got[:n], want[:n]) || len(got) < len(want) && len(d.Lost) == 0 {
		t.Errorf("the disk shows something else (%d bytes of %d)", len(got), len(want))
	}
}

func same(t testing.TB, what string, got, want map[string]string) {
	t.Helper()
	for name, b := range want {
		if got[name] != b {
			t.Errorf("%s: %s is not as it was", what, name)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: %s is left behind", what, name)
		}
	}
}
