package fsck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// tailChecker stands in for the checkers of formats, which this package does
// not know: it runs the toy on the last page of the file.
type tailChecker struct{ format string }

// checks counts the calls by file.
var checks atomic.Pointer[func(name string)]

func init() {
	for _, f := range []string{"qcow2", "ploop", "ploop-descriptor"} {
		RegisterChecker(tailChecker{f})
	}
}

func (c tailChecker) Format() string { return c.format }

const tail = 4096

func (c tailChecker) Check(ctx context.Context, f backend.File, o Options, sink Sink) (Stats, error) {
	if note := checks.Load(); note != nil {
		(*note)(f.Name())
	}
	size, err := o.Reader(f).Size()
	if err != nil {
		return Stats{}, err
	}
	from := max(0, size-tail)
	b := make([]byte, size-from)
	if err := readZero(o.Reader(f), b, from); err != nil {
		return Stats{}, err
	}
	for i, v := range b {
		at := from + int64(i)
		switch v {
		case 0xff:
			fd := Finding{Code: toyBad, Place: Place{Offset: at}, Text: "bad", Fix: &Fix{Text: "clear", Level: Full}}
			if !sink.Report(fd) {
				continue
			}
			if c.format == "ploop-descriptor" {
				whole := make([]byte, size)
				if err := readZero(f, whole, 0); err != nil {
					return Stats{}, err
				}
				return Stats{}, o.Plan.Replace(bytes.ReplaceAll(whole, []byte{0xff}, nil))
			}
			if err := errors.Join(o.Plan.Write(PhaseMap, at, []byte{0}), o.Plan.Quarantine(Lost{Guest: 0, Host: at, Len: 1})); err != nil {
				return Stats{}, err
			}
		case 0xfe:
			if sink.Report(Finding{Code: toyHigh, Place: Place{Offset: at}, Text: "high", Fix: &Fix{Text: "lower", Level: Preen}}) {
				if err := o.Plan.Write(PhaseCounts, at, []byte{1}); err != nil {
					return Stats{}, err
				}
			}
		}
	}
	return Stats{Format: c.format}, nil
}

// addTail appends a page to a file.
func addTail(t *testing.T, path, s string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString(s + strings.Repeat(" ", tail-len(s)))
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

func runAll(t *testing.T, o RunOptions, paths ...string) (bits int, results []*ImageResult) {
	t.Helper()
	Run(t.Context(), paths, o, func(r *ImageResult) {
		bits |= r.Exit()
		results = append(results, r)
	})
	if len(results) != len(paths) {
		t.Fatalf("%d results for %d images", len(results), len(paths))
	}
	for i, r := range results {
		if r.Path != paths[i] {
			t.Errorf("result %d is of %s", i, r.Path)
		}
	}
	return bits, results
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestRunModes(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	addTail(t, "a.qcow2", "one \xff two \xfe")
	original := content(t, "a.qcow2")

	bits, _ := runAll(t, RunOptions{}, "a.qcow2")
	if bits != ExitUncorrected || content(t, "a.qcow2") != original {
		t.Errorf("check: %d", bits)
	}
	bits, _ = runAll(t, RunOptions{Decide: DecideNo}, "a.qcow2")
	if names, _ := filepath.Glob("*"); bits != ExitUncorrected || len(names) != 1 {
		t.Errorf("no: %d, %q", bits, names)
	}
	bits, res := runAll(t, RunOptions{Decide: DecidePreen}, "a.qcow2")
	if bits != ExitCorrected|ExitUncorrected || res[0].Files[0].Undo != "a.qcow2.undo" || res[0].Files[0].Lost != "" {
		t.Errorf("preen: %d %+v", bits, res[0].Files[0])
	}
	preened := content(t, "a.qcow2")
	bits, res = runAll(t, RunOptions{Decide: DecideAll}, "a.qcow2")
	if bits != ExitCorrected || res[0].Files[0].Undo != "a.qcow2.undo.1" || res[0].Files[0].Lost != "a.qcow2.lost+found" {
		t.Errorf("all: %d %+v", bits, res[0].Files[0])
	}
	if want := strings.NewReplacer("\xff", "\x00", "\xfe", "\x01").Replace(original); content(t, "a.qcow2") != want {
		t.Error("all: wrong content")
	}
	lost, _ := filepath.Glob("a.qcow2.lost+found/guest-0x000000000000.host-*")
	if len(lost) != 1 || content(t, lost[0]) != "\xff" {
		t.Errorf("lost+found: %q", lost)
	}
	if bits, _ = runAll(t, RunOptions{Decide: DecideAll}, "a.qcow2"); bits != ExitClean {
		t.Errorf("again: %d", bits)
	}
	// The first undo file does not fit before the second was used.
	for _, step := range []struct {
		undo, want string
		err        error
	}{{"a.qcow2.undo", "", ErrChanged}, {"a.qcow2.undo.1", preened, nil}, {"a.qcow2.undo", original, nil}} {
		err := applyFile(t, step.undo, "a.qcow2")
		if !errors.Is(err, step.err) || step.want != "" && content(t, "a.qcow2") != step.want {
			t.Errorf("%s: %v", step.undo, err)
		}
	}
}

func applyFile(t *testing.T, undo, image string) error {
	t.Helper()
	u, err := backend.Open(undo, backend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	f, err := backend.Open(image, backend.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = ApplyUndo(t.Context(), u, f, UndoOptions{})
	return err
}

func TestRunUndoPlace(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	make := func() {
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
		addTail(t, "a.qcow2", "\xfe")
	}
	make()
	if bits, _ := runAll(t, RunOptions{Decide: DecideAll, Undo: UndoPlace("named")}, "a.qcow2"); bits != ExitCorrected {
		t.Error(bits)
	}
	make()
	before := content(t, "a.qcow2")
	bits, res := runAll(t, RunOptions{Decide: DecideAll, Undo: UndoPlace("named")}, "a.qcow2")
	if bits&ExitOperational == 0 || content(t, "a.qcow2") != before {
		t.Errorf("an undo file was overwritten, or nothing was said: %d %v", bits, res[0].Files[0].Err)
	}
	if err := os.Mkdir("dir", 0o700); err != nil {
		t.Fatal(err)
	}
	if _, res := runAll(t, RunOptions{Decide: DecideAll, Undo: UndoPlace("dir")}, "a.qcow2"); res[0].Files[0].Undo != "dir/a.qcow2.undo" {
		t.Errorf("%+v", res[0].Files[0])
	}
	make()
	before = content(t, "a.qcow2")
	if bits, _ := runAll(t, RunOptions{Decide: DecideAll, Undo: UndoPlace("no/such/dir")}, "a.qcow2"); bits&ExitOperational == 0 || content(t, "a.qcow2") != before {
		t.Errorf("no place for the undo file: %d", bits)
	}
}

// Parents are checked, once, and changed only when they are named.
func TestRunShared(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
	addTail(t, "base.qcow2", "\xfe")
	for _, n := range []string{"a", "b"} {
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", n+".qcow2")
		addTail(t, n+".qcow2", "\xfe")
	}
	older(t, "base.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "lone.qcow2", "1M")
	var calls []string
	note := func(name string) { calls = append(calls, name) }
	checks.Store(&note)
	defer checks.Store(nil)
	bits, res := runAll(t, RunOptions{Serial: true}, "a.qcow2", "lone.qcow2", "b.qcow2", "a.qcow2")
	slices.Sort(calls)
	if want := []string{"a.qcow2", "b.qcow2", "base.qcow2", "lone.qcow2"}; bits != ExitUncorrected || !slices.Equal(calls, want) {
		t.Errorf("%d, checked %q", bits, calls)
	}
	for _, r := range res {
		if r.Err != nil {
			t.Error(r.Err)
		}
	}
	checks.Store(nil)
	base := content(t, "base.qcow2")
	if bits, _ := runAll(t, RunOptions{Decide: DecideAll}, "a.qcow2", "b.qcow2"); bits != ExitCorrected|ExitUncorrected || content(t, "base.qcow2") != base {
		t.Errorf("children: %d", bits)
	}
	if bits, _ := runAll(t, RunOptions{Decide: DecideAll}, "a.qcow2", "base.qcow2"); bits != ExitCorrected || content(t, "base.qcow2") == base {
		t.Errorf("with the base: %d", bits)
	}
}

func TestRunBundle(t *testing.T) {
	dir := t.TempDir()
	if err := ploop.CreateBundle(t.Context(), dir, ploop.CreateOptions{Size: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	xml := filepath.Join(dir, "DiskDescriptor.xml")
	before := content(t, xml)
	if err := errors.Join(os.WriteFile(xml, []byte(before+"\xff"), 0o600), os.Chmod(xml, 0o640)); err != nil {
		t.Fatal(err)
	}
	bits, res := runAll(t, RunOptions{Decide: DecideAll}, dir)
	if bits != ExitCorrected || content(t, xml) != before {
		t.Errorf("%d %v", bits, res[0].Files[0].Err)
	}
	if st, err := os.Stat(xml); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if err := applyFile(t, xml+".undo", xml); err != nil || content(t, xml) != before+"\xff" {
		t.Errorf("undo: %v", err)
	}
}

func TestRunInUse(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	f, err := backend.Open("a.qcow2", backend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lock := backend.LockerOf(f)
	if err := lock.Lock(backend.ReaderUse, backend.ReaderUnshare); err != nil {
		t.Fatal(err)
	}
	if bits, _ := runAll(t, RunOptions{}, "a.qcow2"); bits != ExitClean {
		t.Errorf("beside a reader: %d", bits)
	}
	if bits, res := runAll(t, RunOptions{Decide: DecideAll}, "a.qcow2"); bits != ExitOperational || !errors.Is(res[0].Err, layers.ErrInUse) {
		t.Errorf("repair beside a reader: %d %v", bits, res[0].Err)
	}
	if err := lock.Lock(backend.WriterUse, backend.WriterUnshare); err != nil {
		t.Fatal(err)
	}
	if bits, res := runAll(t, RunOptions{}, "a.qcow2"); bits != ExitOperational || !errors.Is(res[0].Err, layers.ErrInUse) {
		t.Errorf("beside a writer: %d %v", bits, res[0].Err)
	}
	_ = f.Close()

	dir := t.TempDir()
	if err := ploop.CreateBundle(t.Context(), dir, ploop.CreateOptions{Size: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	l, err := backend.LockDescriptor(filepath.Join(dir, "DiskDescriptor.xml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []RunOptions{{}, {Decide: DecideAll}} {
		for _, path := range []string{dir, filepath.Join(dir, "root.hds")} {
			if bits, res := runAll(t, o, path); bits != ExitOperational || !errors.Is(res[0].Err, layers.ErrInUse) {
				t.Errorf("%s: %d %v", path, bits, res[0].Err)
			}
		}
	}
	_ = l.Close()
	for _, path := range []string{dir, filepath.Join(dir, "root.hds")} {
		if bits, res := runAll(t, RunOptions{Decide: DecideAll}, path); bits != ExitClean {
			t.Errorf("%s: %d %v", path, bits, res[0].Err)
		}
	}
}

func TestRunCancelled(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	addTail(t, "a.qcow2", "\xfe")
	before := content(t, "a.qcow2")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	n := 0
	Run(ctx, []string{"a.qcow2", "a.qcow2"}, RunOptions{Decide: DecideAll}, func(r *ImageResult) {
		n++
		if n == 1 && r.Exit()&ExitCancelled == 0 {
			t.Errorf("%d", r.Exit())
		}
	})
	if names, _ := filepath.Glob("*"); content(t, "a.qcow2") != before || len(names) != 1 {
		t.Errorf("%q", names)
	}
}

func TestRunMany(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	var paths []string
	for i := range 20 {
		name := fmt.Sprintf("%d.qcow2", i)
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", name, "1M")
		addTail(t, name, "\xff\xfe")
		paths = append(paths, name)
	}
	paths = append(paths, "none.qcow2")
	bits, res := runAll(t, RunOptions{Decide: DecideAll, Open: open.Options{Format: "qcow2"}}, paths...)
	if bits != ExitCorrected|ExitOperational || res[20].Err == nil {
		t.Errorf("%d", bits)
	}
	d := NewDocument(res)
	if d.Exit != bits || len(d.Images) != 21 || d.Images[20].Error == "" || d.Images[3].Files[0].Left.Worst != "clean" {
		t.Errorf("%+v", d)
	}
}
