package ploopfsck_test

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/fsck/ploopfsck"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers/ploop"
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

// besides are the files beside a descriptor that is fuzzed: headers of images,
// which is all that is read of them.
var besides = sync.OnceValue(func() map[string]*backend.Mem {
	p := damage.NewPloop(2, 1<<20, 1)
	small := damage.NewPloop(1, 1<<20, 1)
	all := map[string]*backend.Mem{}
	for name, b := range map[string][]byte{"root.hds": p.B, "root.hds.1": p.B, "left.hds": small.B, "note.txt": []byte("text")} {
		all[name] = backend.NewMemBytes(name, b)
	}
	return all
})

// kept is a file that is not closed.
type kept struct{ *backend.Mem }

func (kept) Close() error { return nil }

// repairXML checks and repairs a descriptor as often as a run does, and holds
// what is promised of every one.
func repairXML(t testing.TB, s string) {
	t.Helper()
	o := fsck.Options{
		OpenFile: func(name string) (backend.File, error) {
			if b := besides()[name]; b != nil {
				return kept{b}, nil
			}
			return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
		},
		Siblings: func() ([]string, error) { return []string{"left.hds", "note.txt", "root.hds", "root.hds.1"}, nil },
	}
	for _, decide := range []fsck.Decide{fsck.DecidePreen, fsck.DecideAll} {
		f := backend.NewMemBytes("DiskDescriptor.xml", []byte(s))
		res, undo, _ := repair(t, ploopfsck.DescriptorChecker{}, f, decide, o)
		for _, d := range res.Left.Findings {
			if d.Fix != nil && decide(d.Finding) {
				show(t, "left", res.Left)
				t.Fatalf("a fix is left:\n%s\nof\n%s", f.Bytes(), s)
			}
		}
		if res.Left.Worst() > res.Found.Worst() {
			show(t, "found", res.Found)
			show(t, "left", res.Left)
			t.Fatalf("worse than before:\n%s\nof\n%s", f.Bytes(), s)
		}
		if res.Left.Worst() <= fsck.Note {
			if _, err := ploop.ParseDescriptor(f.Bytes()); err != nil {
				t.Fatalf("clean, and refused: %v\n%s", err, f.Bytes())
			}
		}
		restored(t, f, undo, res, []byte(s))
	}
}

func FuzzDescriptor(f *testing.F) {
	f.Add(goodXML)
	f.Add("<a/>")
	for _, c := range []string{"<Disk_size>2048", "<End>2048", "<TopGUID>{5fb", "<ParentGUID>{0", "<File>root.hds.1", "<Type>Comp"} {
		f.Add(strings.Replace(goodXML, c, c+"x", 1))
		f.Add(strings.Replace(goodXML, c, "", 1))
	}
	f.Fuzz(func(t *testing.T, s string) {
		if len(s) <= 8<<10 {
			repairXML(t, s)
		}
	})
}

// TestDescriptorRandom is a short walk over what FuzzDescriptor covers:
// elements that are left out, doubled, or exchanged.
func TestDescriptorRandom(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 2026))
	parts := strings.SplitAfter(goodXML, ">")
	for n := range 600 {
		p := slices.Clone(parts)
		for range 1 + rnd.IntN(3) {
			i, k := rnd.IntN(len(p)), rnd.IntN(len(p))
			switch rnd.IntN(5) {
			case 0:
				p = slices.Delete(p, i, i+1)
			case 1:
				p = slices.Insert(p, i, p[k])
			case 2:
				p[i], p[k] = p[k], p[i]
			case 3:
				p[i] = p[k]
			case 4:
				if p[i] == "" {
					continue
				}
				b := []byte(p[i])
				b[rnd.IntN(len(b))] = "0123456789{}<>/ xA-"[rnd.IntN(19)]
				p[i] = string(b)
			}
		}
		s := strings.Join(p, "")
		if !t.Run(fmt.Sprint(n), func(t *testing.T) { repairXML(t, s) }) {
			return
		}
	}
}
