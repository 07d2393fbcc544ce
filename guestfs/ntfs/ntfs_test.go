package ntfs

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
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
	imgtest.Run(t, "mkntfs", append(append([]string{"-q", "-F", "-f"}, strings.Fields(args)...), path)...)
	return path
}

// mount mounts with ntfs-3g, which reads image files itself.
func mount(t testing.TB, path string, options ...string) (dir string, umount func()) {
	t.Helper()
	dir = t.TempDir()
	options = append([]string{"no_detach", "streams_interface=windows"}, options...)
	return dir, guesttest.Serve(t, dir, "ntfs-3g", "-o", strings.Join(options, ","), path, dir)
}

// oracle is what ntfsclone leaves out: it reads $Bitmap and compares it with
// all files.
func oracle(t testing.TB, path string) *blockmap.Set {
	t.Helper()
	to := filepath.Join(t.TempDir(), "clone")
	imgtest.Run(t, "ntfsclone", "-q", "-s", "-o", to, path)
	b, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	cluster, clusters, at := int64(le.Uint32(b[18:])), int64(le.Uint64(b[30:])), int64(le.Uint32(b[46:]))
	var s blockmap.Set
	for n := int64(0); n < clusters; {
		switch b[at] {
		case 0:
			gap := int64(le.Uint64(b[at+1:]))
			s.Add(n*cluster, min(gap, clusters-n)*cluster)
			n, at = n+gap, at+9
		case 1:
			n, at = n+1, at+1+cluster
		default:
			t.Fatalf("ntfsclone: command %d at %d", b[at], at)
		}
	}
	return &s
}

var variants = []struct {
	name string
	size int64
	args string
}{
	{"default", 64 << 20, ""},
	{"512", 32 << 20, "-c 512"},
	{"64k", 80 << 20, "-c 65536"},
	{"128k", 120 << 20, "-c 131072"},
	{"4k sectors", 64 << 20, "-s 4096"},
	{"odd", 50<<20 + 12345*512, "-c 1024"},
	{"named", 64 << 20, "-L Guest"},
	{"compressed", 64 << 20, "-C"},
}

func TestAgainstNtfsclone(t *testing.T) {
	guesttest.Require(t, "mkntfs", "ntfs-3g", "ntfsclone", "ntfsfix")
	for i, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := mkfs(t, v.size, v.args)
			guesttest.Exact(t, path, "new", Free, oracle(t, path))
			dir, umount := mount(t, path, "compression")
			guesttest.Age(t, dir, uint64(i), 80, v.size/120)
			before := guesttest.Tree(t, dir)
			umount()
			info := guesttest.Exact(t, path, "aged", Free, oracle(t, path))
			if v.name == "named" && info.Label != "Guest" {
				t.Errorf("label %q", info.Label)
			}
			guesttest.TrashKeeps(t, path, Free, before, func() { imgtest.Run(t, "ntfsfix", "-n", path) },
				func() (string, func()) { return mount(t, path, "ro") })
		})
	}
}

// Copies of a filesystem while ntfs-3g writes to it, which leaves no mark: it
// is judged when its table and its bitmap agree, and then nothing is lost.
func TestMounted(t *testing.T) {
	guesttest.Require(t, "mkntfs", "ntfs-3g")
	path := mkfs(t, 64<<20, "")
	dir, umount := mount(t, path)
	judged := 0
	for i := range 6 {
		guesttest.Age(t, dir, uint64(i), 12, 400_000)
		imgtest.Run(t, "sync", dir)
		before := guesttest.Tree(t, dir)
		live := guesttest.Copy(t, path)
		got, _, err := guesttest.Judge(t, live, Free)
		if err != nil {
			t.Log(err)
			continue
		}
		judged++
		guesttest.Trash(t, live, got)
		d, u := mount(t, live, "ro")
		guesttest.SameTree(t, guesttest.Tree(t, d), before)
		u()
	}
	umount()
	if judged == 0 {
		t.Error("no copy was judged")
	}
}

// A file in so many pieces that it takes several records.
func TestFragmented(t *testing.T) {
	guesttest.Require(t, "mkntfs", "ntfs-3g", "ntfsclone")
	path := mkfs(t, 32<<20, "-c 512")
	dir, umount := mount(t, path)
	a, err := os.Create(dir + "/a")
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(3000) { // alternating places leave holes between them
		if _, err := a.WriteAt([]byte("x"), i*20_000); err != nil {
			t.Fatal(err)
		}
	}
	a.Close()
	for i := range 2000 { // the table grows
		guesttest.Write(dir, "f"+strconv.Itoa(i), 1, 700)
	}
	umount()
	guesttest.Exact(t, path, "fragmented", Free, oracle(t, path))
}

// A master file table in so many pieces that it takes several records to
// describe: it grows while only single clusters are free.
func TestFragmentedTable(t *testing.T) {
	guesttest.Require(t, "mkntfs", "ntfs-3g", "ntfsclone", "ntfsinfo")
	path := mkfs(t, 14<<20, "-c 512 -z 1")
	dir, umount := mount(t, path)
	name := func(i int) string { return filepath.Join(dir, "f"+strconv.Itoa(i)) }
	n := 0
	for ; os.WriteFile(name(n), make([]byte, 1000), 0o600) == nil; n++ {
	}
	for i := 0; i < n; i += 2 {
		if err := os.Remove(name(i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; i < 8000 && os.WriteFile(name(n+i), nil, 0o600) == nil; i++ {
	}
	for i := 1; i < n; i += 4 {
		if err := os.Remove(name(i)); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	umount()
	if out := string(imgtest.Run(t, "ntfsinfo", "-i", "0", path)); !strings.Contains(out, "ATTRIBUTE_LIST") {
		t.Fatal("one record is enough for the table")
	}
	guesttest.Exact(t, path, "fragmented", Free, oracle(t, path))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	guesttest.DamagedBytes(t, b, Free, nil, 60)
}

func aged(t testing.TB) []byte {
	t.Helper()
	path := mkfs(t, 24<<20, "")
	dir, umount := mount(t, path)
	guesttest.Age(t, dir, 3, 60, 100_000)
	umount()
	return guesttest.Bytes(t, path)
}

func TestDamagedByte(t *testing.T) {
	guesttest.Require(t, "mkntfs", "ntfs-3g")
	b := aged(t)
	var v volume
	v.r, v.ctx = bytes.NewReader(b), t.Context()
	if err := v.readBoot(int64(len(b))); err != nil {
		t.Fatal(err)
	}
	var try []int64
	for at := range int64(80) {
		try = append(try, at)
	}
	rng := rand.New(rand.NewPCG(5, 5))
	for range 300 { // the system files
		try = append(try, int64(v.mftStart)*v.cluster+rng.Int64N(12)*v.record+rng.Int64N(400))
	}
	guesttest.DamagedBytes(t, b, Free, try, 200)
}

func TestRefusals(t *testing.T) {
	guesttest.Require(t, "mkntfs", "ntfs-3g")
	base := aged(t)
	le := binary.LittleEndian
	// record finds a file record, and place a value in it.
	var v volume
	v.r, v.ctx = bytes.NewReader(base), t.Context()
	if err := v.readBoot(int64(len(base))); err != nil {
		t.Fatal(err)
	}
	record := func(b []byte, n int) []byte {
		return b[int64(v.mftStart)*v.cluster+int64(n)*v.record:][:v.record]
	}
	attrAt := func(r []byte, kind uint32) []byte {
		at := uint32(le.Uint16(r[20:]))
		for le.Uint32(r[at:]) != kind {
			at += le.Uint32(r[at+4:])
		}
		return r[at:]
	}
	info := func(b []byte) []byte {
		a := attrAt(record(b, recordVolume), attrVolumeInfo)
		return a[le.Uint16(a[20:]):]
	}
	logAt := func(b []byte) []byte {
		if err := v.readMFT(); err != nil {
			t.Fatal(err)
		}
		rec, err := v.system(recordLog)
		if err != nil {
			t.Fatal(err)
		}
		f, err := v.open(rec, attrData)
		if err != nil {
			t.Fatal(err)
		}
		return b[f.runs[0].lcn*v.cluster:]
	}
	// restart writes a restart page of 4,096 bytes.
	restart := func(b []byte, lsn uint64, client, flags uint16) {
		clear(b[:4096])
		copy(b, "RSTR")
		le.PutUint16(b[4:], 30)
		le.PutUint16(b[6:], 9)
		le.PutUint32(b[16:], 4096)
		le.PutUint32(b[20:], 4096)
		le.PutUint16(b[24:], 48)
		le.PutUint64(b[48:], lsn)
		le.PutUint16(b[48+12:], client)
		le.PutUint16(b[48+14:], flags)
	}
	broken := guesttest.Broken
	guesttest.Refusals(t, base, Free, nil, []guesttest.Refusal{
		broken("dirty", nil, func(b []byte) { info(b)[10] |= 1 }, freespace.NotClean),
		broken("unknown flag", nil, func(b []byte) { info(b)[11] |= 1 }, freespace.NotClean),
		broken("mounted on NT 4", nil, func(b []byte) { info(b)[10] |= 8 }, ""),
		broken("version", nil, func(b []byte) { info(b)[8] = 4 }, freespace.UnknownFeature),
		broken("log of anything", nil, func(b []byte) { copy(logAt(b), "RCRD") }, freespace.NotClean),
		broken("log in use", nil, func(b []byte) { restart(logAt(b), 5, 0, 0); restart(logAt(b)[4096:], 4, 0xffff, 2) }, freespace.NotClean),
		broken("log clean", nil, func(b []byte) { restart(logAt(b), 5, 0xffff, 2); restart(logAt(b)[4096:], 4, 0, 0) }, ""),
		broken("log with one page", nil, func(b []byte) { restart(logAt(b), 5, 0xffff, 2) }, freespace.NotClean),
		broken("torn record", nil, func(b []byte) { record(b, recordBitmap)[510] ^= 1 }, freespace.Damaged),
		broken("not a record", nil, func(b []byte) { copy(record(b, 64), "BAAD") }, freespace.Damaged),
		broken("deleted record", nil, func(b []byte) { record(b, 64)[22] &^= 1 }, freespace.Damaged),
		broken("shadow copies", nil, func(b []byte) { copy(b[shadowAt:], shadowID); b[shadowAt+shadowCatalog+2] = 1 }, freespace.Unsupported),
		broken("no shadow copies any more", nil, func(b []byte) { copy(b[shadowAt:], shadowID) }, ""),
		broken("attribute list of anything", nil, func(b []byte) { attrAt(record(b, recordMFT), attrFileName)[0] = attrList }, freespace.Damaged),
		broken("attribute list of $Volume", nil, func(b []byte) { attrAt(record(b, recordVolume), attrFileName)[0] = attrList }, freespace.Unsupported),
	})
	_, _, err := guesttest.JudgeAt(bytes.NewReader(base), int64(len(base))-65536, Free)
	guesttest.Refused(t, "truncated", err, freespace.Truncated)
}

// The files of shadow copies have their GUID in their names.
func TestShadowFile(t *testing.T) {
	guesttest.Require(t, "mkntfs", "ntfs-3g")
	path := mkfs(t, 16<<20, "")
	dir, umount := mount(t, path)
	svi := dir + "/System Volume Information"
	if err := os.MkdirAll(svi, 0o700); err != nil {
		t.Fatal(err)
	}
	guesttest.Write(svi, "{11111111-2222-3333-4444-555555555555}{3808876B-c176-4e48-b7ae-04046e6cc752}", 1, 10_000)
	umount()
	_, _, err := guesttest.Judge(t, path, Free)
	guesttest.Refused(t, "a file of a shadow copy", err, freespace.Unsupported)
}

// A hibernated Windows is one by the content of its file, wherever else the
// volume says that it is clean.
func TestHibernated(t *testing.T) {
	guesttest.Require(t, "mkntfs", "ntfs-3g")
	for _, c := range []struct {
		name, path, content string
		refused             bool
	}{
		{"hibernated", "hiberfil.sys", "HIBR", true},
		{"resumed", "hiberfil.sys", "wake", false},
		{"zeros", "HiberFil.sys", "\x00\x00\x00\x00", false},
		{"anything else", "hiberfil.sys", "XYZW", true},
		{"another file", "hiberfil2.sys", "HIBR", false},
		{"another directory", "d/hiberfil.sys", "HIBR", false},
	} {
		for _, size := range []int{400, 100_000} { // in the record, and in clusters
			path := mkfs(t, 16<<20, "")
			dir, umount := mount(t, path)
			if err := os.Mkdir(dir+"/d", 0o700); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, size)
			copy(b, c.content)
			if err := os.WriteFile(filepath.Join(dir, c.path), b, 0o600); err != nil {
				t.Fatal(err)
			}
			umount()
			_, _, err := guesttest.Judge(t, path, Free)
			if c.refused {
				guesttest.Refused(t, c.name, err, freespace.InUse)
			} else if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	}
}
