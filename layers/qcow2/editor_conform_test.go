package qcow2

import (
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
)

// TestConform runs the conformance kit of layers.Editor over the shapes of an
// image that matter to the editor.
func TestConform(t *testing.T) {
	for _, o := range []CreateOptions{
		{Version: 3, ClusterSize: 512, RefcountBits: 64},
		{Version: 3, ClusterSize: 4096, RefcountBits: 16},
		{Version: 2, ClusterSize: 4096, RefcountBits: 16},
		{Version: 3, ClusterSize: 16384, RefcountBits: 1, ExtendedL2: true},
		{Version: 3, ClusterSize: 65536, RefcountBits: 16},
		{Version: 3, ClusterSize: 4096, RefcountBits: 16, DataFile: "image.data"},
		{Version: 3, ClusterSize: 16384, RefcountBits: 16, ExtendedL2: true, DataFile: "image.data"},
		{Version: 3, ClusterSize: 4096, RefcountBits: 16, DataFile: "image.data", DataFileRaw: true},
	} {
		f := conform(o)
		f.Scripts = int(min(16, 256<<10/o.ClusterSize))
		// There is nothing below a raw data file, and it stays mapped.
		f.Opaque, f.KeepsPlace = o.DataFileRaw, o.DataFileRaw
		// QEMU looks for a data file in its own directory: for those see
		// TestEditQemuImages.
		check := func(t testing.TB, dir *layertest.Dir, leaks bool) {
			status, out := imgtest.QemuCheck(t, dir.Path("image.qcow2"), "qcow2")
			if status != 0 && (status != 3 || !leaks) {
				t.Errorf("qemu-img check: status %d\n%s", status, out)
			}
		}
		if o.DataFile == "" {
			f.Check = check
		}
		t.Run(fmt.Sprintf("v%d %d ext=%v %s raw=%v", o.Version, o.ClusterSize, o.ExtendedL2, o.DataFile, o.DataFileRaw), func(t *testing.T) { layertest.Run(t, f) })
	}
}
