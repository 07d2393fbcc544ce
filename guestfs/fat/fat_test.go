package fat

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

func mkfs(t testing.TB, size int64, args string) string {
	t.Helper()
	path := guesttest.Image(t, size)
	imgtest.Run(t, "mkfs.fat", append(strings.Fields(args), path)...)
	return path
}

// age creates and deletes files with mtools, and returns their names and
// content.
func age(t testing.TB, path string, seed uint64, largest int64) map[string][]byte {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 4))
	dir := t.TempDir()
	files := map[string][]byte{}
	mtool := func(name string, args ...string) { imgtest.Run(t, name, append([]string{"-i", path}, args...)...) }
	for round := range 4 {
		sub := fmt.Sprintf("::/d%d", round)
		mtool("mmd", sub)
		var local, gone []string
		for i := range 24 {
			name := fmt.Sprintf("a name that is long %d-%d", round, i)
			b := imgtest.PatternBytes(seed*1000+uint64(i), 0, int(rng.Int64N(largest)))
			files[sub+"/"+name] = b
			local = append(local, filepath.Join(dir, name))
			if err := os.WriteFile(local[i], b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		mtool("mcopy", append(local, sub)...)
		for name := range files {
			if rng.IntN(2) == 0 {
				gone = append(gone, name)
				delete(files, name)
			}
		}
		if len(gone) > 0 {
			mtool("mdel", gone...)
		}
	}
	return files
}

var (
	pieces = regexp.MustCompile(`<(\d+)(?:-(\d+))?>`)
	counts = regexp.MustCompile(`(\d+)/(\d+) clusters`)
)

// oracle is what is in no file by mshowfat, and the free bytes that fsck.fat
// counts.
func oracle(t testing.TB, path string, files map[string][]byte) (free *blockmap.Set, bytes int64) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	g, err := decode(b, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	m := counts.FindStringSubmatch(string(imgtest.Run(t, "fsck.fat", "-n", path)))
	if m == nil {
		t.Fatal("fsck.fat counts no clusters")
	}
	used, _ := strconv.ParseInt(m[1], 10, 64)
	all, _ := strconv.ParseInt(m[2], 10, 64)
	free = &blockmap.Set{}
	free.Add(g.heap, all*g.cluster)
	args := []string{"-i", path}
	for name := range files {
		args = append(args, name)
	}
	for round := range 4 {
		args = append(args, fmt.Sprintf("::/d%d", round))
	}
	if len(files) > 0 {
		for _, p := range pieces.FindAllStringSubmatch(string(imgtest.Run(t, "mshowfat", args...)), -1) {
			from, _ := strconv.ParseInt(p[1], 10, 64)
			to := from
			if p[2] != "" {
				to, _ = strconv.ParseInt(p[2], 10, 64)
			}
			free.Remove(g.heap+(from-2)*g.cluster, (to-from+1)*g.cluster)
		}
	}
	return free, (all - used) * g.cluster
}

func exact(t testing.TB, path, when string, files map[string][]byte) {
	t.Helper()
	got, _, err := guesttest.Judge(t, path, Free)
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	want, bytes := oracle(t, path, files)
	guesttest.Inside(t, got, want)
	if got.Len() != bytes || bytes == 0 {
		t.Errorf("%s: %d bytes free, fsck.fat says %d", when, got.Len(), bytes)
	}
}

var variants = []struct {
	name string
	size int64
	args string
}{
	{"floppy", 1440 << 10, "-F 12"},
	{"fat12", 8 << 20, "-F 12"},
	{"fat16", 32 << 20, "-F 16"},
	{"fat16 small clusters", 20 << 20, "-F 16 -s 1"},
	{"fat16 one table", 64 << 20, "-F 16 -f 1"},
	{"fat32", 66 << 20, "-F 32 -s 1"},
	{"fat32 one table", 66 << 20, "-F 32 -s 1 -f 1"},
	{"fat32 4k sectors", 300 << 20, "-F 32 -S 4096 -s 1"},
	{"fat32 clusters", 280 << 20, "-F 32 -s 8"},
}

func TestAgainstFsckFat(t *testing.T) {
	imgtest.Require(t, "mkfs.fat", "fsck.fat", "mcopy", "mshowfat")
	for i, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := mkfs(t, v.size, v.args)
			exact(t, path, "new", nil)
			if v.name == "fat32 4k sectors" {
				return // mtools count sectors of 512 bytes in images
			}
			files := age(t, path, uint64(i), min(v.size/120, 100_000))
			exact(t, path, "aged", files)
			got, _, err := guesttest.Judge(t, path, Free)
			if err != nil {
				t.Fatal(err)
			}
			guesttest.Trash(t, path, got)
			for name, b := range files {
				if !bytes.Equal(imgtest.Run(t, "mtype", "-i", path, name), b) {
					t.Errorf("%s is lost", name)
				}
			}
			exact(t, path, "trashed", files)
		})
	}
}

func aged(t testing.TB, size int64, args string) []byte {
	t.Helper()
	path := mkfs(t, size, args)
	age(t, path, 1, 20_000)
	return guesttest.Bytes(t, path)
}

func TestDamagedByte(t *testing.T) {
	imgtest.Require(t, "mkfs.fat", "mcopy")
	for _, c := range []struct {
		size int64
		args string
	}{{4 << 20, "-F 12"}, {20 << 20, "-F 16"}, {66 << 20, "-F 32 -s 1"}} {
		var boot []int64
		for at := range int64(90) {
			boot = append(boot, at)
		}
		guesttest.DamagedBytes(t, aged(t, c.size, c.args), Free, boot, 500)
	}
}

func TestRefusals(t *testing.T) {
	imgtest.Require(t, "mkfs.fat", "mcopy")
	base16, base32 := aged(t, 20<<20, "-F 16"), aged(t, 66<<20, "-F 32 -s 1")
	le := binary.LittleEndian
	both := func(b []byte, entry uint32, value uint32) {
		g, err := decode(b, int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		for i := range g.tables {
			at := g.tableStart + i*g.tableBytes
			if g.bits == 16 {
				le.PutUint16(b[at+2*int64(entry):], uint16(value))
			} else {
				le.PutUint32(b[at+4*int64(entry):], value)
			}
		}
	}
	broken := guesttest.Broken
	guesttest.Refusals(t, nil, Free, nil, []guesttest.Refusal{
		broken("mounted 16", base16, func(b []byte) { b[37] |= 1 }, freespace.NotClean),
		broken("mounted 32", base32, func(b []byte) { b[65] |= 1 }, freespace.NotClean),
		broken("not clean 16", base16, func(b []byte) { both(b, 1, 0x7fff) }, freespace.NotClean),
		broken("not clean 32", base32, func(b []byte) { both(b, 1, 0x07ffffff) }, freespace.NotClean),
		broken("errors 16", base16, func(b []byte) { both(b, 1, 0xbfff) }, freespace.ErrorState),
		broken("errors 32", base32, func(b []byte) { both(b, 1, 0x0bffffff) }, freespace.ErrorState),
		broken("a copy differs", base32, func(b []byte) {
			g, _ := decode(b, int64(len(b)))
			b[g.tableStart+g.tableBytes+4000] ^= 1
		}, freespace.Damaged),
		broken("into free space", base16, func(b []byte) { both(b, 2, 9000) }, freespace.Damaged),
		broken("outside", base32, func(b []byte) { both(b, 3, 0x0ffffff0) }, freespace.Damaged),
		broken("crossed", base32, func(b []byte) { both(b, 90_000, 90_002); both(b, 90_001, 90_002); both(b, 90_002, 0x0fffffff) }, freespace.Damaged),
		broken("no root", base32, func(b []byte) { both(b, 2, 0) }, freespace.Damaged),
		broken("media", base32, func(b []byte) { both(b, 0, 0x0ffffff0) }, freespace.Damaged),
		broken("not mirrored", base32, func(b []byte) { b[40] |= 0x80 }, freespace.Unsupported),
		broken("version", base32, func(b []byte) { b[42] = 1 }, freespace.Unsupported),
		broken("three tables", base32, func(b []byte) { b[16] = 3 }, freespace.Unsupported),
		broken("name", base16, func(b []byte) { b[58] = '2' }, freespace.Ambiguous),
		broken("backup", base32, func(b []byte) { b[6*512+13] = 8 }, freespace.Damaged),
		broken("larger", base16, func(b []byte) { le.PutUint16(b[19:], 0xffff) }, freespace.Truncated),
	})
	// Linux takes a FAT32 with few clusters for one, Windows for a FAT16.
	_, _, err := guesttest.Judge(t, mkfs(t, 20<<20, "-F 32 -s 1"), Free)
	guesttest.Refused(t, "small FAT32", err, freespace.Ambiguous)
}

// Clusters that are marked as bad are not free.
func TestBadClusters(t *testing.T) {
	imgtest.Require(t, "mkfs.fat")
	path := guesttest.Image(t, 20<<20)
	list := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(list, []byte("9000\n9001\n12000\n"), 0o600); err != nil { // blocks of 1 KiB
		t.Fatal(err)
	}
	imgtest.Run(t, "mkfs.fat", "-F", "16", "-l", list, path)
	got, info, err := guesttest.Judge(t, path, Free)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int64{9000, 9001, 12000} {
		if got.Overlaps(n<<10, 1<<10) {
			t.Errorf("block %d is bad and called free", n)
		}
	}
	if got.Len() < 20<<20-20*info.BlockSize-200<<10 {
		t.Errorf("%d bytes free", got.Len())
	}
}
