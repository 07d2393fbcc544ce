package ploop

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// extentsOf lists the mapped extents of the image.
func extentsOf(t testing.TB, i *Image) []blockmap.Extent {
	t.Helper()
	var all []blockmap.Extent
	for pos := int64(0); pos < i.Size(); {
		ext, err := i.Lookup(context.Background(), pos, i.Size()-pos, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range ext {
			if e.Kind == blockmap.Data {
				all = append(all, e)
			}
			pos = e.End()
		}
	}
	return all
}

// compareQemuMap checks that QEMU sees the same extents, of one image alone.
func compareQemuMap(t testing.TB, i *Image, path string) {
	t.Helper()
	var want []blockmap.Extent
	for _, m := range imgtest.QemuMap(t, "parallels", path) {
		if !m.Data {
			continue
		}
		if m.Offset == nil {
			t.Fatalf("qemu-img map: data without an offset at %d", m.Start)
		}
		e := blockmap.Extent{Guest: m.Start, Len: m.Length, Host: *m.Offset, Kind: blockmap.Data}
		if n := len(want); n > 0 && want[n-1].Joins(e) {
			want[n-1].Len += e.Len
			continue
		}
		want = append(want, e)
	}
	got := extentsOf(t, i)
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: extents\n%v\nqemu-img map:\n%v", path, got, want)
	}
}

// rawOf is what QEMU reads.
func rawOf(t testing.TB, format, ref string) []byte {
	t.Helper()
	out := tempPath(t, "out.raw")
	imgtest.QemuRaw(t, format, ref, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestReadWhatQemuWrote: images made and filled by QEMU, of several cluster
// sizes (4 KiB is one that ploop refuses), read identically here.
func TestReadWhatQemuWrote(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, cluster := range []string{"4K", "32K", "64K", "1M"} {
		t.Run(cluster, func(t *testing.T) {
			path := tempPath(t, "q.hds")
			imgtest.QemuImg(t, "create", "-f", "parallels", "-o", "cluster_size="+cluster, path, "10241K")
			imgtest.QemuIO(t, "parallels", path, "write -P 17 5M 100K", "write -P 3 0 70K", "write -P 9 9M 1M", "write -P 11 2M 3K", "write -P 7 10240K 1K")
			i := openFile(t, path, false)
			defer closeImage(t, i)
			compareQemuMap(t, i, path)
			sameBytes(t, path, stack{i}.content(t, nil), rawOf(t, "parallels", path))
		})
	}
}

// TestReadBundleOfPloop: a three-layer bundle made by ploop, filled by QEMU,
// with a base of each kind and of each version.
func TestReadBundleOfPloop(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, c := range []struct {
		mode    string
		version int
	}{{"raw", 2}, {"expanded", 1}, {"expanded", 2}, {"preallocated", 2}} {
		t.Run(fmt.Sprintf("%s-v%d", c.mode, c.version), func(t *testing.T) {
			dir := t.TempDir()
			images := imgtest.PloopBundle(t, dir, c.mode, c.version, 12<<20, 3)
			for k := len(images) - 1; k >= 0; k-- {
				// Each layer is written through the chain below it.
				imgtest.QemuIO(t, "", imgtest.Chain(images[k:]...),
					fmt.Sprintf("write -P %d %dM 1M", 10+k, 3*k), fmt.Sprintf("write -P %d %dK 77K", 20+k, 1000+300*k))
			}
			var s stack
			var base []byte
			for _, img := range images {
				if img.Format == "raw" {
					b, err := os.ReadFile(img.Path)
					if err != nil {
						t.Fatal(err)
					}
					base = b
					continue
				}
				i := openFile(t, img.Path, false)
				defer closeImage(t, i)
				if i.Version() != c.version {
					t.Errorf("version %d", i.Version())
				}
				s = append(s, i)
			}
			sameBytes(t, "stack", s.content(t, base), rawOf(t, "", imgtest.Chain(images...)))
		})
	}
}
