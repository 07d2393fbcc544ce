package e2e

import (
	"encoding/json"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// format is an image format as the end-to-end tests need it: made by the
// programs of the trade, and judged by them.
type format struct {
	name string
	// create makes an empty image of the size in dir, a pile of layers where
	// deep is set, and returns what mount-image is given.
	create func(t *testing.T, dir string, size int64, deep bool) string
	// chain is the pile for qemu-img, top first.
	chain func(t *testing.T, image string) []imgtest.Image
	// check fails the test unless the checkers find nothing, or leaks at most.
	check func(t *testing.T, image string, leaks bool)
}

var formats = []format{
	{name: "qcow2", create: createQcow2, chain: chainQcow2, check: checkQcow2},
	{name: "ploop", create: createPloop, chain: chainPloop, check: checkPloop},
}

func createQcow2(t *testing.T, dir string, size int64, deep bool) string {
	t.Helper()
	imgtest.Require(t, "qemu-img")
	top := filepath.Join(dir, "top.qcow2")
	n := strconv.FormatInt(size, 10)
	if !deep {
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", top, n)
		return top
	}
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", filepath.Join(dir, "base.qcow2"), n)
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", filepath.Join(dir, "mid.qcow2"))
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", top)
	return top
}

func chainQcow2(t *testing.T, image string) []imgtest.Image {
	t.Helper()
	var info []struct {
		Filename string `json:"filename"`
		Format   string `json:"format"`
	}
	out := imgtest.QemuImg(t, "info", "-U", "--backing-chain", "--output=json", image)
	if err := json.Unmarshal(out, &info); err != nil {
		t.Fatal(err)
	}
	var chain []imgtest.Image
	for _, i := range info {
		chain = append(chain, imgtest.Image{Path: i.Filename, Format: i.Format})
	}
	return chain
}

func checkQcow2(t *testing.T, image string, leaks bool) {
	t.Helper()
	for _, im := range chainQcow2(t, image) {
		if exit, out := imgtest.QemuCheck(t, im.Path, im.Format); exit != 0 && !(leaks && exit == 3) {
			t.Errorf("qemu-img check %s: exit %d\n%s", im.Path, exit, out)
		}
	}
}

// createPloop returns the directory of a bundle.
func createPloop(t *testing.T, dir string, size int64, deep bool) string {
	t.Helper()
	deltas := 1
	if deep {
		deltas = 3
	}
	imgtest.PloopBundle(t, dir, "expanded", 2, size, deltas)
	return dir
}

func chainPloop(t *testing.T, dir string) []imgtest.Image {
	t.Helper()
	return imgtest.PloopChain(t, filepath.Join(dir, "DiskDescriptor.xml"))
}

func checkPloop(t *testing.T, dir string, leaks bool) {
	t.Helper()
	for _, im := range chainPloop(t, dir) {
		args := []string{"check", "-f", "-c", im.Path}
		if leaks { // a server that was killed leaves the mark of an open image
			args = []string{"check", "-f", "-c", "-d", im.Path}
		}
		// The check repairs: not on the image that a test goes on with.
		before := imgtest.SHA256File(t, im.Path)
		exit, out := imgtest.Ploop(t, args...)
		if exit != 0 {
			t.Errorf("ploop %v: exit %d\n%s", args[1:], exit, out)
		}
		if !leaks && imgtest.SHA256File(t, im.Path) != before {
			t.Errorf("ploop %v found something to repair\n%s", args[1:], out)
		}
	}
}

// usedBytes is how much of the virtual disk a pile maps as data, in QEMU's
// eyes, also while it is mounted.
func usedBytes(t *testing.T, f format, image string) int64 {
	t.Helper()
	var entries []imgtest.MapEntry
	out := imgtest.QemuImg(t, "map", "-U", "--output=json", imgtest.Chain(f.chain(t, image)...))
	if err := json.Unmarshal(out, &entries); err != nil {
		t.Fatal(err)
	}
	var sum int64
	for _, e := range entries {
		if e.Data {
			sum += e.Length
		}
	}
	return sum
}
