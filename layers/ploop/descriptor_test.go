package ploop

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/layers"
)

const (
	guidBase = "{11111111-1111-1111-1111-111111111111}"
	guidMid  = "{22222222-2222-2222-2222-222222222222}"
)

// threeLayers is as ploop writes it, with nodes of other software added.
const threeLayers = `<?xml version="1.0" encoding="UTF-8"?>
<!-- kept -->
<Virtuozzo_disk_image Version="1.0" odd='a &amp; b'>
  <Disk_Parameters>
    <Disk_size>131072</Disk_size>
    <Cylinders>256</Cylinders>
    <Heads>16</Heads>
    <Sectors>32</Sectors>
    <Padding>0</Padding>
    <Unknown kind="x"><Inner/>text &lt; more<![CDATA[ raw <x> ]]></Unknown>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>131072</End>
      <Blocksize>2048</Blocksize>
      <Image>
        <GUID>{11111111-1111-1111-1111-111111111111}</GUID>
        <Type>Compressed</Type>
        <File>root.hds</File>
      </Image>
      <Image>
        <GUID>{22222222-2222-2222-2222-222222222222}</GUID>
        <Type>Compressed</Type>
        <File>root.hds.1</File>
      </Image>
      <Image>
        <GUID>{5FBAABE3-6958-40FF-92A7-860E329AAB41}</GUID>
        <Type>Compressed</Type>
        <File>/abs/root.hds.2</File>
      </Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>
    <Shot>
      <GUID>{11111111-1111-1111-1111-111111111111}</GUID>
      <ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>
    </Shot>
    <Shot>
      <GUID>{22222222-2222-2222-2222-222222222222}</GUID>
      <ParentGUID>{11111111-1111-1111-1111-111111111111}</ParentGUID>
      <Temporary/>
    </Shot>
    <Shot>
      <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
      <ParentGUID>{22222222-2222-2222-2222-222222222222}</ParentGUID>
    </Shot>
  </Snapshots>
</Virtuozzo_disk_image>
`

func files(chain []ImageRef) string {
	var names []string
	for _, r := range chain {
		names = append(names, r.File+":"+r.Format)
	}
	return strings.Join(names, " ")
}

func TestDescriptor(t *testing.T) {
	d, err := ParseDescriptor([]byte(threeLayers))
	if err != nil {
		t.Fatal(err)
	}
	if d.Size() != 64<<20 || d.BlockSize() != 1<<20 || d.Top() != defaultTop {
		t.Errorf("size %d block %d top %s", d.Size(), d.BlockSize(), d.Top())
	}
	for ask, want := range map[string]string{
		"":                           "/abs/root.hds.2:ploop root.hds.1:ploop root.hds:ploop",
		guidMid:                      "root.hds.1:ploop root.hds:ploop",
		strings.Trim(guidBase, "{}"): "root.hds:ploop",
		strings.ToUpper(defaultTop):  "/abs/root.hds.2:ploop root.hds.1:ploop root.hds:ploop",
	} {
		chain, err := d.Chain(ask)
		if err != nil || files(chain) != want {
			t.Errorf("Chain(%q) = %s, %v; want %s", ask, files(chain), err, want)
		}
	}
	for _, ask := range []string{"x", noParent, "{33333333-3333-3333-3333-333333333333}", "urn:uuid:" + strings.Trim(guidMid, "{}")} {
		if _, err := d.Chain(ask); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Chain(%q): %v", ask, err)
		}
	}
	shots := d.Snapshots()
	if len(shots) != 3 || shots[1].Parent != guidBase || !shots[2].Current || shots[0].Current || shots[1].Name != "temporary" || shots[0].Parent != "" {
		t.Errorf("%+v", shots)
	}
	// Raw is a mode of the disk: only the base is raw then.
	d, err = ParseDescriptor([]byte(strings.ReplaceAll(threeLayers, "Compressed", "Plain")))
	if err != nil {
		t.Fatal(err)
	}
	if chain, err := d.Chain(""); err != nil || files(chain) != "/abs/root.hds.2:ploop root.hds.1:ploop root.hds:raw" {
		t.Errorf("raw mode: %s, %v", files(chain), err)
	}
}

// TestDescriptorRoundTrip: what is not understood survives byte for byte.
func TestDescriptorRoundTrip(t *testing.T) {
	// The one thing that the tree does not keep is the kind of an attribute's
	// quotes.
	in := strings.ReplaceAll(threeLayers, "'", `"`)
	d, err := ParseDescriptor([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), DescriptorName)
	for range 2 {
		if err := d.Store(name); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != in {
			t.Fatalf("stored:\n%s\nwant:\n%s", got, in)
		}
		if d, err = ReadDescriptor(name); err != nil {
			t.Fatal(err)
		}
	}
	left, err := os.ReadDir(filepath.Dir(name))
	if err != nil || len(left) != 1 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestDescriptorErrors(t *testing.T) {
	swap := func(old, now string) string {
		if !strings.Contains(threeLayers, old) {
			t.Fatalf("nothing to replace: %s", old)
		}
		return strings.Replace(threeLayers, old, now, 1)
	}
	last := func(old, now string) string {
		k := strings.LastIndex(threeLayers, old)
		return threeLayers[:k] + now + threeLayers[k+len(old):]
	}
	shot := strings.Index(threeLayers, "<Snapshots>")
	for _, c := range []struct {
		name  string
		xml   string
		class error
		says  string
	}{
		{"empty", "", layers.ErrFormat, "root"},
		{"not xml", "\x00\x01hello", layers.ErrFormat, ""},
		{"cut off", threeLayers[:700], layers.ErrFormat, ""},
		{"other xml", "<html/>", layers.ErrFormat, "html"},
		{"too large", threeLayers + strings.Repeat(" ", maxDescriptor), layers.ErrFormat, "larger"},
		{"too many nodes", swap("<Inner/>", strings.Repeat("<a/>", maxNodes)), layers.ErrFormat, "nodes"},
		{"too many attributes", swap("<Inner/>", "<a"+manyAttrs(maxNodes)+"/>"), layers.ErrFormat, "nodes"},
		{"too deep", swap("<Inner/>", strings.Repeat("<a>", 50)+strings.Repeat("</a>", 50)), layers.ErrFormat, "nested"},
		{"entities", swap("<!-- kept -->", `<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>`), layers.ErrFormat, "document type"},
		{"unknown entity", swap("root.hds<", "&xx;<"), layers.ErrFormat, ""},
		{"size", swap("<Disk_size>131072<", "<Disk_size>-1<"), layers.ErrFormat, "Disk_size"},
		{"size overflows", swap("<Disk_size>131072<", "<Disk_size>18446744073709551615<"), layers.ErrFormat, "Disk_size"},
		{"size is not the storage's", swap("<End>131072<", "<End>131071<"), layers.ErrCorrupt, "131071"},
		{"start", swap("<Start>0<", "<Start>8<"), layers.ErrCorrupt, "sectors 8"},
		{"block size", swap("<Blocksize>2048<", "<Blocksize>0<"), layers.ErrFormat, "Blocksize"},
		{"block size huge", swap("<Blocksize>2048<", "<Blocksize>99999999<"), layers.ErrFormat, "Blocksize"},
		{"two storages", swap("<Storage>", "<Storage/><Storage>"), layers.ErrUnsupported, "split"},
		{"no storage", swap("<StorageData>", "<StorageData><X>"), layers.ErrFormat, ""},
		{"encrypted", swap("<Padding>0</Padding>", "<Encryption><KeyId>k</KeyId></Encryption>"), layers.ErrUnsupported, "encrypted"},
		{"parent volume", swap("<StorageData>", "<StorageData><Volume><Parent>/x</Parent></Volume>"), layers.ErrUnsupported, "parent"},
		{"image type", swap("<Type>Compressed<", "<Type>Packed<"), layers.ErrUnsupported, "Packed"},
		{"no file", swap("<File>root.hds<", "<File> <"), layers.ErrFormat, "File"},
		{"same file twice", swap("<File>root.hds.1<", "<File>./root.hds<"), layers.ErrCorrupt, "file of image"},
		{"guid", swap(guidBase, "{1111}"), layers.ErrFormat, "GUID"},
		{"guid not hex", swap(guidBase, "{1111111z-1111-1111-1111-111111111111}"), layers.ErrFormat, "GUID"},
		{"same image twice", swap(guidMid, guidBase), layers.ErrCorrupt, "same GUID"},
		{"same shot twice", threeLayers[:shot] + strings.Replace(threeLayers[shot:], guidMid, guidBase, 1), layers.ErrCorrupt, "same GUID"},
		{"shot without image", threeLayers[:shot] + strings.Replace(threeLayers[shot:], guidMid, "{33333333-3333-3333-3333-333333333333}", 1), layers.ErrCorrupt, "without an image"},
		{"count", swap("<Snapshots>", "<Snapshots><Shot><GUID>"+guidMid+"</GUID><ParentGUID>"+noParent+"</ParentGUID></Shot>"), layers.ErrCorrupt, "4 snapshots"},
		{"parent missing", last("<ParentGUID>"+guidMid, "<ParentGUID>{33333333-3333-3333-3333-333333333333}"), layers.ErrCorrupt, "no snapshot"},
		{"loop", swap("<ParentGUID>"+noParent, "<ParentGUID>"+guidMid), layers.ErrCorrupt, "loop"},
		{"own parent", swap("<ParentGUID>"+noParent, "<ParentGUID>"+guidBase), layers.ErrCorrupt, "loop"},
		{"top missing", swap("<TopGUID>"+defaultTop, "<TopGUID>{33333333-3333-3333-3333-333333333333}"), layers.ErrCorrupt, "TopGUID"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseDescriptor([]byte(c.xml))
			if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %v with %q", err, c.class, c.says)
			}
		})
	}
}

func manyAttrs(n int) string {
	var b strings.Builder
	for k := range n {
		fmt.Fprintf(&b, " a%d=''", k)
	}
	return b.String()
}

// descriptorOf makes a chain of n images without a TopGUID.
func descriptorOf(n int) []byte {
	var images, shots bytes.Buffer
	guid := func(k int) string {
		if k == n {
			return defaultTop
		}
		return fmt.Sprintf("{00000000-0000-0000-0000-%012d}", k)
	}
	for k := 1; k <= n; k++ {
		fmt.Fprintf(&images, "<Image><GUID>%s</GUID><Type>Compressed</Type><File>%d</File></Image>", guid(k), k)
		fmt.Fprintf(&shots, "<Shot><GUID>%s</GUID><ParentGUID>%s</ParentGUID></Shot>", guid(k), guid(k-1))
	}
	return fmt.Appendf(nil, "<P><Disk_Parameters><Disk_size>64</Disk_size></Disk_Parameters><StorageData><Storage>"+
		"<Start>0</Start><End>64</End><Blocksize>64</Blocksize>%s</Storage></StorageData><Snapshots>%s</Snapshots></P>", &images, &shots)
}

func TestDescriptorDepth(t *testing.T) {
	d, err := ParseDescriptor(descriptorOf(1000))
	if err != nil {
		t.Fatal(err)
	}
	if chain, err := d.Chain(""); err != nil || len(chain) != 1000 || chain[0].File != "1000" {
		t.Errorf("%d, %v", len(chain), err)
	}
	if _, err := ParseDescriptor(descriptorOf(1001)); !errors.Is(err, layers.ErrUnsupported) {
		t.Errorf("1001 layers: %v", err)
	}
}

// TestDescriptorAndImages: contradictions between the two name both.
func TestDescriptorAndImages(t *testing.T) {
	d, err := ParseDescriptor([]byte(threeLayers))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := d.Chain("")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		layer         int
		size, cluster int64
		says          string
	}{
		{0, 64 << 20, 1 << 20, ""},
		{1, 1 << 20, 1 << 20, ""}, // short bases are normal
		{1, 64 << 20, 1 << 16, "128"},
		{0, 63 << 20, 1 << 20, "129024"},
		{1, 65 << 20, 1 << 20, "133120"},
	} {
		err := d.CheckImage(chain[c.layer], c.size, c.cluster)
		if (err == nil) != (c.says == "") || err != nil && (!errors.Is(err, layers.ErrCorrupt) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), chain[c.layer].File)) {
			t.Errorf("layer %d size %d cluster %d: %v", c.layer, c.size, c.cluster, err)
		}
	}
}

// Whoever opened a FIFO to read would wait for a writer.
func TestDescriptorIsNoFifo(t *testing.T) {
	name := filepath.Join(t.TempDir(), DescriptorName)
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadDescriptor(name); !errors.Is(err, layers.ErrFormat) {
		t.Errorf("%v", err)
	}
}
