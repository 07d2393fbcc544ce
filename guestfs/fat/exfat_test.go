package fat

import (
	"bytes"
	"encoding/binary"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

func mkexfat(t testing.TB, size int64, args string) string {
	t.Helper()
	path := guesttest.Image(t, size)
	imgtest.Run(t, "mkfs.exfat", append(strings.Fields(args), path)...)
	return path
}

func mountExFAT(t testing.TB, path string) (dir string, umount func()) {
	t.Helper()
	dir = t.TempDir()
	device, detach := guesttest.Loop(t, path) // the driver takes nothing else
	end := guesttest.Serve(t, dir, "mount.exfat-fuse", "-d", device, dir)
	return dir, func() { end(); detach() }
}

var freeLine = regexp.MustCompile(`Free Clusters:\s+(\d+)`)

// exactExFAT compares with the number of clusters that dump.exfat counts.
func exactExFAT(t testing.TB, path, when string) {
	t.Helper()
	got, info, err := guesttest.Judge(t, path, FreeExFAT)
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	m := freeLine.FindStringSubmatch(string(imgtest.Run(t, "dump.exfat", path)))
	if m == nil {
		t.Fatal("dump.exfat counts no clusters")
	}
	if n, _ := strconv.ParseInt(m[1], 10, 64); got.Len() != n*info.BlockSize || n == 0 {
		t.Errorf("%s: %d bytes free, dump.exfat says %d", when, got.Len(), n*info.BlockSize)
	}
}

func TestAgainstDumpExfat(t *testing.T) {
	guesttest.Require(t, "mkfs.exfat", "dump.exfat", "fsck.exfat", "mount.exfat-fuse")
	for i, v := range []struct {
		name string
		size int64
		args string
	}{
		{"default", 48 << 20, ""},
		{"512", 24 << 20, "-c 512"},
		{"128k", 64 << 20, "-c 128K"},
		{"named", 32 << 20, "-L Guest"},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := mkexfat(t, v.size, v.args)
			exactExFAT(t, path, "new")
			dir, umount := mountExFAT(t, path)
			guesttest.Age(t, dir, uint64(i), 80, v.size/120)
			before := guesttest.Tree(t, dir)
			umount()
			exactExFAT(t, path, "aged")
			_, info, err := guesttest.Judge(t, path, FreeExFAT)
			if err != nil || v.name == "named" && info.Label != "Guest" {
				t.Fatalf("%+v %v", info, err)
			}
			guesttest.TrashKeeps(t, path, FreeExFAT, before, func() { imgtest.Run(t, "fsck.exfat", "-n", path) },
				func() (string, func()) { return mountExFAT(t, path) })
		})
	}
}

func agedExFAT(t testing.TB) []byte {
	t.Helper()
	path := mkexfat(t, 16<<20, "-c 512")
	dir, umount := mountExFAT(t, path)
	guesttest.Age(t, dir, 2, 60, 40_000)
	umount()
	return guesttest.Bytes(t, path)
}

// resumExFAT makes the checksum of the boot region right again.
func resumExFAT(b []byte) {
	sum := uint32(0)
	for i, c := range b[:11*512] {
		if i != 106 && i != 107 && i != 112 {
			sum = sum>>1 | sum<<31
			sum += uint32(c)
		}
	}
	for i := 11 * 512; i < 12*512; i += 4 {
		binary.LittleEndian.PutUint32(b[i:], sum)
	}
}

func TestDamagedExFAT(t *testing.T) {
	guesttest.Require(t, "mkfs.exfat", "mount.exfat-fuse")
	var boot []int64
	for at := range int64(512) {
		boot = append(boot, at)
	}
	guesttest.DamagedBytes(t, agedExFAT(t), FreeExFAT, boot, 800)
}

func TestRefusalsExFAT(t *testing.T) {
	guesttest.Require(t, "mkfs.exfat", "mount.exfat-fuse")
	base := agedExFAT(t)
	le := binary.LittleEndian
	const backup = 12 * 512
	broken := guesttest.Broken
	guesttest.Refusals(t, base, FreeExFAT, resumExFAT, []guesttest.Refusal{
		broken("dirty", nil, func(b []byte) { b[106] |= 2 }, freespace.NotClean),
		broken("media failure", nil, func(b []byte) { b[106] |= 4 }, freespace.ErrorState),
		broken("second table", nil, func(b []byte) { b[106] |= 1 }, freespace.UnknownFeature),
		broken("TexFAT", nil, func(b []byte) { b[110], b[backup+110] = 2, 2 }, freespace.Unsupported),
		broken("revision", nil, func(b []byte) { b[105], b[backup+105] = 2, 2 }, freespace.Unsupported),
		broken("larger", nil, func(b []byte) { le.PutUint64(b[72:], 1<<40); le.PutUint64(b[backup+72:], 1<<40) }, freespace.Truncated),
		broken("larger than the copy", nil, func(b []byte) { le.PutUint64(b[72:], 1<<40) }, freespace.Damaged),
		broken("clusters", nil, func(b []byte) { b[92]-- }, freespace.Damaged),
		broken("sectors", nil, func(b []byte) { b[108] = 60 }, freespace.Damaged),
	})
	_, _, err := guesttest.JudgeAt(bytes.NewReader(base), int64(len(base))-4096, FreeExFAT)
	guesttest.Refused(t, "truncated", err, freespace.Truncated)

	// A cluster of a file that is marked as free.
	b := bytes.Clone(base)
	x := exfat{r: bytes.NewReader(b), ctx: t.Context()}
	if err := x.readBoot(int64(len(b))); err != nil {
		t.Fatal(err)
	}
	x.table = freespace.NewWindow(bytes.NewReader(b[x.tableStart:]), (x.clusters+2)*4)
	if err := x.findBitmap(); err != nil {
		t.Fatal(err)
	}
	at := x.heap + int64(x.bitmap[0].first-2)*x.cluster
	for i := range int64(200) {
		if b[at+i] == 0 {
			continue
		}
		b[at+i] &= b[at+i] - 1 // its lowest bit
		_, _, err := guesttest.JudgeAt(bytes.NewReader(b), int64(len(b)), FreeExFAT)
		guesttest.Refused(t, "a file's cluster is free", err, freespace.Damaged)
		b[at+i] = base[at+i]
	}
}

// FuzzExFAT changes everything that is read of a small filesystem.
func FuzzExFAT(f *testing.F) {
	guesttest.Require(f, "mkfs.exfat", "mount.exfat-fuse")
	block := func(at int64) (int64, int64) {
		if at < 12*512 {
			return 0, 12 * 512
		}
		return at, 1
	}
	guesttest.Edits(f, agedExFAT(f), FreeExFAT, block, func(b []byte) {
		if len(b) == 12*512 {
			resumExFAT(b)
		}
	})
}
