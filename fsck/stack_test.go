package fsck

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// codesOf checks a stack and lists what was found, as "code file".
func codesOf(t *testing.T, path string, o open.Options) []string {
	t.Helper()
	s, err := FindStack(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	col := NewCollector(CollectorOptions{File: path})
	if err := s.Check(t.Context(), col); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range col.Sum(Stats{}).Findings {
		got = append(got, f.Code.Name+" "+filepath.Base(f.Place.File))
		if f.Text == "" {
			t.Errorf("%s: no text", f.Code)
		}
	}
	slices.Sort(got)
	return got
}

func wantCodes(t *testing.T, got []string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
}

// older makes a file an hour older than it is.
func older(t *testing.T, paths ...string) {
	t.Helper()
	for _, p := range paths {
		then := time.Now().Add(-time.Hour)
		if err := os.Chtimes(p, then, then); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStackQcow2(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	qemu := func(t *testing.T, args ...string) { t.Helper(); imgtest.QemuImg(t, args...) }
	t.Run("clean", func(t *testing.T) {
		t.Chdir(t.TempDir())
		qemu(t, "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
		qemu(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
		older(t, "base.qcow2")
		wantCodes(t, codesOf(t, "top.qcow2", open.Options{}))
		wantCodes(t, codesOf(t, "base.qcow2", open.Options{}), "stack.top.is-base base.qcow2")
		older(t, "top.qcow2")
		if err := os.Chtimes("base.qcow2", time.Now(), time.Now()); err != nil {
			t.Fatal(err)
		}
		wantCodes(t, codesOf(t, "top.qcow2", open.Options{}), "stack.parent.newer base.qcow2")
	})
	t.Run("sizes", func(t *testing.T) {
		t.Chdir(t.TempDir())
		qemu(t, "create", "-q", "-f", "qcow2", "base.qcow2", "2M")
		qemu(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2", "1M")
		qemu(t, "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "3M")
		older(t, "base.qcow2", "mid.qcow2")
		if err := os.Chtimes("base.qcow2", time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		wantCodes(t, codesOf(t, "top.qcow2", open.Options{}), "stack.parent.longer base.qcow2", "stack.parent.shorter mid.qcow2")
	})
	t.Run("missing", func(t *testing.T) {
		t.Chdir(t.TempDir())
		qemu(t, "create", "-q", "-f", "qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2", "top.qcow2", "1M")
		wantCodes(t, codesOf(t, "top.qcow2", open.Options{}), "stack.parent.missing top.qcow2")
	})
	t.Run("loop", func(t *testing.T) {
		t.Chdir(t.TempDir())
		qemu(t, "create", "-q", "-f", "qcow2", "-u", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2", "1M")
		qemu(t, "create", "-q", "-f", "qcow2", "-u", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "1M")
		older(t, "a.qcow2", "b.qcow2")
		got := codesOf(t, "a.qcow2", open.Options{})
		if !slices.Contains(got, "stack.parent.cycle a.qcow2") {
			t.Error(got)
		}
	})
	t.Run("format", func(t *testing.T) {
		t.Chdir(t.TempDir())
		qemu(t, "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
		qemu(t, "create", "-q", "-f", "raw", "base.raw", "1M")
		older(t, "base.qcow2", "base.raw")
		qemu(t, "create", "-q", "-f", "qcow2", "-u", "-b", "base.qcow2", "-F", "raw", "doubt.qcow2", "1M")
		wantCodes(t, codesOf(t, "doubt.qcow2", open.Options{}), "stack.parent.not-followed base.qcow2")
		qemu(t, "create", "-q", "-f", "qcow2", "-u", "-b", "base.raw", "-F", "qcow2", "wrong.qcow2", "1M")
		wantCodes(t, codesOf(t, "wrong.qcow2", open.Options{}), "stack.parent.wrong-format base.raw")
	})
	t.Run("outside", func(t *testing.T) {
		dir := t.TempDir()
		t.Chdir(dir)
		if err := os.Mkdir("in", 0o700); err != nil {
			t.Fatal(err)
		}
		qemu(t, "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
		older(t, "base.qcow2")
		qemu(t, "create", "-q", "-f", "qcow2", "-b", dir+"/base.qcow2", "-F", "qcow2", "in/top.qcow2")
		wantCodes(t, codesOf(t, "in/top.qcow2", open.Options{}), "stack.parent.not-followed top.qcow2")
		wantCodes(t, codesOf(t, "in/top.qcow2", open.Options{AllowPaths: []string{dir}}))
	})
	t.Run("broken parent", func(t *testing.T) {
		t.Chdir(t.TempDir())
		qemu(t, "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
		qemu(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
		poke(t, "base.qcow2", 40, "\xff\xff\xff\xff\xff\xff\xff\xff") // L1 offset
		older(t, "base.qcow2")
		got := codesOf(t, "top.qcow2", open.Options{})
		if len(got) != 1 || !strings.HasSuffix(got[0], " base.qcow2") {
			t.Error(got)
		}
	})
}

func poke(t *testing.T, path string, off int64, b string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte(b), off)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestStackBundle(t *testing.T) {
	bundle := func(t *testing.T) (dir string) {
		t.Helper()
		dir = t.TempDir()
		if err := ploop.CreateBundle(t.Context(), dir, ploop.CreateOptions{Size: 4 << 20}); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	names := func(t *testing.T, dir string) (out []string) {
		t.Helper()
		s, err := FindStack(t.Context(), dir, open.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range s.Files() {
			out = append(out, fmt.Sprintf("%s %s %v", filepath.Base(f.Path), f.Format, f.Own))
		}
		return out
	}
	t.Run("clean", func(t *testing.T) {
		dir := bundle(t)
		wantCodes(t, codesOf(t, dir, open.Options{}))
		want := []string{"DiskDescriptor.xml ploop-descriptor true", "root.hds ploop true"}
		if got := names(t, dir); !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
		// Named alone, the image is all that is repaired.
		want[0] = "DiskDescriptor.xml ploop-descriptor false"
		if got := names(t, filepath.Join(dir, "root.hds")); !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
	})
	t.Run("child on the top", func(t *testing.T) {
		imgtest.Require(t, "qemu-img")
		dir := bundle(t)
		older(t, filepath.Join(dir, "root.hds"))
		top := filepath.Join(dir, "over.qcow2")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-u", "-b", "root.hds", "-F", "parallels", top, "4M")
		wantCodes(t, codesOf(t, top, open.Options{}), "stack.base.is-top DiskDescriptor.xml")
	})
	t.Run("broken descriptor", func(t *testing.T) {
		dir := bundle(t)
		if err := os.WriteFile(filepath.Join(dir, "DiskDescriptor.xml"), []byte("<Parallels"), 0o600); err != nil {
			t.Fatal(err)
		}
		want := []string{"DiskDescriptor.xml ploop-descriptor true"}
		if got := names(t, dir); !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
		want = []string{"DiskDescriptor.xml ploop-descriptor false", "root.hds ploop true"}
		if got := names(t, filepath.Join(dir, "root.hds")); !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
	})
}
