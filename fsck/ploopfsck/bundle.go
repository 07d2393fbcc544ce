package ploopfsck

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/ploop"
)

// facts are what the header of a file beside the descriptor tells.
type facts struct {
	length int64
	ploop  bool // it has the signature of an image
	// sound tells that the fields of the header agree with each other; only
	// then the rest is believed.
	sound         bool
	version       int
	cluster, size int64 // bytes
	empty         bool  // it is so short that it can hold no data
}

func (x *facts) known() bool { return x != nil && x.sound }

// look reads the header of a file that the descriptor names, or that lies
// beside it; nil when it cannot be opened. missing: there is no such file.
func (d *descriptor) look(name string) (x *facts, missing bool) {
	if d.o.OpenFile == nil {
		return nil, false
	}
	if x := d.heads[name]; x != nil {
		return x, false
	}
	f, err := d.o.OpenFile(name)
	if err != nil {
		return nil, errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close() // opened for reading
	x = &facts{}
	if x.length, err = f.Size(); err != nil {
		return nil, false
	}
	var h header
	if n, _ := f.ReadAt(h[:], 0); n == headerSize && ploop.Probe(h[:]) {
		x.ploop = true
		x.version = 1
		if string(h[:16]) == sigV2 {
			x.version = 2
		}
		c := check{geometry: geometry{version: x.version}, eof: x.length}
		fit := c.stated(&h)
		if fit.whole() && h.u32(offType) == diskType && fit.sectors > 0 && fit.first*sectorSize <= x.length {
			x.sound, x.cluster, x.size = true, fit.spc*sectorSize, fit.sectors*sectorSize
			x.empty = fit.first*sectorSize == x.length
		}
	}
	if d.heads == nil {
		d.heads = map[string]*facts{}
	}
	d.heads[name] = x
	return x, false
}

// lookAround lists what lies beside the descriptor.
func (d *descriptor) lookAround() {
	if d.o.Siblings == nil || d.o.OpenFile == nil {
		return
	}
	names, err := d.o.Siblings()
	if err != nil {
		return // not to be listed
	}
	d.isSibling = make(map[string]bool, len(names))
	for _, n := range names {
		if n != path.Base(d.f.Name()) {
			d.siblings = append(d.siblings, n)
			d.isSibling[n] = true
		}
	}
}

// sizeOf is the length in bytes of the disk that an image is of, as far as its
// file tells: the header, or the length of a raw base.
func (d *descriptor) sizeOf(i *image) (int64, bool) {
	switch {
	case i == nil || i.facts == nil:
		return 0, false
	case i.facts.sound:
		return i.facts.size, true
	case i.facts.ploop || i.typ != "Plain":
		return 0, false
	}
	s := d.shot(i.guid)
	return i.facts.length, (s == nil || s.parent == noParent) && i.facts.length%sectorSize == 0
}

// agreed is the cluster size in sectors that all images have, 0 when they
// differ, or none is known.
func (d *descriptor) agreed() (spc int64) {
	for _, i := range d.images {
		switch {
		case i.missing || i.facts == nil || !i.facts.ploop && i.typ == "Plain":
		case !i.facts.sound || spc != 0 && spc != i.facts.cluster/sectorSize:
			return 0
		default:
			spc = i.facts.cluster / sectorSize
		}
	}
	return spc
}

// setSize are the edits that make the disk n sectors long, with the geometry
// as ploop keeps it: sectors of a track are what remains of the size.
func (d *descriptor) setSize(n int64) []edit {
	if d.params == nil {
		return nil
	}
	text := strconv.FormatInt(n, 10)
	edits := setText(d.b, d.params, "Disk_size", text)
	if len(edits) == 0 {
		return nil
	}
	cyl, heads, per := d.sectors(d.params, "Cylinders"), d.sectors(d.params, "Heads"), d.sectors(d.params, "Sectors")
	if cyl > 0 && heads > 0 && cyl <= maxSectors/heads && d.size > 0 && per == d.size/(cyl*heads) {
		edits = append(edits, setText(d.b, d.params, "Sectors", strconv.FormatInt(n/(cyl*heads), 10))...)
	}
	return edits
}

func (d *descriptor) setEnd(n int64) []edit {
	return setText(d.b, d.store, "End", strconv.FormatInt(n, 10))
}

// checkNumbers looks at the sizes. They are said three times: Disk_size, End,
// and the header of the top image. What two of the three say is proved.
func (d *descriptor) checkNumbers() {
	const field = "StorageData/Storage"
	d.size, d.end, d.block = d.sectors(d.params, "Disk_size"), d.sectors(d.store, "End"), d.sectors(d.store, "Blocksize")
	top := int64(-1)
	if n, ok := d.sizeOf(d.image(d.topGUID)); ok {
		top = n / sectorSize
	}
	// want is what a bad number has to be, by another number and the image.
	want := func(other int64) (int64, fsck.Level) {
		switch {
		case other >= 0 && other == top:
			return other, fsck.Preen
		case other >= 0 && top < 0:
			return other, fsck.Full
		case other < 0 && top >= 0:
			return top, fsck.Full
		}
		return -1, fsck.Full
	}
	tell := func(n int64) string { return fmt.Sprintf("set it to %d", n) }
	if d.params != nil && d.size < 0 {
		f := d.place(codeDescNumber, "Disk_Parameters/Disk_size", d.params.value("Disk_size"), "not a number of sectors")
		if n, level := want(d.end); n >= 0 {
			d.offer(f, level, tell(n), nil, d.setSize(n))
		} else {
			d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		}
	}
	if d.end < 0 {
		f := d.place(codeDescNumber, field+"/End", d.store.value("End"), "not a number of sectors")
		if n, level := want(d.size); n >= 0 {
			d.offer(f, level, tell(n), nil, d.setEnd(n))
		} else {
			d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		}
	}
	switch start := d.sectors(d.store, "Start"); {
	case start < 0:
		d.offer(d.place(codeDescNumber, field+"/Start", d.store.value("Start"), "not a number of sectors"), fsck.Full, tell(0), nil, setText(d.b, d.store, "Start", "0"))
	case start > 0:
		d.offer(d.place(codeDescSize, field+"/Start", start, "the only storage does not begin at 0"), fsck.Full, tell(0), nil, setText(d.b, d.store, "Start", "0"))
	}
	if d.size >= 0 && d.end >= 0 && d.size != d.end {
		f := d.place(codeDescSize, field+"/End", d.end, fmt.Sprintf("the disk has %d sectors", d.size))
		switch top {
		case d.size:
			d.offer(f, fsck.Preen, tell(top)+", as the top image says", nil, d.setEnd(top))
		case d.end:
			d.offer(f, fsck.Preen, fmt.Sprintf("set Disk_size to %d, as the top image says", top), nil, d.setSize(top))
		default:
			d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		}
	}
	if d.block <= 0 || d.block > maxClusterSectors {
		f := d.place(codeDescNumber, field+"/Blocksize", d.store.value("Blocksize"), "not a cluster size")
		if n := d.agreed(); n > 0 {
			d.offer(f, fsck.Preen, tell(n)+", as all images say", nil, setText(d.b, d.store, "Blocksize", strconv.FormatInt(n, 10)))
		} else {
			d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		}
	} else {
		d.stats.ClusterSize = d.block * sectorSize
	}
	if d.size >= 0 {
		d.stats.VirtualSize = d.size * sectorSize
	}
}

// checkFiles compares the descriptor with the files beside it.
func (d *descriptor) checkFiles() {
	for _, i := range d.images {
		if i.missing {
			f := d.place(codeDescMissing, i.field+"/File", i.file, "there is no such file")
			if !d.besideTop(i.guid) {
				f.Severity = fsck.Fatal
			}
			d.findFile(i, f)
		}
	}
	d.checkSizes()
	versions := map[int]bool{}
	for _, i := range d.images {
		if i.facts.known() {
			versions[i.facts.version] = true
		}
	}
	if len(versions) > 1 {
		d.report(codeBundleVersions, "StorageData/Storage", nil, "some images are of version 1 and some of version 2; ploop convert -v 2 "+d.command())
	}
	for _, s := range d.shots {
		switch {
		case !s.temporary:
		case s.guid == d.topGUID:
			var edits []edit
			for _, m := range temporaryMarks {
				for _, n := range s.n.all(m) {
					edits = append(edits, remove(d.b, n)...)
				}
			}
			d.offer(d.place(codeBundleTopTemporary, s.field, s.guid, "the current state is marked as temporary, which ploop refuses"),
				fsck.Full, "take the mark away", nil, edits)
		default:
			d.report(codeBundleTemporary, s.field, s.guid,
				fmt.Sprintf("a temporary snapshot; if no backup is running: ploop snapshot-delete -u %s %s", s.guid, d.command()))
		}
	}
	missing := false
	for _, i := range d.images {
		missing = missing || i.missing || i.facts == nil
	}
	for _, name := range d.orphans() {
		x := d.heads[name]
		text := fmt.Sprintf("an image of %d bytes that the descriptor does not name; look at it with image-stack info --format ploop", x.length)
		if x.empty && !missing {
			text = "an image that the descriptor does not name; it holds no data, and can be removed"
		}
		f := d.place(codeBundleOrphan, "", nil, text)
		f.Place.File = path.Join(path.Dir(d.f.Name()), name)
		d.sink.Report(f)
	}
}

// command is the descriptor's name in a command that is shown.
func (d *descriptor) command() string { return d.f.Name() }

// besideTop reports whether the current state certainly does not need the image
// of a GUID.
func (d *descriptor) besideTop(guid string) bool {
	s, other := d.shot(d.topGUID), d.shot(guid)
	return s != nil && other != nil && d.tree.whole && !d.tree.belowTop[other]
}

// checkSizes compares sizes of disk and clusters with those of the images.
func (d *descriptor) checkSizes() {
	top := d.image(d.topGUID)
	if n, ok := d.sizeOf(top); ok && d.size >= 0 && d.size == d.end && n != d.size*sectorSize {
		d.topSize(top, n/sectorSize)
	}
	for _, i := range d.images {
		n, ok := d.sizeOf(i)
		if m, known := d.sizeOf(top); known && ok && i != top && i.facts.ploop && d.size >= 0 && n > max(m, d.size*sectorSize) {
			d.report(codeBundleSize, i.field+"/File", i.file, fmt.Sprintf("a disk of %d sectors under one of %d: this image is not of this disk, or not at this place", n/sectorSize, d.size))
		}
	}
	if d.block <= 0 || d.block > maxClusterSectors {
		return
	}
	agreed := d.agreed()
	if agreed == d.block {
		return
	}
	if agreed > 0 {
		f := d.place(codeBundleCluster, "StorageData/Storage/Blocksize", d.block, fmt.Sprintf("all images have clusters of %d sectors", agreed))
		d.offer(f, fsck.Preen, fmt.Sprintf("set it to %d", agreed), nil, setText(d.b, d.store, "Blocksize", strconv.FormatInt(agreed, 10)))
		return
	}
	for _, i := range d.images {
		if i.facts.known() && i.facts.cluster != d.block*sectorSize {
			d.report(codeBundleCluster, i.field+"/File", i.file, fmt.Sprintf("has clusters of %d sectors, the disk of %d", i.facts.cluster/sectorSize, d.block))
		}
	}
}

// topSize handles a descriptor whose two sizes agree with each other and not
// with the top image.
func (d *descriptor) topSize(top *image, n int64) {
	f := d.place(codeBundleSize, "Disk_Parameters/Disk_size", d.size, fmt.Sprintf("the top image %s has %d sectors", top.file, n))
	var loses []blockmap.Range
	if n > d.size {
		f.Text += ", as growing leaves it that was interrupted"
	} else {
		// It reads as zeros as far as no lower image is longer.
		loses = []blockmap.Range{{Off: n * sectorSize, Len: (d.size - n) * sectorSize}}
		f.Guest = loses
	}
	edits := d.setSize(n)
	if end := d.setEnd(n); len(edits) > 0 && len(end) > 0 {
		edits = append(edits, end...)
	} else {
		edits = nil
	}
	d.offer(f, fsck.Full, fmt.Sprintf("set it and End to %d, the size in the sound header of the top image", n), loses, edits)
}

// orphans are images beside the descriptor that it does not name.
func (d *descriptor) orphans() (out []string) {
	if d.orphaned != nil {
		return *d.orphaned
	}
	defer func() { d.orphaned = &out }()
	named := d.tree.files
	for _, name := range d.siblings {
		if base, ok := strings.CutSuffix(name, ".idx"); named[name] > 0 || ok && (named[base] > 0 || d.isSibling[base]) {
			continue // the BAT that a conversion has saved
		}
		if x, _ := d.look(name); x != nil && x.ploop {
			out = append(out, name)
		}
	}
	return out
}

// fits reports whether a file can be the image of a GUID.
func (d *descriptor) fits(name, guid string) bool {
	x, _ := d.look(name)
	if x == nil || !x.sound || d.block > 0 && x.cluster != d.block*sectorSize {
		return false
	}
	return d.size < 0 || x.size == d.size*sectorSize || guid != d.topGUID && x.size < d.size*sectorSize
}

// onlyOrphan is the only image that nothing names, if it fits the GUID.
func (d *descriptor) onlyOrphan(guid string) string {
	if all := d.orphans(); len(all) == 1 && d.fits(all[0], guid) {
		return all[0]
	}
	return ""
}

// findFile offers another file for an image whose file is not there: the one
// of that name in the directory of the descriptor, where the bundle was moved,
// or the only image there that nothing names. A snapshot on which nothing
// stands can be given up.
func (d *descriptor) findFile(i *image, f fsck.Finding) {
	base := path.Base(i.file)
	switch orphan := d.onlyOrphan(i.guid); {
	case i.file != "" && base != i.file && d.isSibling[base] && d.tree.files[base] == 1 && (i.typ == "Plain" || d.fits(base, i.guid)):
		d.offer(f, fsck.Full, "name "+base+" instead, the file of this name beside the descriptor", nil, setText(d.b, i.n, "File", base))
	case d.tree.missing == 1 && orphan != "" && (i.typ == "Compressed" || d.shot(i.guid) != nil && d.shot(i.guid).parent != noParent):
		d.offer(f, fsck.Full, "name "+orphan+" instead, the only image in the directory that nothing names; likely and not proved", nil, setText(d.b, i.n, "File", orphan))
	case i.missing && i.guid != d.topGUID && d.shot(i.guid) != nil && d.tree.isLeaf(d.shot(i.guid)):
		d.offer(f, fsck.Full, "take the snapshot "+i.guid+" out of the descriptor; nothing stands on it, and its content is gone unless the file is brought back", nil,
			append(remove(d.b, i.n), remove(d.b, d.shot(i.guid).n)...))
	default:
		d.sink.Report(f)
	}
}

// onlyImage is the only image in the directory, if there is nothing else that
// could belong to the disk.
func (d *descriptor) onlyImage() (name string, x *facts) {
	for _, s := range d.siblings {
		f, _ := d.look(s)
		switch {
		case f == nil:
			return "", nil
		case strings.HasSuffix(s, ".idx") || strings.Contains(s, ".undo"):
		case f.ploop && f.sound && x == nil:
			name, x = s, f
		case f.ploop || f.length >= 1<<20: // a raw base, perhaps
			return "", nil
		}
	}
	return name, x
}
