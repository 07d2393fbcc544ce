package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// compactDoc is what scripts read of image-compact --json.
type compactDoc struct {
	Version  int
	Action   string
	Complete bool
	Error    string
	Image    string
	Before   struct{ Apparent, Allocated int64 }
	After    *struct{ Apparent, Allocated int64 }
	Steps    []struct {
		Name    string
		Bytes   int64
		Skipped string
	}
	Reclaim int64
	Ideal   int64
	Moved   int64
	Guest   []struct {
		Name, Type, Code, Reason string
		Judged                   bool
		Free                     int64
		Replayed                 int64
	}
}

func (d *compactDoc) step(name string) int64 {
	for _, s := range d.Steps {
		if s.Name == name {
			return s.Bytes
		}
	}
	return -1
}

func compactJSON(t *testing.T, args ...string) *compactDoc {
	t.Helper()
	o := wantExit(t, 0, "image-compact", append([]string{"--json"}, args...)...)
	var d compactDoc
	if err := json.Unmarshal([]byte(o.stdout), &d); err != nil {
		t.Fatalf("%v\n%s", err, o.stdout)
	}
	if d.Version != 1 || !d.Complete || o.stderr != "" {
		t.Fatalf("image-compact %q: %s%s", args, o.stdout, o.stderr)
	}
	return &d
}

// kinds of images that one raw disk is made into.
var compactKinds = []struct{ name, format string }{{"raw", "raw"}, {"qcow2", "qcow2"}, {"ploop", "parallels"}}

// TestCompactJournalTrap: files that are only in the journal are not free
// space. The control is that the maps on the disk say that they are.
func TestCompactJournalTrap(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "qemu-img", "dumpe2fs", "debugfs", "e2fsck")
	const files = 20
	dir := workDir(t)
	live, dirty := filepath.Join(dir, "live.raw"), filepath.Join(dir, "dirty.raw")
	imgtest.Run(t, "truncate", "-s", "256M", live)
	// Without checksums, so that the control can change the journal.
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^metadata_csum", live)
	mnt, umount := mountGuest(t, live, "rw,loop")
	writePattern(t, filepath.Join(mnt, "old"), 99, 40<<20)
	umount()
	mnt, umount = mountGuest(t, live, "rw,loop")
	if err := os.Remove(filepath.Join(mnt, "old")); err != nil {
		t.Fatal(err)
	}
	want := func(n int) []byte { return imgtest.PatternBytes(uint64(n), 0, 50<<10) }
	for n := range files {
		f, err := os.Create(filepath.Join(mnt, fmt.Sprint("f", n)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(want(n)); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	imgtest.Run(t, "cp", "--sparse=always", live, dirty)
	umount()
	if out := imgtest.Run(t, "dumpe2fs", "-h", dirty); !bytes.Contains(out, []byte("needs_recovery")) {
		t.Fatal("the journal is not dirty: the test would show nothing")
	}
	found := findBlocks(t, dirty, files, func(n int) []byte { return want(n)[:4096] })
	var places []int64 // of blocks that the map on the disk calls free
	for n := range files {
		at, ok := found[n]
		if !ok {
			t.Fatalf("file %d is not on the disk", n)
		}
		_, out := imgtest.Try(t, "debugfs", "-R", fmt.Sprint("testb ", at/4096), dirty)
		if strings.Contains(out, "not in use") {
			places = append(places, at)
		}
	}
	if len(places) < files/2 {
		t.Fatalf("only %d of %d files lie in blocks that the map calls free: the test would show little", len(places), files)
	}
	t.Run("control", func(t *testing.T) { trapSprings(t, dirty, places) })
	for _, kind := range compactKinds {
		t.Run(kind.name, func(t *testing.T) {
			image := filepath.Join(workDir(t), "dirty."+kind.name)
			imgtest.QemuImg(t, "convert", "-f", "raw", "-O", kind.format, dirty, image)
			d := compactJSON(t, "--format", kind.name, image)
			if len(d.Guest) != 1 || !d.Guest[0].Judged || d.Guest[0].Replayed == 0 {
				t.Errorf("the guest: %+v", d.Guest)
			}
			if d.step("guest-free") < 20<<20 {
				t.Errorf("%d bytes of the deleted file came back", d.step("guest-free"))
			}
			m := mountImage(t, image, "--scratch", "--loop", "--format", kind.name)
			mnt, umount := mountGuest(t, m.loop, "rw")
			for n := range files {
				got, err := os.ReadFile(filepath.Join(mnt, fmt.Sprint("f", n)))
				if err != nil || !bytes.Equal(got, want(n)) {
					t.Errorf("file %d: %v, %d bytes, and not as it was written", n, err, len(got))
				}
			}
			umount()
			imgtest.Run(t, "e2fsck", "-fn", m.loop)
			m.unmount()
		})
	}
}

// writePattern makes a file without holding it in memory: what the tests take is
// counted as that of programs that they start.
func writePattern(t *testing.T, path string, seed uint64, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const piece = 1 << 20
	for at := int64(0); at < size; at += piece {
		if _, err := f.Write(imgtest.PatternBytes(seed, at, int(min(piece, size-at)))); err != nil {
			t.Fatal(err)
		}
	}
}

// findBlocks tells where in a file blocks of 4 KiB lie that begin with what
// block returns.
func findBlocks(t *testing.T, path string, n int, block func(int) []byte) map[int]int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	wanted := map[string]int{}
	for i := range n {
		wanted[string(block(i))] = i
	}
	found := map[int]int64{}
	r, b := bufio.NewReaderSize(f, 1<<20), make([]byte, 4096)
	for at := int64(0); ; at += 4096 {
		if _, err := io.ReadFull(r, b); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return found
		} else if err != nil {
			t.Fatal(err)
		}
		if i, ok := wanted[string(b)]; ok {
			found[i] = at
		}
	}
}

// trapSprings: once the journal is made to look empty the maps on the disk are
// believed, and the files are lost.
func trapSprings(t *testing.T, dirty string, places []int64) {
	image := filepath.Join(workDir(t), "believed.raw")
	imgtest.Run(t, "cp", "--sparse=always", dirty, image)
	imgtest.Run(t, "debugfs", "-w", "-R", "feature -needs_recovery", image)
	first, _, _ := strings.Cut(strings.TrimSpace(string(imgtest.Run(t, "debugfs", "-R", "blocks <8>", image))), " ")
	block, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	writeRange(t, image, block*4096+28, make([]byte, 4)) // s_start
	compactJSON(t, "--format", "raw", image)
	lost := 0
	for _, at := range places {
		if !bytes.Equal(readRange(t, image, at, 4096), readRange(t, dirty, at, 4096)) {
			lost++
		}
	}
	if lost < len(places) {
		t.Errorf("%d of %d files are lost: the test does not show what replaying is for", lost, len(places))
	}
}

// TestCompactContent: a guest with a real tree of which half was deleted. What
// is left reads as before, in the eyes of everybody, and the space is gone.
func TestCompactContent(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "cp", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "qemu-img", "qemu-io")
	tree := filepath.Join(goSource(t), "encoding")
	if testing.Short() {
		tree = filepath.Join(goSource(t), "debug")
	}
	for _, f := range formats {
		for _, g := range guests {
			for _, deep := range []bool{false, true} {
				name := f.name + "/" + g.name
				if deep {
					name += "/layers"
				}
				t.Run(name, func(t *testing.T) { compactContent(t, f, g, tree, deep) })
			}
		}
	}
}

func compactContent(t *testing.T, f format, g guest, tree string, deep bool) {
	image := f.create(t, workDir(t), guestSize, deep)
	m := mountImage(t, image, "-w", "--loop")
	g.run(t, g.mkfs, m.loop)
	mnt, umount := mountGuest(t, m.loop, "rw")
	for _, name := range []string{"gone1", "kept1", "gone2", "kept2"} {
		imgtest.Run(t, "cp", "-a", tree, filepath.Join(mnt, name))
		writePattern(t, filepath.Join(mnt, name, "big"), uint64(len(name)), 12<<20)
		imgtest.Run(t, "sync", "-f", mnt)
	}
	imgtest.Run(t, "rm", "-rf", filepath.Join(mnt, "gone1"), filepath.Join(mnt, "gone2"))
	umount()
	m.unmount()
	f.check(t, image, false)

	before := digests(t, f, image)
	estimate := compactJSON(t, "-n", image)
	if digests(t, f, image) != before {
		t.Fatal("the estimate changed the image")
	}
	under := f.chain(t, image)[1:]
	var parents []string
	for _, p := range under {
		parents = append(parents, imgtest.SHA256File(t, p.Path))
	}

	done := compactJSON(t, image)
	f.check(t, image, false)
	for k, p := range under {
		if imgtest.SHA256File(t, p.Path) != parents[k] {
			t.Errorf("%s was changed: it is a parent", p.Path)
		}
	}
	if done.After == nil || done.After.Apparent > done.Before.Apparent-20<<20 {
		t.Errorf("before %+v, after %+v", done.Before, done.After)
	}
	if done.step("guest-free") != estimate.step("guest-free") || done.Reclaim < 20<<20 {
		t.Errorf("estimated %+v, done %+v", estimate.Steps, done.Steps)
	}
	if off := done.After.Apparent - estimate.Ideal; off < 0 || off > estimate.Ideal/50 {
		t.Errorf("the ideal is %d, reached were %d", estimate.Ideal, done.After.Apparent)
	}
	for _, a := range done.Guest {
		if !a.Judged {
			t.Errorf("not judged: %+v", a)
		}
	}

	m = mountImage(t, image, "--loop")
	mnt, umount = mountGuest(t, m.loop, "ro")
	for _, name := range []string{"kept1", "kept2"} {
		sameButBig(t, tree, filepath.Join(mnt, name))
		got, err := os.ReadFile(filepath.Join(mnt, name, "big"))
		if err != nil || !bytes.Equal(got, imgtest.PatternBytes(uint64(len(name)), 0, 12<<20)) {
			t.Errorf("%s/big: %v, and not as it was written", name, err)
		}
	}
	umount()
	g.run(t, g.check, m.loop)
	m.unmount()

	again := compactJSON(t, image)
	if again.Moved > 1<<20 || again.Reclaim > 1<<20 {
		t.Errorf("there was more to do: %+v", again)
	}
}

// sameButBig is sameTree with a file more.
func sameButBig(t *testing.T, want, got string) {
	t.Helper()
	aside := filepath.Join(t.TempDir(), "tree")
	imgtest.Run(t, "cp", "-a", got, aside)
	if err := os.Remove(filepath.Join(aside, "big")); err != nil {
		t.Fatal(err)
	}
	sameTree(t, want, aside)
}

// TestCompactKeepsSnapshots: internal snapshots and bitmaps of a qcow2 image
// read as before, and so do compressed clusters.
func TestCompactKeepsSnapshots(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, o := range []string{"cluster_size=64k", "cluster_size=4k", "cluster_size=64k,extended_l2=on", "cluster_size=64k,compat=0.10"} {
		t.Run(o, func(t *testing.T) {
			dir := workDir(t)
			image := filepath.Join(dir, "a.qcow2")
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", o, image, "64M")
			imgtest.QemuIO(t, "qcow2", image, "write -P 1 0 8M", "write -c -P 2 8M 64k", "write -c -P 3 9M 128k")
			imgtest.QemuImg(t, "snapshot", "-c", "s1", image)
			imgtest.QemuIO(t, "qcow2", image, "write -P 4 2M 4M", "write -P 0 16M 8M", "write -P 5 30M 3M")
			if !strings.Contains(o, "compat") {
				imgtest.QemuImg(t, "bitmap", "--add", image, "b1")
				imgtest.QemuIO(t, "qcow2", image, "write -P 6 31M 1M")
			}
			imgtest.QemuImg(t, "snapshot", "-c", "s2", image)
			imgtest.QemuIO(t, "qcow2", image, "write -P 0 30M 3M", "discard 4M 1M")
			shown := func() string {
				all := ""
				for _, s := range []string{"", "s1", "s2"} {
					raw := filepath.Join(dir, "raw"+s)
					args := []string{"convert", "-f", "qcow2", "-O", "raw"}
					if s != "" {
						args = append(args, "-l", s)
					}
					imgtest.QemuImg(t, append(args, image, raw)...)
					all += imgtest.SHA256File(t, raw) + " "
				}
				return all + bitmapsOf(t, image)
			}
			before := shown()
			done := compactJSON(t, image)
			checkQcow2(t, image, false)
			if after := shown(); after != before {
				t.Errorf("before %s\nafter  %s", before, after)
			}
			if done.After.Apparent >= done.Before.Apparent {
				t.Errorf("before %+v, after %+v", done.Before, done.After)
			}
		})
	}
}

// bitmapsOf is what qemu-img says of the bitmaps of an image.
func bitmapsOf(t *testing.T, image string) string {
	var info struct {
		Specific struct {
			Data struct {
				Bitmaps json.RawMessage `json:"bitmaps"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(imgtest.QemuImg(t, "info", "--output=json", image), &info); err != nil {
		t.Fatal(err)
	}
	return string(info.Specific.Data.Bitmaps)
}

// TestCompactTo makes a copy: the image stays, the copy is compact, and what
// exists is not replaced.
func TestCompactTo(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := workDir(t)
	image, copied := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "new", "b.qcow2")
	if err := os.Mkdir(filepath.Dir(copied), 0o755); err != nil {
		t.Fatal(err)
	}
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", image, "64M")
	imgtest.QemuIO(t, "qcow2", image, "write -P 0 0 8M", "write -P 7 8M 2M")
	before := imgtest.SHA256File(t, image)
	d := compactJSON(t, "--to", copied, image)
	if d.After == nil || d.After.Apparent > 4<<20 || d.Image != copied {
		t.Errorf("%+v", d)
	}
	checkQcow2(t, copied, false)
	imgtest.QemuIO(t, "qcow2", copied, "read -P 0 0 8M", "read -P 7 8M 2M")
	if imgtest.SHA256File(t, image) != before {
		t.Error("the image was changed")
	}
	first := imgtest.SHA256File(t, copied)
	if o := wantExit(t, 1, "image-compact", "--to", copied, image); !strings.Contains(o.stderr, "not overwritten") {
		t.Error(o.stderr)
	}
	if imgtest.SHA256File(t, copied) != first {
		t.Error("the copy was replaced")
	}
	entries, err := os.ReadDir(filepath.Dir(copied))
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v: want the copy alone", entries, err)
	}
}

// TestCompactProgress: --progress=plain says how far it has come.
func TestCompactProgress(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	image := filepath.Join(workDir(t), "a.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", image, "256M")
	imgtest.QemuIO(t, "qcow2", image, "write -P 0 0 64M", "write -P 7 64M 64M")
	o := wantExit(t, 0, "image-compact", "--progress", "plain", image)
	lines := regexp.MustCompile(`(?m)^[a-z ]+: (\d+)%`).FindAllStringSubmatch(o.stderr, -1)
	if len(lines) < 5 {
		t.Errorf("progress:\n%s", o.stderr)
	}
	for _, l := range lines {
		if n, err := strconv.Atoi(l[1]); err != nil || n > 100 {
			t.Errorf("progress %q", l[0])
		}
	}
}
