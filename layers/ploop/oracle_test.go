package ploop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/imagestack/imagestack/backend"
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

// judge lets the other tools look at a closed image: ploop check, QEMU's
// check, and that the host file has neither holes nor unwritten extents.
func judge(t testing.TB, path string) {
	t.Helper()
	if err := syncPath(path); err != nil {
		t.Fatal(err)
	}
	before := imgtest.SHA256File(t, path)
	if exit, out := imgtest.PloopCheck(t, path); exit != 0 || strings.Contains(out, "Hole") {
		t.Errorf("ploop check -f -c: exit %d\n%s", exit, out)
	}
	if imgtest.SHA256File(t, path) != before {
		t.Errorf("ploop check found something to repair in %s", path)
	}
	if exit, out := imgtest.QemuCheck(t, path, "parallels"); exit != 0 {
		t.Errorf("qemu-img check: exit %d\n%s", exit, out)
	}
	out := string(imgtest.Run(t, "filefrag", "-v", path))
	if strings.Contains(out, "unwritten") {
		t.Errorf("unwritten extents:\n%s", out)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := st.Sys().(*syscall.Stat_t).Blocks * 512; got < st.Size() {
		t.Errorf("%s is sparse: %d of %d bytes allocated", path, got, st.Size())
	}
}

func syncPath(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// TestWriteForTheOthers: images written here satisfy ploop and QEMU and read
// identically there.
func TestWriteForTheOthers(t *testing.T) {
	imgtest.Require(t, "qemu-img", "filefrag")
	ctx := context.Background()
	for _, c := range []CreateOptions{
		{Size: 12 << 20, ClusterSize: 32 << 10, Version: 1},
		{Size: 12 << 20, ClusterSize: 64 << 10, Version: 2},
		{Size: 12 << 20, Version: 1},
		{Size: 12 << 20, Version: 2},
		{Size: 64 << 20, ClusterSize: 64 << 20, Version: 2},
	} {
		t.Run(fmt.Sprintf("%dK-v%d", c.defaults().ClusterSize>>10, c.Version), func(t *testing.T) {
			path := tempPath(t, "w.hds")
			f, err := backend.Open(path, backend.Options{Writable: true, Create: true, Exclusive: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(Create(ctx, f, c), f.Close()); err != nil {
				t.Fatal(err)
			}
			judge(t, path)
			want := make([]byte, c.Size)
			i := openFile(t, path, true)
			write := func(off, n int64) {
				p := imgtest.PatternBytes(7, off, int(n))
				copy(want[off:], p)
				if err := i.WriteAt(ctx, p, off, bytesBelow(nil)); err != nil {
					t.Fatal(err)
				}
			}
			write(5<<20, 1<<20)
			write(100, 1000)
			write(2<<20-4096, 3<<20+8192)
			write(c.Size-512, 512)
			judgeOpen(t, path)
			if err := i.ZeroAt(ctx, 3<<20, 2<<20, true, bytesBelow(nil)); err != nil {
				t.Fatal(err)
			}
			clear(want[3<<20 : 5<<20])
			if err := i.Sync(ctx); err != nil {
				t.Fatal(err)
			}
			// Fill what became free, so that no slot is left over.
			write(7<<20, 3<<20)
			closeImage(t, i)
			judge(t, path)
			sameBytes(t, path, rawOf(t, "parallels", path), want)
			i = openFile(t, path, true)
			compareQemuMap(t, i, path)
			if err := i.ZeroAt(ctx, 0, i.Size(), true, bytesBelow(nil)); err != nil {
				t.Fatal(err)
			}
			closeImage(t, i)
			judge(t, path)
		})
	}
}

// judgeOpen checks the header of an image that is open for writing.
func judgeOpen(t testing.TB, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, headerSize)
	_, err = f.ReadAt(b, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	h, err := parseHeader(b, path)
	if err != nil {
		t.Fatal(err)
	}
	if h.inUse != inUseOpen || h.flags&flagEmpty != 0 {
		t.Errorf("while open: m_DiskInUse %#x m_Flags %#x", h.inUse, h.flags)
	}
}

// TestMergeByPloop: a bundle whose layers were written here is merged by
// ploop's own tool; the result is what the stack showed before.
func TestMergeByPloop(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	ctx := context.Background()
	for _, version := range []int{1, 2} {
		t.Run(fmt.Sprintf("v%d", version), func(t *testing.T) {
			dir := t.TempDir()
			images := imgtest.PloopBundle(t, dir, "expanded", version, 12<<20, 3)
			below := bytesBelow(make([]byte, 12<<20))
			for k := len(images) - 1; k >= 0; k-- {
				i := openFile(t, images[k].Path, true)
				for _, off := range []int64{int64(k) << 20, 5<<20 - 700, int64(6+k)<<20 + 12345} {
					p := imgtest.PatternBytes(uint64(k), off, 300000)
					if err := i.WriteAt(ctx, p, off, below); err != nil {
						t.Fatal(err)
					}
				}
				if err := i.ZeroAt(ctx, int64(7+k)<<20-5000, 1<<20+9000, true, below); err != nil {
					t.Fatal(err)
				}
				next := make([]byte, len(below))
				copy(next, below)
				readLayer(t, i, next, 0)
				closeImage(t, i)
				if exit, out := imgtest.PloopCheck(t, images[k].Path); exit != 0 {
					t.Errorf("ploop check: exit %d\n%s", exit, out)
				}
				below = next
			}
			sameBytes(t, "QEMU's view", rawOf(t, "", imgtest.Chain(images...)), below)
			d, err := ReadDescriptor(filepath.Join(dir, DescriptorName))
			if err != nil {
				t.Fatal(err)
			}
			chain, err := d.Chain("")
			if err != nil {
				t.Fatal(err)
			}
			for k, ref := range chain {
				if filepath.Join(dir, ref.File) != images[k].Path && ref.File != images[k].Path {
					t.Errorf("chain[%d] is %s, want %s", k, ref.File, images[k].Path)
				}
			}
			for range len(images) - 1 {
				imgtest.PloopRun(t, "snapshot-merge", filepath.Join(dir, DescriptorName))
			}
			d, err = ReadDescriptor(filepath.Join(dir, DescriptorName))
			if err != nil {
				t.Fatal(err)
			}
			chain, err = d.Chain("")
			if err != nil || len(chain) != 1 {
				t.Fatalf("after the merge: %v, %v", chain, err)
			}
			name := chain[0].File
			if !filepath.IsAbs(name) {
				name = filepath.Join(dir, name)
			}
			i := openFile(t, name, false)
			defer closeImage(t, i)
			sameBytes(t, "merged by ploop", stack{i}.content(t, nil), below)
		})
	}
}

// TestCreateBundle: a bundle made here is one for ploop.
func TestCreateBundle(t *testing.T) {
	dir := t.TempDir()
	if err := CreateBundle(context.Background(), dir, CreateOptions{Size: 10 << 20}); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, DescriptorName)
	imgtest.PloopRun(t, "check", "-f", name)
	if out := imgtest.PloopRun(t, "snapshot-list", "-H", name); !strings.Contains(out, defaultTop) {
		t.Errorf("snapshot-list: %s", out)
	}
	imgtest.PloopRun(t, "snapshot", name)
	d, err := ReadDescriptor(name)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := d.Chain("")
	if err != nil || len(chain) != 2 || chain[1].File != RootName {
		t.Errorf("after a snapshot by ploop: %v, %v", chain, err)
	}
	for _, ref := range chain {
		i := openFile(t, filepath.Join(dir, ref.File), false)
		if err := d.CheckImage(ref, i.Size(), i.Granule()); err != nil {
			t.Error(err)
		}
		closeImage(t, i)
	}
	if err := CreateBundle(context.Background(), dir, CreateOptions{Size: 10 << 20}); !errors.Is(err, os.ErrExist) {
		t.Errorf("second bundle in the same place: %v", err)
	}
}

// TestShortBase: ploop grows the top of a bundle only; behind the end of the
// lower images it reads as zeros, and a writer fills up with zeros there.
func TestShortBase(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	ctx := context.Background()
	dir := t.TempDir()
	images := imgtest.PloopBundle(t, dir, "expanded", 2, 10<<20, 2)
	xml := filepath.Join(dir, DescriptorName)
	imgtest.QemuIO(t, "", imgtest.Chain(images[1]), "write -P 5 8M 2M")
	imgtest.PloopRun(t, "grow", "-s", "14M", xml)
	d, err := ReadDescriptor(xml)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := d.Chain("")
	if err != nil || d.Size() != 14<<20 {
		t.Fatalf("%d, %v", d.Size(), err)
	}
	base := openFile(t, images[1].Path, false)
	defer closeImage(t, base)
	top := openFile(t, images[0].Path, true)
	if top.Size() != 14<<20 || base.Size() != 10<<20 {
		t.Errorf("sizes %d and %d", top.Size(), base.Size())
	}
	for k, i := range []*Image{top, base} {
		if err := d.CheckImage(chain[k], i.Size(), i.Granule()); err != nil {
			t.Error(err)
		}
	}
	below := bytesBelow(stack{base}.content(t, nil))
	for _, off := range []int64{9<<20 + 600000, 11<<20 + 5, 14<<20 - 100} {
		if err := top.WriteAt(ctx, imgtest.PatternBytes(1, off, 100), off, below); err != nil {
			t.Fatal(err)
		}
	}
	if err := top.ZeroAt(ctx, 8<<20+10, 1<<20+10, true, below); err != nil {
		t.Fatal(err)
	}
	want := stack{top, base}.content(t, nil)
	closeImage(t, top)
	judge(t, images[0].Path)
	sameBytes(t, "QEMU's view", rawOf(t, "", imgtest.Chain(images...)), want)
	imgtest.PloopRun(t, "snapshot-merge", xml)
	d, err = ReadDescriptor(xml)
	if err != nil {
		t.Fatal(err)
	}
	if chain, err = d.Chain(""); err != nil || len(chain) != 1 {
		t.Fatalf("%v, %v", chain, err)
	}
	name := chain[0].File
	if !filepath.IsAbs(name) {
		name = filepath.Join(dir, name)
	}
	merged := openFile(t, name, false)
	defer closeImage(t, merged)
	sameBytes(t, "merged by ploop", stack{merged}.content(t, nil), want)
}
