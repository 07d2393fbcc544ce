package open_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// bundle makes one with two deltas over its base, each with content, and
// returns its directory, its images top first and what the disk holds.
func bundle(t *testing.T, mode string) (dir string, images []imgtest.Image, want []byte) {
	imgtest.RequirePloop(t)
	dir = t.TempDir()
	xml := filepath.Join(dir, ploop.DescriptorName)
	imgtest.PloopBundle(t, dir, mode, 2, 8*mib, 0)
	want = make([]byte, 8*mib)
	for i := range 3 {
		if i > 0 {
			imgtest.PloopRun(t, "snapshot", xml)
		}
		p := imgtest.PatternBytes(uint64(i), 0, 1_500_000)
		off := int64(i * 1_000_000)
		write(t, dir, open.Options{}, off, p)
		copy(want[off:], p)
	}
	return dir, imgtest.PloopChain(t, xml), want
}

func TestBundle(t *testing.T) {
	for _, mode := range []string{"expanded", "raw"} {
		t.Run(mode, func(t *testing.T) {
			dir, images, want := bundle(t, mode)
			if len(images) != 3 {
				t.Fatalf("%d images", len(images))
			}
			for _, path := range []string{dir, filepath.Join(dir, ploop.DescriptorName), images[0].Path} {
				s := mustOpen(t, path, open.Options{})
				if len(s.Layers()) != 3 || !bytes.Equal(content(t, s), want) {
					t.Errorf("%s: %d layers, or wrong content", path, len(s.Layers()))
				}
			}
			middle := mustOpen(t, images[1].Path, open.Options{})
			if len(middle.Layers()) != 2 || bytes.Equal(content(t, middle), want) {
				t.Errorf("the middle image shows %d layers, or the content of the top", len(middle.Layers()))
			}
			alone := mustOpen(t, images[0].Path, open.Options{Format: "ploop"})
			if len(alone.Layers()) != 1 {
				t.Errorf("with the format stated: %d layers", len(alone.Layers()))
			}
			report, err := open.Inspect(context.Background(), dir, open.Options{}, nil)
			if err != nil || len(report.Snapshots) != 3 {
				t.Fatalf("%+v, %v", report, err)
			}
			for _, snap := range report.Snapshots {
				s := mustOpen(t, dir, open.Options{Snapshot: strings.Trim(snap.ID, "{}")})
				if snap.Current != bytes.Equal(content(t, s), want) {
					t.Errorf("snapshot %s: current %v, but its content says otherwise", snap.ID, snap.Current)
				}
				refuses(t, dir, open.Options{Snapshot: snap.ID, Writable: true}, layers.ErrUnsupported)
			}
		})
	}
}

func TestBundleIsWrittenOnlyAtItsTop(t *testing.T) {
	dir, images, _ := bundle(t, "expanded")
	for _, img := range images[1:] {
		refuses(t, img.Path, open.Options{Writable: true}, layers.ErrUnsupported, "top")
	}
	s, err := open.Open(context.Background(), images[0].Path, open.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	refuses(t, dir, open.Options{}, layers.ErrInUse)
	refuses(t, dir, open.Options{Writable: true}, layers.ErrInUse)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// An image that the descriptor does not name stands alone.
	lone := filepath.Join(dir, "lone.hds")
	f, err := backend.Open(lone, backend.Options{Writable: true, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := ploop.Create(context.Background(), f, ploop.CreateOptions{Size: mib}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if s := mustOpen(t, lone, open.Options{Writable: true}); len(s.Layers()) != 1 {
		t.Errorf("%d layers", len(s.Layers()))
	}
}

// An image on which others of its bundle stand is written by who says that he
// means that, and by its GUID, so that its parents are there.
func TestBundleIsWrittenBelow(t *testing.T) {
	dir, images, _ := bundle(t, "expanded")
	trace, err := open.Follow(context.Background(), dir, open.Options{})
	if err != nil || trace.Err != nil {
		t.Fatal(err, trace.Err)
	}
	for i, at := range trace.Images {
		if at.Path != images[i].Path || at.Descriptor != filepath.Join(dir, "DiskDescriptor.xml") || at.GUID == "" {
			t.Fatalf("layer %d: %+v", i, at)
		}
		o := open.Options{Writable: true, Snapshot: at.GUID}
		refuses(t, dir, o, layers.ErrUnsupported, "snapshot")
		o.Lower = true
		s, err := open.Open(context.Background(), at.Descriptor, o)
		if err != nil {
			t.Fatal(err)
		}
		if l := s.Layers(); len(l) != len(images)-i || l[0].Data().Name() != at.Path {
			t.Errorf("layer %d: %d layers, the top is %s", i, len(l), l[0].Data().Name())
		}
		refuses(t, dir, open.Options{}, layers.ErrInUse)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// Snapshots inside an image are something else.
	qcow2 := filepath.Join(t.TempDir(), "image.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", qcow2, "1M")
	imgtest.QemuImg(t, "snapshot", "-c", "one", qcow2)
	refuses(t, qcow2, open.Options{Writable: true, Snapshot: "one", Lower: true}, layers.ErrUnsupported, "snapshot")
}

// A descriptor comes with the image: what it names is policed in the same way.
func TestHostileBundle(t *testing.T) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	fresh := func(change func(xml string) string) string {
		dir := t.TempDir()
		if err := ploop.CreateBundle(context.Background(), dir, ploop.CreateOptions{Size: 4 * mib}); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, ploop.DescriptorName)
		b := mustRead(t, path)
		if err := os.WriteFile(path, []byte(change(string(b))), 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	file := func(name string) func(string) string {
		return func(xml string) string { return strings.ReplaceAll(xml, ploop.RootName, name) }
	}
	for _, name := range []string{secret, "../x", "/etc/passwd", "/proc/self/mem", "/dev/zero"} {
		for _, o := range []open.Options{{}, {Writable: true}} {
			refuses(t, fresh(file(name)), o, layers.ErrPolicy, "--allow-path")
		}
	}
	refuses(t, fresh(file("json:{}")), open.Options{}, layers.ErrPolicy)
	refuses(t, fresh(file(ploop.DescriptorName)), open.Options{}, layers.ErrFormat)
	refuses(t, fresh(func(string) string { return "<x/>" }), open.Options{}, layers.ErrFormat)
	refuses(t, fresh(func(string) string { return "" }), open.Options{}, layers.ErrFormat)
	refuses(t, fresh(func(s string) string {
		return `<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>` + s
	}), open.Options{}, layers.ErrFormat)
	refuses(t, fresh(func(s string) string { return strings.Repeat("<a>", 1<<18) + s }), open.Options{}, layers.ErrFormat)
	// A descriptor that leads out: only who names it means it.
	away, link := fresh(func(s string) string { return s }), t.TempDir()
	for _, name := range []string{ploop.DescriptorName, ploop.RootName} {
		b := mustRead(t, filepath.Join(away, name))
		if name == ploop.RootName {
			if err := os.WriteFile(filepath.Join(link, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		} else if err := os.Symlink(filepath.Join(away, name), filepath.Join(link, name)); err != nil {
			t.Fatal(err)
		}
	}
	refuses(t, link, open.Options{}, layers.ErrPolicy, "--allow-path")
	refuses(t, filepath.Join(link, ploop.RootName), open.Options{}, layers.ErrPolicy, "--allow-path")
	mustOpen(t, link, open.Options{AllowPaths: []string{away}})
	mustOpen(t, filepath.Join(link, ploop.DescriptorName), open.Options{})
	fifo := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(fifo, ploop.DescriptorName), 0o600); err != nil {
		t.Fatal(err)
	}
	refuses(t, fifo, open.Options{}, layers.ErrFormat, "regular file")
}
