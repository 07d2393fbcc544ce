package guestfs

import (
	"bytes"
	"io"
	"os"
	"testing"

	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/guestfs/lvm"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

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
	pv := load(t, pvPath)
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
		contents[name] = load(t, path)
	}
	group, err := lvm.Read(t.Context(), bytes.NewReader(pv), size)
	if err != nil {
		t.Fatal(err)
	}
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
	disk := load(t, path)
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
