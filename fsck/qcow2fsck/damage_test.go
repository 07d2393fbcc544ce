package qcow2fsck

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// content is the disk of an image as layers/qcow2 reads it, over base.
func content(f backend.File, dir string, base []byte) ([]byte, error) {
	ctx := context.Background()
	img, err := qcow2.Open(ctx, f, layers.OpenOptions{OpenFile: func(name string, _ bool) (backend.File, error) {
		return backend.Open(filepath.Join(dir, filepath.Base(name)), backend.Options{})
	}})
	if err != nil {
		return nil, err
	}
	out := make([]byte, img.Size())
	copy(out, base)
	cluster := make([]byte, img.Granule())
	buf := make([]blockmap.Extent, 0, 64)
	for pos := int64(0); pos < img.Size(); {
		got, err := img.Lookup(ctx, pos, img.Size()-pos, buf[:0])
		if err != nil {
			return nil, err
		}
		for _, e := range got {
			dst := out[e.Guest:e.End()]
			switch e.Kind {
			case blockmap.Zero:
				clear(dst)
			case blockmap.Data:
				clear(dst)
				if _, err := img.Data().ReadAt(dst, e.Host); err != nil && !errors.Is(err, io.EOF) {
					return nil, err
				}
			case blockmap.Packed:
				if err := img.Unpack(ctx, e, 0, cluster); err != nil {
					return nil, err
				}
				copy(dst, cluster[e.Guest%img.Granule():])
			}
			pos = e.End()
		}
	}
	return out, nil
}

// differs returns the first 512 bytes that differ outside of the ranges, -1 for none.
func differs(a, b []byte, except []blockmap.Range) int64 {
	var s blockmap.Set
	for _, r := range except {
		s.Add(r.Off, r.Len)
	}
	n := max(len(a), len(b))
	at := func(x []byte, i int) byte {
		if i < len(x) {
			return x[i]
		}
		return 0
	}
	for i := 0; i < n; i += 512 {
		if i+512 <= len(a) && i+512 <= len(b) && bytes.Equal(a[i:i+512], b[i:i+512]) {
			continue
		}
		for k := i; k < min(i+512, n); k++ {
			if at(a, k) != at(b, k) && !s.Contains(int64(k), 1) {
				return int64(k)
			}
		}
	}
	return -1
}

// state is what a report says.
func state(rep *fsck.Report) damage.State {
	switch rep.Worst() {
	case fsck.Fatal:
		return damage.Fatal
	case fsck.Damage:
		return damage.Damaged
	case fsck.Leak:
		return damage.Leaks
	}
	return damage.Clean
}

// lost are the ranges that the fixes of the reports lose.
func lost(reps []*fsck.Report) (all []blockmap.Range) {
	for _, r := range reps {
		for _, f := range r.Findings {
			if f.Fixed {
				all = append(all, f.Fix.Loses...)
			}
		}
	}
	return all
}

// TestDamage takes every kind of damage through check, -p, -y and undo.
func TestDamage(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, d := range damage.Qcow2() {
		t.Run(d.Name, func(t *testing.T) {
			dir := t.TempDir()
			img := d.Build(t, dir)
			original, err := os.ReadFile(damage.Original(dir))
			if err != nil {
				t.Fatal(err)
			}
			base, _ := os.ReadFile(filepath.Join(dir, "base.raw")) // only one shape has it
			o := options(dir)
			o.Data = d.Data
			damaged := openMem(t, img)
			if d.Foreign >= 0 {
				if exit, out := qemuCheck(t, dir, damaged.Bytes()); exit != d.Foreign {
					t.Errorf("qemu-img check before: %d, want %d\n%s", exit, d.Foreign, out)
				}
			}

			// -n finds it and writes nothing.
			f := damaged.Clone()
			rep := checkFile(t, f, o, nil, nil)
			for _, code := range d.Codes {
				if !slices.ContainsFunc(rep.Counts, func(n fsck.Count) bool { return n.Code.Name == code }) {
					t.Errorf("no finding %s:\n%s", code, list(rep))
				}
			}
			if f.Hash() != damaged.Hash() {
				t.Error("a check has written")
			}

			// -p.
			f = damaged.Clone()
			reps := repair(t, f, o, fsck.DecidePreen, nil)
			if l := lost(reps); len(l) > 0 {
				t.Errorf("-p loses %v", l)
			}
			if got := state(reps[len(reps)-1]); got != d.Preen {
				t.Errorf("after -p: %v, want %v:\n%s", got, d.Preen, list(reps[len(reps)-1]))
			}
			if d.Preen == damage.Clean {
				got, err := content(f, dir, base)
				if err != nil {
					t.Errorf("content after -p: %v", err)
				} else if at := differs(got, original, d.Lost); at >= 0 {
					t.Errorf("content after -p differs at %#x", at)
				}
			}

			// -y behind it, in little memory.
			if d.Preen == damage.Damaged && d.Full == damage.Clean {
				small := o
				small.Memory = 1
				reps := repair(t, f, small, fsck.DecideAll, nil)
				if last := reps[len(reps)-1]; state(last) != damage.Clean {
					t.Errorf("after -p and -y: %v\n%s", state(last), list(last))
				} else if got, err := content(f, dir, base); err != nil {
					t.Errorf("content after -p and -y: %v", err)
				} else if at := differs(got, original, d.Lost); at >= 0 {
					t.Errorf("content after -p and -y differs at %#x", at)
				}
			}

			// -y, in one round.
			f = damaged.Clone()
			undo := backend.NewMem("undo")
			reps = repair(t, f, o, fsck.DecideAll, undo)
			last := reps[len(reps)-1]
			if got := state(last); got != d.Full {
				t.Errorf("after -y: %v, want %v:\nfirst\n%slast\n%s", got, d.Full, list(reps[0]), list(last))
			} else if len(reps) > 2 {
				t.Errorf("%d rounds; the second:\n%s", len(reps)-1, list(reps[1]))
			}
			if d.Full == damage.Clean {
				got, err := content(f, dir, base)
				if err != nil {
					t.Errorf("content after -y: %v\n%s", err, list(reps[0]))
				} else {
					if at := differs(got, original, d.Lost); at >= 0 {
						t.Errorf("content after -y differs at %#x", at)
					}
					if at := differs(got, original, append(lost(reps), allowed(d)...)); at >= 0 {
						t.Errorf("content after -y differs at %#x, which is not named as lost\n%s", at, list(reps[0]))
					}
				}
				if exit, out := qemuCheck(t, dir, f.Bytes()); exit != 0 {
					t.Errorf("qemu-img check after -y: %d\n%s\nours:\n%s", exit, out, list(reps[0]))
				}
				raw := filepath.Join(dir, "out.raw")
				imgtest.QemuRaw(t, "qcow2", filepath.Join(dir, "checked"), raw)
				if theirs, err := os.ReadFile(raw); err != nil || got != nil && !bytes.Equal(theirs, got) {
					t.Errorf("QEMU reads something else than we do (%v)", err)
				}
			}

			// Undo.
			if f.Hash() != damaged.Hash() {
				if _, err := fsck.ApplyUndo(context.Background(), undo, f, fsck.UndoOptions{}); err != nil {
					t.Fatalf("undo: %v", err)
				}
			}
			if !bytes.Equal(f.Bytes(), damaged.Bytes()) {
				t.Error("undo does not restore the image")
			}
		})
	}
}

// allowed are ranges that the damage itself destroyed without a trace: nobody
// can name them.
func allowed(d damage.Damage) []blockmap.Range {
	switch d.Name {
	case "leak-middle", "size-0":
		return d.Lost
	}
	return nil
}

// qemuCheck is qemu-img check of b, in dir, where parents and data files are.
func qemuCheck(t testing.TB, dir string, b []byte) (int, string) {
	t.Helper()
	path := filepath.Join(dir, "checked")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	exit, out := imgtest.QemuCheck(t, path, "qcow2")
	return exit, out[:min(len(out), 1000)]
}
