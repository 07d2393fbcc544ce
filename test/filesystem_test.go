package e2e

import (
	"bytes"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

const guestSize = 1 << 30

// guest is a filesystem of a virtual machine.
type guest struct {
	name  string
	mkfs  []string
	check []string // reads only, 0 is clean
}

var guests = []guest{
	{"ext4", []string{"mkfs.ext4", "-q", "-F"}, []string{"e2fsck", "-fn"}},
	{"xfs", []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-n"}},
}

func (g guest) run(t *testing.T, command []string, device string) {
	t.Helper()
	imgtest.Run(t, command[0], append(append([]string{}, command[1:]...), device)...)
}

// TestFilesystem lives through what an image is for: a filesystem made in it,
// a real tree copied into it, found again after a remount, deleted and
// trimmed, twice; and at every rest the checkers of the image and of the
// filesystem are content.
func TestFilesystem(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mount", "umount", "cp", "fstrim", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair")
	tree := goSource(t)
	for _, f := range formats {
		for _, g := range guests {
			t.Run(f.name+"/"+g.name, func(t *testing.T) { liveThrough(t, f, g, tree) })
		}
	}
}

// goSource is the tree that is copied: the source of the Go toolchain, or with
// -short a part of it.
func goSource(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	src := filepath.Join(strings.TrimSpace(string(out)), "src")
	if testing.Short() {
		src = filepath.Join(src, "runtime")
	}
	return src
}

func liveThrough(t *testing.T, f format, g guest, tree string) {
	image := f.create(t, workDir(t), guestSize, true)

	m := mountImage(t, image, "-w", "--loop")
	g.run(t, g.mkfs, m.loop)
	mnt, umount := mountGuest(t, m.loop, "rw")
	imgtest.Run(t, "cp", "-a", tree, filepath.Join(mnt, "tree"))
	imgtest.Run(t, "sync", "-f", mnt)
	umount()
	g.run(t, g.check, m.loop)
	m.unmount()
	f.check(t, image, false)

	// Everything is found again, read-only, and reading changes nothing.
	before := digests(t, f, image)
	m = mountImage(t, image, "--loop")
	mnt, umount = mountGuest(t, m.loop, "ro")
	sameTree(t, tree, filepath.Join(mnt, "tree"))
	umount()
	g.run(t, g.check, m.loop)
	m.unmount()
	if after := digests(t, f, image); before != after {
		t.Error("a read-only mount changed the image")
	}

	// Space comes back to the host, and not only the first time.
	m = mountImage(t, image, "-w", "--loop")
	mnt, umount = mountGuest(t, m.loop, "rw")
	for round := 1; round <= 2; round++ {
		full := usedAfterSync(t, f, image, m)
		imgtest.Run(t, "rm", "-rf", filepath.Join(mnt, "tree"))
		imgtest.Run(t, "sync", "-f", mnt)
		out := imgtest.Run(t, "fstrim", "-v", mnt)
		if free := usedAfterSync(t, f, image, m); free > full/2 {
			t.Errorf("round %d: %d bytes in use before deleting, %d after fstrim (%s)", round, full, free, bytes.TrimSpace(out))
		}
		if round == 1 {
			imgtest.Run(t, "cp", "-a", tree, filepath.Join(mnt, "tree"))
			imgtest.Run(t, "sync", "-f", mnt)
			sameTree(t, tree, filepath.Join(mnt, "tree"))
		}
	}
	umount()
	g.run(t, g.check, m.loop)
	m.unmount()
	f.check(t, image, false)
}

// usedAfterSync flushes the loop device, so that the image holds everything.
func usedAfterSync(t *testing.T, f format, image string, m *mounted) int64 {
	t.Helper()
	imgtest.Run(t, "sync", m.loop)
	imgtest.Run(t, "sync", m.file())
	return usedBytes(t, f, image)
}

// digests is the content of all files of a pile, as one string.
func digests(t *testing.T, f format, image string) string {
	t.Helper()
	var sums []string
	for _, im := range f.chain(t, image) {
		sums = append(sums, imgtest.SHA256File(t, im.Path))
	}
	return strings.Join(sums, " ")
}

// sameTree fails the test where two trees differ in names, types, modes,
// links or content.
func sameTree(t *testing.T, want, got string) {
	t.Helper()
	n := 0
	err := filepath.WalkDir(want, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(want, path)
		if err != nil {
			return err
		}
		other := filepath.Join(got, rel)
		a, err := os.Lstat(path)
		if err != nil {
			return err
		}
		b, err := os.Lstat(other)
		if err != nil {
			return err
		}
		if a.Mode() != b.Mode() {
			t.Errorf("%s: mode %v, want %v", rel, b.Mode(), a.Mode())
			return nil
		}
		switch {
		case d.IsDir():
			return nil
		case d.Type()&fs.ModeSymlink != 0:
			la, errA := os.Readlink(path)
			lb, errB := os.Readlink(other)
			if la != lb || errA != nil || errB != nil {
				t.Errorf("%s: link to %q, want %q (%v, %v)", rel, lb, la, errA, errB)
			}
			return nil
		}
		n++
		x, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		y, err := os.ReadFile(other)
		if err != nil {
			return err
		}
		if !bytes.Equal(x, y) {
			t.Errorf("%s: content differs", rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if a, b := countFiles(t, want), countFiles(t, got); a != b || n == 0 {
		t.Errorf("%d entries, want %d; %d files compared", b, a, n)
	}
}

func countFiles(t *testing.T, dir string) int {
	t.Helper()
	n := 0
	if err := filepath.WalkDir(dir, func(_ string, _ fs.DirEntry, err error) error { n++; return err }); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestScratchLeavesImageAlone mounts an ext4 whose journal wants replaying,
// read-write, without a byte of the image changing.
func TestScratchLeavesImageAlone(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "qemu-img", "dumpe2fs")
	dir := workDir(t)
	dirty := dirtyExt4(t, dir)
	for _, kind := range []struct{ name, format string }{{"raw", "raw"}, {"qcow2", "qcow2"}, {"ploop", "parallels"}} {
		t.Run(kind.name, func(t *testing.T) {
			image := filepath.Join(workDir(t), "dirty."+kind.name)
			imgtest.QemuImg(t, "convert", "-f", "raw", "-O", kind.format, dirty, image)
			before := imgtest.SHA256File(t, image)

			m := mountImage(t, image, "--scratch", "--loop", "--format", kind.name)
			mnt, umount := mountGuest(t, m.loop, "rw")
			for name, want := range map[string]string{"synced": "in the journal\n"} {
				got, err := os.ReadFile(filepath.Join(mnt, name))
				if err != nil || string(got) != want {
					t.Errorf("%s: %q, %v; want %q", name, got, err, want)
				}
			}
			fresh := imgtest.PatternBytes(9, 0, 8<<20)
			if err := os.WriteFile(filepath.Join(mnt, "fresh"), fresh, 0o644); err != nil {
				t.Fatal(err)
			}
			umount()
			mnt, umount = mountGuest(t, m.loop, "rw")
			got, err := os.ReadFile(filepath.Join(mnt, "fresh"))
			if err != nil {
				t.Fatal(err)
			}
			wantBytes(t, "a file written into the scratch layer", got, fresh)
			umount()
			m.unmount()

			if after := imgtest.SHA256File(t, image); after != before {
				t.Error("the image changed under --scratch")
			}
			m = mountImage(t, image, "--format", kind.name)
			if want, got := readRange(t, dirty, 0, 4<<20), readRange(t, m.file(), 0, 4<<20); !bytes.Equal(want, got) {
				t.Error("the scratch layer was not thrown away")
			}
			m.unmount()
		})
	}
}

// dirtyExt4 is a raw ext4 as a power cut leaves it: a file in its journal, and
// the mark that the journal has to be replayed.
func dirtyExt4(t *testing.T, dir string) string {
	t.Helper()
	live, dirty := filepath.Join(dir, "live.raw"), filepath.Join(dir, "dirty.raw")
	imgtest.Run(t, "truncate", "-s", "128M", live)
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", live)
	mnt, umount := mountGuest(t, live, "rw,loop")
	f, err := os.Create(filepath.Join(mnt, "synced"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(f, "in the journal\n"); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	imgtest.Run(t, "cp", "--sparse=always", live, dirty)
	umount()
	if out := imgtest.Run(t, "dumpe2fs", "-h", dirty); !strings.Contains(string(out), "needs_recovery") {
		t.Fatal("the sample's journal is not dirty: the test would show nothing")
	}
	return dirty
}

// TestPartitionsOfGuest mounts a filesystem from a partition view without a
// loop device over the whole disk.
func TestPartitionsOfGuest(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "sfdisk", "mkfs.ext4", "qemu-img")
	dir := workDir(t)
	raw := filepath.Join(dir, "disk.img")
	imgtest.Run(t, "truncate", "-s", "64M", raw)
	imgtest.Run(t, "sh", "-c", "printf 'label: gpt\nsize=8M\nsize=32M\n' | sfdisk -q "+raw)
	image := filepath.Join(dir, "disk.qcow2")
	imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", raw, image)

	m := mountImage(t, image, "-w", "--partitions")
	p2 := filepath.Join(m.dir, "p2")
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", p2)
	mnt, umount := mountGuest(t, p2, "rw,loop")
	if err := os.WriteFile(filepath.Join(mnt, "hello"), []byte("in a partition\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	umount()
	imgtest.Run(t, "e2fsck", "-fn", p2)
	m.unmount()

	// It lies where the table says: 1 MiB of alignment and 8 MiB of p1.
	m = mountImage(t, image)
	mnt, umount = mountGuest(t, m.file(), "ro,loop,offset=9437184")
	if got, err := os.ReadFile(filepath.Join(mnt, "hello")); err != nil || string(got) != "in a partition\n" {
		t.Errorf("hello: %q, %v", got, err)
	}
	umount()
	m.unmount()
}
