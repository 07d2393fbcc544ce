package ploopfsck_test

import (
	"context"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/fsck/ploopfsck"
)

const goodXML = `<?xml version="1.0"?>
<Parallels_disk_image>
 <Disk_Parameters><Disk_size>2048</Disk_size></Disk_Parameters>
 <StorageData><Storage><Start>0</Start><End>2048</End><Blocksize>2048</Blocksize>
  <Image><GUID>{11111111-1111-1111-1111-111111111111}</GUID><Type>Compressed</Type><File>root.hds</File></Image>
  <Image><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><Type>Compressed</Type><File>root.hds.1</File></Image>
 </Storage></StorageData>
 <Snapshots><TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
  <Shot><GUID>{11111111-1111-1111-1111-111111111111}</GUID><ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID></Shot>
  <Shot><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><ParentGUID>{11111111-1111-1111-1111-111111111111}</ParentGUID></Shot>
 </Snapshots>
</Parallels_disk_image>`

func checkXML(t testing.TB, b string) *fsck.Report {
	t.Helper()
	f := backend.NewMemBytes("DiskDescriptor.xml", []byte(b))
	col := fsck.NewCollector(fsck.CollectorOptions{})
	o := fsck.Options{OpenFile: func(name string) (backend.File, error) {
		if name == "gone" {
			return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
		}
		return backend.NewMem(name), nil
	}}
	stats, err := ploopfsck.DescriptorChecker{}.Check(context.Background(), f, o, col)
	if err != nil {
		t.Fatal(err)
	}
	return col.Sum(stats)
}

// TestDescriptor: every kind of defect is named, and all of them at once.
func TestDescriptor(t *testing.T) {
	if r := checkXML(t, goodXML); r.Worst() != 0 {
		show(t, "sound", r)
		t.Error("the sound descriptor has findings")
	}
	const one, top = "{11111111-1111-1111-1111-111111111111}", "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
	for _, c := range []struct{ name, old, new, code string }{
		{"no XML", "</Snapshots>", "", "xml"},
		{"empty", goodXML, "", "xml"},
		{"too large", "<Snapshots>", "<Snapshots><!--" + strings.Repeat("x", 1<<20) + "-->", "xml"},
		{"nested", "<Snapshots>", "<Snapshots>" + strings.Repeat("<a>", 100) + strings.Repeat("</a>", 100), "xml"},
		{"parameters", "Disk_Parameters>", "Other>", "structure"},
		{"storage", "StorageData>", "Other>", "structure"},
		{"snapshots", "Snapshots>", "Other>", "structure"},
		{"size", "<Disk_size>2048", "<Disk_size>many", "number"},
		{"negative size", "<Disk_size>2048", "<Disk_size>-1", "number"},
		{"end", "<End>2048", "<End>4096", "size"},
		{"start", "<Start>0", "<Start>8", "size"},
		{"block", "<Blocksize>2048", "<Blocksize>0", "number"},
		{"guid", one, "{1111}", "guid"},
		{"same guid", one, top, "duplicate"},
		{"same file", "root.hds.1", "./root.hds", "duplicate"},
		{"type", "<Type>Compressed", "<Type>Zipped", "type"},
		{"no file", "<File>root.hds<", "<File><", "file"},
		{"shot without image", "<Shot>", "<Shot><GUID>{22222222-2222-2222-2222-222222222222}</GUID><ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID></Shot><Shot>", "snapshot-without-image"},
		{"image without shot", "<Image>", "<Image><GUID>{22222222-2222-2222-2222-222222222222}</GUID><Type>Plain</Type><File>x</File></Image><Image>", "image-without-snapshot"},
		{"top", "<TopGUID>" + top, "<TopGUID>{22222222-2222-2222-2222-222222222222}", "top"},
		{"parent", "<ParentGUID>" + one, "<ParentGUID>{22222222-2222-2222-2222-222222222222}", "parent"},
		{"loop", "<ParentGUID>{00000000-0000-0000-0000-000000000000}", "<ParentGUID>" + top, "loop"},
		{"own parent", "<ParentGUID>" + one, "<ParentGUID>" + top, "loop"},
		{"split", "</Storage>", "</Storage><Storage></Storage>", "unsupported"},
		{"encrypted", "</Disk_Parameters>", "<Encryption><KeyId>1</KeyId></Encryption></Disk_Parameters>", "unsupported"},
		{"missing, and broken otherwise", "root.hds.1</File></Image>\n </Storage><", "gone</File></Image><Image/></Storage><", "image-missing"},
		{"doctype", "<Parallels", "<!DOCTYPE x><Parallels", "refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(goodXML, c.old) {
				t.Fatalf("no %q", c.old)
			}
			n := 1
			if strings.HasPrefix(c.new, "Other") {
				n = -1 // both ends of the element
			}
			r := checkXML(t, strings.Replace(goodXML, c.old, c.new, n))
			if !has(r, "ploop.descriptor."+c.code) {
				show(t, "found", r)
				t.Errorf("%s is not found", c.code)
			}
		})
	}
	bad := strings.NewReplacer("<End>2048", "<End>1", "<Type>Compressed", "<Type>x", one+"</Parent", "{1}</Parent").Replace(goodXML)
	r := checkXML(t, bad)
	for _, code := range []string{"size", "type", "guid"} {
		if !has(r, "ploop.descriptor."+code) {
			t.Errorf("%s is not found beside the others", code)
		}
	}
}

func FuzzDescriptor(f *testing.F) {
	f.Add(goodXML)
	f.Add("<a/>")
	f.Fuzz(func(t *testing.T, s string) { checkXML(t, s) })
}
