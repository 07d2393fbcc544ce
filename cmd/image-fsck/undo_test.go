package main

import (
	"encoding/json"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
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
