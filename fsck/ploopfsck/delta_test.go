package ploopfsck_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers/open"
)

// TestDeltas: in a bundle, an entry that a delta has lost shows zeros, which
// the report names, and never what a parent has there; in the base it is
// emptied.
func TestDeltas(t *testing.T) {
	const k = 64 << 10
	for _, c := range []struct {
		name, file string
		idx        int
		zeros      bool // an entry with a cluster of zeros
	}{
		{"base", "root.hds", 2, false},
		{"middle", "root.hds.1", 1, true},
		{"top", "root.hds.3", 2, true},
		{"beside", "root.hds.2", 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "disk.hdd")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			damage.WriteBundle(t, dir)
			want := readFile(t, damage.Original(filepath.Dir(dir)))
			path := filepath.Join(dir, c.file)
			b := readFile(t, path)
			p := &damage.PloopImage{Version: 2, Cluster: k, Entries: 16, B: b}
			p.Put32(64+4*c.idx, 0xffffffff)
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if left, codes, _ := stateOfAll(runOn(t, dir, nil)); left != damage.Damaged || !codes["ploop.bat.invalid"] {
				t.Errorf("%v %v", left, codes)
			}
			res := runOn(t, dir, fsck.DecideAll)
			if left, _, _ := stateOfAll(res); left != damage.Clean {
				showAll(t, res)
				t.Fatal("not clean")
			}
			entry := le32(readFile(t, path)[64+4*c.idx:])
			if (entry != 0) != c.zeros {
				t.Errorf("the entry is %#x", entry)
			}
			got := showsDisk(t, dir)
			if c.name == "middle" || c.name == "top" { // the others do not show there
				clear(want[c.idx*k : (c.idx+1)*k])
			}
			if !bytes.Equal(got, want) {
				t.Error("the disk shows something else than zeros there, or has changed elsewhere")
			}
			undoAll(t, res)
			if !bytes.Equal(readFile(t, path), b) {
				t.Error("not taken back")
			}
			// Named alone, the image has its parents all the same.
			var alone *fsck.ImageResult
			fsck.Run(t.Context(), []string{path}, fsck.RunOptions{Decide: fsck.DecideAll}, func(r *fsck.ImageResult) { alone = r })
			if e := le32(readFile(t, path)[64+4*c.idx:]); alone.Err != nil || (e != 0) != c.zeros {
				t.Errorf("alone: the entry is %#x, %v", e, alone.Err)
			}
		})
	}
}

func le32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// TestDeltasOfPloop: bundles that ploop's own tools have made with snapshots
// are clean, empty or with data in every delta; what -y leaves of a damaged
// one is accepted by ploop check and by QEMU with the chain stated.
func TestDeltasOfPloop(t *testing.T) {
	imgtest.RequirePloop(t)
	imgtest.Require(t, "qemu-img")
	for _, mode := range []string{"expanded", "raw"} {
		t.Run(mode, func(t *testing.T) {
			dir := t.TempDir()
			imgtest.PloopBundle(t, dir, mode, 2, 8<<20, 3)
			if left, _, _ := stateOfAll(runOn(t, dir, nil)); left != damage.Clean {
				t.Error("a fresh bundle is not clean")
			}
			fill := func(at int64) {
				s, err := open.Open(t.Context(), dir, open.Options{Writable: true})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.WriteAt(t.Context(), imgtest.PatternBytes(uint64(at)+1, at, 3<<20), at); err != nil {
					t.Fatal(err)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			fill(1 << 20)
			imgtest.PloopRun(t, "snapshot", filepath.Join(dir, "DiskDescriptor.xml"))
			fill(2 << 20)
			res := runOn(t, dir, nil)
			if left, _, _ := stateOfAll(res); left != damage.Clean {
				showAll(t, res)
				t.Error("a bundle with data is not clean")
			}
			want := showsDisk(t, dir)
			images := imgtest.PloopChain(t, filepath.Join(dir, "DiskDescriptor.xml"))
			top := images[0].Path
			b := readFile(t, top)
			p := &damage.PloopImage{Version: 2, Cluster: 1 << 20, Entries: 8, B: b}
			p.Put32(64+4*3, 0x7fffffff)
			if err := os.WriteFile(top, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if left, _, _ := stateOfAll(runOn(t, dir, fsck.DecideAll)); left != damage.Clean {
				t.Error("not clean")
			}
			got := showsDisk(t, dir)
			// Both neighbours tell which cluster it was: nothing is lost.
			if !bytes.Equal(got, want) {
				t.Error("the disk shows something else")
			}
			raw := filepath.Join(t.TempDir(), "raw")
			imgtest.QemuRaw(t, "", imgtest.Chain(images...), raw)
			if !bytes.Equal(readFile(t, raw), want) {
				t.Error("QEMU reads something else")
			}
			if exit, out := imgtest.Ploop(t, "check", filepath.Join(dir, "DiskDescriptor.xml")); exit != 0 {
				t.Errorf("ploop check: %d %s", exit, out)
			}
		})
	}
}
