package ploop

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/beevik/etree"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/layers"
)

// DescriptorName is the file that makes a directory a bundle.
const DescriptorName = "DiskDescriptor.xml"

// Bounds of a descriptor. One of 1,000 snapshots is about 300 KiB.
const (
	maxDescriptor = 1 << 20 // bytes
	maxNodes      = 64 << 10
	maxNesting    = 32
	maxDepth      = 1000 // images of one chain
)

const (
	// defaultTop is the top of a descriptor without a TopGUID; ploop also
	// keeps it as the constant name of its top.
	defaultTop = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
	noParent   = "{00000000-0000-0000-0000-000000000000}"
)

// Values of ImageRef.Format.
const (
	FormatRaw   = "raw"
	FormatPloop = "ploop"
)

// Descriptor is a parsed and validated DiskDescriptor.xml (QEMU
// docs/interop/prl-xml.rst, OpenVZ lib/xml.c). The document it was read from
// is kept, so that nodes which are not understood survive an edit.
type Descriptor struct {
	doc    *etree.Document
	path   string
	size   int64
	block  int64
	top    string
	images map[string]ImageRef
	shots  []shot // in the order of the file
	parent map[string]string
}

type shot struct {
	guid, parent string
	temporary    bool
}

// ImageRef is one image of a bundle.
type ImageRef struct {
	GUID string // lower case, in braces
	File string // as written: relative to the descriptor, or absolute
	Type string // as written: Plain or Compressed
	// Format is what the image is stored as: ploop, or raw for the base of a
	// disk in raw mode. Raw is a mode of the whole disk: there every Image
	// says Plain, although all but the base are ploop images.
	Format string
}

// ReadDescriptor reads and parses the descriptor at name, which has to be a
// regular file: a FIFO must not make us wait.
func ReadDescriptor(name string) (*Descriptor, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, &layers.ImageError{Path: name, Layer: -1, Offset: -1, Err: fmt.Errorf("%w: not a regular file", layers.ErrFormat)}
	}
	b, err := io.ReadAll(io.LimitReader(f, maxDescriptor+1))
	if err != nil {
		return nil, err
	}
	return parseDescriptor(b, name)
}

// ParseDescriptor parses a descriptor of at most 1 MiB. It does not touch the
// images. Errors wrap layers.ErrFormat (not such a document, or a value that
// cannot be), ErrUnsupported (split disk, encryption, parent volume) or
// ErrCorrupt (contradictions: missing or duplicate parts, loops).
func ParseDescriptor(b []byte) (*Descriptor, error) { return parseDescriptor(b, DescriptorName) }

func parseDescriptor(b []byte, name string) (*Descriptor, error) {
	d := &Descriptor{path: name, images: map[string]ImageRef{}, parent: map[string]string{}}
	if err := boundXML(b); err != nil {
		return nil, d.fail("", nil, layers.ErrFormat, err.Error())
	}
	d.doc = etree.NewDocument()
	d.doc.ReadSettings.PreserveCData = true
	if err := d.doc.ReadFromBytes(b); err != nil {
		return nil, d.fail("", nil, layers.ErrFormat, err.Error())
	}
	root := d.doc.Root()
	if root == nil {
		return nil, d.fail("", nil, layers.ErrFormat, "no root element")
	}
	storage, err := d.parseStorage(root)
	if err != nil {
		return nil, err
	}
	if err := d.parseImages(storage); err != nil {
		return nil, err
	}
	if err := d.parseShots(root.SelectElement("Snapshots")); err != nil {
		return nil, err
	}
	return d, d.resolve()
}

// boundXML walks the tokens once, before a tree is built from them.
func boundXML(b []byte) error {
	if len(b) > maxDescriptor {
		return fmt.Errorf("larger than %d bytes", maxDescriptor)
	}
	dec := xml.NewDecoder(bytes.NewReader(b))
	for nodes, depth := 0, 0; ; nodes++ {
		tok, err := dec.RawToken()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if nodes > maxNodes {
			return fmt.Errorf("more than %d nodes", maxNodes)
		}
		switch e := tok.(type) {
		case xml.StartElement:
			depth++
			if depth > maxNesting {
				return fmt.Errorf("elements nested deeper than %d", maxNesting)
			}
			if nodes += len(e.Attr); nodes > maxNodes {
				return fmt.Errorf("more than %d nodes", maxNodes)
			}
		case xml.EndElement:
			depth--
		case xml.Directive:
			return errors.New("document type declarations are not accepted")
		}
	}
}

func (d *Descriptor) fail(field string, value any, class error, why string) error {
	return &layers.ImageError{Path: d.path, Layer: -1, Offset: -1, Field: field, Value: value, Err: fmt.Errorf("%w: %s", class, why)}
}

// text is the trimmed text of the child with that name, "" without it.
func text(e *etree.Element, name string) string {
	if c := e.SelectElement(name); c != nil {
		return strings.TrimSpace(c.Text())
	}
	return ""
}

// sectors parses a count of 512-byte sectors into bytes.
func (d *Descriptor) sectors(e *etree.Element, field, name string) (int64, error) {
	s := text(e, name)
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil || v > math.MaxInt64/sectorSize {
		return 0, d.fail(field+"/"+name, s, layers.ErrFormat, "not a number of sectors")
	}
	return int64(v) * sectorSize, nil
}

// parseStorage reads the sizes and returns the Storage element.
func (d *Descriptor) parseStorage(root *etree.Element) (*etree.Element, error) {
	params, data := root.SelectElement("Disk_Parameters"), root.SelectElement("StorageData")
	if params == nil || data == nil {
		return nil, d.fail(root.Tag, nil, layers.ErrFormat, "Disk_Parameters or StorageData is missing")
	}
	var err error
	if d.size, err = d.sectors(params, "Disk_Parameters", "Disk_size"); err != nil {
		return nil, err
	}
	if enc := params.SelectElement("Encryption"); enc != nil && text(enc, "KeyId") != "" {
		return nil, d.fail("Disk_Parameters/Encryption/KeyId", text(enc, "KeyId"), layers.ErrUnsupported, "encrypted disk")
	}
	if vol := data.SelectElement("Volume"); vol != nil && text(vol, "Parent") != "" {
		return nil, d.fail("StorageData/Volume/Parent", text(vol, "Parent"), layers.ErrUnsupported, "volume with a parent volume")
	}
	all := data.SelectElements("Storage")
	if len(all) != 1 {
		return nil, d.fail("StorageData/Storage", len(all), layers.ErrUnsupported, "split disk: exactly one Storage is handled")
	}
	const field = "StorageData/Storage"
	start, err := d.sectors(all[0], field, "Start")
	if err != nil {
		return nil, err
	}
	end, err := d.sectors(all[0], field, "End")
	if err != nil {
		return nil, err
	}
	if d.block, err = d.sectors(all[0], field, "Blocksize"); err != nil {
		return nil, err
	}
	if start != 0 || end != d.size {
		return nil, d.fail(field+"/End", end/sectorSize, layers.ErrCorrupt,
			fmt.Sprintf("storage is sectors %d to %d of a disk of %d", start/sectorSize, end/sectorSize, d.size/sectorSize))
	}
	if d.block == 0 || d.block > MaxCluster {
		return nil, d.fail(field+"/Blocksize", d.block/sectorSize, layers.ErrFormat, "not a cluster size in sectors")
	}
	return all[0], nil
}

func (d *Descriptor) parseImages(storage *etree.Element) error {
	files := map[string]string{}
	for k, e := range storage.SelectElements("Image") {
		field := fmt.Sprintf("StorageData/Storage/Image[%d]", k+1)
		guid, err := d.guid(e, field, "GUID")
		if err != nil {
			return err
		}
		ref := ImageRef{GUID: guid, File: text(e, "File"), Type: text(e, "Type"), Format: FormatPloop}
		switch {
		case ref.Type != "Plain" && ref.Type != "Compressed":
			return d.fail(field+"/Type", ref.Type, layers.ErrUnsupported, "neither Plain nor Compressed")
		case ref.File == "" || strings.ContainsRune(ref.File, 0):
			return d.fail(field+"/File", ref.File, layers.ErrFormat, "not a file name")
		case d.images[guid].GUID != "":
			return d.fail(field+"/GUID", guid, layers.ErrCorrupt, "two images with the same GUID")
		}
		clean := path.Clean(ref.File)
		if other, dup := files[clean]; dup {
			return d.fail(field+"/File", ref.File, layers.ErrCorrupt, "is the file of image "+other+" too")
		}
		files[clean] = guid
		d.images[guid] = ref
	}
	if len(d.images) == 0 {
		return d.fail("StorageData/Storage/Image", nil, layers.ErrCorrupt, "no image")
	}
	return nil
}

func (d *Descriptor) parseShots(e *etree.Element) error {
	d.top = defaultTop
	if e == nil {
		if len(d.images) != 1 {
			return d.fail("Snapshots", nil, layers.ErrCorrupt, fmt.Sprintf("missing, with %d images", len(d.images)))
		}
		for guid := range d.images {
			d.top = guid
			d.shots = []shot{{guid: guid, parent: noParent}}
		}
	} else {
		if e.SelectElement("TopGUID") != nil {
			var err error
			if d.top, err = d.guid(e, "Snapshots", "TopGUID"); err != nil {
				return err
			}
		}
		for k, s := range e.SelectElements("Shot") {
			field := fmt.Sprintf("Snapshots/Shot[%d]", k+1)
			guid, err := d.guid(s, field, "GUID")
			if err != nil {
				return err
			}
			parent, err := d.guid(s, field, "ParentGUID")
			if err != nil {
				return err
			}
			sh := shot{guid: guid, parent: parent}
			for _, mark := range []string{"Temporary", "TemporaryZero", "TemporaryZeroSwap"} {
				sh.temporary = sh.temporary || s.SelectElement(mark) != nil
			}
			d.shots = append(d.shots, sh)
		}
	}
	if len(d.shots) != len(d.images) {
		return d.fail("Snapshots/Shot", len(d.shots), layers.ErrCorrupt, fmt.Sprintf("%d images but %d snapshots", len(d.images), len(d.shots)))
	}
	for k, s := range d.shots {
		field := fmt.Sprintf("Snapshots/Shot[%d]/GUID", k+1)
		if _, dup := d.parent[s.guid]; dup {
			return d.fail(field, s.guid, layers.ErrCorrupt, "two snapshots with the same GUID")
		}
		if d.images[s.guid].GUID == "" {
			return d.fail(field, s.guid, layers.ErrCorrupt, "snapshot without an image")
		}
		d.parent[s.guid] = s.parent
	}
	return nil
}

// guid parses a GUID in braces (bare ones are understood) and normalises it.
func (d *Descriptor) guid(e *etree.Element, field, name string) (string, error) {
	s := text(e, name)
	g, err := parseGUID(s)
	if err != nil {
		return "", d.fail(field+"/"+name, s, layers.ErrFormat, err.Error())
	}
	return g, nil
}

func parseGUID(s string) (string, error) {
	if n := len(s); n != 36 && (n != 38 || s[0] != '{' || s[37] != '}') {
		return "", errors.New("not a GUID")
	}
	u, err := uuid.Parse(s)
	if err != nil {
		return "", errors.New("not a GUID")
	}
	return "{" + u.String() + "}", nil
}

// resolve checks that every snapshot has a chain that ends, and marks the raw
// bases.
func (d *Descriptor) resolve() error {
	if _, ok := d.parent[d.top]; !ok {
		return d.fail("Snapshots/TopGUID", d.top, layers.ErrCorrupt, "no snapshot has this GUID")
	}
	length := map[string]int{noParent: 0}
	for k, s := range d.shots {
		field := fmt.Sprintf("Snapshots/Shot[%d]/ParentGUID", k+1)
		var chain []string
		at := s.guid
		for ; ; at = d.parent[at] {
			if _, known := length[at]; known {
				break
			}
			if _, ok := d.parent[at]; !ok {
				return d.fail(field, at, layers.ErrCorrupt, "no snapshot has this GUID")
			}
			length[at] = -1 // on the way: met again, it is a loop
			chain = append(chain, at)
		}
		if length[at] < 0 {
			return d.fail(field, at, layers.ErrCorrupt, "snapshots form a loop")
		}
		for n := len(chain) - 1; n >= 0; n-- {
			length[chain[n]] = length[d.parent[chain[n]]] + 1
			if length[chain[n]] > maxDepth {
				return d.fail(field, s.guid, layers.ErrUnsupported, fmt.Sprintf("chain of more than %d images", maxDepth))
			}
		}
		if ref := d.images[s.guid]; s.parent == noParent && ref.Type == "Plain" {
			ref.Format = FormatRaw
			d.images[s.guid] = ref
		}
	}
	return nil
}

// Size is the length of the virtual disk in bytes.
func (d *Descriptor) Size() int64 { return d.size }

// BlockSize is the cluster size of the images in bytes.
func (d *Descriptor) BlockSize() int64 { return d.block }

// Top is the GUID of the current state, in braces.
func (d *Descriptor) Top() string { return d.top }

// Chain lists the images of a snapshot, top first; "" is the current state. A
// GUID may be given with or without braces, in any case. An unknown one is an
// error for which errors.Is(err, fs.ErrNotExist) holds.
func (d *Descriptor) Chain(snapshot string) ([]ImageRef, error) {
	at := d.top
	if snapshot != "" {
		var err error
		if at, err = parseGUID(snapshot); err != nil {
			return nil, fmt.Errorf("%s: snapshot %q: %w: %w", d.path, snapshot, err, fs.ErrNotExist)
		}
	}
	if _, ok := d.parent[at]; !ok {
		return nil, fmt.Errorf("%s: snapshot %s: %w", d.path, at, fs.ErrNotExist)
	}
	var chain []ImageRef
	for ; at != noParent; at = d.parent[at] {
		chain = append(chain, d.images[at])
	}
	return chain, nil
}

// Images lists all images of the bundle, in the order of their snapshots.
func (d *Descriptor) Images() []ImageRef {
	out := make([]ImageRef, 0, len(d.shots))
	for _, s := range d.shots {
		out = append(out, d.images[s.guid])
	}
	return out
}

// Snapshots lists all states of the bundle, in the order of the document. The
// current one is among them.
func (d *Descriptor) Snapshots() []layers.Snapshot {
	out := make([]layers.Snapshot, 0, len(d.shots))
	for _, s := range d.shots {
		snap := layers.Snapshot{ID: s.guid, Current: s.guid == d.top}
		if s.parent != noParent {
			snap.Parent = s.parent
		}
		if s.temporary {
			snap.Name = "temporary"
		}
		out = append(out, snap)
	}
	return out
}

// CheckImage compares an opened image of the bundle with the descriptor: the
// cluster size of a ploop image has to be Blocksize, the current top has to be
// as long as the disk and no image may be longer (a lower one may be shorter).
func (d *Descriptor) CheckImage(ref ImageRef, size, cluster int64) error {
	if ref.Format == FormatPloop && cluster != d.block {
		return d.fail("StorageData/Storage/Blocksize", d.block/sectorSize, layers.ErrCorrupt,
			fmt.Sprintf("image %s has clusters of %d sectors", ref.File, cluster/sectorSize))
	}
	if ref.GUID == d.top && size != d.size || ref.Format == FormatPloop && size > d.size {
		return d.fail("Disk_Parameters/Disk_size", d.size/sectorSize, layers.ErrCorrupt,
			fmt.Sprintf("image %s has %d sectors", ref.File, size/sectorSize))
	}
	return nil
}
