package ploopfsck

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/ploop"
)

// Bounds of a descriptor, those of layers/ploop.
const (
	maxDescriptor = 1 << 20
	maxNodes      = 64 << 10
	maxNesting    = 32

	defaultTop = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
	noParent   = "{00000000-0000-0000-0000-000000000000}"
)

// DescriptorChecker checks a DiskDescriptor.xml by itself. Whether it fits the
// files beside it is a matter of fsck.Stack. Nothing is repaired: what a
// descriptor should say only its owner, a backup of it or the images tell.
type DescriptorChecker struct{}

// Format implements fsck.Checker.
func (DescriptorChecker) Format() string { return "ploop-descriptor" }

// Check implements fsck.Checker. A descriptor that layers/ploop accepts is
// clean; of any other it names all that is wrong.
func (DescriptorChecker) Check(ctx context.Context, f backend.File, o fsck.Options, sink fsck.Sink) (fsck.Stats, error) {
	d := descriptor{ctx: ctx, o: o, sink: sink, stats: fsck.Stats{Format: "ploop-descriptor"}}
	b := make([]byte, maxDescriptor+1)
	n, err := o.Reader(f).ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return d.stats, err
	}
	b = b[:n]
	strict, err := ploop.ParseDescriptor(b)
	if err == nil {
		d.stats.VirtualSize, d.stats.ClusterSize = strict.Size(), strict.BlockSize()
		return d.stats, ctx.Err()
	}
	root, xerr := parseXML(b)
	if xerr != nil {
		d.report(codeXML, "", nil, xerr.Error())
		return d.stats, nil
	}
	d.root(root)
	if !d.found {
		d.report(codeDescriptor, "", nil, err.Error())
	}
	return d.stats, ctx.Err()
}

// node is an element of the document.
type node struct {
	name string
	text strings.Builder
	sub  []*node
}

// all are the children of a name, one the first of them.
func (n *node) all(name string) (out []*node) {
	for _, s := range n.sub {
		if s.name == name {
			out = append(out, s)
		}
	}
	return out
}

func (n *node) one(name string) *node {
	for _, s := range n.sub {
		if s.name == name {
			return s
		}
	}
	return nil
}

// value is the text of a child, "" without it.
func (n *node) value(name string) string {
	if s := n.one(name); s != nil {
		return strings.TrimSpace(s.text.String())
	}
	return ""
}

// parseXML builds a tree of bounded size.
func parseXML(b []byte) (*node, error) {
	if len(b) > maxDescriptor {
		return nil, fmt.Errorf("larger than %d bytes", maxDescriptor)
	}
	dec := xml.NewDecoder(bytes.NewReader(b))
	top := &node{}
	open := []*node{top}
	for nodes := 0; ; nodes++ {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if nodes > maxNodes || len(open) > maxNesting {
			return nil, errors.New("too many or too deeply nested elements")
		}
		at := open[len(open)-1]
		switch e := tok.(type) {
		case xml.StartElement:
			n := &node{name: e.Name.Local}
			at.sub = append(at.sub, n)
			open = append(open, n)
		case xml.EndElement:
			open = open[:len(open)-1]
		case xml.CharData:
			at.text.Write(e)
		}
	}
	if len(top.sub) == 0 {
		return nil, errors.New("no root element")
	}
	return top.sub[0], nil
}

// descriptor is the state of one check.
type descriptor struct {
	ctx   context.Context
	o     fsck.Options
	sink  fsck.Sink
	stats fsck.Stats
	found bool
}

func (d *descriptor) report(code *fsck.Code, field string, value any, text string) {
	d.found = d.found || code.Severity > fsck.Note
	d.sink.Report(fsck.Finding{Code: code, Place: fsck.Place{Offset: -1, Field: field, Value: value}, Text: text})
}

// sectors reads a number of sectors.
func (d *descriptor) sectors(n *node, field, name string) (int64, bool) {
	s := n.value(name)
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil || v > 1<<53 {
		d.report(codeDescNumber, field+"/"+name, s, "not a number of sectors")
		return 0, false
	}
	return int64(v), true
}

func (d *descriptor) root(root *node) {
	params, data := root.one("Disk_Parameters"), root.one("StorageData")
	size, sizeOK := int64(0), false
	if params == nil {
		d.report(codeDescStructure, root.name, nil, "Disk_Parameters is missing")
	} else {
		size, sizeOK = d.sectors(params, "Disk_Parameters", "Disk_size")
		if sizeOK {
			d.stats.VirtualSize = size * sectorSize
		}
		if enc := params.one("Encryption"); enc != nil && enc.value("KeyId") != "" {
			d.report(codeDescUnsupported, "Disk_Parameters/Encryption/KeyId", enc.value("KeyId"), "encrypted disk")
		}
	}
	if data == nil {
		d.report(codeDescStructure, root.name, nil, "StorageData is missing")
		return
	}
	if vol := data.one("Volume"); vol != nil && vol.value("Parent") != "" {
		d.report(codeDescUnsupported, "StorageData/Volume/Parent", vol.value("Parent"), "volume with a parent volume")
	}
	storages := data.all("Storage")
	if len(storages) != 1 {
		code := codeDescUnsupported
		if len(storages) == 0 {
			code = codeDescStructure
		}
		d.report(code, "StorageData/Storage", len(storages), "exactly one Storage is expected (split disks have more)")
		if len(storages) == 0 {
			return
		}
	}
	d.storage(storages[0], size, sizeOK)
	images := d.images(storages[0])
	d.snapshots(root.one("Snapshots"), images)
}

func (d *descriptor) storage(s *node, size int64, sizeOK bool) {
	const field = "StorageData/Storage"
	if v, ok := d.sectors(s, field, "Start"); ok && v != 0 {
		d.report(codeDescSize, field+"/Start", v, "the only storage does not begin at 0")
	}
	if v, ok := d.sectors(s, field, "End"); ok && sizeOK && v != size {
		d.report(codeDescSize, field+"/End", v, fmt.Sprintf("the disk has %d sectors", size))
	}
	if v, ok := d.sectors(s, field, "Blocksize"); ok {
		if v == 0 || v > maxClusterSectors {
			d.report(codeDescNumber, field+"/Blocksize", v, "not a cluster size")
		} else {
			d.stats.ClusterSize = v * sectorSize
		}
	}
}

// guid reads a GUID, "" for a malformed one.
func (d *descriptor) guid(n *node, field, name string) string {
	s := n.value(name)
	bare := s
	if len(s) == 38 && s[0] == '{' && s[37] == '}' {
		bare = s[1:37]
	}
	u, err := uuid.Parse(bare)
	if len(bare) != 36 || err != nil {
		d.report(codeDescGUID, field+"/"+name, s, "not a GUID")
		return ""
	}
	return "{" + u.String() + "}"
}

// images returns the images by GUID.
func (d *descriptor) images(storage *node) map[string]bool {
	images, files := map[string]bool{}, map[string]int{}
	list := storage.all("Image")
	if len(list) == 0 {
		d.report(codeDescStructure, "StorageData/Storage/Image", nil, "no image")
	}
	for k, n := range list {
		field := fmt.Sprintf("StorageData/Storage/Image[%d]", k+1)
		if guid := d.guid(n, field, "GUID"); guid != "" {
			if images[guid] {
				d.report(codeDescDuplicate, field+"/GUID", guid, "another image has the same GUID")
			}
			images[guid] = true
		}
		if typ := n.value("Type"); typ != "Plain" && typ != "Compressed" {
			d.report(codeDescType, field+"/Type", typ, "neither Plain nor Compressed")
		}
		name := n.value("File")
		if name == "" || strings.ContainsRune(name, 0) {
			d.report(codeDescFile, field+"/File", name, "not a file name")
			continue
		}
		if other := files[path.Clean(name)]; other != 0 {
			d.report(codeDescDuplicate, field+"/File", name, fmt.Sprintf("is the file of Image[%d] too", other))
			continue
		}
		files[path.Clean(name)] = k + 1
		d.exists(field+"/File", name)
	}
	return images
}

// exists looks for an image, which fsck.Stack cannot do with a descriptor that
// does not parse.
func (d *descriptor) exists(field, name string) {
	if d.o.OpenFile == nil {
		return
	}
	f, err := d.o.OpenFile(name)
	if err == nil {
		_ = f.Close() // opened for reading
	} else if errors.Is(err, fs.ErrNotExist) {
		d.report(codeDescMissing, field, name, "there is no such file")
	}
}

func (d *descriptor) snapshots(s *node, images map[string]bool) {
	if s == nil {
		if len(images) > 1 {
			d.report(codeDescStructure, "Snapshots", nil, fmt.Sprintf("missing, with %d images", len(images)))
		}
		return
	}
	parent := map[string]string{}
	shots := s.all("Shot")
	for k, n := range shots {
		field := fmt.Sprintf("Snapshots/Shot[%d]", k+1)
		guid, up := d.guid(n, field, "GUID"), d.guid(n, field, "ParentGUID")
		if guid == "" {
			continue
		}
		if _, dup := parent[guid]; dup {
			d.report(codeDescDuplicate, field+"/GUID", guid, "another snapshot has the same GUID")
		}
		parent[guid] = up
		if !images[guid] {
			d.report(codeDescNoImage, field+"/GUID", guid, "no image has this GUID")
		}
	}
	for guid := range images {
		if _, ok := parent[guid]; !ok {
			d.report(codeDescNoShot, "StorageData/Storage/Image/GUID", guid, "no snapshot has this GUID")
		}
	}
	top := defaultTop
	if s.one("TopGUID") != nil {
		top = d.guid(s, "Snapshots", "TopGUID")
	}
	if _, ok := parent[top]; !ok && top != "" {
		d.report(codeDescTop, "Snapshots/TopGUID", top, "no snapshot has this GUID")
	}
	d.chains(shots, parent)
}

// chains follows the parents of every snapshot, each once.
func (d *descriptor) chains(shots []*node, parent map[string]string) {
	state := map[string]int{noParent: 2, "": 2} // 1: on the way, 2: done
	for guid := range parent {
		var way []string
		at := guid
		for state[at] == 0 {
			up, ok := parent[at]
			if !ok {
				d.report(codeDescParent, "Snapshots/Shot/ParentGUID", at, "no snapshot has this GUID")
				break
			}
			state[at] = 1
			way = append(way, at)
			at = up
		}
		if state[at] == 1 {
			d.report(codeDescLoop, "Snapshots/Shot/ParentGUID", at, "snapshots form a loop")
		}
		state[at] = 2
		for _, g := range way {
			state[g] = 2
		}
	}
}
