package btrfs

import (
	"bytes"
	"crypto/sha256"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

var (
	keyLine    = regexp.MustCompile(`item \d+ key \((\S+) ([A-Z_]+) (\d+)\)`)
	chunkLine  = regexp.MustCompile(`^\s+length (\d+) owner .* type (\S+)`)
	stripeLine = regexp.MustCompile(`^\s+stripe \d+ devid 1 offset (\d+)`)
)

func dump(t testing.TB, path, tree string) string {
	t.Helper()
	return string(imgtest.Run(t, "btrfs", "inspect-internal", "dump-tree", "-t", tree, path))
}

func number(t testing.TB, s string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// piece is a stripe of a chunk, as the chunk tree says.
type piece struct {
	start, n, at int64
	kind         string
}

func pieces(t testing.TB, path string) (all []piece) {
	t.Helper()
	var p piece
	for line := range strings.Lines(dump(t, path, "chunk")) {
		if m := keyLine.FindStringSubmatch(line); m != nil {
			p.start = number(t, m[3])
		} else if m := chunkLine.FindStringSubmatch(line); m != nil {
			p.n, p.kind = number(t, m[1]), m[2]
		} else if m := stripeLine.FindStringSubmatch(line); m != nil {
			p.at = number(t, m[1])
			all = append(all, p)
		}
	}
	return all
}

// oracle is what btrfs inspect-internal dump-tree leaves free: every extent
// is put where the chunk tree says that it lies.
func oracle(t testing.TB, path string, size int64) *blockmap.Set {
	t.Helper()
	var free blockmap.Set
	free.Add(0, size)
	pieces := pieces(t, path)
	node := int64(0)
	for line := range strings.Lines(string(imgtest.Run(t, "btrfs", "inspect-internal", "dump-super", path))) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "nodesize" {
			node = number(t, f[1])
		}
	}
	extents := 0
	for line := range strings.Lines(dump(t, path, "extent")) {
		m := keyLine.FindStringSubmatch(line)
		if m == nil || m[2] != "EXTENT_ITEM" && m[2] != "METADATA_ITEM" {
			continue
		}
		at, n := number(t, m[1]), number(t, m[3])
		if m[2] == "METADATA_ITEM" {
			n = node
		}
		extents++
		for _, p := range pieces {
			if at >= p.start && at+n <= p.start+p.n {
				free.Remove(at-p.start+p.at, n)
			}
		}
	}
	if extents == 0 || len(pieces) == 0 || node == 0 {
		t.Fatalf("dump-tree: %d extents, %d stripes, nodes of %d", extents, len(pieces), node)
	}
	for _, r := range reserved {
		free.Remove(r.start, r.end-r.start)
	}
	return &free
}

func mkfs(t testing.TB, size int64, args string) string {
	t.Helper()
	path := guesttest.Image(t, size)
	run(t, "mkfs.btrfs", append(append([]string{"-q", "-f"}, strings.Fields(args)...), path)...)
	return path
}

// run runs a program of btrfs-progs. These look whether their image is mounted
// and fail when a loop device of anybody else goes meanwhile.
func run(t testing.TB, name string, args ...string) {
	t.Helper()
	for range 10 {
		exit, out := imgtest.Try(t, name, args...)
		if exit == 0 {
			return
		}
		if !strings.Contains(out, "mount status") {
			t.Fatalf("%s %v: exit %d\n%s", name, args, exit, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
	imgtest.Run(t, name, args...)
}

var variants = []struct {
	name    string
	size    int64
	args    string
	options string
}{
	{"default", 128 << 20, "", ""},
	{"single", 120 << 20, "-m single -d single", ""},
	{"dup data", 240 << 20, "-m dup -d dup", ""},
	{"mixed", 64 << 20, "--mixed", ""},
	{"mixed dup", 160 << 20, "--mixed -m dup -d dup", ""},
	{"xxhash", 128 << 20, "--csum xxhash", ""},
	{"sha256", 128 << 20, "--csum sha256", ""},
	{"blake2", 128 << 20, "--csum blake2", ""},
	{"small nodes", 128 << 20, "-n 4096", ""},
	{"large nodes", 128 << 20, "-n 65536", ""},
	{"no free-space tree", 128 << 20, "-R ^free-space-tree", "nospace_cache"},
	{"space cache v1", 128 << 20, "-R ^free-space-tree", "space_cache=v1"},
	{"old", 128 << 20, "-O ^no-holes,^skinny-metadata,^extref -R ^free-space-tree", "nospace_cache"},
	{"compressed", 128 << 20, "", "compress-force=zstd"},
	{"no cow", 128 << 20, "", "nodatacow"},
	{"quota", 128 << 20, "-R quota", ""},
	{"metadata UUID", 128 << 20, "", ""},
}

func TestAgainstDumpTree(t *testing.T) {
	guesttest.Require(t, "mkfs.btrfs", "btrfs")
	for i, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := mkfs(t, v.size, v.args)
			if v.name == "metadata UUID" {
				run(t, "btrfstune", "-m", path)
			}
			guesttest.Exact(t, path, "new", Free, oracle(t, path, v.size))
			var options []string
			if v.options != "" {
				options = []string{v.options}
			}
			dir, umount := guesttest.Mount(t, path, options...)
			guesttest.Age(t, dir, uint64(i), 60, v.size/200)
			run(t, "btrfs", "subvolume", "snapshot", dir, dir+"/snapshot")
			guesttest.Age(t, dir, uint64(i)+100, 40, v.size/200)
			umount()
			guesttest.Exact(t, path, "aged", Free, oracle(t, path, v.size))
			dir, umount = guesttest.Mount(t, path, "ro")
			before := guesttest.Tree(t, dir)
			umount()
			got, _, err := guesttest.Judge(t, path, Free)
			if err != nil {
				t.Fatal(err)
			}
			guesttest.Trash(t, path, got)
			run(t, "btrfs", "check", "--check-data-csum", path)
			dir, umount = guesttest.Mount(t, path, options...)
			guesttest.SameTree(t, guesttest.Tree(t, dir), before)
			umount()
		})
	}
}

// A tree of many levels, and free space in bitmaps.
func TestFragmented(t *testing.T) {
	guesttest.Require(t, "mkfs.btrfs", "btrfs")
	const size = 256 << 20
	path := mkfs(t, size, "-n 4096 -m single")
	dir, umount := guesttest.Mount(t, path, "max_inline=0")
	for i := range 6000 {
		guesttest.Write(dir, "f"+strconv.Itoa(i), 1, 4096)
	}
	imgtest.Run(t, "sync", "-f", dir)
	for i := 0; i < 6000; i += 2 {
		if err := os.Remove(dir + "/f" + strconv.Itoa(i)); err != nil {
			t.Fatal(err)
		}
	}
	umount()
	if d := dump(t, path, "10"); !strings.Contains(d, "FREE_SPACE_BITMAP") || !strings.Contains(d, "FREE_SPACE_EXTENT") {
		t.Fatal("the filesystem has no bitmaps, or only bitmaps")
	}
	guesttest.Exact(t, path, "fragmented", Free, oracle(t, path, size))
}

// What is called free is what the kernel discards, but for what its last
// commits use and release, and for groups of metadata, which fstrim leaves
// alone.
func TestAgainstFstrim(t *testing.T) {
	guesttest.Require(t, "mkfs.btrfs", "fstrim", "qemu-img")
	const size = 128 << 20
	path := guesttest.Image(t, size)
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xaa}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.btrfs", "-q", "-f", "-K", path)
	dir, umount := guesttest.Mount(t, path, "nodiscard")
	guesttest.Age(t, dir, 7, 120, 1_000_000)
	imgtest.Run(t, "fstrim", dir)
	umount()
	var holes blockmap.Set
	holes.Add(0, size)
	for _, e := range imgtest.QemuMap(t, "raw", path) {
		if e.Data {
			holes.Remove(e.Start, e.Length)
		}
	}
	got, _, err := guesttest.Judge(t, path, Free)
	if err != nil {
		t.Fatal(err)
	}
	missed, extra := outside(&holes, got), int64(0)
	for _, p := range pieces(t, path) {
		if strings.Contains(p.kind, "METADATA") {
			holes.Add(p.at, p.n)
		}
	}
	extra = outside(got, &holes)
	if missed > 2<<20 || extra > 2<<20 || holes.Len() < size/2 {
		t.Errorf("the kernel discarded %d bytes; %d of them are not called free, and %d others are", holes.Len(), missed, extra)
	}
}

// outside is how much of a is not in b.
func outside(a, b *blockmap.Set) (n int64) {
	for r := range a.Ranges() {
		for g := range b.Gaps(r.Off, r.Len) {
			n += g.Len
		}
	}
	return n
}

// The trap: files are synced, and the image is copied before the next commit:
// a log tree has them. Whatever is called free in such a copy, and in one
// without a log tree, can be thrown away.
func TestMounted(t *testing.T) {
	guesttest.Require(t, "mkfs.btrfs", "btrfs")
	for _, args := range []string{"", "-n 4096 -m single", "--mixed"} {
		t.Run(args, func(t *testing.T) {
			path := mkfs(t, 128<<20, args)
			dir, umount := guesttest.Mount(t, path, "commit=300")
			guesttest.Age(t, dir, 1, 50, 500_000) // ends with a commit
			clean := guesttest.Copy(t, path)
			before := guesttest.Tree(t, dir)
			for i := range 40 {
				sync(t, dir, "synced"+strconv.Itoa(i), imgtest.PatternBytes(uint64(i), 0, 1000+i*5000))
			}
			logged := guesttest.Copy(t, path)
			after := guesttest.Tree(t, dir)
			umount()
			if regexp.MustCompile(`log_root\s+0\n`).Match(imgtest.Run(t, "btrfs", "inspect-internal", "dump-super", logged)) {
				t.Fatal("there is no log tree")
			}
			for path, want := range map[string]map[string][sha256.Size]byte{clean: before, logged: after} {
				got, _, err := guesttest.Judge(t, path, Free)
				if err != nil || got.Len() < 48<<20 {
					t.Fatalf("%v, %d bytes", err, got.Len())
				}
				guesttest.Inside(t, got, oracle(t, path, 128<<20))
				guesttest.Trash(t, path, got)
				dir, umount := guesttest.Mount(t, path)
				guesttest.SameTree(t, guesttest.Tree(t, dir), want)
				umount()
			}
			run(t, "btrfs", "check", logged)
		})
	}
}

// sync writes a file and syncs it alone.
func sync(t testing.TB, dir, name string, b []byte) {
	t.Helper()
	f, err := os.Create(dir + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// Without the log trees, the same copy would lose what was synced: the test
// above notices what it is for.
func TestLogTreeMatters(t *testing.T) {
	guesttest.Require(t, "mkfs.btrfs", "btrfs")
	path := mkfs(t, 128<<20, "")
	dir, umount := guesttest.Mount(t, path, "commit=300")
	guesttest.Age(t, dir, 1, 10, 500_000)
	sync(t, dir, "synced", imgtest.PatternBytes(1, 0, 300_000))
	logged := guesttest.Copy(t, path)
	umount()
	b, err := os.ReadFile(logged)
	if err != nil {
		t.Fatal(err)
	}
	with, _, err := guesttest.JudgeAt(bytes.NewReader(b), int64(len(b)), Free)
	if err != nil {
		t.Fatal(err)
	}
	s := b[superOffset:][:superSize]
	clear(s[96:104])
	resum(s)
	without, _, err := guesttest.JudgeAt(bytes.NewReader(b), int64(len(b)), Free)
	if err != nil || outside(without, with) < 300_000 || outside(with, without) != 0 {
		t.Errorf("%v: %d bytes more are free without the log", err, outside(without, with))
	}
}
