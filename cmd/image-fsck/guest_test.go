package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// partitioned makes a qcow2 image with an ext4 and an xfs partition and the
// raw files of both.
func partitioned(t *testing.T, path string, damage func(ext4 string)) {
	t.Helper()
	imgtest.Run(t, "truncate", "-s", "40M", "p1")
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", "p1")
	imgtest.Run(t, "truncate", "-s", "320M", "p2")
	imgtest.Run(t, "mkfs.xfs", "-q", "-f", "p2")
	if damage != nil {
		damage("p1")
	}
	imgtest.Run(t, "truncate", "-s", "364M", "disk")
	imgtest.Run(t, "sh", "-c", `printf 'label: gpt\nstart=2048, size=81920\nstart=83968, size=655360\n' | sfdisk -q disk`)
	for i, start := range []string{"1", "41"} {
		imgtest.Run(t, "dd", "if=p"+string(rune('1'+i)), "of=disk", "bs=1M", "seek="+start, "conv=notrunc,sparse", "status=none")
	}
	imgtest.QemuImg(t, "convert", "-O", "qcow2", "disk", path)
	for _, f := range []string{"p1", "p2", "disk"} {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
}

func guestJSON(t *testing.T, exit int, args ...string) (doc guestDoc) {
	t.Helper()
	out, _ := want(t, exit, append([]string{"--guest", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Exit != exit {
		t.Errorf("exit %d in the document, %d of the tool", doc.Exit, exit)
	}
	return doc
}

func TestGuest(t *testing.T) {
	imgtest.Require(t, "qemu-img", "mkfs.ext4", "e2fsck", "debugfs", "mkfs.xfs", "xfs_repair", "sfdisk")
	imgtest.RequireFuse(t)
	t.Chdir(t.TempDir())
	partitioned(t, "good.qcow2", nil)
	before := imgtest.SHA256File(t, "good.qcow2")
	for _, args := range [][]string{{"good.qcow2"}, {"-n", "good.qcow2"}, {"-y", "good.qcow2"}} {
		doc := guestJSON(t, 0, args...)
		if len(doc.Filesystems) != 2 || doc.Filesystems[0].Filesystem != "ext4" || doc.Filesystems[1].Partition != "p2" || doc.Filesystems[1].Filesystem != "xfs" {
			t.Errorf("%+v", doc)
		}
	}
	// The same within all limits, as another user, and without any.
	for _, args := range [][]string{{"--sandbox=require"}, {"--sandbox=require", "--uid", "nobody"}, {"--sandbox=off"}} {
		if doc := guestJSON(t, 0, append(args, "good.qcow2")...); len(doc.Filesystems) != 2 || len(doc.Filesystems[0].Commands) != 2 {
			t.Errorf("%q: %+v", args, doc)
		}
	}
	partitioned(t, "bad.qcow2", func(p string) {
		// A bitmap that says the contrary, and a directory entry to nowhere.
		imgtest.Run(t, "debugfs", "-w", "-R", "freeb 9 100", p)
	})
	damaged := imgtest.SHA256File(t, "bad.qcow2")
	doc := guestJSON(t, 4, "bad.qcow2")
	if doc.Filesystems[0].Exit != 4 || doc.Filesystems[1].Exit != 0 || doc.NewTop != "" || len(doc.Filesystems[0].Commands) != 2 {
		t.Errorf("%+v", doc)
	}
	if left, _ := filepath.Glob("*"); len(left) != 2 {
		t.Errorf("left behind: %q", left)
	}
	doc = guestJSON(t, 1, "-y", "bad.qcow2")
	if doc.NewTop != "bad.qcow2.guest.qcow2" || doc.Filesystems[0].Exit != 1 {
		t.Errorf("%+v", doc)
	}
	if imgtest.SHA256File(t, "bad.qcow2") != damaged || imgtest.SHA256File(t, "good.qcow2") != before {
		t.Error("the image was written to")
	}
	guestJSON(t, 0, doc.NewTop)
	want(t, 0, "-n", doc.NewTop)
	if exit, out := imgtest.QemuCheck(t, doc.NewTop, "qcow2"); exit != 0 {
		t.Error(out)
	}
	out, _ := want(t, 0, "--guest", doc.NewTop)
	if !strings.Contains(out, "p1: ext4: clean") || !strings.Contains(out, "p2: xfs: clean") {
		t.Error(out)
	}
	// The second new top is refused: it would overwrite the first.
	if _, stderr := want(t, 8, "--guest", "-y", "bad.qcow2"); !strings.Contains(stderr, "file exists") {
		t.Error(stderr)
	}
}

// However a check ends, nothing stays behind: no mount, no new top, no checker.
func TestGuestEnds(t *testing.T) {
	imgtest.Require(t, "qemu-img", "mkfs.ext4")
	imgtest.RequireFuse(t)
	dir := t.TempDir()
	t.Chdir(dir)
	imgtest.Run(t, "truncate", "-s", "8M", "d.raw")
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", "d.raw")
	if err := os.Mkdir("bin", 0o700); err != nil {
		t.Fatal(err)
	}
	// A checker that does not end by itself.
	if err := os.WriteFile("bin/e2fsck", []byte("#!/bin/sh\necho $$ >"+dir+"/pid\nexec sleep 300\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGKILL} {
		tmp := t.TempDir()
		cmd := command(t.Context(), "--guest", "-y", "--sandbox=off", "d.raw")
		cmd.Env = append(cmd.Env, "PATH="+dir+"/bin:"+os.Getenv("PATH"), "TMPDIR="+tmp)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pid := 0
		await(t, "the checker runs", func() bool {
			b, err := os.ReadFile("pid")
			n, _ := fmt.Sscan(string(b), &pid)
			return err == nil && n == 1
		})
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // the exit code tells
		if code := cmd.ProcessState.ExitCode(); sig != unix.SIGKILL && code != fsck.ExitCancelled {
			t.Errorf("%v: exit %d", sig, code)
		}
		await(t, "all is gone", func() bool {
			left, err := os.ReadDir(tmp)
			_, top := os.Stat("d.raw.guest.qcow2")
			return err == nil && len(left) == 0 && errors.Is(top, fs.ErrNotExist) && unix.Kill(pid, 0) != nil
		})
		if err := os.Remove("pid"); err != nil {
			t.Fatal(err)
		}
	}
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it never came: ", what)
		}
	}
}

// A journal that waits for its replay is no damage.
func TestGuestJournal(t *testing.T) {
	imgtest.Require(t, "qemu-img", "mkfs.ext4", "e2fsck", "debugfs", "dumpe2fs")
	imgtest.RequireFuse(t)
	t.Chdir(t.TempDir())
	imgtest.Run(t, "truncate", "-s", "40M", "d.raw")
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", "d.raw")
	if err := os.WriteFile("cmds", []byte("jo\njw -b 9000 /etc/hostname\njc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	imgtest.Run(t, "debugfs", "-w", "-f", "cmds", "d.raw")
	if out := imgtest.Run(t, "dumpe2fs", "-h", "d.raw"); !strings.Contains(string(out), "needs_recovery") {
		t.Fatalf("the journal is clean:\n%s", out)
	}
	before := imgtest.SHA256File(t, "d.raw")
	doc := guestJSON(t, 0, "d.raw")
	if len(doc.Filesystems) != 1 || doc.Filesystems[0].Partition != "disk" {
		t.Errorf("%+v", doc)
	}
	if imgtest.SHA256File(t, "d.raw") != before {
		t.Error("the image was written to")
	}
	if err := os.Remove("cmds"); err != nil {
		t.Fatal(err)
	}
	imgtest.Run(t, "truncate", "-s", "1M", "empty.raw")
	if out, _ := want(t, 0, "--guest", "empty.raw"); !strings.Contains(out, "no filesystem") {
		t.Error(out)
	}
}
