package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// hostDir is a directory on a fresh filesystem of the kind, of size bytes.
func hostDir(t *testing.T, size int64, mkfs ...string) string {
	t.Helper()
	imgtest.RequireRoot(t)
	imgtest.Require(t, mkfs[0])
	file := filepath.Join(workDir(t), "host.img")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	imgtest.Run(t, mkfs[0], append(mkfs[1:], file)...)
	dir, _ := mountGuest(t, file, "loop")
	return dir
}

// flatImages makes images of several kinds in dir.
func flatImages(t *testing.T, dir string) []string {
	t.Helper()
	const size = 24 << 20
	raw := filepath.Join(dir, "d.raw")
	imgtest.RawFile(t, raw, size, 256<<10, 3)
	images := []string{raw}
	add := func(name string, args ...string) {
		to := filepath.Join(dir, name)
		imgtest.QemuImg(t, append(append([]string{"convert", "-f", "raw", "-q"}, args...), raw, to)...)
		images = append(images, to)
	}
	add("c64k.qcow2", "-O", "qcow2")
	add("c512.qcow2", "-O", "qcow2", "-o", "cluster_size=512")
	add("packed.qcow2", "-O", "qcow2", "-c")
	add("d.hds", "-O", "parallels")
	chain := createQcow2(t, dir, size+100*512, true)
	imgtest.QemuIO(t, "qcow2", filepath.Join(dir, "base.qcow2"), "write -P 1 0 9M", "write -P 2 20M 3M")
	imgtest.QemuIO(t, "qcow2", filepath.Join(dir, "mid.qcow2"), "write -P 3 100k 3k", "write -z 8M 64k", "write -P 5 23M 1M")
	imgtest.QemuIO(t, "qcow2", chain, "write -P 4 5M 1536", "write -P 6 24M 50k")
	return append(images, chain)
}

// TestFlat shows every kind of image as a file that shares its storage, on the
// filesystems that can, and takes no room for it.
func TestFlat(t *testing.T) {
	for _, host := range [][]string{{"mkfs.xfs", "-q"}, {"mkfs.btrfs", "-q"}} {
		t.Run(host[0], func(t *testing.T) {
			dir := hostDir(t, 512<<20, host...)
			for _, image := range flatImages(t, dir) {
				t.Run(filepath.Base(image), func(t *testing.T) { flatOne(t, dir, image) })
			}
		})
	}
}

func flatOne(t *testing.T, dir, image string) {
	before := imgtest.SHA256File(t, image)
	m := mountImage(t, image)
	want := imgtest.SHA256File(t, m.file())
	m.unmount()

	m = mountImage(t, image, "--flat")
	if n := readBy(t, m); n > 1<<20 {
		t.Errorf("the server read %d bytes of a flat view", n)
	}
	if got := imgtest.SHA256File(t, m.file()); got != want {
		t.Errorf("flat view %s, served %s", got, want)
	}
	if o := runTool(t, "mount-image", "-w", image, mountPoint(t)); o.exit != 3 {
		t.Errorf("the image of a flat view is not locked: exit %d %s", o.exit, o.stderr)
	}
	m.unmount()

	for _, flags := range []string{"--flat --scratch", "--flat --scratch --passthrough=on --sandbox=off", "-o flat,scratch,loop"} {
		m = mountImage(t, image, strings.Fields(flags)...)
		if got := imgtest.SHA256File(t, m.file()); got != want {
			t.Errorf("%s: %s, want %s", flags, got, want)
		}
		p := imgtest.PatternBytes(5, 0, 64<<10)
		writeRange(t, m.file(), 3<<20+512, p)
		wantBytes(t, "written to the flat view", readRange(t, m.file(), 3<<20+512, len(p)), p)
		m.unmount()
	}
	if got := imgtest.SHA256File(t, image); got != before {
		t.Errorf("the image has changed: %s, was %s", got, before)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if strings.Contains(e.Name(), "scratch") {
			t.Errorf("%s was left", e.Name())
		}
	}
}

// TestFlatSpace: a flat view takes no storage to speak of.
func TestFlatSpace(t *testing.T) {
	dir := hostDir(t, 1<<30, "mkfs.xfs", "-q")
	image := createQcow2(t, dir, 1<<30, false)
	imgtest.QemuIO(t, "qcow2", image, "write -P 7 0 400M")
	imgtest.Run(t, "sync")
	free := func() int64 {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Bfree) * st.Bsize
	}
	before := free()
	m := mountImage(t, image, "--flat")
	if took := before - free(); took > 8<<20 {
		t.Errorf("the flat view of 400 MiB takes %d bytes", took)
	}
	m.unmount()
}

// TestFlatImpossible: without reflinks there is no flat view, and nothing is
// copied instead; writing to the image through one is refused.
func TestFlatImpossible(t *testing.T) {
	dir := hostDir(t, 64<<20, "mkfs.ext4", "-q")
	image := createQcow2(t, dir, 16<<20, false)
	imgtest.QemuIO(t, "qcow2", image, "write -P 7 0 4M")
	for _, flag := range []string{"--sandbox=auto", "--sandbox=off"} {
		o := wantExit(t, 1, "mount-image", "--flat", flag, image, mountPoint(t))
		if !strings.Contains(o.stderr, "reflinks") {
			t.Errorf("message %q", o.stderr)
		}
	}
	wantExit(t, 2, "mount-image", "--flat", "-w", image, mountPoint(t))
}

// TestFlatSpeed: a stack of 100,000 extents is there within a second on an
// idle machine; the test allows a busy one.
func TestFlatSpeed(t *testing.T) {
	dir := hostDir(t, 1<<30, "mkfs.xfs", "-q")
	image := filepath.Join(dir, "fragments.qcow2")
	const cluster, n = 4096, 50000
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image, "1G")
	m := mountImage(t, image, "-w")
	f, err := os.OpenFile(m.file(), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := imgtest.PatternBytes(1, 0, cluster)
	for i := range int64(n) { // every other cluster, backwards: no two are neighbours
		if _, err := f.WriteAt(p, (n-1-i)*2*cluster); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	m.unmount()
	start := time.Now()
	m = mountImage(t, image, "--flat")
	took := time.Since(start)
	t.Logf("%d extents in %v", n, took)
	if took > 10*time.Second {
		t.Errorf("a flat view of %d extents took %v", n, took)
	}
	m.unmount()
}

// TestCloneRange: what cannot be shared says so and changes nothing.
func TestCloneRange(t *testing.T) {
	dir := hostDir(t, 512<<20, "mkfs.xfs", "-q")
	open := func(path string) backend.File {
		f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	src, dst, other := open(filepath.Join(dir, "a")), open(filepath.Join(dir, "b")), open(filepath.Join(workDir(t), "c"))
	p := imgtest.PatternBytes(1, 0, 64<<10)
	for _, f := range []backend.File{src, other} {
		if _, err := f.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		src            backend.File
		srcOff, off, n int64
	}{{other, 0, 0, 4096}, {src, 512, 0, 4096}, {src, 0, 512, 4096}, {src, 0, 0, 100}, {src, 64 << 10, 0, 4096}, {backend.NewMem("m"), 0, 0, 4096}} {
		if err := backend.CloneRange(dst, c.src, c.srcOff, c.off, c.n); err == nil {
			t.Errorf("clone %d %d %d worked", c.srcOff, c.off, c.n)
		} else if !strings.Contains(err.Error(), "cannot share") {
			t.Error(err)
		}
	}
	if n, err := dst.Size(); n != 0 || err != nil {
		t.Errorf("size %d %v after clones that failed", n, err)
	}
	if err := backend.CloneRange(dst, src, 4096, 8192, 8192); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 8192)
	if _, err := dst.ReadAt(got, 8192); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, "cloned", got, p[4096:4096+8192])
}
