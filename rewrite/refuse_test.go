package rewrite_test

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/rewrite"
)

// small makes an image of one cluster of zeros and one of data.
func small(t *testing.T, path string) {
	t.Helper()
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	imgtest.QemuIO(t, "qcow2", path, "write -P 0 0 64k", "write -P 5 128k 64k")
}

// TestChildrenElsewhere: what stands on an image is found behind a symbolic
// link, under whatever name, and in directories that are named.
func TestChildrenElsewhere(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	home, links, other := t.TempDir(), t.TempDir(), t.TempDir()
	base, link, child := filepath.Join(home, "base"), filepath.Join(links, "link"), filepath.Join(home, "child")
	small(t, base)
	if err := os.Symlink(base, link); err != nil {
		t.Fatal(err)
	}
	sum := imgtest.SHA256File(t, base)
	refused := func(what, path string, o rewrite.Options) {
		t.Helper()
		if _, err := rewrite.Compact(t.Context(), path, o); !errors.Is(err, rewrite.ErrBase) {
			t.Errorf("%s: %v", what, err)
		}
		if imgtest.SHA256File(t, base) != sum {
			t.Fatalf("%s: it was changed", what)
		}
	}
	for _, name := range []string{"base", "file:" + base, `json:{"driver":"qcow2","file":{"driver":"file","filename":"` + base + `"}}`,
		`json:{"driver":"qcow2","file.filename":"` + base + `"}`} {
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", name, child)
		refused(name, base, rewrite.Options{})
		refused(name+" behind a link", link, rewrite.Options{})
	}
	if err := os.Remove(child); err != nil {
		t.Fatal(err)
	}
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", link, filepath.Join(other, "child"))
	refused("in a named directory", base, rewrite.Options{ChildDirs: []string{other}})
	refused("in a named directory, behind a link", link, rewrite.Options{ChildDirs: []string{t.TempDir(), other}})
	// The control: nothing else is in the way.
	if _, err := rewrite.Compact(t.Context(), link, rewrite.Options{ChildDirs: []string{home}}); err != nil {
		t.Error(err)
	}
	if imgtest.SHA256File(t, base) == sum {
		t.Error("the control did nothing")
	}
}

// TestUnclearSibling: an image beside it of which nobody can tell what it
// stands on is named.
func TestUnclearSibling(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "a")
	small(t, path)
	r, err := rewrite.Estimate(t.Context(), path, rewrite.Options{})
	if err != nil || len(r.Notes) != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	other := filepath.Join(filepath.Dir(path), "b")
	if err := os.WriteFile(other, []byte("QFI\xfb\x00\x00\x00\x03"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err = rewrite.Estimate(t.Context(), path, rewrite.Options{})
	if err != nil || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], other) {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestLinkedDelta: the upper image of a bundle is not taken for one that stands
// alone when a symbolic link leads to it: a cluster of zeros is not dropped,
// because the lower image would show through.
func TestLinkedDelta(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io", "ploop")
	bundle := t.TempDir()
	images := imgtest.PloopBundle(t, bundle, "expanded", 2, 64<<20, 2)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(images[0].Path, link); err != nil {
		t.Fatal(err)
	}
	sum := imgtest.SHA256File(t, images[0].Path)
	for _, path := range []string{link, images[0].Path} {
		_, err := rewrite.Compact(t.Context(), path, rewrite.Options{Open: open.Options{Format: "ploop"}})
		if !errors.Is(err, layers.ErrUnsupported) || imgtest.SHA256File(t, images[0].Path) != sum {
			t.Errorf("%s: %v", path, err)
		}
	}
	_, err := rewrite.Compact(t.Context(), link, rewrite.Options{})
	if !errors.Is(err, layers.ErrUnsupported) || imgtest.SHA256File(t, images[0].Path) != sum {
		t.Errorf("%s: %v", link, err)
	}
}

// TestStrangeRecord: a record that is not that of the run is not gone by, and
// can be given up.
func TestStrangeRecord(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	ctx, done := context.WithTimeout(t.Context(), time.Minute)
	defer done()
	dir := t.TempDir()
	image := filepath.Join(dir, "a")
	record := image + ".compact"
	small(t, image)
	sum := imgtest.SHA256File(t, image)
	text := func(s string) func() error { return func() error { return os.WriteFile(record, []byte(s), 0o600) } }
	for _, c := range []struct {
		name string
		make func() error
		want string // what is not a record is never removed
	}{
		{"pipe", func() error { return unix.Mkfifo(record, 0o600) }, "not a record"},
		{"dangling link", func() error { return os.Symlink("nowhere", record) }, "no interrupted run"},
		{"directory", func() error { return os.Mkdir(record, 0o700) }, "not a record"},
		{"empty", text(""), "--abandon removes it"},
		{"zeros", text("\x00\x00"), "--abandon removes it"},
		{"torn", text(`{"version":1,"ima`), "--abandon removes it"},
		{"text", text("hello"), "not a record"},
		{"other JSON", text(`{"name":"a"}`), "not a record"},
		{"large", text(strings.Repeat(" ", 1<<20)), "not a record"},
		{"other version", text(`{"version":7,"image":"a","layer":0}`), "version 7"},
		{"other image", text(`{"version":1,"image":"b","layer":0,"guest":true}`), "of b"},
		{"other layer", text(`{"version":1,"image":"a","layer":1,"guest":true}`), "layer 1"},
	} {
		if err := c.make(); err != nil {
			t.Fatal(err)
		}
		if _, err := rewrite.Resume(ctx, image, rewrite.Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: resume: %v", c.name, err)
		}
		if c.name != "dangling link" {
			foreign := c.want == "not a record"
			r, err := rewrite.Estimate(ctx, image, rewrite.Options{})
			if err != nil || len(r.Notes) != 1 || strings.Contains(r.Notes[0], c.want) != foreign {
				t.Errorf("%s: estimate: %+v, %v", c.name, r, err)
			}
			_, err = rewrite.Compact(ctx, image, rewrite.Options{})
			if errors.Is(err, rewrite.ErrPending) == foreign || errors.Is(err, rewrite.ErrNotRecord) != foreign {
				t.Errorf("%s: compact: %v", c.name, err)
			}
			_, err = rewrite.Abandon(ctx, image, rewrite.Options{})
			if _, left := os.Lstat(record); (err != nil) != foreign || (left == nil) != foreign {
				t.Errorf("%s: abandon: %v, %v", c.name, err, left)
			}
		}
		if imgtest.SHA256File(t, image) != sum {
			t.Fatalf("%s: the image was changed", c.name)
		}
		os.Remove(record)
	}
}

// TestRecordOfAnotherLayer: who forgets --layer is told of it; and who has put
// another image on top goes on with the number that the layer has now.
func TestRecordOfAnotherLayer(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	small(t, base)
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
	if err := os.WriteFile(base+".compact", []byte(`{"version":1,"image":"base","layer":0}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, run := range []func() error{
		func() error { _, err := rewrite.Resume(t.Context(), top, rewrite.Options{}); return err },
		func() error { _, err := rewrite.Abandon(t.Context(), top, rewrite.Options{}); return err },
	} {
		if err := run(); !errors.Is(err, rewrite.ErrNotPending) || !strings.Contains(err.Error(), "--layer 1") {
			t.Errorf("%v", err)
		}
	}
	r, err := rewrite.Resume(t.Context(), top, rewrite.Options{Layer: 1})
	if err != nil || step(r, rewrite.PhaseZeros) != 64<<10 || exists(base+".compact") {
		t.Errorf("%+v, %v", r, err)
	}
	_, err = rewrite.Resume(t.Context(), top, rewrite.Options{Layer: 1})
	if !errors.Is(err, rewrite.ErrNotPending) || strings.Contains(err.Error(), "--layer") {
		t.Errorf("%v", err)
	}
}

// TestForeignRecordClosesNothing: the mark of an image in use is taken for that
// of the interrupted run only beside its own record. One of another run is
// removed nevertheless.
func TestForeignRecordClosesNothing(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	image := filepath.Join(t.TempDir(), "a")
	imgtest.QemuImg(t, "create", "-q", "-f", "parallels", image, "1M")
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	// m_DiskInUse of the header.
	_, err = f.WriteAt([]byte{0x59, 0x6e, 0x6f, 0x74}, 44)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"b", "a"} {
		wantErr := name == "b"
		sum := imgtest.SHA256File(t, image)
		if err := os.WriteFile(image+".compact", []byte(`{"version":1,"image":"`+name+`","layer":0}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := rewrite.Abandon(t.Context(), image, rewrite.Options{}); errors.Is(err, layers.ErrCorrupt) != wantErr {
			t.Errorf("record of %s: %v", name, err)
		}
		if wantErr != (imgtest.SHA256File(t, image) == sum) {
			t.Errorf("record of %s: the image was changed or not", name)
		}
		if exists(image + ".compact") {
			t.Errorf("record of %s: it stayed", name)
		}
	}
}

// TestRunningIsInUse: a run that is under way is not called an interrupted one.
func TestRunningIsInUse(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	image := filepath.Join(t.TempDir(), "a")
	small(t, image)
	met := 0
	_, err := rewrite.Compact(t.Context(), image, rewrite.Options{Progress: func(rewrite.Progress) {
		met++
		if _, err := rewrite.Compact(t.Context(), image, rewrite.Options{}); !errors.Is(err, layers.ErrInUse) {
			t.Errorf("%v", err)
		}
		if _, err := rewrite.Resume(t.Context(), image, rewrite.Options{}); !errors.Is(err, layers.ErrInUse) {
			t.Errorf("%v", err)
		}
	}})
	if err != nil || met == 0 {
		t.Errorf("%v, %d", err, met)
	}
	// Also on a lower layer.
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	small(t, base)
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
	met = 0
	_, err = rewrite.Compact(t.Context(), top, rewrite.Options{Layer: 1, Progress: func(rewrite.Progress) {
		met++
		for layer := range 2 {
			if _, err := rewrite.Compact(t.Context(), top, rewrite.Options{Layer: layer}); !errors.Is(err, layers.ErrInUse) {
				t.Errorf("layer %d: %v", layer, err)
			}
		}
	}})
	if err != nil || met == 0 {
		t.Errorf("%v, %d", err, met)
	}
}

// TestPendingIsNotTakenOver: who is told of an interrupted run has changed
// nothing, neither the mark of a ploop image in use nor its format extension,
// with which Resume goes on. One that is under way is not called interrupted.
func TestPendingIsNotTakenOver(t *testing.T) {
	const inUse, cluster = 0x746f6e59, 64 << 10
	for _, extension := range []bool{false, true} {
		p := damage.NewPloop(2, cluster, 16, 0, 3)
		// A cluster in no use that is a hole, which a takeover fills.
		at := int64(p.Append(1) * cluster)
		clear(p.B[at : at+cluster])
		p.Holes = []blockmap.Range{{Off: at, Len: cluster}}
		p.SetEntry(15, p.Append(16))
		if extension {
			p.AddExtension()
		}
		p.Put32(44, inUse)
		path := filepath.Join(t.TempDir(), "a")
		p.Write(t, path)
		if err := os.WriteFile(path+".compact", []byte(`{"version":1,"image":"a","layer":0}`), 0o600); err != nil {
			t.Fatal(err)
		}
		blocks := func() int64 {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			return st.Blocks
		}
		sum, was := imgtest.SHA256File(t, path), blocks()
		if _, err := rewrite.Compact(t.Context(), path, rewrite.Options{}); !errors.Is(err, rewrite.ErrPending) {
			t.Errorf("extension %v: %v", extension, err)
		}
		if imgtest.SHA256File(t, path) != sum || blocks() != was {
			t.Errorf("extension %v: the image was changed", extension)
		}
		met := 0
		_, err := rewrite.Resume(t.Context(), path, rewrite.Options{Progress: func(rewrite.Progress) {
			met++
			if _, err := rewrite.Compact(t.Context(), path, rewrite.Options{}); !errors.Is(err, layers.ErrInUse) {
				t.Errorf("extension %v: under way: %v", extension, err)
			}
		}})
		if err != nil || met == 0 {
			t.Errorf("extension %v: %v, %d", extension, err, met)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if kept := binary.LittleEndian.Uint64(b[56:]) != 0; kept != extension {
			t.Errorf("extension %v afterwards: %v", extension, kept)
		}
	}
}
