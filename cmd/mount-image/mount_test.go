package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

func TestReadOnly(t *testing.T) {
	t.Parallel()
	raw, paths := images(t)
	for kind, path := range paths {
		t.Run(kind, func(t *testing.T) {
			before := imgtest.SHA256File(t, path)
			dir := mountDir(t)
			if o := want(t, 0, path, dir); o.stdout != "" || o.stderr != "" {
				t.Errorf("it says %q %q", o.stdout, o.stderr)
			}
			imgtest.SameContent(t, raw, disk(dir))
			if _, err := os.OpenFile(disk(dir), os.O_RDWR, 0); err == nil {
				t.Error("a read-only mount opens for writing")
			}
			want(t, 0, "-u", dir)
			unmounted(t, dir)
			if imgtest.SHA256File(t, path) != before {
				t.Error("the image has changed")
			}
		})
	}
}

func TestWrite(t *testing.T) {
	t.Parallel()
	raw, paths := images(t)
	expect, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	patch := imgtest.PatternBytes(7, 0, 300000)
	copy(expect[1234567:], patch)
	clear(expect[10<<20+5 : 12<<20])
	for kind, path := range paths {
		if kind == "qcow2 chain" {
			continue // its base is written by another case
		}
		t.Run(kind, func(t *testing.T) {
			dir := mountDir(t)
			want(t, 0, "-w", path, dir)
			f, err := os.OpenFile(disk(dir), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(patch, 1234567); err != nil {
				t.Error(err)
			}
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 10<<20+5, 2<<20-5); err != nil {
				t.Error(err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			want(t, 0, "-u", dir)
			unmounted(t, dir)
			out := filepath.Join(t.TempDir(), "out")
			imgtest.QemuRaw(t, kind, path, out)
			if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got[:len(expect)], expect) {
				t.Errorf("qemu-img reads something else (%v)", err)
			}
			if kind != "raw" {
				if exit, out := imgtest.QemuCheck(t, path, kind); exit != 0 {
					t.Errorf("qemu-img check: %d %s", exit, out)
				}
			}
		})
	}
}

func TestScratch(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	before := imgtest.SHA256File(t, path)
	for _, flags := range [][]string{{"--scratch"}, {"-w", "--scratch"}, {"-o", "rw,scratch"}} {
		dir := mountDir(t)
		want(t, 0, append(flags, path, dir)...)
		data := imgtest.PatternBytes(9, 0, 5<<20)
		f, err := os.OpenFile(disk(dir), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(data, 777); err != nil {
			t.Error(err)
		}
		if err := f.Sync(); err != nil {
			t.Error(err)
		}
		got := make([]byte, len(data))
		if _, err := f.ReadAt(got, 777); err != nil || !bytes.Equal(got, data) {
			t.Errorf("reading back: %v", err)
		}
		_ = f.Close()
		want(t, 0, "-u", dir)
		if imgtest.SHA256File(t, path) != before {
			t.Error("the image has changed")
		}
	}
}

func TestPartitions(t *testing.T) {
	t.Parallel()
	imgtest.Require(t, "sfdisk")
	raw := rawImage(t)
	cmd := exec.Command("sfdisk", "-q", "--no-reread", "--no-tell-kernel", raw)
	cmd.Stdin = strings.NewReader("label: gpt\nsize=4M, name=one\nsize=8M, name=two\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v %s", err, out)
	}
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	imgtest.QemuImg(t, "convert", "-O", "qcow2", raw, path)
	dir := mountDir(t)
	o := want(t, 0, "-w", "--partitions", "--json", path, dir)
	var a announcement
	if err := json.Unmarshal([]byte(o.stdout), &a); err != nil {
		t.Fatalf("%v: %s", err, o.stdout)
	}
	if a.Mount != dir || a.Disk != disk(dir) || !a.Writable || a.Size != imageSize || len(a.Partitions) != 2 ||
		a.Partitions[1].Name != "two" || a.Partitions[1].File != dir+"/p2" || a.PID == 0 {
		t.Errorf("%+v", a)
	}
	p2, err := os.OpenFile(dir+"/p2", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p2.Close()
	if _, err := p2.WriteAt([]byte("hello"), 100); err != nil {
		t.Error(err)
	}
	d, err := os.Open(disk(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := make([]byte, 5)
	if _, err := d.ReadAt(got, a.Partitions[1].Start+100); err != nil || string(got) != "hello" {
		t.Errorf("%q %v", got, err)
	}
	_ = p2.Close()
	_ = d.Close()
	want(t, 0, "-u", dir)

	// A damaged table is an error that says where, and nothing is mounted.
	f, err := os.OpenFile(raw, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{512 + 40, imageSize - 512 + 40} {
		if _, err := f.WriteAt([]byte{0xff}, at); err != nil {
			t.Fatal(err)
		}
	}
	_ = f.Close()
	o = want(t, 1, "--partitions", "--format", "raw", raw, dir)
	contains(t, "damaged table", o.stderr, "partition table: offset 0x")
	unmounted(t, dir)
}

func TestLoop(t *testing.T) {
	t.Parallel()
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "e2fsck")
	_, path := qcow2Image(t)
	dir := mountDir(t)
	guest := t.TempDir()

	o := want(t, 0, "-w", "--loop", path, dir)
	loop := strings.TrimSpace(o.stdout)
	if !strings.HasPrefix(loop, "/dev/loop") || o.stdout != loop+"\n" {
		t.Fatalf("stdout %q", o.stdout)
	}
	base := "/sys/block/" + filepath.Base(loop)
	for file, text := range map[string]string{"/ro": "0", "/loop/dio": "1", "/queue/logical_block_size": "512", "/loop/backing_file": disk(dir)} {
		if b, err := os.ReadFile(base + file); err != nil || strings.TrimSpace(string(b)) != text {
			t.Errorf("%s: %q %v, want %q", file, b, err, text)
		}
	}
	imgtest.Run(t, "mkfs.ext4", "-q", loop)
	imgtest.Run(t, "mount", loop, guest)
	mounted := true
	defer func() {
		if mounted {
			imgtest.Umount(t, guest)
		}
	}()
	data := imgtest.PatternBytes(3, 0, 9<<20)
	if err := os.WriteFile(guest+"/file", data, 0o600); err != nil {
		t.Fatal(err)
	}
	// In use: exit 3, naming the place, and nothing is lost.
	o = want(t, 3, "-u", dir)
	contains(t, "busy", o.stderr, loop, guest)
	if !isMounted(t, dir) {
		t.Fatal("unmounted under the guest's filesystem")
	}
	// Discards reach the image, again and again: the loop device must never
	// see EOPNOTSUPP.
	used := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	for range 2 {
		imgtest.Run(t, "sync", "-f", guest)
		full := used()
		if err := os.Remove(guest + "/file"); err != nil {
			t.Fatal(err)
		}
		imgtest.Run(t, "sync", "-f", guest)
		imgtest.Run(t, "fstrim", guest)
		imgtest.Run(t, "sync", disk(dir))
		if now := used(); now > full-8<<20 {
			t.Errorf("fstrim gave back %d bytes", full-now)
		}
		if err := os.WriteFile(guest+"/file", data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	imgtest.Umount(t, guest)
	mounted = false
	want(t, 0, "-u", dir)
	unmounted(t, dir)
	if exit, out := imgtest.QemuCheck(t, path, "qcow2"); exit != 0 {
		t.Errorf("qemu-img check: %d %s", exit, out)
	}

	// Again, read-only.
	loop = strings.TrimSpace(want(t, 0, "--loop", path, dir).stdout)
	if b, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/ro"); err != nil || string(b) != "1\n" {
		t.Errorf("ro: %q %v", b, err)
	}
	imgtest.Run(t, "e2fsck", "-fn", loop)
	imgtest.Run(t, "mount", "-o", "ro", loop, guest)
	got, err := os.ReadFile(guest + "/file")
	imgtest.Umount(t, guest)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file differs (%v)", err)
	}
	want(t, 0, "-u", dir)
	unmounted(t, dir)

	loop = strings.TrimSpace(want(t, 0, "--loop", "--sector-size", "4096", path, dir).stdout)
	if b, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/queue/logical_block_size"); err != nil || string(b) != "4096\n" {
		t.Errorf("sector size: %q %v", b, err)
	}
	want(t, 0, "-u", dir)
	unmounted(t, dir)
}

func TestPermissions(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	for _, c := range []struct {
		options string
		mode    string
		owner   int
		root    bool
	}{
		{"ro", "-r--------", os.Geteuid(), false},
		{"rw", "-rw-------", os.Geteuid(), false},
		{"allow_other", "-r--r--r--", 0, true},
		{"rw,allow_other", "-rw-r--r--", 0, true},
		{"rw,allow_root", "-rw-------", 0, true},
		{"rw,allow_root,umask=022", "-rw-------", 0, true},
		{"rw,allow_other,uid=1234,gid=99,umask=027", "-rw-r-----", 1234, true},
	} {
		if c.root && os.Geteuid() != 0 {
			continue // needs user_allow_other in /etc/fuse.conf
		}
		dir := mountDir(t)
		want(t, 0, "-o", c.options, path, dir)
		st, err := os.Stat(disk(dir))
		if err != nil {
			t.Fatal(err)
		}
		var u unix.Stat_t
		if err := unix.Stat(disk(dir), &u); err != nil {
			t.Fatal(err)
		}
		if st.Mode().String() != c.mode || int(u.Uid) != c.owner {
			t.Errorf("%s: %v owned by %d", c.options, st.Mode(), u.Uid)
		}
		want(t, 0, "-u", dir)
	}
}

// Whatever is wrong, the caller hears it, with its exit code, and nothing is
// left mounted.
func TestRefusals(t *testing.T) {
	t.Parallel()
	raw, path := qcow2Image(t)
	dir := mountDir(t)
	corrupt := filepath.Join(t.TempDir(), "bad.qcow2")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[5] = 9 // version
	if err := os.WriteFile(corrupt, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		exit int
		args []string
		says string
	}{
		{2, []string{}, "want an image and a directory"},
		{2, []string{path}, "want an image and a directory"},
		{2, []string{"--nonsense", path, dir}, "nonsense"},
		{2, []string{"-o", "nonsense", path, dir}, "nonsense"},
		{2, []string{"-w", "-o", "ro", path, dir}, "exclude"},
		{2, []string{"--scratch", "-o", "ro", path, dir}, "exclude"},
		{2, []string{"--format", "vmdk", path, dir}, "vmdk"},
		{2, []string{"--cache-size", "lots", path, dir}, "lots"},
		{2, []string{"-o", "cache_size=lots", path, dir}, "lots"},
		{2, []string{"--sector-size", "1000", path, dir}, "1000"},
		{2, []string{"-u"}, "wants a directory"},
		{1, []string{"-u", dir, dir}, "nothing is mounted"},
		{1, []string{filepath.Join(dir, "none"), dir}, "no such file"},
		{1, []string{path, filepath.Join(dir, "none")}, "no such file"},
		{1, []string{path, raw}, "not a directory"},
		{1, []string{corrupt, dir}, "bad.qcow2"},
		{1, []string{"--snapshot", "none", path, dir}, "none"},
		{1, []string{"-u", dir}, "nothing is mounted"},
		{1, []string{"-u", "/proc"}, "not by mount-image"},
	} {
		for _, foreground := range []bool{false, true} {
			args := c.args
			if foreground {
				args = append([]string{"-f"}, args...)
			}
			o := want(t, c.exit, args...)
			contains(t, fmt.Sprint(args), o.stderr, c.says)
			if !strings.HasPrefix(o.stderr, "mount-image: ") || o.stdout != "" {
				t.Errorf("%q: stdout %q, stderr %q", args, o.stdout, o.stderr)
			}
			unmounted(t, dir)
		}
	}

	// Damage that image-fsck is for, where the first byte of the disk is mapped.
	b[5] = 0
	copy(b[40:48], []byte{0, 0, 0, 0x7f, 0, 0, 0, 0}) // L1 table offset
	if err := os.WriteFile(corrupt, b, 0o600); err != nil {
		t.Fatal(err)
	}
	o := want(t, 4, corrupt, dir)
	contains(t, "damaged map", o.stderr, "bad.qcow2: offset 0x", "L1 table", "image-fsck -n")
	unmounted(t, dir)

	// One mount point, one mount; one image, one writer.
	want(t, 0, "-w", path, dir)
	o = want(t, 3, raw, dir)
	contains(t, "second mount", o.stderr, "already", "-u "+dir)
	other := mountDir(t)
	o = want(t, 3, path, other)
	contains(t, "second opener", o.stderr, path)
	unmounted(t, other)
	want(t, 0, "-u", dir)

	// Names with everything that a table of mounts must escape.
	odd := filepath.Join(t.TempDir(), `a b,c\d`+"\té.qcow2")
	if err := os.Rename(path, odd); err != nil {
		t.Fatal(err)
	}
	oddDir := filepath.Join(dir, `x y,\z`)
	if err := os.Mkdir(oddDir, 0o755); err != nil {
		t.Fatal(err)
	}
	want(t, 0, odd, oddDir)
	imgtest.SameContent(t, raw, disk(oddDir))
	want(t, 0, "-u", oddDir)
	unmounted(t, oddDir)
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	raw, path := qcow2Image(t)
	imgtest.QemuImg(t, "snapshot", "-c", "before", path)
	imgtest.QemuIO(t, "qcow2", path, "write -P 7 0 4M")
	dir := mountDir(t)
	for _, flags := range [][]string{{"--snapshot", "before"}, {"--snapshot", "1"}, {"-o", "ro,snapshot=before"}} {
		want(t, 0, append(flags, path, dir)...)
		imgtest.SameContent(t, raw, disk(dir))
		want(t, 0, "-u", dir)
	}
	want(t, 0, path, dir)
	head := make([]byte, 4<<20)
	f, err := os.Open(disk(dir))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(head, 0); err != nil || !bytes.Equal(head, bytes.Repeat([]byte{7}, len(head))) {
		t.Errorf("the active state: %v", err)
	}
	_ = f.Close()
	want(t, 0, "-u", dir)
	want(t, 0, "--scratch", "--snapshot", "before", path, dir)
	imgtest.SameContent(t, raw, disk(dir))
	want(t, 0, "-u", dir)
}

// A bundle, named by its directory and by its descriptor, written here and
// read by qemu-img layer over layer, then checked by ploop's own tool.
func TestPloopBundle(t *testing.T) {
	t.Parallel()
	imgtest.RequirePloop(t)
	bundle := t.TempDir()
	images := imgtest.PloopBundle(t, bundle, "expanded", 2, 64<<20, 3)
	dir := mountDir(t)
	data := imgtest.PatternBytes(4, 0, 5<<20)
	want(t, 0, "-w", bundle, dir)
	writeDisk(t, dir, data, 3<<20+12345)
	want(t, 0, "-u", dir)
	unmounted(t, dir)
	out := filepath.Join(t.TempDir(), "out")
	imgtest.QemuRaw(t, "", imgtest.Chain(images...), out)
	got, err := os.ReadFile(out)
	if err != nil || !bytes.Equal(got[3<<20+12345:][:len(data)], data) {
		t.Errorf("qemu-img reads something else (%v)", err)
	}
	want(t, 0, filepath.Join(bundle, "DiskDescriptor.xml"), dir)
	imgtest.SameContent(t, out, disk(dir))
	want(t, 0, "-u", dir)
	for _, image := range images {
		if exit, out := imgtest.PloopCheck(t, image.Path); exit != 0 {
			t.Errorf("ploop check: %d %s", exit, out)
		}
	}
}
