package guestfs

import (
	"bytes"
	"io"
	"os"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/guestfs/lvm"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

func decodeGroup(t testing.TB, disk []byte, pvs ...blockmap.Range) *lvm.Group {
	t.Helper()
	var volumes []*lvm.Volume
	for _, at := range pvs {
		v, err := lvm.Open(t.Context(), bytes.NewReader(disk), at)
		if err != nil {
			t.Fatal(err)
		}
		volumes = append(volumes, v)
	}
	group, err := lvm.Decode(t.Context(), bytes.NewReader(disk), volumes)
	if err != nil {
		t.Fatal(err)
	}
	return group
}

// A disk was extended by a second partition, and the volume group with it: a
// logical volume lies on both. Without the other partition, or when its
// metadata is older, nothing is judged.
func TestLVMOnTwoPartitions(t *testing.T) {
	guesttest.Require(t, "mke2fs", "e2fsck", "sfdisk")
	const size, first, second = 24 << 20, 4 << 20, 40 << 20
	paths := []string{guesttest.Image(t, size), guesttest.Image(t, size)}
	vg := guesttest.NewVG(t, paths...)
	vg.Create("root", "-l", "30") // of 23 extents on each
	older := guesttest.Bytes(t, paths[1])
	vg.Run("lvextend", "-q", "-l", "+1", "vg/root")
	vg.Close()
	path, _ := sfdisk(t, 72<<20, "label: gpt\nstart=4M, size=24M\nstart=40M, size=24M\n")
	disk := guesttest.Bytes(t, path)
	copy(disk[first:], guesttest.Bytes(t, paths[0]))
	copy(disk[second:], guesttest.Bytes(t, paths[1]))
	group := decodeGroup(t, disk, blockmap.Range{Off: first, Len: size}, blockmap.Range{Off: second, Len: size})
	lv := &group.LVs[0]
	if len(lv.Pieces) != 2 || lv.Size != 31<<20 {
		t.Fatalf("%+v", lv)
	}
	image := guesttest.Image(t, lv.Size)
	imgtest.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", image)
	dir, umount := guesttest.Mount(t, image)
	guesttest.Age(t, dir, 1, 60, 300_000)
	tree := guesttest.Tree(t, dir)
	umount()
	b := guesttest.Bytes(t, image)
	lv.Place(0, lv.Size, func(at, n int64) { b = b[copy(disk[at:at+n], b):] })

	rep := mustFree(t, disk, Options{})
	if a := find(t, rep, "p1/unallocated"); a.Refusal != nil || a.Free != 15<<20 {
		t.Errorf("%+v", a)
	}
	if a := find(t, rep, "p1/vg/root"); a.Refusal != nil || a.Free == 0 {
		t.Errorf("%+v", a)
	}
	for _, f := range rep.Free {
		copy(disk[f.Off:f.End()], bytes.Repeat([]byte{0xdb}, int(f.Len)))
	}
	b, err := io.ReadAll(io.NewSectionReader(lv.ReaderAt(bytes.NewReader(disk)), 0, lv.Size))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(image, b, 0o600); err != nil {
		t.Fatal(err)
	}
	imgtest.Run(t, "e2fsck", "-fn", image)
	dir, umount = guesttest.Mount(t, image)
	guesttest.SameTree(t, guesttest.Tree(t, dir), tree)
	umount()

	copy(disk[second:], older)
	rep = mustFree(t, disk, Options{})
	for _, name := range []string{"p1", "p2"} {
		if a := find(t, rep, name); a.Refusal == nil || a.Refusal.Code != freespace.Unsupported || len(rep.Free) > 0 {
			t.Errorf("older metadata: %+v", a)
		}
	}
	clear(disk[second:][:size])
	rep = mustFree(t, disk, Options{})
	if a := find(t, rep, "p1"); a.Refusal == nil || a.Refusal.Code != freespace.Unsupported || len(rep.Free) > 0 {
		t.Errorf("missing: %+v", a)
	}
}

// A partition with a volume group: an ext4 in three pieces, an xfs, swap, a
// logical volume without a filesystem, one with partitions and one with a
// volume group of its own. Everything that is free is overwritten, and the
// filesystems must not miss it.
func TestLVM(t *testing.T) {
	guesttest.Require(t, "mke2fs", "mkfs.xfs", "xfs_repair", "e2fsck", "mkswap", "sfdisk")
	const (
		start = 4 << 20
		size  = 180 << 20
	)
	pvPath := guesttest.Image(t, size)
	vg := guesttest.NewVG(t, pvPath)
	vg.Create("root", "-l", "12")
	vg.Create("raw", "-l", "2")
	vg.Run("lvextend", "-q", "-l", "+9", "vg/root")
	vg.Create("swap", "-l", "6")
	vg.Run("lvextend", "-q", "-l", "+11", "vg/root")
	vg.Create("data", "-l", "64")
	vg.Create("nested", "-l", "3")
	vg.Close()
	pv := guesttest.Bytes(t, pvPath)
	contents := map[string][]byte{
		"nested": pv[:3<<20],
		"swap":   content(t, 6<<20, "mkswap", "-q"),
	}
	trees := map[string]map[string][32]byte{}
	for name, mkfs := range map[string][]string{"root": {"mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024"}, "data": {"mkfs.xfs", "-q", "-f", "--unsupported"}} {
		path := guesttest.Image(t, map[string]int64{"root": 32 << 20, "data": 64 << 20}[name])
		imgtest.Run(t, mkfs[0], append(mkfs[1:], path)...)
		dir, umount := guesttest.Mount(t, path)
		guesttest.Age(t, dir, 1, 60, 300_000)
		trees[name] = guesttest.Tree(t, dir)
		umount()
		contents[name] = guesttest.Bytes(t, path)
	}
	group := decodeGroup(t, pv, blockmap.Range{Len: size})
	pieces := 0
	for _, lv := range group.LVs {
		b := contents[lv.Name]
		lv.Place(0, int64(len(b)), func(at, n int64) { b = b[copy(pv[at:at+n], b):] })
		pieces = max(pieces, len(lv.Pieces))
	}
	if pieces != 3 {
		t.Fatalf("%d pieces", pieces)
	}
	path, _ := sfdisk(t, 192<<20, "label: gpt\nstart=4M, size=180M\n")
	disk := guesttest.Bytes(t, path)
	copy(disk[start:], pv)

	rep := mustFree(t, disk, Options{Swap: true})
	if a := find(t, rep, "p1/unallocated"); a.Refusal != nil || a.Free != 72<<20 || a.Info.Label != "vg" || a.Type != "lvm2" {
		t.Errorf("%+v", a)
	}
	for name, kind := range map[string]string{"root": "ext", "data": "xfs", "swap": "swap"} {
		alone := mustFree(t, contents[name], Options{Swap: true})
		if a := find(t, rep, "p1/vg/"+name); a.Refusal != nil || a.Type != kind || a.Free != alone.Bytes() || a.Free == 0 {
			t.Errorf("%s: %+v, alone %d", name, a, alone.Bytes())
		}
	}
	if a := find(t, rep, "p1/vg/data"); a.Where.Off < start || a.Where.Len != 64<<20 {
		t.Errorf("%+v", a)
	}
	for name, want := range map[string]freespace.Code{"raw": freespace.UnknownType, "nested": freespace.NotJudged} {
		if a := find(t, rep, "p1/vg/"+name); a.Refusal == nil || a.Refusal.Code != want {
			t.Errorf("%s: %+v, want %s", name, a, want)
		}
	}
	for _, f := range rep.Free {
		copy(disk[f.Off:f.End()], bytes.Repeat([]byte{0xdb}, int(f.Len)))
	}
	for name, tree := range trees {
		i := 0
		for group.LVs[i].Name != name {
			i++
		}
		b, err := io.ReadAll(io.NewSectionReader(group.LVs[i].ReaderAt(bytes.NewReader(disk[start:])), 0, group.LVs[i].Size))
		if err != nil {
			t.Fatal(err)
		}
		path := guesttest.Image(t, int64(len(b)))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if name == "root" {
			imgtest.Run(t, "e2fsck", "-fn", path)
		} else {
			imgtest.Run(t, "xfs_repair", "-n", path)
		}
		dir, umount := guesttest.Mount(t, path)
		guesttest.SameTree(t, guesttest.Tree(t, dir), tree)
		umount()
	}
	// A whole disk can be a physical volume.
	if a := find(t, mustFree(t, pv, Options{}), "disk/unallocated"); a.Free != 72<<20 {
		t.Errorf("%+v", a)
	}
}
