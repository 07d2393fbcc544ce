package ploopfsck_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

const convK = 64 << 10

// halfway brings an image into the state of a conversion that was cut off
// after done entries of its BAT; with header, the header has the new version.
func halfway(t testing.TB, path string, done int, header bool) {
	t.Helper()
	b := readFile(t, path)
	if err := os.WriteFile(path+".idx", b[:convK], 0o600); err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	v1 := string(b[:16]) == "WithoutFreeSpace"
	le.PutUint32(b[44:], 0x746f6e59)
	le.PutUint32(b[52:], le.Uint32(b[52:])|2)
	for idx := range done {
		e := le.Uint32(b[64+4*idx:])
		if v1 {
			e /= convK / 512
		} else {
			e *= convK / 512
		}
		le.PutUint32(b[64+4*idx:], e)
	}
	if header && v1 {
		copy(b, "WithouFreSpacExt")
	} else if header {
		copy(b, "WithoutFreeSpace")
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// unmark takes the marks of a conversion off.
func unmark(t testing.TB, path string) {
	t.Helper()
	b := readFile(t, path)
	le := binary.LittleEndian
	le.PutUint32(b[44:], 0)
	le.PutUint32(b[52:], le.Uint32(b[52:])&^2)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func versionOf(t testing.TB, path string) int {
	t.Helper()
	if string(readFile(t, path)[:16]) == "WithoutFreeSpace" {
		return 1
	}
	return 2
}

// TestConversion: wherever a conversion of a bundle was cut off, -p mends it
// without loss: back while no image is finished, on when one is.
func TestConversion(t *testing.T) {
	imgtest.RequirePloop(t)
	names := []string{"root.hds", "root.hds.1", "root.hds.2", "root.hds.3"}
	build := func(t *testing.T) (dir string, want []byte) {
		dir = filepath.Join(t.TempDir(), "disk.hdd")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		damage.WriteBundle(t, dir)
		return dir, readFile(t, damage.Original(filepath.Dir(dir)))
	}
	check := func(t *testing.T, dir string, want []byte, version int) {
		t.Helper()
		before := files(t, dir)
		if left, codes, _ := stateOfAll(runOn(t, dir, nil)); left != damage.Fatal || !codes["ploop.header.converting"] {
			t.Errorf("not found: %v %v", left, codes)
		}
		same(t, "a check", files(t, dir), before)
		res := runOn(t, dir, fsck.DecidePreen)
		if left, _, _ := stateOfAll(res); left != damage.Clean {
			showAll(t, res)
			t.Fatal("not clean after -p")
		}
		for _, n := range names {
			if v := versionOf(t, filepath.Join(dir, n)); v != version {
				t.Errorf("%s is version %d, want %d", n, v, version)
			}
		}
		if !bytes.Equal(showsDisk(t, dir), want) {
			t.Error("the disk shows something else")
		}
		if strings.Contains(t.Name(), "1_images_done") || strings.Contains(t.Name(), "image_1,_3") {
			copyDir := filepath.Join(t.TempDir(), "copy.hdd")
			imgtest.Run(t, "cp", "-r", dir, copyDir)
			if exit, out := imgtest.Ploop(t, "check", filepath.Join(copyDir, "DiskDescriptor.xml")); exit != 0 {
				t.Errorf("ploop check: %d %s", exit, out)
			}
		}
		undoAll(t, res)
		same(t, "undo", files(t, dir), before)
	}
	// While image k is being converted, after so many of its entries.
	for k := range names {
		for _, done := range []int{0, 1, 3, 16} {
			for _, header := range []bool{false, true} {
				if header && done < 16 || done < 3 && k != 1 {
					continue
				}
				t.Run(fmt.Sprintf("image %d, %d entries, header %v", k, done, header), func(t *testing.T) {
					dir, want := build(t)
					for i, n := range names {
						switch {
						case i < k:
							halfway(t, filepath.Join(dir, n), 16, true)
						case i == k:
							halfway(t, filepath.Join(dir, n), done, header)
						default:
							halfway(t, filepath.Join(dir, n), 0, false)
						}
					}
					check(t, dir, want, 2)
				})
			}
		}
	}
	// While the marks are taken off.
	for k := 1; k < len(names); k++ {
		t.Run(fmt.Sprintf("%d images done", k), func(t *testing.T) {
			dir, want := build(t)
			for i, n := range names {
				halfway(t, filepath.Join(dir, n), 16, true)
				if i < k {
					unmark(t, filepath.Join(dir, n))
				}
			}
			check(t, dir, want, 1)
		})
	}
}

// TestConversionSaved: a saved BAT that does not fit is not believed.
func TestConversionSaved(t *testing.T) {
	for name, c := range map[string]struct {
		hurt func(idx []byte) []byte
		want fsck.Severity // what is left after -y
	}{
		"cut off":         {func(b []byte) []byte { return b[:len(b)-1] }, fsck.Fatal},
		"empty":           {func([]byte) []byte { return nil }, fsck.Fatal},
		"another disk":    {func(b []byte) []byte { b[32]++; return b }, fsck.Fatal},
		"another entry":   {func(b []byte) []byte { b[64+4*3] = 3; return b }, fsck.Fatal},
		"entry outside":   {func(b []byte) []byte { b[64+4*3] = 200; return b }, fsck.Fatal},
		"too many":        {func(b []byte) []byte { b[64+4*9] = 2; return b }, fsck.Fatal},
		"no signature":    {func(b []byte) []byte { b[0]++; return b }, fsck.Fatal},
		"what was closed": {func(b []byte) []byte { return b }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a.hds")
			p := damage.NewPloop(2, convK, 16, 0, 3, 4, 15)
			p.Write(t, path)
			halfway(t, path, 2, false)
			if err := os.WriteFile(path+".idx", c.hurt(readFile(t, path+".idx")), 0o600); err != nil {
				t.Fatal(err)
			}
			var res *fsck.ImageResult
			fsck.Run(t.Context(), []string{path}, fsck.RunOptions{Decide: fsck.DecideAll}, func(r *fsck.ImageResult) { res = r })
			got := res.Files[0].Left.Worst()
			if got <= fsck.Note {
				got = 0
			}
			if got != c.want {
				showAll(t, res)
				t.Errorf("left: %v, want %v", got, c.want)
			}
			if c.want == 0 && !bytes.Equal(guestOf(t, openFile(t, path, false)), p.Guest()) {
				t.Error("the disk shows something else")
			}
		})
	}
}
