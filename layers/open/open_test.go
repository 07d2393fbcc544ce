package open_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/qcow2"
)

const mib = 1 << 20

// newQcow2 makes an empty image in dir.
func newQcow2(t testing.TB, dir, name string, o qcow2.CreateOptions) string {
	t.Helper()
	path := filepath.Join(dir, name)
	f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if o.Size == 0 {
		o.Size = 4 * mib
	}
	if err := errors.Join(qcow2.Create(context.Background(), f, o), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustOpen(t testing.TB, path string, o open.Options) *layers.Stack {
	t.Helper()
	s, err := open.Open(context.Background(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// write changes the image at path as the tools do, and closes it.
func write(t testing.TB, path string, o open.Options, off int64, p []byte) {
	t.Helper()
	o.Writable = true
	s, err := open.Open(context.Background(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.WriteAt(context.Background(), p, off)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
}

func content(t testing.TB, s *layers.Stack) []byte {
	t.Helper()
	b := make([]byte, s.Size())
	if n, err := s.ReadAt(context.Background(), b, 0); n != len(b) {
		t.Fatalf("read %d of %d bytes: %v", n, len(b), err)
	}
	return b
}

// refuses expects an error of the class whose message holds all of the words.
func refuses(t *testing.T, path string, o open.Options, class error, words ...string) {
	t.Helper()
	begin := time.Now()
	s, err := open.Open(context.Background(), path, o)
	if err == nil {
		_ = s.Close()
		t.Fatalf("%s was opened; want: %v", path, class)
	}
	if !errors.Is(err, class) {
		t.Errorf("%v\nis not of the class: %v", err, class)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v\ndoes not say %q", err, w)
		}
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
}

func TestMixedChain(t *testing.T) {
	dir := t.TempDir()
	base := imgtest.PatternBytes(1, 0, 3*mib+512)
	if err := os.WriteFile(filepath.Join(dir, "base.raw"), base, 0o600); err != nil {
		t.Fatal(err)
	}
	newQcow2(t, dir, "mid.qcow2", qcow2.CreateOptions{Size: 5 * mib, ClusterSize: 4096, BackingFile: "base.raw", BackingFormat: "raw"})
	top := newQcow2(t, dir, "top.qcow2", qcow2.CreateOptions{Size: 8 * mib, BackingFile: filepath.Join(dir, "mid.qcow2"), BackingFormat: "qcow2"})
	want := append(bytes.Clone(base), make([]byte, 8*mib-len(base))...)
	for i, path := range []string{filepath.Join(dir, "mid.qcow2"), top} {
		p := imgtest.PatternBytes(uint64(2+i), 0, 700_000)
		off := int64(1_000_001 + i*300_000)
		write(t, path, open.Options{}, off, p)
		copy(want[off:], p)
	}
	s := mustOpen(t, top, open.Options{})
	if len(s.Layers()) != 3 || !bytes.Equal(content(t, s), want) {
		t.Fatalf("%d layers, or wrong content", len(s.Layers()))
	}
	if _, err := s.WriteAt(context.Background(), []byte{1}, 0); !errors.Is(err, layers.ErrReadOnly) {
		t.Errorf("write to a read-only stack: %v", err)
	}
	imgtest.Require(t, "qemu-img")
	out := filepath.Join(t.TempDir(), "out.raw")
	imgtest.QemuRaw(t, "qcow2", top, out)
	if b, err := os.ReadFile(out); err != nil || !bytes.Equal(b, want) {
		t.Errorf("qemu-img reads other content (%v)", err)
	}
}

func TestDetection(t *testing.T) {
	dir := t.TempDir()
	image, err := os.ReadFile(newQcow2(t, dir, "a.qcow2", qcow2.CreateOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	zeros := make([]byte, mib)
	for name, c := range map[string]struct {
		content []byte
		format  string
		size    int64
	}{
		"disk.img":       {image, "", 4 * mib},
		"disk":           {image, "qcow2", 4 * mib},
		"really.raw":     {image, "raw", int64(len(image))},
		"plain.img":      {zeros, "", mib},
		"plain.raw":      {zeros[:1000], "", 1000},
		"empty":          {nil, "", 0},
		"misnamed.qcow2": {zeros, "raw", mib},
		"foreign.vmdk":   {append([]byte("KDMV"), zeros...), "raw", mib + 4},
	} {
		s := mustOpen(t, file(name, c.content), open.Options{Format: c.format})
		if s.Size() != c.size {
			t.Errorf("%s as %q: %d bytes, want %d", name, c.format, s.Size(), c.size)
		}
	}
	refuses(t, file("guest.raw", image), open.Options{}, layers.ErrPolicy, "guest.raw", "--format")
	refuses(t, file("lie.qcow2", zeros), open.Options{}, layers.ErrFormat, "lie.qcow2", "qcow2")
	refuses(t, file("lie.hds", zeros), open.Options{}, layers.ErrFormat, "ploop")
	refuses(t, file("v.img", append([]byte("KDMV"), zeros...)), open.Options{}, layers.ErrUnsupported, "VMDK")
	refuses(t, file("w.img", append([]byte("vhdxfile"), zeros...)), open.Options{}, layers.ErrUnsupported, "VHDX")
	refuses(t, file("x.img", zeros), open.Options{Format: "vdi"}, layers.ErrUnsupported, "vdi")
	refuses(t, file("y.img", zeros), open.Options{Format: "qcow2"}, layers.ErrFormat, "y.img")
	refuses(t, filepath.Join(dir, "none"), open.Options{}, os.ErrNotExist)
	refuses(t, dir, open.Options{}, os.ErrNotExist, "DiskDescriptor.xml")
}

func TestPolicy(t *testing.T) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret.raw")
	if err := os.WriteFile(secret, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for link, target := range map[string]string{"link.raw": secret, "linkdir": outside, "loop.raw": "loop.raw"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "guest.raw"), mustRead(t, newQcow2(t, dir, "x.qcow2", qcow2.CreateOptions{})), 0o600); err != nil {
		t.Fatal(err)
	}
	n := 0
	child := func(backing, format string) string {
		n++
		return newQcow2(t, dir, fmt.Sprintf("child%d.qcow2", n), qcow2.CreateOptions{BackingFile: backing, BackingFormat: format})
	}
	for _, name := range []string{
		secret, "../" + filepath.Base(outside) + "/secret.raw", "link.raw", "linkdir/secret.raw",
		"/proc/self/environ", "/etc/passwd", "/dev/zero", "/proc/self/fd/0", "/etc/no such file",
		"linkdir/no such file", "..",
	} {
		refuses(t, child(name, "raw"), open.Options{}, layers.ErrPolicy, "--allow-path", "backing file")
	}
	for _, name := range []string{`json:{"driver":"file"}`, "nbd://host/x", "nbd:unix:/s", "file:secret.raw", "vvfat:/etc", "fat:rw:/", "https://h/x"} {
		refuses(t, child(name, "raw"), open.Options{AllowPaths: []string{"/"}}, layers.ErrPolicy, "protocol")
	}
	refuses(t, child("fifo", "raw"), open.Options{}, layers.ErrPolicy, "regular file")
	refuses(t, child(".", "raw"), open.Options{}, layers.ErrPolicy, "regular file")
	refuses(t, child("missing.raw", "raw"), open.Options{}, os.ErrNotExist, "missing.raw")
	refuses(t, child("loop.raw", "raw"), open.Options{}, layers.ErrPolicy)
	refuses(t, child("guest.raw", "raw"), open.Options{}, layers.ErrPolicy, "--backing-format", "guest.raw")
	refuses(t, child("x.qcow2", "vmdk"), open.Options{}, layers.ErrUnsupported, "vmdk")
	// The header says nothing of the format.
	bare := child("x.qcow2", "qcow2")
	removeBackingFormat(t, bare)
	refuses(t, bare, open.Options{}, layers.ErrPolicy, "--backing-format")
	mustOpen(t, bare, open.Options{BackingFormat: "qcow2"})
	mustOpen(t, child("guest.raw", "raw"), open.Options{BackingFormat: "raw"})

	for _, name := range []string{secret, "link.raw", "linkdir/secret.raw"} {
		mustOpen(t, child(name, "raw"), open.Options{AllowPaths: []string{outside}})
	}
	// The same for external data files.
	refuses(t, newQcow2(t, dir, "data.qcow2", qcow2.CreateOptions{DataFile: secret, DataFileRaw: true, Size: mib}),
		open.Options{}, layers.ErrPolicy, "data file", "--allow-path")
	mustOpen(t, filepath.Join(dir, "data.qcow2"), open.Options{AllowPaths: []string{outside}})
}

func mustRead(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// removeBackingFormat turns the backing format extension into an unknown one.
func removeBackingFormat(t testing.TB, path string) {
	t.Helper()
	b := mustRead(t, path)
	i := bytes.Index(b, []byte{0xe2, 0x79, 0x2a, 0xca})
	if i < 0 {
		t.Fatal("no backing format extension")
	}
	copy(b[i:], []byte{0x12, 0x34, 0x56, 0x78})
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestLoopsAndDepth(t *testing.T) {
	dir := t.TempDir()
	newQcow2(t, dir, "a.qcow2", qcow2.CreateOptions{BackingFile: "b.qcow2", BackingFormat: "qcow2"})
	newQcow2(t, dir, "b.qcow2", qcow2.CreateOptions{BackingFile: "a.qcow2", BackingFormat: "qcow2"})
	newQcow2(t, dir, "self.qcow2", qcow2.CreateOptions{BackingFile: "self.qcow2", BackingFormat: "qcow2"})
	if err := os.Link(filepath.Join(dir, "self.qcow2"), filepath.Join(dir, "alias.qcow2")); err != nil {
		t.Fatal(err)
	}
	refuses(t, filepath.Join(dir, "a.qcow2"), open.Options{}, layers.ErrCorrupt, "loop")
	refuses(t, filepath.Join(dir, "a.qcow2"), open.Options{Writable: true}, layers.ErrCorrupt, "loop")
	refuses(t, filepath.Join(dir, "alias.qcow2"), open.Options{}, layers.ErrCorrupt, "loop")

	const depth = layers.MaxDepth
	name := func(i int) string { return fmt.Sprintf("d%04d.qcow2", i) }
	for i := range depth + 1 {
		o := qcow2.CreateOptions{Size: mib}
		if i > 0 {
			o.BackingFile, o.BackingFormat = name(i-1), "qcow2"
		}
		newQcow2(t, dir, name(i), o)
	}
	p := imgtest.PatternBytes(5, 0, 100_000)
	write(t, filepath.Join(dir, name(0)), open.Options{}, 300_000, p)
	begin := time.Now()
	s := mustOpen(t, filepath.Join(dir, name(depth-1)), open.Options{})
	got := content(t, s)
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("opening and reading %d layers took %v", depth, d)
	}
	if len(s.Layers()) != depth || !bytes.Equal(got[300_000:400_000], p) {
		t.Errorf("%d layers, or wrong content", len(s.Layers()))
	}
	refuses(t, filepath.Join(dir, name(depth)), open.Options{}, layers.ErrUnsupported, "1000")
}

func TestLocks(t *testing.T) {
	dir := t.TempDir()
	base := newQcow2(t, dir, "base.qcow2", qcow2.CreateOptions{})
	top := newQcow2(t, dir, "top.qcow2", qcow2.CreateOptions{BackingFile: "base.qcow2", BackingFormat: "qcow2"})
	reader := mustOpen(t, top, open.Options{})
	mustOpen(t, top, open.Options{})
	refuses(t, top, open.Options{Writable: true}, layers.ErrInUse, "top.qcow2")
	refuses(t, base, open.Options{Writable: true}, layers.ErrInUse, "base.qcow2")
	mustOpen(t, top, open.Options{Scratch: true})
	_ = reader

	other := newQcow2(t, dir, "other.qcow2", qcow2.CreateOptions{BackingFile: "base.qcow2", BackingFormat: "qcow2"})
	writer, err := open.Open(context.Background(), other, open.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	refuses(t, other, open.Options{}, layers.ErrInUse, "other.qcow2")
	refuses(t, other, open.Options{Writable: true}, layers.ErrInUse)
	mustOpen(t, base, open.Options{})
	imgtest.Require(t, "qemu-img")
	if code, out := imgtest.Try(t, "qemu-img", "info", other); code == 0 {
		t.Errorf("qemu-img reads what we write: %s", out)
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	if code, out := imgtest.Try(t, "qemu-img", "info", other); code != 0 {
		t.Errorf("the lock outlived the stack: %s", out)
	}
}

// A throw-away layer takes the changes; reading leaves no trace.
func TestNothingIsWritten(t *testing.T) {
	dir := t.TempDir()
	base := newQcow2(t, dir, "base.qcow2", qcow2.CreateOptions{Size: 3*mib + 12345 - 12345%512})
	write(t, base, open.Options{}, 0, imgtest.PatternBytes(1, 0, 2*mib))
	top := newQcow2(t, dir, "top.qcow2", qcow2.CreateOptions{Size: 5 * mib, BackingFile: "base.qcow2", BackingFormat: "qcow2"})
	before := listing(t, dir)
	for _, o := range []open.Options{{}, {Scratch: true}, {Scratch: true, Writable: true, ScratchDir: t.TempDir()}} {
		s, err := open.Open(context.Background(), top, o)
		if err != nil {
			t.Fatal(err)
		}
		want := content(t, s)
		if o.Scratch {
			p := imgtest.PatternBytes(7, 0, mib)
			if _, err := s.WriteAt(context.Background(), p, mib/2+77); err != nil {
				t.Fatal(err)
			}
			if err := s.ZeroAt(context.Background(), 100, mib/4, true); err != nil {
				t.Fatal(err)
			}
			copy(want[mib/2+77:], p)
			clear(want[100 : 100+mib/4])
			if err := s.Sync(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(content(t, s), want) {
			t.Errorf("%+v: wrong content", o)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if after := listing(t, dir); after != before {
			t.Errorf("%+v changed the directory:\n%s\nto\n%s", o, before, after)
		}
	}
}

func listing(t testing.TB, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range entries {
		fmt.Fprintln(&b, e.Name(), imgtest.SHA256File(t, filepath.Join(dir, e.Name())))
	}
	return b.String()
}

func TestInternalSnapshot(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	dir := t.TempDir()
	path := newQcow2(t, dir, "a.qcow2", qcow2.CreateOptions{})
	old := imgtest.PatternBytes(1, 0, mib)
	write(t, path, open.Options{}, 0, old)
	imgtest.QemuImg(t, "snapshot", "-c", "before", path)
	write(t, path, open.Options{}, 0, imgtest.PatternBytes(2, 0, mib))
	s := mustOpen(t, path, open.Options{Snapshot: "before"})
	if !bytes.Equal(content(t, s)[:mib], old) {
		t.Error("the snapshot does not read as it was")
	}
	refuses(t, path, open.Options{Snapshot: "before", Writable: true}, layers.ErrUnsupported, "snapshot")
	sc := mustOpen(t, path, open.Options{Snapshot: "1", Scratch: true})
	if _, err := sc.WriteAt(context.Background(), []byte{1, 2, 3}, 5); err != nil {
		t.Error(err)
	}
	report, err := open.Inspect(context.Background(), path, open.Options{}, nil)
	if err != nil || len(report.Layers) != 1 || len(report.Layers[0].Snapshots) != 1 || report.Layers[0].Snapshots[0].Name != "before" {
		t.Errorf("%+v, %v", report, err)
	}
}
