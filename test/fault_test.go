package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"golang.org/x/sys/unix"
)

// TestFullHost fills the host filesystem through the mount. The writer gets
// ENOSPC, the mount lives on, what was synced stays, and space that is given
// back can be written again.
func TestFullHost(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "mount")
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			small := filepath.Join(workDir(t), "host.ext4")
			imgtest.Run(t, "truncate", "-s", "96M", small)
			imgtest.Run(t, "mkfs.ext4", "-q", "-F", "-m", "0", small)
			host, umount := mountGuest(t, small, "rw,loop")
			image := f.create(t, bundleDir(t, host), 256<<20, false)
			fillHost(t, image)
			f.check(t, image, true)
			umount()
		})
	}
}

// bundleDir is a fresh directory inside host.
func bundleDir(t *testing.T, host string) string {
	t.Helper()
	dir := filepath.Join(host, "image")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func fillHost(t *testing.T, image string) {
	t.Helper()
	m := mountImage(t, image, "-w")
	disk, err := os.OpenFile(m.file(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	const piece = 1 << 20
	full := int64(-1) // where the disk became full
	for off := int64(0); off < 256<<20; off += piece {
		_, err := disk.WriteAt(imgtest.PatternBytes(1, off, piece), off)
		if err == nil {
			err = disk.Sync()
		}
		if err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				t.Errorf("writing at %d on a full host: %v, want ENOSPC", off, err)
			}
			full = off
			break
		}
	}
	if full < 16<<20 {
		t.Fatalf("the host was full after %d bytes: the test shows nothing", full)
	}
	for off := int64(0); off < full; off += piece {
		wantBytes(t, "what was synced before the host was full", readRange(t, m.file(), off, piece), imgtest.PatternBytes(1, off, piece))
	}
	// Writing in place needs no space.
	writeRange(t, m.file(), piece, imgtest.PatternBytes(2, piece, piece))
	// What is given back can be written again, elsewhere.
	if err := unix.Fallocate(int(disk.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8*piece, 8*piece); err != nil {
		t.Errorf("discard on a full host: %v", err)
	}
	if err := disk.Sync(); err != nil {
		t.Errorf("sync after the discard: %v", err)
	}
	writeRange(t, m.file(), 200<<20, imgtest.PatternBytes(3, 200<<20, 2*piece))
	disk.Close()
	m.unmount()

	m = mountImage(t, image)
	for off := int64(0); off < full; off += piece {
		want := imgtest.PatternBytes(1, off, piece)
		switch {
		case off == piece:
			want = imgtest.PatternBytes(2, off, piece)
		case off >= 8*piece && off < 16*piece:
			want = make([]byte, piece)
		}
		wantBytes(t, "after a remount", readRange(t, m.file(), off, piece), want)
	}
	wantBytes(t, "written into returned space", readRange(t, m.file(), 200<<20, 2*piece), imgtest.PatternBytes(3, 200<<20, 2*piece))
	m.unmount()
}

// TestReadOnly: no way of changing a read-only mount, and the error is EROFS.
func TestReadOnly(t *testing.T) {
	imgtest.RequireFuse(t)
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			image := f.create(t, workDir(t), 16<<20, false)
			before := digests(t, f, image)
			m := mountImage(t, image)
			if fd, err := os.OpenFile(m.file(), os.O_RDWR, 0); !errors.Is(err, unix.EROFS) {
				t.Errorf("opening for writing: %v, want EROFS", err)
				if err == nil {
					fd.Close()
				}
			}
			if err := os.Truncate(m.file(), 0); !errors.Is(err, unix.EROFS) {
				t.Errorf("truncate: %v, want EROFS", err)
			}
			if err := os.Remove(m.file()); !errors.Is(err, unix.EROFS) {
				t.Errorf("remove: %v, want EROFS", err)
			}
			m.unmount()
			if digests(t, f, image) != before {
				t.Error("the image changed")
			}
		})
	}
}

// TestBadInput gives mount-image and image-stack images that are cut short or
// lie. Each must be refused in no time, with the path in the message, with
// exit 1 or 4, without a mount left and without a byte written.
func TestBadInput(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	imgtest.RequireFuse(t)
	dir := workDir(t)
	for _, c := range badImages(t, dir) {
		t.Run(c.name, func(t *testing.T) {
			before := imgtest.SHA256File(t, c.path)
			for _, args := range [][]string{{}, {"-w"}, {"--scratch"}} {
				args := append(args, "--format", c.format)
				mnt := mountPoint(t)
				o := runTool(t, "mount-image", append(args, c.path, mnt)...)
				if o.exit == 0 {
					runTool(t, "mount-image", "-u", mnt)
				}
				if o.exit != 1 && o.exit != 4 {
					t.Errorf("mount-image %q: exit %d, want 1 or 4\n%s", args, o.exit, o.stderr)
				}
				complains(t, "mount-image", o, c.path)
			}
			o := runTool(t, "image-stack", "map", "--json", "--format", c.format, c.path)
			if o.exit != 1 && o.exit != 4 {
				t.Errorf("image-stack map: exit %d, want 1 or 4\n%s", o.exit, o.stderr)
			}
			complains(t, "image-stack", o, c.path)
			if imgtest.SHA256File(t, c.path) != before {
				t.Error("the image was written to")
			}
		})
	}
}

func complains(t *testing.T, tool string, o outcome, path string) {
	t.Helper()
	if !strings.HasPrefix(o.stderr, tool+": ") || !strings.Contains(o.stderr, filepath.Base(path)) {
		t.Errorf("the message of %s does not begin with its name or does not name the file:\n%s", tool, o.stderr)
	}
	if o.took > 5*time.Second {
		t.Errorf("%s took %v", tool, o.took)
	}
}

type badImage struct{ name, path, format string }

// badImages makes images whose header is damaged so that nothing of them can
// be used.
func badImages(t *testing.T, dir string) []badImage {
	t.Helper()
	good := map[string]string{
		"qcow2": filepath.Join(dir, "good.qcow2"),
		"ploop": filepath.Join(dir, "good.hds"),
	}
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", good["qcow2"], "64M")
	imgtest.QemuIO(t, "qcow2", good["qcow2"], "write -P 1 0 1M")
	imgtest.QemuImg(t, "create", "-q", "-f", "parallels", good["ploop"], "64M")
	imgtest.QemuIO(t, "parallels", good["ploop"], "write -P 1 0 1M")

	be32 := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
	be64 := func(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }
	le32 := func(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
	cases := []struct {
		name, format string
		size         int64 // cut to, -1 not
		off          int64
		poke         []byte
	}{
		{"empty", "qcow2", 0, 0, nil},
		{"header-cut", "qcow2", 60, 0, nil},
		{"magic", "qcow2", -1, 0, []byte("QFI?")},
		{"version-1", "qcow2", -1, 4, be32(1)},
		{"version-9", "qcow2", -1, 4, be32(9)},
		{"cluster-bits-0", "qcow2", -1, 20, be32(0)},
		{"cluster-bits-63", "qcow2", -1, 20, be32(63)},
		{"size-huge", "qcow2", -1, 24, be64(1 << 62)},
		{"size-negative", "qcow2", -1, 24, be64(1 << 63)},
		{"encrypted", "qcow2", -1, 32, be32(1)},
		{"l1-size-huge", "qcow2", -1, 36, be32(0xffffffff)},
		{"l1-size-0", "qcow2", -1, 36, be32(0)},
		{"l1-offset-unaligned", "qcow2", -1, 40, be64(513)},
		{"l1-offset-far", "qcow2", -1, 40, be64(1 << 55)},
		{"backing-name-long", "qcow2", -1, 8, append(be64(0x200), be32(0xffffffff)...)},
		{"incompatible-bit", "qcow2", -1, 72, be64(1 << 40)},
		{"header-length", "qcow2", -1, 100, be32(0x7fffffff)},
		{"empty", "ploop", 0, 0, nil},
		{"header-cut", "ploop", 40, 0, nil},
		{"bat-cut", "ploop", 70, 0, nil},
		{"magic", "ploop", -1, 0, []byte("WithSomeFreeSpac")},
		{"type", "ploop", -1, 16, le32(7)},
		{"cluster-0", "ploop", -1, 28, le32(0)},
		{"cluster-3", "ploop", -1, 28, le32(3)},
		{"cluster-huge", "ploop", -1, 28, le32(0x80000000)},
		{"bat-huge", "ploop", -1, 32, le32(0xffffffff)},
		{"size-huge", "ploop", -1, 36, bytes.Repeat([]byte{0xff}, 8)},
		{"data-unaligned", "ploop", -1, 48, le32(1)},
		{"data-far", "ploop", -1, 48, le32(0xfffff800)},
	}
	var bad []badImage
	for _, c := range cases {
		b, err := os.ReadFile(good[c.format])
		if err != nil {
			t.Fatal(err)
		}
		if c.size >= 0 {
			b = b[:c.size]
		}
		copy(b[min(c.off, int64(len(b))):], c.poke)
		path := filepath.Join(dir, "bad-"+c.name+"."+c.format)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		bad = append(bad, badImage{c.format + "/" + c.name, path, c.format})
	}
	return bad
}

// TestDamagedMap: entries of the map that point nowhere are damage (exit 4 of
// image-stack map, EIO on the mount), never zeros and never a crash; the rest
// of the disk stays readable.
func TestDamagedMap(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	imgtest.RequireFuse(t)
	dir := workDir(t)
	qcow2, ploop := filepath.Join(dir, "d.qcow2"), filepath.Join(dir, "d.hds")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", qcow2, "64M")
	imgtest.QemuImg(t, "create", "-q", "-f", "parallels", ploop, "64M")
	for path, format := range map[string]string{qcow2: "qcow2", ploop: "parallels"} {
		imgtest.QemuIO(t, format, path, "write -P 1 0 4M")
	}
	// The second cluster of each: 0x...f00 MiB lies far behind the end.
	l2 := int64(binary.BigEndian.Uint64(readRange(t, qcow2, 0x30000, 8)) & 0x00fffffffffffe00)
	writeRange(t, qcow2, l2+8, binary.BigEndian.AppendUint64(nil, 1<<63|1<<50))
	writeRange(t, ploop, 64+4, binary.LittleEndian.AppendUint32(nil, 0x00ffff00))
	for _, c := range []struct {
		name, path string
		cluster    int64
	}{{"qcow2", qcow2, 64 << 10}, {"ploop", ploop, 1 << 20}} {
		t.Run(c.name, func(t *testing.T) {
			before := imgtest.SHA256File(t, c.path)
			o := runTool(t, "image-stack", "map", "--json", "--format", c.name, c.path)
			if o.exit != 4 {
				t.Errorf("image-stack map: exit %d, want 4\n%s", o.exit, o.stderr)
			}
			complains(t, "image-stack", o, c.path)
			mnt := mountPoint(t)
			o = runTool(t, "mount-image", "--format", c.name, c.path, mnt)
			switch o.exit {
			case 4: // it was seen while opening
				complains(t, "mount-image", o, c.path)
			case 0:
				m := &mounted{t: t, dir: mnt}
				wantBytes(t, "the first cluster", readRange(t, m.file(), 0, 4096), bytes.Repeat([]byte{1}, 4096))
				f, err := os.Open(m.file())
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.ReadAt(make([]byte, 4096), c.cluster); !errors.Is(err, unix.EIO) {
					t.Errorf("reading the damaged cluster: %v, want EIO", err)
				}
				f.Close()
				wantBytes(t, "the third cluster", readRange(t, m.file(), 2*c.cluster, 4096), bytes.Repeat([]byte{1}, 4096))
				m.unmount()
			default:
				t.Errorf("mount-image: exit %d\n%s", o.exit, o.stderr)
			}
			if imgtest.SHA256File(t, c.path) != before {
				t.Error("the image was written to")
			}
		})
	}
}
