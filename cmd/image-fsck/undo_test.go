package main

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers/open"
)

// repaired is what --json says of the files that a repair has changed.
func repaired(t *testing.T, stdout string) map[string]string {
	t.Helper()
	var doc struct {
		Images []struct {
			Files []struct {
				File, Undo string
				Changed    bool
			}
		}
	}
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil {
		t.Fatal(err)
	}
	undo := map[string]string{}
	for _, i := range doc.Images {
		for _, f := range i.Files {
			if f.Changed {
				undo[f.File] = f.Undo
			}
		}
	}
	return undo
}

// TestUndoBundle: --undo names a file, and several files of a bundle are
// repaired. Each has an undo file of its own, by which it is taken back. A file
// that was there before is not touched.
func TestUndoBundle(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("disk.hdd", 0o700); err != nil {
		t.Fatal(err)
	}
	damage.WriteBundle(t, "disk.hdd")
	images := []string{"disk.hdd/root.hds", "disk.hdd/root.hds.1", "disk.hdd/root.hds.3"}
	before := map[string]string{}
	for _, name := range images {
		poke(t, name, 44, []byte{0xef, 0xbe, 0xad, 0xde}) // m_DiskInUse
		before[name] = imgtest.SHA256File(t, name)
	}
	if err := os.WriteFile("u.1", []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, _ := want(t, 1, "-p", "--undo", "u", "--json", "disk.hdd")
	undo := repaired(t, out)
	if names := slices.Sorted(maps.Values(undo)); !slices.Equal(names, []string{"u", "u.2", "u.3"}) {
		t.Fatalf("undo files %q", undo)
	}
	for name, u := range undo {
		want(t, 0, "--undo-apply", u, name)
	}
	for _, name := range images {
		if imgtest.SHA256File(t, name) != before[name] {
			t.Errorf("%s was not taken back", name)
		}
	}
	if b, err := os.ReadFile("u.1"); string(b) != "mine" {
		t.Errorf("a file was overwritten: %v", err)
	}
	// Another run does not add to them.
	want(t, 12, "-p", "--undo", "u", "disk.hdd")
	for _, name := range images {
		if imgtest.SHA256File(t, name) != before[name] {
			t.Errorf("%s was changed without an undo file", name)
		}
	}
}

// TestDumpReplaces: a dump takes the place of an earlier one, and of nothing
// else: not of the image, of another file, or of a device.
func TestDumpReplaces(t *testing.T) {
	t.Chdir(t.TempDir())
	ploopImage(t, "a.hds")
	before := imgtest.SHA256File(t, "a.hds")
	if err := os.WriteFile("notes", []byte("mine, and longer than a word"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a.hds", "link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("dir", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a.hds", "notes", "link", "dir", "/dev/null"} {
		_, stderr := want(t, 8, "--dump", name, "a.hds")
		if !strings.Contains(stderr, "not a valid metadata dump") {
			t.Errorf("%s: %s", name, stderr)
		}
	}
	if b, err := os.ReadFile("notes"); imgtest.SHA256File(t, "a.hds") != before || string(b[:4]) != "mine" || err != nil {
		t.Fatal("overwritten")
	}
	if st, err := os.Lstat("/dev/null"); err != nil || st.Mode()&os.ModeCharDevice == 0 {
		t.Fatalf("/dev/null: %v %v", st, err)
	}
	if err := os.WriteFile("d", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, 0, "--dump", "d", "a.hds")
	want(t, 0, "--dump", "d", "a.hds")
}

// TestGuestBundle: --guest -y on a bundle, named by its directory or by its
// descriptor, makes the new top beside it.
func TestGuestBundle(t *testing.T) {
	imgtest.Require(t, "mkfs.ext4", "e2fsck", "qemu-img")
	imgtest.RequirePloop(t)
	imgtest.RequireFuse(t)
	dir := t.TempDir()
	t.Chdir(dir)
	imgtest.Run(t, "truncate", "-s", "32M", "fs.raw")
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", "fs.raw")
	for _, d := range []string{"disk.hdd", "copy"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	imgtest.PloopBundle(t, filepath.Join(dir, "disk.hdd"), "expanded", 2, 32<<20, 1)
	s, err := open.Open(t.Context(), "disk.hdd", open.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("fs.raw")
	if err != nil {
		t.Fatal(err)
	}
	b[1024+58] ^= 1 // s_state: not clean
	if _, err := s.WriteAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ image, top string }{{"disk.hdd", "disk.hdd.guest.qcow2"}, {"disk.hdd/DiskDescriptor.xml", "disk.hdd/DiskDescriptor.xml.guest.qcow2"}} {
		doc := guestJSON(t, 1, "-y", c.image)
		if doc.NewTop != c.top {
			t.Errorf("%s: %+v", c.image, doc)
		}
		guestJSON(t, 0, doc.NewTop)
		if err := os.Remove(doc.NewTop); err != nil {
			t.Fatal(err)
		}
		guestJSON(t, 4, c.image) // as it was
	}
}
