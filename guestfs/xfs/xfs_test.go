package xfs

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

func free(r io.ReaderAt, size int64) (*blockmap.Set, error) {
	s, _, err := guesttest.JudgeAt(r, size, Free)
	return s, err
}

func judge(t testing.TB, path string) (*blockmap.Set, error) {
	t.Helper()
	s, _, err := guesttest.Judge(t, path, Free)
	return s, err
}

func db(t testing.TB, path string, commands ...string) string {
	t.Helper()
	var args []string
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return string(imgtest.Run(t, "xfs_db", append(append([]string{"-r"}, args...), path)...))
}

func value(t testing.TB, out, name string) int64 {
	t.Helper()
	for line := range strings.Lines(out) {
		if k, v, ok := strings.Cut(line, " = "); ok && k == name {
			n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s in %s", name, out)
	return 0
}

// oracle is what xfs_db lists as free, and the bytes in it that it counts
// although they are kept for the free-space trees.
func oracle(t testing.TB, path string) (s *blockmap.Set, kept int64) {
	t.Helper()
	sb := db(t, path, "sb 0", "p")
	block, ag := value(t, sb, "blocksize"), value(t, sb, "agblocks")
	s = new(blockmap.Set)
	for line := range strings.Lines(db(t, path, "freesp -d")) {
		f := strings.Fields(line)
		var n [3]int64
		ok := len(f) == 3
		for i := range n {
			var err error
			if ok {
				n[i], err = strconv.ParseInt(f[i], 10, 64)
				ok = err == nil
			}
		}
		if !ok {
			continue
		}
		s.Add((n[0]*ag+n[1])*block, n[2]*block)
	}
	for i := range value(t, sb, "agcount") {
		kept += block * value(t, db(t, path, "agf "+strconv.FormatInt(i, 10), "p"), "flcount")
	}
	return s, kept
}

func mkfs(t testing.TB, size int64, args string) string {
	t.Helper()
	path := guesttest.Image(t, size)
	imgtest.Run(t, "mkfs.xfs", append(append([]string{"-q", "-f", "--unsupported"}, strings.Fields(args)...), path)...)
	return path
}

func exact(t testing.TB, path, when string) {
	t.Helper()
	got, err := judge(t, path)
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	want, kept := oracle(t, path)
	guesttest.Inside(t, got, want)
	if got.Len() != want.Len()-kept || got.Len() == 0 {
		t.Errorf("%s: %d bytes free, xfs_db says %d with %d kept for trees", when, got.Len(), want.Len(), kept)
	}
}

var variants = []struct {
	name  string
	size  int64
	args  string
	mount bool // kernels may lack version 4
}{
	{"default", 64 << 20, "", true},
	{"rmapbt", 64 << 20, "-m rmapbt=1,reflink=1,finobt=1,inobtcount=1", true},
	{"plain", 64 << 20, "-m rmapbt=0,reflink=0,finobt=0,bigtime=0 -i sparse=0", true},
	{"nrext64", 64 << 20, "-m bigtime=1 -i nrext64=1", true},
	{"1k", 48 << 20, "-b size=1024", true},
	{"2k many groups", 96 << 20, "-b size=2048 -d agcount=6", true},
	{"odd groups", 90 << 20, "-d agcount=5", true},
	{"sectors", 64 << 20, "-s size=4096", true},
	{"log unit", 96 << 20, "-l su=32k,size=16m", true},
	{"log unit 256k", 192 << 20, "-l su=256k", true},
	{"large inodes", 64 << 20, "-i size=2048", true},
	{"directories", 64 << 20, "-n size=16384", true},
	{"stripes", 96 << 20, "-d su=64k,sw=4", true},
	{"version 4", 64 << 20, "-m crc=0,finobt=0", false},
	{"version 4 1k", 64 << 20, "-m crc=0,finobt=0 -b size=1024 -l version=1", false},
}

func TestAgainstXfsDB(t *testing.T) {
	guesttest.Require(t, "mkfs.xfs", "xfs_db", "xfs_repair")
	for i, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := mkfs(t, v.size, v.args)
			exact(t, path, "new")
			if !v.mount {
				return
			}
			for round := range 2 {
				dir, umount := guesttest.Mount(t, path, "nouuid")
				guesttest.Age(t, dir, uint64(i*10+round), 120, v.size/100)
				dirty := guesttest.Copy(t, path)
				umount()
				exact(t, path, "aged")
				_, err := judge(t, dirty)
				guesttest.Refused(t, "mounted", err, freespace.NotClean)
				if round == 0 { // replayed by the kernel, it is judged again
					_, umount := guesttest.Mount(t, dirty, "nouuid")
					umount()
					exact(t, dirty, "recovered")
				}
			}
			if exit, out := imgtest.Try(t, "xfs_repair", "-n", path); exit != 0 {
				t.Errorf("xfs_repair: %d\n%s", exit, out)
			}
		})
	}
}

// A log that went around its end many times, and every state on the way:
// clean or not, the verdict is that of xfs_repair.
func TestLogWraps(t *testing.T) {
	guesttest.Require(t, "mkfs.xfs", "xfs_db", "xfs_repair")
	path := mkfs(t, 48<<20, "-b size=1024")
	for round := range 12 {
		dir, umount := guesttest.Mount(t, path)
		guesttest.Age(t, dir, uint64(round), 60+round*17, 100_000)
		for i := range 10 + round {
			guesttest.Write(dir, "again"+strconv.Itoa(i), 1, 5000)
			imgtest.Run(t, "sync", "-f", dir)
			if i%8 != 0 {
				continue
			}
			dirty := guesttest.Copy(t, path)
			_, err := judge(t, dirty)
			exit, _ := imgtest.Try(t, "xfs_repair", "-n", dirty)
			if err == nil && exit != 0 {
				t.Errorf("judged, and xfs_repair says %d", exit)
			}
		}
		umount()
		exact(t, path, "round "+strconv.Itoa(round))
	}
	if !strings.Contains(string(imgtest.Run(t, "xfs_logprint", "-t", path)), "CLEAN") {
		t.Error("xfs_logprint finds the log not clean")
	}
}

func agedImage(t testing.TB) []byte {
	t.Helper()
	path := mkfs(t, 32<<20, "-b size=1024 -d agcount=2")
	dir, umount := guesttest.Mount(t, path)
	guesttest.Age(t, dir, 5, 250, 60_000)
	umount()
	return guesttest.Bytes(t, path)
}

// Whatever byte changes in anything that is read, no more becomes free.
func TestDamagedByte(t *testing.T) {
	guesttest.Require(t, "mkfs.xfs")
	b := agedImage(t)
	size := int64(len(b))
	tr := &guesttest.Traced{R: bytes.NewReader(b)}
	if _, err := free(tr, size); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	try := []int64{}
	for at := range int64(4 * 512) {
		try = append(try, at, size/2+at)
	}
	s, err := readSuper(bytes.NewReader(b), 0, size)
	if err != nil {
		t.Fatal(err)
	}
	ag, at := s.split(s.logStart)
	log := s.groupStart(ag) + int64(at)*s.blockSize
	for r := range tr.Seen.Ranges() {
		n := r.Len / 16 // of the trees
		if r.Off <= log && log < r.End() {
			n = 400 // of the log
		}
		for range min(n, 2000) {
			try = append(try, r.Off+rng.Int64N(r.Len))
		}
	}
	guesttest.DamagedBytes(t, b, Free, try, 0)
}

// resum makes the checksum of the superblock right again.
func resum(b []byte) {
	sector := int(be16(b[102:]))
	if sector >= 512 && sector <= len(b) {
		binary.LittleEndian.PutUint32(b[superCRCAt:], sum(b[:sector], superCRCAt))
	}
}

func TestRefusals(t *testing.T) {
	guesttest.Require(t, "mkfs.xfs")
	base := agedImage(t)
	be := binary.BigEndian
	put := func(at int, v uint32) func([]byte) { return func(b []byte) { be.PutUint32(b[at:], v) } }
	or := func(at int, v uint32) func([]byte) {
		return func(b []byte) { be.PutUint32(b[at:], be.Uint32(b[at:])|v) }
	}
	broken := guesttest.Broken
	guesttest.Refusals(t, base, Free, resum, []guesttest.Refusal{
		broken("needsrepair", nil, or(216, incompatNeedsRepair), freespace.ErrorState),
		broken("unknown incompat", nil, or(216, 1<<20), freespace.UnknownFeature),
		broken("unknown ro_compat", nil, or(212, 1<<20), freespace.UnknownFeature),
		broken("log features", nil, or(220, 1), freespace.UnknownFeature),
		broken("version", nil, func(b []byte) { b[101] = b[101]&0xf0 | 6 }, freespace.UnknownFeature),
		broken("realtime", nil, put(20, 100), freespace.Unsupported),
		broken("external log", nil, func(b []byte) { clear(b[48:56]) }, freespace.Unsupported),
		broken("mkfs interrupted", nil, func(b []byte) { b[126] = 1 }, freespace.NotClean),
		broken("free blocks", nil, func(b []byte) { b[151] ^= 1 }, freespace.CountMismatch),
		broken("groups", nil, put(88, 77), freespace.Damaged),
		broken("group size", nil, put(84, 0), freespace.Damaged),
		broken("other UUID", nil, func(b []byte) { b[33] ^= 1 }, freespace.Damaged),
	})
	_, err := free(bytes.NewReader(base), int64(len(base))-4096)
	guesttest.Refused(t, "truncated", err, freespace.Truncated)
}
