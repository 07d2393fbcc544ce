package damage

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
)

// GUIDs of the bundle that bundle cases damage: a base, a snapshot over it,
// the current state over that, and a snapshot beside it.
const (
	GUIDBase   = "{11111111-1111-1111-1111-111111111111}"
	GUIDMiddle = "{22222222-2222-2222-2222-222222222222}"
	GUIDSide   = "{33333333-3333-3333-3333-333333333333}"
	GUIDTop    = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
	guidNone   = "{00000000-0000-0000-0000-000000000000}"
	guidOther  = "{99999999-9999-9999-9999-999999999999}"
)

// BundleDamage is damage between the descriptor of a ploop bundle and its
// images.
type BundleDamage struct {
	Name string
	// Hurt damages the sound bundle in dir.
	Hurt func(t testing.TB, dir string)
	// Codes are what must be found.
	Codes []string
	// Preen and Full are the states after -p and -y.
	Preen, Full State
	// Lost are the guest ranges that a full repair may lose.
	Lost []blockmap.Range
	// Remedy is a part of the text that tells what to do where nothing is
	// repaired.
	Remedy string
}

// ploopXML is the descriptor of the sound bundle, with things in it that
// nobody knows.
func ploopXML(sectors int) string {
	shot := func(guid, parent string) string {
		return fmt.Sprintf("    <Shot>\n      <GUID>%s</GUID>\n      <ParentGUID>%s</ParentGUID>\n    </Shot>\n", guid, parent)
	}
	image := func(guid, file string) string {
		return fmt.Sprintf("      <Image>\n        <GUID>%s</GUID>\n        <Type>Compressed</Type>\n        <File>%s</File>\n      </Image>\n", guid, file)
	}
	return fmt.Sprintf(`<?xml version="1.0"?>
<Parallels_disk_image Version='1.0' >
  <!-- a comment, & nothing more -->
  <Disk_Parameters>
    <Disk_size>%d</Disk_size>
    <Cylinders>4</Cylinders>
    <Heads>16</Heads>
    <Sectors>%d</Sectors>
    <Padding>0</Padding>
    <Miscellaneous   Unknown="yes"/>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>%[1]d</End>
      <Blocksize>128</Blocksize>
`, sectors, sectors/64) + image(GUIDBase, "root.hds") + image(GUIDMiddle, "root.hds.1") + image(GUIDSide, "root.hds.2") + image(GUIDTop, "root.hds.3") +
		"    </Storage>\n  </StorageData>\n  <Snapshots>\n    <TopGUID>" + GUIDTop + "</TopGUID>\n" +
		shot(GUIDBase, guidNone) + shot(GUIDMiddle, GUIDBase) + shot(GUIDSide, GUIDBase) + shot(GUIDTop, GUIDMiddle) +
		"  </Snapshots>\n  <Vendor><![CDATA[<kept>]]></Vendor>\n</Parallels_disk_image>\n"
}

// WriteBundle writes the sound bundle into dir, and Original(dir) beside it,
// with what the current state shows.
func WriteBundle(t testing.TB, dir string) {
	t.Helper()
	var disk []byte
	for k, mapped := range [][]int{{0, 1, 2}, {1, 5}, {0, 7}, {2, 6}} {
		p := NewPloop(2, ploopK, 16)
		for _, idx := range mapped {
			p.SetEntry(idx, p.Append(uint64(100*k+idx+1)))
		}
		p.Put32(52, 0)
		name := "root.hds"
		if k > 0 {
			name = fmt.Sprintf("root.hds.%d", k)
		}
		p.Write(t, filepath.Join(dir, name))
		if k == 0 {
			disk = make([]byte, 16*ploopK)
		}
		if k == 2 {
			continue // beside the current state
		}
		show := p.Guest()
		for _, idx := range mapped {
			copy(disk[idx*ploopK:(idx+1)*ploopK], show[idx*ploopK:])
		}
	}
	write(t, filepath.Join(dir, "DiskDescriptor.xml"), []byte(ploopXML(16*ploopK/512)))
	write(t, Original(filepath.Dir(dir)), disk)
}

// swap is a Hurt that replaces text in the descriptor.
func swap(pairs ...string) func(testing.TB, string) {
	return func(t testing.TB, dir string) {
		t.Helper()
		path := filepath.Join(dir, "DiskDescriptor.xml")
		b := read(t, path)
		for k := 0; k < len(pairs); k += 2 {
			if n := bytes.Count(b, []byte(pairs[k])); n != 1 {
				t.Fatalf("%q is there %d times", pairs[k], n)
			}
			b = bytes.Replace(b, []byte(pairs[k]), []byte(pairs[k+1]), 1)
		}
		write(t, path, b)
	}
}

// element is an element with the white space of the descriptor.
func shotXML(guid, parent string) string {
	return "    <Shot>\n      <GUID>" + guid + "</GUID>\n      <ParentGUID>" + parent + "</ParentGUID>\n    </Shot>\n"
}

func imageXML(guid, file string) string {
	return "      <Image>\n        <GUID>" + guid + "</GUID>\n        <Type>Compressed</Type>\n        <File>" + file + "</File>\n      </Image>\n"
}

func rename(from, to string) func(testing.TB, string) {
	return func(t testing.TB, dir string) {
		t.Helper()
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
}

func drop(names ...string) func(testing.TB, string) {
	return func(t testing.TB, dir string) {
		t.Helper()
		for _, n := range names {
			if err := os.Remove(filepath.Join(dir, n)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func both(all ...func(testing.TB, string)) func(testing.TB, string) {
	return func(t testing.TB, dir string) {
		t.Helper()
		for _, f := range all {
			f(t, dir)
		}
	}
}

// patch changes an image of the bundle.
func patch(name string, change func(*PloopImage)) func(testing.TB, string) {
	return func(t testing.TB, dir string) {
		t.Helper()
		p := &PloopImage{Version: 2, Cluster: ploopK, Entries: 16, B: read(t, filepath.Join(dir, name))}
		change(p)
		write(t, filepath.Join(dir, name), p.B)
	}
}

// shorter makes an image one of a disk of n clusters.
func length(n int) func(*PloopImage) {
	return func(p *PloopImage) {
		p.Put32(32, uint32(n)).Put64(36, uint64(n*ploopK/512)).Put32(24, uint32(n*ploopK/512/512))
	}
}

// Bundles are the cases of damage of a bundle.
func Bundles() []BundleDamage {
	const number, size, guid = "ploop.descriptor.number", "ploop.descriptor.size", "ploop.descriptor.guid"
	const end, blocks = "<End>2048</End>", "<Blocksize>128</Blocksize>"
	big := strings.Repeat("<a>", 3)
	return []BundleDamage{
		{Name: "sound", Hurt: func(testing.TB, string) {}},
		{Name: "size is no number", Hurt: swap("<Disk_size>2048", "<Disk_size>many"), Codes: []string{number}},
		{Name: "size is missing", Hurt: swap("    <Disk_size>2048</Disk_size>\n", ""), Codes: []string{number}},
		{Name: "end is no number", Hurt: swap(end, "<End/>"), Codes: []string{number}},
		{Name: "start is no number", Hurt: swap("<Start>0", "<Start>x"), Codes: []string{number}, Preen: Damaged},
		{Name: "start is not 0", Hurt: swap("<Start>0", "<Start>8"), Codes: []string{size}, Preen: Damaged},
		{Name: "cluster size is no number", Hurt: swap(blocks, "<Blocksize>0</Blocksize>"), Codes: []string{number}},
		{Name: "end differs", Hurt: swap(end, "<End>4096</End>"), Codes: []string{size}},
		{Name: "size differs", Hurt: swap("<Disk_size>2048", "<Disk_size>4096"), Codes: []string{size}},
		{Name: "both sizes are wrong", Hurt: swap("<Disk_size>2048", "<Disk_size>4096", end, "<End>8192</End>"), Codes: []string{size},
			Preen: Damaged, Full: Damaged, Remedy: "the disk has 4096 sectors"},
		{Name: "the disk is longer than the top", Hurt: swap("<Disk_size>2048", "<Disk_size>4096", end, "<End>4096</End>"),
			Codes: []string{"stack.bundle.size-mismatch"}, Preen: Damaged, Lost: []blockmap.Range{{Off: 16 * ploopK, Len: 16 * ploopK}}},
		{Name: "growing was interrupted", Hurt: swap("<Disk_size>2048", "<Disk_size>1024", end, "<End>1024</End>"),
			Codes: []string{"stack.bundle.size-mismatch"}, Preen: Damaged},
		{Name: "a lower image is too long", Hurt: patch("root.hds", length(32)), Codes: []string{"stack.bundle.size-mismatch", "stack.parent.longer"},
			Preen: Damaged, Full: Damaged, Remedy: "not of this disk"},
		{Name: "cluster size differs", Hurt: swap(blocks, "<Blocksize>2048</Blocksize>"), Codes: []string{"stack.bundle.cluster-mismatch"}},
		{Name: "an image is version 1", Hurt: patch("root.hds.2", func(p *PloopImage) {
			copy(p.B, "WithoutFreeSpace")
			p.Put32(64, 128).Put32(64+4*7, 256)
		}), Codes: []string{"stack.bundle.version-mixed"}, Remedy: "ploop convert -v 2"},
		{Name: "lower images were not closed", Hurt: both(patch("root.hds", func(p *PloopImage) { p.Put32(44, 0x746f6e59) }),
			patch("root.hds.2", func(p *PloopImage) { p.Put32(44, 0x746f6e59) })), Codes: []string{"ploop.header.in-use"}},
		{Name: "GUID of an image", Hurt: swap("<Image>\n        <GUID>"+GUIDMiddle, "<Image>\n        <GUID>{2222"), Codes: []string{guid}, Preen: Damaged},
		{Name: "GUID of a snapshot", Hurt: swap("<Shot>\n      <GUID>"+GUIDMiddle, "<Shot>\n      <GUID>?"), Codes: []string{guid}, Preen: Damaged},
		{Name: "GUID of an image is another", Hurt: swap("<Image>\n        <GUID>"+GUIDMiddle, "<Image>\n        <GUID>"+guidOther),
			Codes: []string{"ploop.descriptor.image-without-snapshot", "ploop.descriptor.snapshot-without-image"}, Preen: Damaged},
		{Name: "two GUIDs of images are others", Hurt: swap("<Image>\n        <GUID>"+GUIDMiddle, "<Image>\n        <GUID>"+guidOther,
			"<Image>\n        <GUID>"+GUIDSide, "<Image>\n        <GUID>{99999999-9999-9999-9999-000000000000}"),
			Codes: []string{"ploop.descriptor.image-without-snapshot"}, Preen: Damaged, Full: Damaged},
		{Name: "the same GUID twice", Hurt: swap("<Image>\n        <GUID>"+GUIDMiddle, "<Image>\n        <GUID>"+GUIDBase),
			Codes: []string{"ploop.descriptor.duplicate"}, Preen: Damaged, Full: Damaged},
		{Name: "the same file twice", Hurt: swap("<File>root.hds.1", "<File>root.hds"), Codes: []string{"ploop.descriptor.duplicate"}, Preen: Damaged, Full: Damaged},
		{Name: "type", Hurt: swap("<Type>Compressed</Type>\n        <File>root.hds.1", "<Type>Zipped</Type>\n        <File>root.hds.1"),
			Codes: []string{"ploop.descriptor.type"}, Preen: Damaged},
		{Name: "no file name", Hurt: swap("<File>root.hds.1</File>", "<File></File>"), Codes: []string{"ploop.descriptor.file"}, Preen: Damaged},
		{Name: "a file was renamed", Hurt: rename("root.hds.1", "moved.hds"), Codes: []string{"ploop.descriptor.image-missing", "stack.bundle.orphan-image"}, Preen: Fatal},
		{Name: "the bundle was moved", Hurt: swap("<File>root.hds.1", "<File>old/place/root.hds.1"), Codes: []string{"ploop.descriptor.image-missing"}, Preen: Fatal},
		{Name: "the base is gone", Hurt: drop("root.hds"), Codes: []string{"ploop.descriptor.image-missing"}, Preen: Fatal, Full: Fatal, Remedy: "no such file"},
		{Name: "a side branch is gone", Hurt: drop("root.hds.2"), Codes: []string{"ploop.descriptor.image-missing"}, Preen: Damaged},
		{Name: "two are gone, two are there", Hurt: both(rename("root.hds.1", "a.hds"), rename("root.hds", "b.hds")),
			Codes: []string{"ploop.descriptor.image-missing", "stack.bundle.orphan-image"}, Preen: Fatal, Full: Fatal},
		{Name: "an orphan", Hurt: func(t testing.TB, dir string) {
			write(t, filepath.Join(dir, "left.hds"), read(t, filepath.Join(dir, "root.hds")))
		},
			Codes: []string{"stack.bundle.orphan-image"}, Remedy: "image-stack info --format ploop"},
		{Name: "an empty orphan", Hurt: func(t testing.TB, dir string) { NewPloop(2, ploopK, 16).Write(t, filepath.Join(dir, "left.hds")) },
			Codes: []string{"stack.bundle.orphan-image"}, Remedy: "can be removed"},
		{Name: "a temporary snapshot", Hurt: swap(shotXML(GUIDMiddle, GUIDBase), strings.Replace(shotXML(GUIDMiddle, GUIDBase), "</Shot>", "<Temporary/></Shot>", 1)),
			Codes: []string{"stack.bundle.temporary-snapshot"}, Remedy: "ploop snapshot-delete -u " + GUIDMiddle},
		{Name: "the top is temporary", Hurt: swap("<ParentGUID>"+GUIDMiddle+"</ParentGUID>", "<ParentGUID>"+GUIDMiddle+"</ParentGUID>\n      <Temporary/>"),
			Codes: []string{"stack.bundle.top-temporary"}, Preen: Damaged},
		{Name: "an image element is gone", Hurt: swap(imageXML(GUIDMiddle, "root.hds.1"), ""),
			Codes: []string{"ploop.descriptor.snapshot-without-image", "stack.bundle.orphan-image"}, Preen: Damaged},
		{Name: "an image element of a branch is gone, and its file", Hurt: both(swap(imageXML(GUIDSide, "root.hds.2"), ""), drop("root.hds.2")),
			Codes: []string{"ploop.descriptor.snapshot-without-image"}, Preen: Damaged},
		{Name: "a snapshot of a branch is gone", Hurt: swap(shotXML(GUIDSide, GUIDBase), ""), Codes: []string{"ploop.descriptor.image-without-snapshot"}, Preen: Damaged},
		{Name: "the snapshot of the top is gone", Hurt: both(swap(shotXML(GUIDTop, GUIDMiddle), ""), swap(shotXML(GUIDSide, GUIDBase), "", imageXML(GUIDSide, "root.hds.2"), "")),
			Codes: []string{"ploop.descriptor.image-without-snapshot"}, Preen: Damaged},
		{Name: "the top is no snapshot", Hurt: swap("<TopGUID>"+GUIDTop, "<TopGUID>"+guidOther), Codes: []string{"ploop.descriptor.top"}, Preen: Damaged},
		{Name: "the top is no GUID", Hurt: swap("<TopGUID>"+GUIDTop, "<TopGUID>{"), Codes: []string{guid}, Preen: Damaged},
		{Name: "a parent is unknown", Hurt: swap("<ParentGUID>"+GUIDMiddle, "<ParentGUID>"+guidOther), Codes: []string{"ploop.descriptor.parent"}, Preen: Damaged, Full: Damaged},
		{Name: "a parent is unknown, one is left", Hurt: both(swap("<ParentGUID>"+GUIDMiddle, "<ParentGUID>"+guidOther),
			swap(shotXML(GUIDSide, GUIDBase), "", imageXML(GUIDSide, "root.hds.2"), "")), Codes: []string{"ploop.descriptor.parent"}, Preen: Damaged},
		{Name: "the base has a parent", Hurt: swap("<ParentGUID>"+guidNone, "<ParentGUID>"+guidOther), Codes: []string{"ploop.descriptor.parent"}, Preen: Damaged},
		{Name: "a parent is no GUID", Hurt: swap("<ParentGUID>"+guidNone, "<ParentGUID>none"), Codes: []string{guid}, Preen: Damaged},
		{Name: "a loop over the top", Hurt: swap("<ParentGUID>"+guidNone, "<ParentGUID>"+GUIDTop), Codes: []string{"ploop.descriptor.loop"}, Preen: Damaged},
		{Name: "its own parent", Hurt: swap("<ParentGUID>"+guidNone, "<ParentGUID>"+GUIDBase), Codes: []string{"ploop.descriptor.loop"}, Preen: Damaged},
		{Name: "a loop of lower ones", Hurt: swap("<ParentGUID>"+guidNone, "<ParentGUID>"+GUIDMiddle), Codes: []string{"ploop.descriptor.loop"}, Preen: Damaged, Full: Damaged},
		{Name: "no descriptor, several images", Hurt: func(t testing.TB, dir string) { write(t, filepath.Join(dir, "DiskDescriptor.xml"), []byte(big)) },
			Codes: []string{"ploop.descriptor.xml"}, Preen: Fatal, Full: Fatal},
		{Name: "split disk", Hurt: swap("</Storage>", "</Storage><Storage></Storage>"), Codes: []string{"ploop.descriptor.unsupported"}, Preen: Damaged, Full: Damaged},
		{Name: "several at once", Hurt: both(swap("<Disk_size>2048", "<Disk_size>x", "<TopGUID>"+GUIDTop, "<TopGUID>{", "<ParentGUID>"+guidNone, "<ParentGUID>?"),
			rename("root.hds.2", "z.hds")), Codes: []string{number, guid, "ploop.descriptor.image-missing"}, Preen: Fatal},
	}
}
