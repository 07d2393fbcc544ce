package ploopfsck

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/ploop"
)

const (
	defaultTop = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
	noParent   = "{00000000-0000-0000-0000-000000000000}"
)

// DescriptorChecker checks a DiskDescriptor.xml, and with Options.OpenFile and
// Options.Siblings whether it fits the files beside it. What it repairs it
// takes from what the descriptor says twice and from sound headers of images;
// every edit leaves the rest of the document as it is, byte for byte.
type DescriptorChecker struct{}

// Format implements fsck.Checker.
func (DescriptorChecker) Format() string { return "ploop-descriptor" }

// Check implements fsck.Checker.
func (DescriptorChecker) Check(ctx context.Context, f backend.File, o fsck.Options, sink fsck.Sink) (fsck.Stats, error) {
	d := descriptor{ctx: ctx, f: f, o: o, sink: sink, stats: fsck.Stats{Format: "ploop-descriptor"}}
	size, err := o.Reader(f).Size()
	if err != nil {
		return d.stats, err
	}
	b := make([]byte, min(size, maxDescriptor+1))
	n, err := o.Reader(f).ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return d.stats, err
	}
	d.b = b[:n]
	d.lookAround()
	_, strict := ploop.ParseDescriptor(d.b)
	root, err := parseXML(d.b)
	if err != nil {
		d.whole(codeXML, "", err.Error())
		return d.stats, d.finish()
	}
	d.root(root)
	if !d.found && strict != nil {
		d.report(codeDescriptor, "", nil, strict.Error())
	}
	if err := ctx.Err(); err != nil {
		return d.stats, err
	}
	return d.stats, d.finish()
}

// descriptor is the state of one check.
type descriptor struct {
	ctx   context.Context
	f     backend.File
	b     []byte
	o     fsck.Options
	sink  fsck.Sink
	stats fsck.Stats
	found bool // something worse than a note

	size, end, block int64 // in sectors, -1 for what is no number
	params, store    *node
	images           []*image
	shots            []*shot
	snapshots        *node
	topGUID          string
	tree             tree

	siblings  []string // names of the files beside it, nil when not known
	isSibling map[string]bool
	orphaned  *[]string // nil before they were looked for
	heads     map[string]*facts
	edits     []edit
	fresh     []byte // a new document, instead of edits
}

// image is an Image element.
type image struct {
	n           *node
	field, guid string // guid is "" for one that is malformed
	typ, file   string
	facts       *facts // nil when the file cannot be looked at
	missing     bool   // there is no such file
}

// shot is a Shot element.
type shot struct {
	n                   *node
	field, guid, parent string // "" for what is malformed
	temporary           bool
}

// place makes a finding at a field.
func (d *descriptor) place(code *fsck.Code, field string, value any, text string) fsck.Finding {
	d.found = d.found || code.Severity > fsck.Note
	return fsck.Finding{Code: code, Place: fsck.Place{Offset: -1, Field: field, Value: value}, Text: text}
}

// report is a finding without a fix.
func (d *descriptor) report(code *fsck.Code, field string, value any, text string) {
	d.sink.Report(d.place(code, field, value, text))
}

// offer is a finding whose fix are edits, none if there are no edits.
func (d *descriptor) offer(f fsck.Finding, level fsck.Level, text string, loses []blockmap.Range, edits []edit) {
	if len(edits) > 0 {
		f.Fix = &fsck.Fix{Text: text, Level: level, Loses: loses}
	}
	if d.sink.Report(f) && d.o.Plan != nil && !clash(d.edits, edits) {
		// What clashes waits for the next round of repair.
		d.edits = append(d.edits, edits...)
	}
}

// whole is a finding about a document that is of no use. Where the images
// beside it leave no doubt a new one takes its place.
func (d *descriptor) whole(code *fsck.Code, field, text string) {
	f := d.place(code, field, nil, text)
	name, x := d.onlyImage()
	var fresh []byte
	if x != nil {
		if n, err := ploop.NewDescriptor(x.size, x.cluster, name); err == nil {
			fresh, err = n.Marshal()
			if err != nil {
				fresh = nil
			}
		}
	}
	if fresh != nil {
		f.Fix = &fsck.Fix{Level: fsck.Full, Text: fmt.Sprintf("write a new one for %s, the only image in the directory", name)}
	}
	if d.sink.Report(f) && d.o.Plan != nil && fresh != nil {
		d.fresh = fresh
	}
}

// finish enters the new document in the plan.
func (d *descriptor) finish() error {
	switch {
	case d.o.Plan == nil:
		return nil
	case d.fresh != nil:
		return d.o.Plan.Replace(d.fresh)
	case len(d.edits) > 0:
		return d.o.Plan.Replace(apply(d.b, d.edits))
	}
	return nil
}

// maxSectors bounds a number of sectors.
const maxSectors = 1 << 53

// sectors reads a number of sectors, -1 for what is none.
func (d *descriptor) sectors(n *node, name string) int64 {
	if n == nil {
		return -1
	}
	v, err := strconv.ParseUint(n.value(name), 10, 64)
	if err != nil || v > maxSectors {
		return -1
	}
	return int64(v)
}

func (d *descriptor) root(root *node) {
	d.params = root.one("Disk_Parameters")
	data := root.one("StorageData")
	if d.params == nil || data == nil || data.one("Storage") == nil || data.one("Storage").one("Image") == nil {
		what := "Disk_Parameters"
		switch {
		case d.params == nil:
		case data == nil:
			what = "StorageData"
		case data.one("Storage") == nil:
			what = "StorageData/Storage"
		default:
			what = "StorageData/Storage/Image"
		}
		d.whole(codeDescStructure, root.name, what+" is missing")
	}
	if d.params != nil {
		if enc := d.params.one("Encryption"); enc != nil && enc.value("KeyId") != "" {
			d.report(codeDescUnsupported, "Disk_Parameters/Encryption/KeyId", enc.value("KeyId"), "encrypted disk")
		}
	}
	if data == nil {
		return
	}
	if vol := data.one("Volume"); vol != nil && vol.value("Parent") != "" {
		d.report(codeDescUnsupported, "StorageData/Volume/Parent", vol.value("Parent"), "volume with a parent volume")
	}
	storages := data.all("Storage")
	if len(storages) > 1 {
		d.report(codeDescUnsupported, "StorageData/Storage", len(storages), "exactly one Storage is expected (split disks have more)")
	}
	if len(storages) == 0 {
		return
	}
	d.store = storages[0]
	d.readImages()
	d.readShots(root.one("Snapshots"))
	d.tree = newTree(d.images, d.shots, d.topGUID)
	d.checkNumbers()
	d.checkImages()
	d.checkShots()
	d.checkFiles()
}

// guidText normalises a GUID, "" for a malformed one.
func guidText(s string) string {
	bare := s
	if len(s) == 38 && s[0] == '{' && s[37] == '}' {
		bare = s[1:37]
	}
	u, err := uuid.Parse(bare)
	if len(bare) != 36 || err != nil {
		return ""
	}
	return "{" + u.String() + "}"
}

// ownGUID is guidText of what has to name something: the GUID that stands for
// no parent does not.
func ownGUID(s string) string {
	if g := guidText(s); g != noParent {
		return g
	}
	return ""
}

func (d *descriptor) readImages() {
	for k, n := range d.store.all("Image") {
		i := &image{n: n, field: fmt.Sprintf("StorageData/Storage/Image[%d]", k+1), guid: ownGUID(n.value("GUID")),
			typ: n.value("Type"), file: n.value("File")}
		if i.file != "" && !strings.ContainsRune(i.file, 0) {
			i.facts, i.missing = d.look(i.file)
		}
		d.images = append(d.images, i)
	}
}

var temporaryMarks = []string{"Temporary", "TemporaryZero", "TemporaryZeroSwap"}

func (d *descriptor) readShots(s *node) {
	d.snapshots, d.topGUID = s, defaultTop
	if s == nil {
		if len(d.images) == 1 {
			d.topGUID = d.images[0].guid
		}
		return
	}
	if s.one("TopGUID") != nil {
		d.topGUID = ownGUID(s.value("TopGUID"))
	}
	for k, n := range s.all("Shot") {
		sh := &shot{n: n, field: fmt.Sprintf("Snapshots/Shot[%d]", k+1), guid: ownGUID(n.value("GUID")), parent: guidText(n.value("ParentGUID"))}
		for _, mark := range temporaryMarks {
			sh.temporary = sh.temporary || n.one(mark) != nil
		}
		d.shots = append(d.shots, sh)
	}
}

// checkImages looks at the Image elements by themselves.
func (d *descriptor) checkImages() {
	guids, files := map[string]bool{}, map[string]int{}
	for k, i := range d.images {
		switch {
		case i.guid == "":
			d.wrongGUID(i)
		case guids[i.guid]:
			d.report(codeDescDuplicate, i.field+"/GUID", i.guid, "another image has the same GUID")
		}
		guids[i.guid] = true
		if i.typ != "Plain" && i.typ != "Compressed" {
			d.wrongType(i)
		}
		clean := path.Clean(i.file)
		switch {
		case i.file == "" || strings.ContainsRune(i.file, 0):
			f := d.place(codeDescFile, i.field+"/File", i.file, "not a file name")
			d.findFile(i, f)
		case files[clean] != 0:
			d.report(codeDescDuplicate, i.field+"/File", i.file, fmt.Sprintf("is the file of Image[%d] too", files[clean]))
		}
		files[clean] = k + 1
	}
}

// wrongGUID handles an image whose GUID is malformed: the only snapshot
// without an image tells it.
func (d *descriptor) wrongGUID(i *image) {
	f := d.place(codeDescGUID, i.field+"/GUID", i.n.value("GUID"), "not a GUID")
	lone := d.tree.shotsAlone
	if len(lone) != 1 || d.tree.badImages != 1 {
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		return
	}
	d.offer(f, fsck.Full, "set it to "+lone[0].guid+", the only snapshot without an image", nil, setText(d.b, i.n, "GUID", lone[0].guid))
}

// wrongType handles an image of an unknown type: raw is a mode of the whole
// disk, so that the others tell it, or the image itself.
func (d *descriptor) wrongType(i *image) {
	f := d.place(codeDescType, i.field+"/Type", i.typ, "neither Plain nor Compressed")
	want := d.tree.oneType
	if d.tree.types == 0 && len(d.images) == 1 && i.facts != nil && i.facts.sound {
		want = "Compressed"
	}
	if want == "" {
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		return
	}
	d.offer(f, fsck.Full, "set it to "+want, nil, setText(d.b, i.n, "Type", want))
}
