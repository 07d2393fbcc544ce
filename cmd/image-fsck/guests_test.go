package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// guestDisk makes a disk of three partitions, ext4, xfs and btrfs, in a format
// that QEMU names.
func guestDisk(t *testing.T, format, path string, hurt map[string]func(t *testing.T, part string)) {
	t.Helper()
	for _, p := range []struct{ name, size, mkfs string }{
		{"p1", "32M", "mkfs.ext4 -q -F p1"}, {"p2", "300M", "mkfs.xfs -q -f p2"}, {"p3", "114M", "mkfs.btrfs -q -f -m single -d single p3"},
	} {
		imgtest.Run(t, "truncate", "-s", p.size, p.name)
		imgtest.Run(t, "sh", "-c", p.mkfs)
		if h := hurt[p.name]; h != nil {
			h(t, p.name)
		}
	}
	imgtest.Run(t, "truncate", "-s", "450M", "disk")
	imgtest.Run(t, "sh", "-c", `printf 'label: gpt\nstart=2048, size=65536\nstart=67584, size=614400\nstart=681984, size=233472\n' | sfdisk -q disk`)
	for name, start := range map[string]string{"p1": "1", "p2": "33", "p3": "333"} {
		imgtest.Run(t, "dd", "if="+name, "of=disk", "bs=1M", "seek="+start, "conv=notrunc,sparse", "status=none")
	}
	imgtest.QemuImg(t, "convert", "-O", format, "disk", path)
	for _, f := range []string{"p1", "p2", "p3", "disk"} {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
}

// hurtExt4 lets a bitmap contradict the inodes.
func hurtExt4(t *testing.T, part string) {
	t.Helper()
	imgtest.Run(t, "debugfs", "-w", "-R", "freeb 9 100", part)
}

// hurtXFS makes the number of links of the root directory wrong.
func hurtXFS(t *testing.T, part string) {
	t.Helper()
	imgtest.Run(t, "xfs_db", "-x", "-f", "-c", "sb 0", "-c", "addr rootino", "-c", "write core.nlinkv2 9", part)
}

// hurtBtrfs damages a block of the tree of files.
func hurtBtrfs(t *testing.T, part string) {
	t.Helper()
	b, err := os.ReadFile(part)
	if err != nil {
		t.Fatal(err)
	}
	fsid := b[0x10020:0x10030]
	n := 0
	for at := 0; at+16384 <= len(b); at += 4096 {
		if bytes.Equal(b[at+32:at+48], fsid) && binary.LittleEndian.Uint64(b[at+88:]) == 5 && at != 0x10000 {
			b[at+200] ^= 0xff
			n++
		}
	}
	if n == 0 {
		t.Fatal("there is no block of the tree")
	}
	if err := os.WriteFile(part, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestGuests: three partitions, clean or damaged, in images of several formats; what -y repairs is in the new top and nowhere else,
// and a new top with nothing in it is removed.
func TestGuests(t *testing.T) {
	imgtest.Require(t, "qemu-img", "mkfs.ext4", "e2fsck", "debugfs", "mkfs.xfs", "xfs_repair", "xfs_db", "mkfs.btrfs", "btrfs", "sfdisk")
	imgtest.RequireFuse(t)
	all := map[string]func(*testing.T, string){"p1": hurtExt4, "p2": hurtXFS, "p3": hurtBtrfs}
	for _, c := range []struct {
		name, format string
		hurt         map[string]func(*testing.T, string)
		check        [3]int // exit bits of the partitions
		repair       [3]int
	}{
		{"btrfs", "raw", map[string]func(*testing.T, string){"p3": hurtBtrfs}, [3]int{0, 0, 4}, [3]int{0, 0, 4}},
		{"all", "parallels", all, [3]int{4, 4, 4}, [3]int{1, 1, 4}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			path := map[string]string{"qcow2": "d.qcow2", "raw": "d.raw", "parallels": "d.hds"}[c.format]
			guestDisk(t, c.format, path, c.hurt)
			before := imgtest.SHA256File(t, path)
			bits := func(want [3]int) int { return want[0] | want[1] | want[2] }
			see := func(doc guestDoc, want [3]int) {
				t.Helper()
				kinds := []string{"ext4", "xfs", "btrfs"}
				if len(doc.Filesystems) != 3 {
					t.Fatalf("%+v", doc)
				}
				for i, f := range doc.Filesystems {
					if f.Filesystem != kinds[i] || f.Exit != want[i] {
						t.Errorf("%s: %s, exit %d, want %d\n%+v", f.Partition, f.Filesystem, f.Exit, want[i], f.Commands)
					}
				}
			}
			for _, args := range [][]string{{path}, {"-n", path}} {
				see(guestJSON(t, bits(c.check), args...), c.check)
			}
			doc := guestJSON(t, bits(c.repair), "-y", path)
			see(doc, c.repair)
			if imgtest.SHA256File(t, path) != before {
				t.Error("the image was written to")
			}
			names, _ := filepath.Glob("*")
			if repaired := bits(c.repair)&1 != 0; repaired != (doc.NewTop != "") || len(names) != 1+len(strings.Fields(doc.NewTop)) {
				t.Errorf("new top %q, files %q", doc.NewTop, names)
			}
			if doc.NewTop == "" {
				return
			}
			// To keep it: it is a sound layer over the image, in which only what
			// could not be repaired is left.
			if exit, out := imgtest.QemuCheck(t, doc.NewTop, "qcow2"); exit != 0 {
				t.Error(out)
			}
			var left [3]int
			for i, b := range c.repair {
				left[i] = b &^ 1
			}
			see(guestJSON(t, bits(left), doc.NewTop), left)
			// To drop it: the image is as damaged as it was.
			if err := os.Remove(doc.NewTop); err != nil {
				t.Fatal(err)
			}
			see(guestJSON(t, bits(c.check), path), c.check)
		})
	}
}

// TestGuestKeepsOne: what was repaired in one partition is kept, although the
// checker of another does not know all that is there.
func TestGuestKeepsOne(t *testing.T) {
	imgtest.Require(t, "qemu-img", "mkfs.ext4", "e2fsck", "debugfs", "mkfs.xfs", "mkfs.btrfs", "btrfs", "sfdisk")
	imgtest.RequireFuse(t)
	t.Chdir(t.TempDir())
	guestDisk(t, "qcow2", "d.qcow2", map[string]func(*testing.T, string){"p1": hurtExt4, "p2": func(t *testing.T, part string) {
		imgtest.Run(t, "wipefs", "-q", "-a", part)
		imgtest.Run(t, "mkfs.ext4", "-q", "-F", "-O", "^metadata_csum", part)
		poke(t, part, 1024+96+3, []byte{0x80}) // an incompatible feature that nobody knows
	}})
	doc := guestJSON(t, 1|8, "-y", "d.qcow2")
	if len(doc.Filesystems) != 3 || doc.Filesystems[0].Exit != 1 || doc.Filesystems[1].Exit != 8 || doc.NewTop != "d.qcow2.guest.qcow2" {
		t.Fatalf("%+v", doc)
	}
	if doc = guestJSON(t, 8, doc.NewTop); doc.Filesystems[0].Exit != 0 {
		t.Errorf("%+v", doc)
	}
}

// TestGuestDoubt: when the new top is not to be kept.
func TestGuestDoubt(t *testing.T) {
	for _, c := range []struct {
		want   string
		unread bool
		exits  []int
	}{
		{"", false, []int{1, 8, 4}},
		{"", false, []int{1 | 4}},
		{"p2", false, []int{1, 1 | 8}},
		{"read", true, []int{1}},
	} {
		doc := guestDoc{unread: c.unread}
		for i, e := range c.exits {
			doc.Filesystems = append(doc.Filesystems, guestCheck{Partition: fmt.Sprint("p", i+1), Exit: e})
		}
		if why := doc.doubt(); (why == "") != (c.want == "") || !strings.Contains(why, c.want) {
			t.Errorf("%v: %q", c.exits, why)
		}
	}
}

// TestGuestProgress: e2fsck's progress comes to the descriptor of -C, its
// output to stderr.
func TestGuestProgress(t *testing.T) {
	imgtest.Require(t, "mkfs.ext4", "e2fsck")
	imgtest.RequireFuse(t)
	t.Chdir(t.TempDir())
	imgtest.Run(t, "truncate", "-s", "64M", "d.raw")
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", "d.raw")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-C", "3", "--guest", "-n", "d.raw")
	cmd.Env = append(os.Environ(), toolEnv+"=1")
	cmd.ExtraFiles = []*os.File{w}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	err = cmd.Run()
	w.Close()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) < 5 || !strings.HasPrefix(lines[len(lines)-1], "5 ") {
		t.Errorf("progress: %q", lines)
	}
	if !strings.Contains(stderr.String(), "Pass 1") {
		t.Error(stderr.String())
	}
	var doc map[string]any
	if json.Unmarshal(b, &doc) == nil {
		t.Error("a document among the progress")
	}
}
