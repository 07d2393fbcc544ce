package fsck

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/imagestack/imagestack/backend"
)

func execute(p *Plan, undo backend.File) error {
	_, err := p.Execute(context.Background(), ExecuteOptions{Undo: undo, Name: "image"})
	return err
}

// memLost is a LostStore in memory.
type memLost struct {
	files  map[string]*backend.Mem
	synced bool
}

func (m *memLost) Create(name string) (backend.File, string, error) {
	if m.files == nil {
		m.files = map[string]*backend.Mem{}
	}
	m.files[name] = backend.NewMem(name)
	return m.files[name], name, nil
}

func (m *memLost) Remove(name string) error { delete(m.files, name); return nil }

func (m *memLost) Sync() error { m.synced = true; return nil }

// Whatever the plan, executing it gives what the model says, and undoing that
// gives the original, as often as one likes.
func TestExecuteAndUndo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		old := randomFile(t)
		f := backend.NewMemBytes("image", old)
		undo := backend.NewMem("undo")
		var want []byte
		for range rapid.IntRange(1, 3).Draw(t, "rounds") {
			p, m := randomPlan(t, f, f.Bytes(), PlanOptions{Memory: 3 * pageBytes})
			err := execute(p, undo)
			if errors.Is(err, ErrPlan) { // a copy from what the phase changes
				t.Skip()
			}
			if err != nil {
				t.Fatal(err)
			}
			want = m.content()
			if got := f.Bytes(); !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, want %d; first difference at %d", len(got), len(want), firstDiff(got, want))
			}
			p.Close()
		}
		for range 2 {
			if _, err := ApplyUndo(context.Background(), undo, f, UndoOptions{}); err != nil {
				t.Fatal(err)
			}
			if got := f.Bytes(); !bytes.Equal(got, old) {
				t.Fatalf("not restored: %d bytes, want %d; first difference at %d", len(got), len(old), firstDiff(got, old))
			}
		}
	})
}

func firstDiff(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// phased is a plan with something in every phase, on a file of 16 pages.
func phased(t testing.TB, f backend.File) *Plan {
	t.Helper()
	p, err := NewPlan(f, PlanOptions{})
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		p.Copy(17*4096, 3*4096, 4096),
		p.Write(PhaseNew, 16*4096, bytes.Repeat([]byte("new"), 1000)),
		p.Write(PhaseCounts, 4096, bytes.Repeat([]byte("counts"), 200)),
		p.Write(PhaseMap, 2*4096+100, []byte("map")),
		p.Write(PhaseHeader, 10, []byte("header")),
		p.Write(PhaseFree, 4096+700, []byte("free")),
		p.Punch(8*4096, 2*4096),
		p.Write(PhaseFlags, 20, []byte("flags")),
	)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// shrinking is one that makes the file shorter.
func shrinking(t testing.TB, f backend.File) *Plan {
	t.Helper()
	p, err := NewPlan(f, PlanOptions{})
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		p.Write(PhaseMap, 2*4096+100, []byte("map")),
		p.Zero(PhaseMap, 4*4096, 4096),
		p.SetSize(9*4096+77),
		p.Write(PhaseFlags, 20, []byte("flags")),
	)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func original() []byte {
	old := make([]byte, 16*4096+300)
	for i := range old {
		old[i] = byte(i*31 + i/4096 + 1)
	}
	clear(old[5*4096 : 6*4096])
	return old
}

// holey is a longer one, whose end is mostly a hole.
func holey() []byte {
	end := make([]byte, 5*undoBlock)
	copy(end[3*undoBlock:], original()[:4096])
	return append(original(), end...)
}

// crashCheck is the verdict on one state after a power cut.
func crashCheck(make func(testing.TB, backend.File) *Plan, t *testing.T, old []byte, image, undo *backend.Mem) error {
	ctx := context.Background()
	// Undone at once.
	f := image.Clone()
	switch _, err := ApplyUndo(ctx, undo.Clone(), f, UndoOptions{}); {
	case errors.Is(err, ErrNothingToUndo):
		if !bytes.Equal(f.Bytes(), old) {
			return errors.New("changed, and nothing to undo")
		}
	case err != nil:
		return err
	case !bytes.Equal(f.Bytes(), old):
		return errors.New("not restored")
	}
	// Repaired again, then both taken back, the later one first.
	f = image.Clone()
	second := backend.NewMem("undo.1")
	p := make(t, f)
	if err := execute(p, second); err != nil {
		return err
	}
	if _, err := ApplyUndo(ctx, second, f, UndoOptions{}); err != nil {
		return err
	}
	if !bytes.Equal(f.Bytes(), image.Bytes()) {
		return errors.New("the second repair was not taken back")
	}
	return nil
}

func TestExecutePowerCut(t *testing.T) {
	for name, c := range map[string]struct {
		plan func(testing.TB, backend.File) *Plan
		old  []byte
	}{"phased": {phased, original()}, "shrinking": {shrinking, original()}, "holey": {shrinking, holey()}} {
		t.Run(name, func(t *testing.T) {
			makePlan, old := c.plan, c.old
			r := backend.NewRecorder()
			f, _ := r.Wrap(backend.NewMemBytes("image", old))
			undo, _ := r.Wrap(backend.NewMem("undo"))
			p := makePlan(t, f)
			want := make([]byte, p.size)
			if err := readZero(p, want, 0); err != nil {
				t.Fatal(err)
			}
			if err := execute(p, undo); err != nil {
				t.Fatal(err)
			}
			all := r.Syncs()
			verdict := func(o backend.StateOptions) (states int, bad error) {
				o.Random, o.MaxPerEpoch = 60, 120
				o.Piece = func(int, int64) int64 { return 512 }
				for s := range r.States(o) {
					states++
					err := crashCheck(makePlan, t, old, s.Files[0], s.Files[1])
					if err == nil {
						err = inOrder(s.Files[0].Bytes(), old)
					}
					if err == nil && s.Completed == all && !bytes.Equal(s.Files[0].Bytes(), want) {
						err = errors.New("done, but not durable")
					}
					if err != nil && bad == nil {
						bad = err
						if o.IgnoreSync == 0 {
							t.Logf("%v: %v", s, err)
						} else {
							return states, bad
						}
					}
				}
				return states, bad
			}
			states, bad := verdict(backend.StateOptions{})
			if bad != nil {
				t.Fatal(bad)
			}
			t.Logf("%d states, %d syncs", states, all)
			for i := 1; i <= r.SyncCalls(); i++ {
				if _, bad := verdict(backend.StateOptions{IgnoreSync: i}); bad == nil {
					t.Errorf("sync %d: needless, or the test is blind", i)
				}
			}
		})
	}
}

// inOrder: when a phase has begun, the one before is there.
func inOrder(b, old []byte) error {
	has := func(off int, s string) bool { return len(b) >= off+len(s) && string(b[off:off+len(s)]) == s }
	steps := []struct {
		name string
		all  bool
		any  bool
	}{
		{"new", has(16*4096+2990, "wnewnewnew"[:3]) && len(b) > 18*4096-1 && bytes.Equal(b[17*4096:18*4096], old[3*4096:4*4096]), false},
		{"counts", has(4096, "counts") && has(4096+1194, "counts"), has(4096, "counts") || has(4096+1194, "counts")},
		{"map", has(2*4096+100, "map"), has(2*4096+100, "map")},
		{"header", has(10, "header"), has(10, "header")},
		{"free", has(4096+700, "free") && backend.IsZero(b[8*4096:min(len(b), 9*4096)]), has(4096+700, "free")},
		{"flags", true, has(20, "flags")},
	}
	if has(20, "flags") && len(b) < 10*4096 { // the shrinking plan
		if !has(2*4096+100, "map") {
			return errors.New("flags before map")
		}
		return nil
	}
	if len(b) <= len(old) { // of the other, or not begun
		if has(20, "flags") {
			return errors.New("flags before the end was cut")
		}
		if len(b) < len(old) && !has(2*4096+100, "map") {
			return errors.New("cut before map")
		}
		return nil
	}
	for i := 1; i < len(steps); i++ {
		if steps[i].any && !steps[i-1].all {
			return errors.New(steps[i].name + " before " + steps[i-1].name)
		}
	}
	return nil
}

// Undoing is crash-safe, too.
func TestApplyUndoPowerCut(t *testing.T) {
	for _, c := range []struct {
		first func(testing.TB, backend.File) *Plan
		old   []byte
	}{{phased, original()}, {shrinking, original()}, {phased, holey()}, {shrinking, holey()}} {
		first, old := c.first, c.old
		image, undo := backend.NewMemBytes("image", old), backend.NewMem("undo")
		for _, makePlan := range []func(testing.TB, backend.File) *Plan{first, shrinking, phased} {
			if err := execute(makePlan(t, image), undo); err != nil {
				t.Fatal(err)
			}
		}
		r := backend.NewRecorder()
		f, _ := r.Wrap(image)
		if _, err := ApplyUndo(t.Context(), undo, f, UndoOptions{}); err != nil {
			t.Fatal(err)
		}
		all := r.Syncs()
		verdict := func(o backend.StateOptions) error {
			o.Random, o.MaxPerEpoch = 60, 150
			o.Piece = func(int, int64) int64 { return 512 }
			for s := range r.States(o) {
				if s.Completed == all && !bytes.Equal(s.Files[0].Bytes(), old) {
					return errors.New("done, but not durable")
				}
				if _, err := ApplyUndo(t.Context(), undo, s.Files[0], UndoOptions{}); err != nil {
					return err
				}
				if !bytes.Equal(s.Files[0].Bytes(), old) {
					return errors.New("not restored")
				}
			}
			return nil
		}
		if err := verdict(backend.StateOptions{}); err != nil {
			t.Fatal(err)
		}
		if verdict(backend.StateOptions{IgnoreSync: r.SyncCalls()}) == nil {
			t.Error("the last sync is needless, or the test is blind")
		}
	}
}

// Every failing operation: before the image is touched it is as it was, later
// it can be restored. A failed sync ends the repair.
func TestExecuteFaults(t *testing.T) {
	old := original()
	for _, on := range []backend.Op{backend.OpWrite, backend.OpSync, backend.OpTruncate, backend.OpRead, backend.OpPunch} {
		for file := range 2 {
			for skip := 0; ; skip++ {
				image, undo := backend.NewMemBytes("image", old), backend.NewMem("undo")
				fi, fu := backend.NewFault(image), backend.NewFault(undo)
				p := phased(t, fi)
				[]*backend.Fault{fi, fu}[file].Inject(backend.Rule{On: on, Nth: skip + 1})
				undone, err := p.Execute(t.Context(), ExecuteOptions{Undo: fu})
				if err == nil {
					break // there were fewer operations
				}
				if !errors.Is(err, unix.EIO) {
					t.Fatal(err)
				}
				if undone && !bytes.Equal(image.Bytes(), old) {
					t.Errorf("%v %d of file %d: changed, but said not to be", on, skip, file)
				}
				if n, _ := undo.Size(); undone && n != 0 {
					t.Errorf("%v %d of file %d: %d bytes left in the undo file", on, skip, file, n)
				}
				if !undone {
					if _, err := ApplyUndo(t.Context(), undo, image, UndoOptions{}); err != nil {
						t.Errorf("%v %d of file %d: %v", on, skip, file, err)
					}
				}
				if !bytes.Equal(image.Bytes(), old) {
					t.Errorf("%v %d of file %d: not restored", on, skip, file)
				}
			}
		}
	}
}

func writeAt(t *testing.T, f backend.File, off int64) {
	t.Helper()
	if _, err := f.WriteAt([]byte{'x'}, off); err != nil {
		t.Fatal(err)
	}
}

func truncate(t *testing.T, f backend.File, n int64) {
	t.Helper()
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
}

func TestUndoRefuses(t *testing.T) {
	repaired := func() (*backend.Mem, *backend.Mem) {
		image, undo := backend.NewMemBytes("image", original()), backend.NewMem("undo")
		if err := execute(phased(t, image), undo); err != nil {
			t.Fatal(err)
		}
		return image, undo
	}
	refused := func(what string, image, undo *backend.Mem, want error) {
		t.Helper()
		before := image.Bytes()
		if _, err := ApplyUndo(t.Context(), undo, image, UndoOptions{}); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		if !bytes.Equal(before, image.Bytes()) {
			t.Errorf("%s: refused, but changed", what)
		}
	}
	image, undo := repaired()
	writeAt(t, image, 2*4096+101)
	refused("a sector that somebody wrote", image, undo, ErrChanged)
	if _, err := ApplyUndo(t.Context(), undo, image, UndoOptions{Force: true}); err != nil || !bytes.Equal(image.Bytes(), original()) {
		t.Errorf("force: %v", err)
	}
	image, undo = repaired()
	writeAt(t, image, 3000)
	refused("another head", image, undo, ErrChanged)
	image, undo = repaired()
	truncate(t, image, 19*4096)
	refused("longer", image, undo, ErrChanged)
	truncate(t, image, 4096)
	refused("shorter", image, undo, ErrChanged)

	image, undo = repaired()
	good := undo.Bytes()
	for i := 0; i < len(good); i += 13 {
		bad := bytes.Clone(good)
		bad[i] ^= 0x41
		refused("damaged undo file", image, backend.NewMemBytes("undo", bad), ErrUndo)
	}
	for i := 1; i < len(good); i += 97 {
		refused("cut undo file", image, backend.NewMemBytes("undo", good[:i]), ErrUndo)
	}
	refused("empty undo file", image, backend.NewMem("undo"), ErrNothingToUndo)
	refused("another file", image, backend.NewMemBytes("undo", []byte(strings.Repeat("hello ", 500))), ErrUndo)
}

func TestQuarantine(t *testing.T) {
	old := original()
	f := backend.NewMemBytes("image", old)
	p := phased(t, f)
	if err := p.Quarantine(Lost{Guest: 65536, Host: 4096, Len: 8192}); err != nil {
		t.Fatal(err)
	}
	if err := p.Quarantine(Lost{Guest: -1, Host: 5, Len: 7}); err != nil {
		t.Fatal(err)
	}
	if undone, err := p.Execute(t.Context(), ExecuteOptions{Undo: backend.NewMem("undo")}); !undone || !errors.Is(err, ErrPlan) {
		t.Fatalf("without a place: %v %v", undone, err)
	}
	lost := &memLost{}
	if _, err := p.Execute(t.Context(), ExecuteOptions{Undo: backend.NewMem("undo"), Lost: lost}); err != nil {
		t.Fatal(err)
	}
	if got := lost.files["guest-0x000000010000.host-0x000000001000"]; got == nil || !bytes.Equal(got.Bytes(), old[4096:4096+8192]) {
		t.Errorf("wrong content of %v", lost.files)
	}
	if got := lost.files["guest-unknown.host-0x000000000005"]; got == nil || !bytes.Equal(got.Bytes(), old[5:12]) {
		t.Errorf("wrong content of %v", lost.files)
	}
	if !lost.synced {
		t.Error("not synced")
	}
	for _, l := range []Lost{{Host: -1, Len: 5}, {Host: 5}, {Host: 1 << 62, Len: 1 << 62}} {
		if err := p.Quarantine(l); !errors.Is(err, ErrPlan) {
			t.Errorf("%+v: %v", l, err)
		}
	}
}

func FuzzApplyUndo(f *testing.F) {
	old := original()[:3000]
	image, undo := backend.NewMemBytes("image", old), backend.NewMem("undo")
	p, err := NewPlan(image, PlanOptions{})
	if err == nil {
		err = errors.Join(p.Write(PhaseCounts, 3000, []byte("abc")), p.Write(PhaseMap, 100, []byte("abc")), p.Punch(512, 512), execute(p, undo))
	}
	if err != nil {
		f.Fatal(err)
	}
	f.Add(undo.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		target := backend.NewMemBytes("image", image.Bytes())
		if _, err := ApplyUndo(context.Background(), backend.NewMemBytes("undo", b), target, UndoOptions{}); err == nil {
			// Checksums make sure that nothing else is accepted, but names.
			if !bytes.Equal(target.Bytes(), old) {
				t.Error("something else was restored")
			}
		} else if !bytes.Equal(target.Bytes(), image.Bytes()) {
			t.Error("refused, but changed")
		}
	})
}

func FuzzRestore(f *testing.F) {
	f.Add([]byte(dumpMagic + "\x01\x00\x00\x00"))
	var b bytes.Buffer
	d := Dumped{ID: DumpIdentity{Format: "raw", FileSize: 8192, VirtualSize: 8192, ClusterSize: 512, End: 8192},
		f: backend.NewMemBytes("x", original()), meta: []metaRange{{0, 4096, 1, true}, {4096, 4096, 2, false}}}
	if err := d.Write(context.Background(), &b); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := newDumpReader(bytes.NewReader(b))
		if err != nil {
			return
		}
		defer r.close()
		for {
			rec, err := r.next()
			if err != nil || rec == nil {
				return
			}
			if len(rec.data) > dumpPiece || rec.off < 0 || rec.off+int64(len(rec.data)) > r.id.FileSize {
				t.Fatalf("%d bytes at %d", len(rec.data), rec.off)
			}
		}
	})
}
