package scavenge_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fsck/scavenge"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
	"github.com/imagestack/imagestack/layers"
)

// disks are filesystems that tests share; nobody changes them.
var disks = struct {
	sync.Mutex
	dir  string
	made map[string]string
}{made: map[string]string{}}

func TestMain(m *testing.M) {
	code := m.Run()
	if disks.dir != "" {
		os.RemoveAll(disks.dir)
	}
	os.Exit(code)
}

// uuid makes ext4 lay out its directories the same way each time.
const uuid = "3f1c9d5e-7b60-4c1f-9a55-2f0b6c8d1e42"

// mkfs makes a filesystem that has lived in a file and returns its path. The
// file is shared.
func mkfs(t testing.TB, kind string, size int64, args ...string) string {
	t.Helper()
	guesttest.Require(t, "mkfs."+kind)
	disks.Lock()
	defer disks.Unlock()
	key := fmt.Sprint(kind, size, args)
	if path, ok := disks.made[key]; ok {
		return path
	}
	if disks.dir == "" {
		dir, err := os.MkdirTemp("/dev/shm", "scavenge")
		if err != nil {
			dir, err = os.MkdirTemp("", "scavenge")
		}
		if err != nil {
			t.Fatal(err)
		}
		disks.dir = dir
	}
	path := filepath.Join(disks.dir, fmt.Sprint("disk", len(disks.made)))
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	quiet := map[string][]string{"ext4": {"-q", "-F", "-U", uuid, "-E", "hash_seed=" + uuid}, "xfs": {"-q", "-f"}, "btrfs": {"-q", "-f"}}[kind]
	imgtest.Run(t, "mkfs."+kind, append(append(quiet, args...), path)...)
	live(t, path)
	disks.made[key] = path
	return path
}

// live lets a filesystem at offset off of a file live for a while.
func live(t testing.TB, path string) {
	t.Helper()
	dir, umount := guesttest.Mount(t, path)
	guesttest.Age(t, dir, 7, 120, 400<<10)
	// Directories all over the disk, as those of a system are.
	for i := range 40 {
		d := filepath.Join(dir, fmt.Sprintf("tree%d", i), "sub")
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		guesttest.Write(d, "file", uint64(i), 50<<10)
	}
	umount()
}

// partitioned puts a filesystem into the one partition of a disk.
func partitioned(t testing.TB, label, kind string, size int64, args ...string) string {
	t.Helper()
	imgtest.Require(t, "sfdisk")
	const start = 1 << 20
	disk := guesttest.Image(t, size)
	script := filepath.Join(t.TempDir(), "script")
	n := (size - 2*start) / 512
	if err := os.WriteFile(script, fmt.Appendf(nil, "label: %s\nstart=2048, size=%d\n", label, n), 0o600); err != nil {
		t.Fatal(err)
	}
	imgtest.Run(t, "sh", "-c", "sfdisk -q "+disk+" <"+script)
	fs := mkfs(t, kind, n*512, args...)
	imgtest.Run(t, "dd", "status=none", "conv=notrunc,sparse", "bs=1M", "seek=1", "if="+fs, "of="+disk)
	return disk
}

func be64(t testing.TB, path string, off int64) int64 {
	t.Helper()
	return int64(binary.BigEndian.Uint64(peek(t, path, off, 8)))
}

func peek(t testing.TB, path string, off int64, n int) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	return b
}

func poke(t testing.TB, path string, off int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// l1 is where the L1 table of a qcow2 image is, and its length in bytes.
func l1(t testing.TB, path string) (off, n int64) {
	t.Helper()
	return be64(t, path, 40), be64(t, path, 32) & 0xffffffff * 8
}

// loseL1 fills the L1 table.
func loseL1(t testing.TB, path string, with byte) {
	t.Helper()
	off, n := l1(t, path)
	b := make([]byte, n)
	for i := range b {
		b[i] = with
	}
	poke(t, path, off, b)
}

// loseBAT zeroes the whole BAT of a ploop image.
func loseBAT(t testing.TB, path string) {
	t.Helper()
	first := int64(binary.LittleEndian.Uint32(peek(t, path, 48, 4))) * 512
	poke(t, path, 64, make([]byte, first-64))
}

// run scavenges into a new file beside the image and returns its path. The
// source has to stay as it is.
func run(t testing.TB, path string, o scavenge.Options) (string, *scavenge.Report) {
	t.Helper()
	before := imgtest.SHA256File(t, path)
	name := filepath.Join(t.TempDir(), "new")
	r, err := scavenge.Run(context.Background(), path, name, o)
	if err != nil {
		t.Fatal(err)
	}
	if after := imgtest.SHA256File(t, path); after != before {
		t.Error("the source was changed")
	}
	t.Logf("%s: exit %d, pieces %d, placed %v, %d MiB of the disk, unplaced %d MiB, unknown %d MiB", filepath.Base(path), r.Exit, r.Pieces,
		r.Placed, r.PlacedBytes>>20, r.UnplacedBytes>>20, r.UnknownBytes>>20)
	for _, f := range r.Filesystems {
		base := int64(-1)
		if f.Base != nil {
			base = *f.Base
		}
		t.Logf("  %s %s of %d at %d: %s, %d blocks", f.Type, f.UUID, f.Size, base, f.Basis, f.Blocks)
	}
	for i, u := range r.Unplaced {
		if i < 4 {
			t.Logf("  unplaced %+v", u)
		}
	}
	for _, n := range r.Notes {
		t.Log("  note:", n)
	}
	return name, r
}

// same compares a disk with the original outside the ranges of which the
// report says that nothing is known.
func same(t testing.TB, r *scavenge.Report, format, name, want string) {
	t.Helper()
	got := filepath.Join(t.TempDir(), "raw")
	imgtest.QemuRaw(t, format, name, got)
	a, err := os.Open(got)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := os.Open(want)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	st, err := b.Stat()
	if err != nil {
		t.Fatal(err)
	}
	unknown := guesttest.Set(nil)
	for _, u := range r.Unknown {
		unknown.Add(u.Offset, u.Length)
	}
	const step, unit = 1 << 20, 4096
	x, y := make([]byte, step), make([]byte, step)
	different := 0
	for off := int64(0); off < st.Size(); off += step {
		// Holes of both need not be read.
		if off = min(data(a, off), data(b, off)) &^ (step - 1); off >= st.Size() {
			break
		}
		clear(x)
		clear(y)
		for _, r := range []struct {
			f *os.File
			p []byte
		}{{a, x}, {b, y}} {
			if _, err := r.f.ReadAt(r.p, off); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		}
		for i := int64(0); i < step; i += unit {
			if !bytes.Equal(x[i:i+unit], y[i:i+unit]) && !unknown.Contains(off+i, min(unit, st.Size()-off-i)) {
				if different++; different < 5 {
					t.Errorf("different at %#x", off+i)
				}
			}
		}
	}
	if different > 0 {
		t.Errorf("%d blocks differ that are not reported as unknown", different)
	}
}

// data is where the next data of a file begins.
func data(f *os.File, off int64) int64 {
	at, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if err != nil {
		return 1 << 62
	}
	return at
}

var openOptions = layers.OpenOptions{}
