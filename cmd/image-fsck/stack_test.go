package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// parentOf is what QEMU says about the parent of an image: its name and format.
func parentOf(t *testing.T, path string) string {
	t.Helper()
	out := string(imgtest.Run(t, "qemu-img", "info", "-U", "--output=json", path))
	var parts []string
	for _, key := range []string{`"backing-filename": "`, `"backing-filename-format": "`} {
		_, after, _ := strings.Cut(out, key)
		v, _, _ := strings.Cut(after, `"`)
		parts = append(parts, v)
	}
	return strings.TrimSuffix(strings.Join(parts, " "), " ")
}

// TestLinks: what can be wrong between a qcow2 image and its parent, what is
// repaired, and that it is taken back.
func TestLinks(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	qemu := func(t *testing.T, line string) { t.Helper(); imgtest.QemuImg(t, strings.Fields(line)...) }
	chain := func(t *testing.T, name string) {
		t.Helper()
		qemu(t, "create -q -f qcow2 base.qcow2 1M")
		imgtest.QemuIO(t, "qcow2", "base.qcow2", "write -P 7 0 1M")
		qemu(t, "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 1M")
		imgtest.QemuIO(t, "qcow2", "top.qcow2", "write -P 9 64k 64k")
		qemu(t, "rebase -u -b "+name+" -F qcow2 top.qcow2")
		old(t, "base.qcow2")
	}
	for _, c := range []struct {
		name               string
		make               func(t *testing.T)
		args               []string // besides the mode
		code               string
		before, preen, all int    // exit codes
		parent             string // after -y
		says               string
	}{
		{"moved", func(t *testing.T) { chain(t, "/srv/images/base.qcow2"); old(t, "base.qcow2") }, nil, "stack.parent.not-followed", 0, 0, 0, "", "--allow-path"},
		{"moved below", func(t *testing.T) { chain(t, "images/base.qcow2") }, nil, "stack.parent.missing", 4, 4, 1, "base.qcow2 qcow2", "name base.qcow2 instead"},
		{"moved to an allowed directory", func(t *testing.T) {
			chain(t, "images/base.qcow2")
			imgtest.Run(t, "mkdir", "there")
			imgtest.Run(t, "mv", "base.qcow2", "there")
		}, []string{"--allow-path", "there"}, "stack.parent.missing", 4, 4, 1, "/there/base.qcow2 qcow2", "likely and not proved"},
		{"gone", func(t *testing.T) { chain(t, "other.qcow2") }, nil, "stack.parent.missing", 4, 4, 4, "", "qemu-img rebase -u"},
		{"gone, another format of that name", func(t *testing.T) {
			chain(t, "images/base.qcow2")
			qemu(t, "create -q -f raw base.qcow2 1M")
		}, nil, "stack.parent.missing", 4, 4, 4, "", "qemu-img rebase -u"},
		{"gone and not needed", func(t *testing.T) {
			chain(t, "base.qcow2")
			imgtest.QemuIO(t, "qcow2", "top.qcow2", "write -P 9 0 1M")
			imgtest.Run(t, "rm", "base.qcow2")
		}, nil, "stack.parent.missing", 4, 1, 1, "-", "stores the whole disk"},
		{"gone, needed by a snapshot", func(t *testing.T) {
			chain(t, "base.qcow2")
			qemu(t, "snapshot -c one top.qcow2")
			imgtest.QemuIO(t, "qcow2", "top.qcow2", "write -P 9 0 1M")
			imgtest.Run(t, "rm", "base.qcow2")
		}, nil, "stack.parent.missing", 4, 4, 4, "", "qemu-img rebase -u"},
		{"loop", func(t *testing.T) {
			chain(t, "other.qcow2")
			qemu(t, "create -q -f qcow2 -u -b top.qcow2 -F qcow2 other.qcow2 1M")
		}, nil, "stack.parent.cycle", 4, 4, 4, "", "which image is the base"},
		{"loop with a base", func(t *testing.T) {
			chain(t, "base.qcow2")
			imgtest.QemuIO(t, "qcow2", "top.qcow2", "write -P 9 0 1M")
			qemu(t, "rebase -u -b top.qcow2 -F qcow2 top.qcow2")
			imgtest.Run(t, "rm", "base.qcow2")
		}, nil, "stack.parent.cycle", 4, 1, 1, "-", "it is the base"},
		{"wrong format", func(t *testing.T) {
			chain(t, "base.qcow2")
			qemu(t, "create -q -f raw base.qcow2 1M")
			old(t, "base.qcow2")
		}, nil,
			"stack.parent.wrong-format", 4, 4, 4, "", "--backing-format FORMAT"},
		{"wrong format, stated", func(t *testing.T) {
			chain(t, "base.qcow2")
			qemu(t, "create -q -f raw base.qcow2 1M")
			old(t, "base.qcow2")
		},
			[]string{"--backing-format", "raw"}, "stack.parent.wrong-format", 4, 4, 1, "base.qcow2 raw", "state raw"},
		{"wrong format, stated wrongly", func(t *testing.T) {
			chain(t, "base.qcow2")
			qemu(t, "create -q -f raw base.qcow2 1M")
			old(t, "base.qcow2")
		},
			[]string{"--backing-format", "ploop"}, "stack.parent.wrong-format", 4, 4, 4, "", ""},
		{"in doubt", func(t *testing.T) { chain(t, "base.qcow2"); qemu(t, "rebase -u -b base.qcow2 -F raw top.qcow2") }, nil,
			"stack.parent.not-followed", 0, 0, 0, "", "--backing-format"},
		{"in doubt, stated", func(t *testing.T) { chain(t, "base.qcow2"); qemu(t, "rebase -u -b base.qcow2 -F raw top.qcow2") },
			[]string{"--backing-format", "qcow2"}, "stack.parent.not-followed", 0, 0, 1, "base.qcow2 qcow2", "state qcow2"},
		{"not stated, but by the user", func(t *testing.T) { chain(t, "base.qcow2"); unstate(t, "top.qcow2") },
			[]string{"--backing-format", "qcow2"}, "stack.parent.format-unstated", 0, 0, 1, "base.qcow2 qcow2", "state qcow2"},
		{"not stated", func(t *testing.T) { chain(t, "base.qcow2"); unstate(t, "top.qcow2") }, nil, "stack.parent.not-followed", 0, 0, 0, "", "--backing-format"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			c.make(t)
			before := imgtest.SHA256File(t, "top.qcow2")
			out, _ := want(t, c.before, append([]string{"-n", "top.qcow2"}, c.args...)...)
			if !strings.Contains(out, "["+c.code+"]") || !strings.Contains(out, c.says) {
				t.Errorf("%s is not found, or %q not said:\n%s", c.code, c.says, out)
			}
			if imgtest.SHA256File(t, "top.qcow2") != before {
				t.Fatal("-n changed the image")
			}
			undo := func(exit int) {
				t.Helper()
				if exit&1 == 0 {
					if imgtest.SHA256File(t, "top.qcow2") != before {
						t.Error("changed, and not said")
					}
					if _, err := os.Stat("top.qcow2.undo"); err == nil {
						t.Error("an undo file for nothing")
					}
					return
				}
				want(t, 0, "--undo-apply", "top.qcow2.undo", "top.qcow2")
				if imgtest.SHA256File(t, "top.qcow2") != before {
					t.Error("not restored")
				}
				if err := os.Remove("top.qcow2.undo"); err != nil {
					t.Fatal(err)
				}
			}
			want(t, c.preen, append([]string{"-p", "top.qcow2"}, c.args...)...)
			undo(c.preen)
			out, _ = want(t, c.all, append([]string{"-y", "top.qcow2"}, c.args...)...)
			if c.all&1 != 0 {
				if !strings.Contains(out, "FIXED") || !strings.Contains(out, "--undo-apply") {
					t.Error(out)
				}
				dir, _ := os.Getwd()
				got := strings.ReplaceAll(parentOf(t, "top.qcow2"), dir, "")
				if got != strings.TrimPrefix(c.parent, "-") {
					t.Errorf("parent %q, want %q", got, c.parent)
				}
				want(t, 0, append([]string{"-n", "top.qcow2"}, c.args...)...)
				if exit, out := imgtest.QemuCheck(t, "top.qcow2", "qcow2"); exit != 0 {
					t.Error(out)
				}
				// What the image stores itself has not changed.
				imgtest.QemuIO(t, "qcow2", "top.qcow2", "read -P 9 64k 64k")
			}
			undo(c.all)
		})
	}
}

// old makes a file older than what is made after it.
func old(t *testing.T, path string) {
	t.Helper()
	then := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, then, then); err != nil {
		t.Fatal(err)
	}
}

// unstate takes the extension with the format of the parent out of a header.
func unstate(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := strings.Index(string(b[:4096]), "\xe2\x79\x2a\xca")
	if at < 0 {
		t.Fatal("no format is stated")
	}
	poke(t, path, int64(at), []byte{0x12, 0x34, 0x56, 0x78}) // one that nobody knows
}

// A parent that comes to light by a repair is checked in the same run.
func TestLinkLeadsOn(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-u", "-b", "was/base.qcow2", "-F", "qcow2", "top.qcow2", "1M")
	imgtest.QemuIO(t, "qcow2", "base.qcow2", "write 0 64k")
	st, err := os.Stat("base.qcow2")
	if err == nil {
		err = os.Truncate("base.qcow2", st.Size()+1<<20) // a leak
	}
	if err != nil {
		t.Fatal(err)
	}
	old(t, "base.qcow2")
	before := imgtest.SHA256File(t, "base.qcow2")
	out, _ := want(t, 1, "-y", "--undo", "my.undo", "top.qcow2")
	if !strings.Contains(out, "base.qcow2: clean") && !strings.Contains(out, "base.qcow2: NOT CLEAN") {
		t.Errorf("the parent was not checked:\n%s", out)
	}
	if imgtest.SHA256File(t, "base.qcow2") != before {
		t.Error("a parent was repaired that was not named")
	}
	if names, _ := filepath.Glob("*"); len(names) != 3 {
		t.Errorf("%q", names)
	}
}
