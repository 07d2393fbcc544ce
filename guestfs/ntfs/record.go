package ntfs

import (
	"encoding/binary"
	"io"
	"slices"
	"sort"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// File records and attributes (Linux-NTFS: FILE record, attributes).
const (
	attrList       = 0x20
	attrFileName   = 0x30
	attrVolumeName = 0x60
	attrVolumeInfo = 0x70
	attrData       = 0x80
	attrBitmap     = 0xb0
	attrEnd        = 0xffffffff

	flagInUse   = 1
	maxRuns     = 1 << 20 // of a system file, 24 bytes each
	fixupSector = 512
)

// fixup checks that a structure of several sectors was written as a whole and
// puts back what its sectors end with: every sector ends with the same number,
// which stands in an array with what it replaced.
func fixup(b []byte, what string, at int64) error {
	le := binary.LittleEndian
	off, n := int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	if n != len(b)/fixupSector+1 || off < 8 || off%2 != 0 || off+2*n > fixupSector-2 {
		return damaged("%s %d: update sequence of %d at %d", what, at, n, off)
	}
	for i := 1; i < n; i++ {
		end := b[i*fixupSector-2:][:2]
		if [2]byte(end) != [2]byte(b[off:]) {
			return damaged("%s %d was written in part", what, at)
		}
		copy(end, b[off+2*i:][:2])
	}
	return nil
}

// record is a file record.
type record struct {
	number int64
	base   int64 // the record that this one continues, 0 for none
	inUse  bool
	attrs  []attr
}

// attr is an attribute: its value, or where its clusters are.
type attr struct {
	kind     uint32
	named    bool
	value    []byte // resident
	resident bool
	runs     []run
	lowest   int64 // the first of its clusters that runs are about
	size     int64 // bytes, of the whole attribute
	ready    int64 // of these, how many were ever written
	flags    uint16
}

// run is a piece of a file: n clusters from cluster lcn, from cluster vcn of
// the file. An lcn of -1 is a hole.
type run struct {
	vcn, n, lcn int64
}

// reference is the number of the record that a reference names; the rest of
// it counts how often the record was used.
func reference(b []byte) int64 { return int64(binary.LittleEndian.Uint64(b) & (1<<48 - 1)) }

// decodeRecord decodes a file record. One that is not in use has no attrs.
func (v *volume) decodeRecord(b []byte, number int64) (*record, error) {
	if string(b[:4]) != "FILE" {
		return nil, damaged("file record %d: magic %q", number, b[:4])
	}
	if err := fixup(b, "file record", number); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	at, used, room := int64(le.Uint16(b[20:])), int64(le.Uint32(b[24:])), int64(le.Uint32(b[28:]))
	rec := &record{number: number, base: reference(b[32:]), inUse: le.Uint16(b[22:])&flagInUse != 0}
	if !rec.inUse {
		return rec, nil
	}
	if room != v.record || used > room || at < 42 || at%8 != 0 {
		return nil, damaged("file record %d: attributes at %d, %d of %d bytes in use", number, at, used, room)
	}
	for {
		if at+4 > used {
			return nil, damaged("file record %d: its attributes do not end", number)
		}
		if le.Uint32(b[at:]) == attrEnd {
			return rec, nil
		}
		if at+24 > used {
			return nil, damaged("file record %d: attribute at %d", number, at)
		}
		n := int64(le.Uint32(b[at+4:]))
		if n < 24 || n%8 != 0 || n > used-at {
			return nil, damaged("file record %d: attribute of %d bytes at %d", number, n, at)
		}
		a, err := v.decodeAttr(b[at:at+n], number)
		if err != nil {
			return nil, err
		}
		rec.attrs = append(rec.attrs, a)
		at += n
	}
}

func (v *volume) decodeAttr(b []byte, number int64) (attr, error) {
	le := binary.LittleEndian
	a := attr{kind: le.Uint32(b), named: b[9] != 0, resident: b[8] == 0, flags: le.Uint16(b[12:])}
	if b[8] > 1 {
		return a, damaged("file record %d: attribute %#x of form %d", number, a.kind, b[8])
	}
	if a.resident {
		n, off := int64(le.Uint32(b[16:])), int64(le.Uint16(b[20:]))
		if off > int64(len(b)) || n > int64(len(b))-off {
			return a, damaged("file record %d: value %d+%d of attribute %#x", number, off, n, a.kind)
		}
		a.value = b[off : off+n]
		return a, nil
	}
	if len(b) < 64 {
		return a, damaged("file record %d: attribute %#x of %d bytes", number, a.kind, len(b))
	}
	lowest, highest := int64(le.Uint64(b[16:])), int64(le.Uint64(b[24:]))
	off := int(le.Uint16(b[32:]))
	a.lowest, a.size, a.ready = lowest, int64(le.Uint64(b[48:])), int64(le.Uint64(b[56:]))
	// An empty attribute ends in front of its first cluster.
	const most = 1 << 52
	if lowest < 0 || lowest > most || highest < lowest-1 || highest > most || off < 64 || off > len(b) ||
		lowest == 0 && (a.size < 0 || a.ready < 0 || a.ready > a.size) {
		return a, damaged("file record %d: attribute %#x with clusters %d to %d", number, a.kind, lowest, highest)
	}
	var err error
	a.runs, err = v.decodeRuns(b[off:], lowest, highest+1, number)
	return a, err
}

// decodeRuns decodes the mapping pairs of an attribute: a byte with the sizes
// of two numbers, which are a length and a distance from the run before.
func (v *volume) decodeRuns(b []byte, vcn, end, number int64) ([]run, error) {
	var runs []run
	lcn := int64(0)
	for vcn < end {
		if len(b) == 0 || b[0] == 0 {
			break
		}
		nl, no := int(b[0]&15), int(b[0]>>4)
		if nl == 0 || nl > 8 || no > 8 || 1+nl+no > len(b) {
			return nil, damaged("file record %d: a run with header %#x", number, b[0])
		}
		n, d := signed(b[1:1+nl]), signed(b[1+nl:1+nl+no])
		b = b[1+nl+no:]
		if n <= 0 || n > end-vcn {
			return nil, damaged("file record %d: a run of %d clusters, there are %d", number, n, end-vcn)
		}
		r := run{vcn, n, -1}
		if no > 0 {
			// Both are below 2^63 in size: the sum may wrap, and is then refused
			// or a cluster of the filesystem.
			lcn += d
			if lcn < 0 || uint64(lcn) >= v.clusters || uint64(n) > v.clusters-uint64(lcn) {
				return nil, damaged("file record %d: a run in clusters %d+%d of %d", number, lcn, n, v.clusters)
			}
			r.lcn = lcn
		}
		runs = append(runs, r)
		vcn += n
	}
	if vcn != end {
		return nil, damaged("file record %d: its runs end at cluster %d of %d", number, vcn, end)
	}
	return runs, nil
}

// signed is a little-endian number of up to eight bytes.
func signed(b []byte) int64 {
	var x uint64
	for i, c := range b {
		x |= uint64(c) << (8 * i)
	}
	if k := 64 - 8*len(b); k < 64 {
		return int64(x<<k) >> k
	}
	return 0
}

// find is the only attribute of a kind without a name, nil when there is none.
func (r *record) find(kind uint32) (*attr, error) {
	var found *attr
	for i := range r.attrs {
		a := &r.attrs[i]
		if a.kind == attrList {
			return nil, freespace.Refuse(freespace.Unsupported, "ntfs: file record %d has an attribute list", r.number)
		}
		if a.kind != kind || a.named {
			continue
		}
		if found != nil {
			return nil, damaged("file record %d has two attributes %#x", r.number, kind)
		}
		found = a
	}
	return found, nil
}

// file is the content of an attribute with clusters of its own.
type file struct {
	v                 *volume
	runs              []run
	size, initialized int64 // bytes
}

// open opens an attribute of a system file: neither resident nor sparse nor
// compressed.
func (v *volume) open(r *record, kind uint32) (*file, error) {
	f := &file{v: v}
	end := int64(0)
	err := v.pieces(r, kind, func(a *attr) error {
		if a.resident || a.lowest != end || a.flags != 0 || len(a.runs) == 0 {
			return damaged("file record %d: attribute %#x is resident, sparse or not in order", r.number, kind)
		}
		for _, p := range a.runs {
			if p.lcn < 0 {
				return damaged("file record %d has a hole", r.number)
			}
		}
		if len(f.runs) > maxRuns {
			return freespace.Refuse(freespace.TooLarge, "ntfs: file record %d: more than %d runs", r.number, maxRuns)
		}
		if f.runs = append(f.runs, a.runs...); a.lowest == 0 {
			f.size, f.initialized = a.size, a.ready
		}
		last := f.runs[len(f.runs)-1]
		if end = last.vcn + last.n; uint64(end) > v.clusters {
			return damaged("file record %d: %d of %d clusters", r.number, end, v.clusters)
		}
		if kind == attrData && r.number == recordMFT {
			// Where the next records are is in those that are known.
			known := *f
			known.size = min(f.size, end*v.cluster)
			v.mft = &known
		}
		return nil
	})
	if err == nil && f.size > end*v.cluster {
		err = damaged("file record %d: %d bytes in %d clusters", r.number, f.size, end)
	}
	return f, err
}

// pieces calls f for the parts of an attribute without a name in order. It is
// in one part, unless the record has an attribute list, which tells in which
// records the parts are.
func (v *volume) pieces(r *record, kind uint32, f func(*attr) error) error {
	at := slices.IndexFunc(r.attrs, func(a attr) bool { return a.kind == attrList })
	if at < 0 || !r.inUse {
		a, err := r.find(kind)
		if err == nil && a == nil {
			err = damaged("file record %d has no attribute %#x", r.number, kind)
		}
		if err != nil {
			return err
		}
		return f(a)
	}
	list, err := v.readList(r, &r.attrs[at])
	if err != nil {
		return err
	}
	found := false
	le := binary.LittleEndian
	for len(list) > 0 {
		if len(list) < 24 || int(le.Uint16(list[4:])) < 24 || int(le.Uint16(list[4:])) > len(list) {
			return damaged("file record %d: an attribute list that does not end", r.number)
		}
		e := list
		list = list[le.Uint16(list[4:]):]
		if le.Uint32(e) != kind || e[6] != 0 {
			continue
		}
		from := r
		if n := reference(e[16:]); n != r.number {
			if from, err = v.system(n); err != nil {
				return err
			}
			if !from.inUse || from.base != r.number {
				return damaged("file record %d does not continue record %d", n, r.number)
			}
		}
		lowest := int64(le.Uint64(e[8:]))
		i := slices.IndexFunc(from.attrs, func(a attr) bool { return a.kind == kind && !a.named && a.lowest == lowest })
		if i < 0 {
			return damaged("file record %d has no attribute %#x from cluster %d", from.number, kind, lowest)
		}
		found = true
		if err := f(&from.attrs[i]); err != nil {
			return err
		}
	}
	if !found {
		return damaged("file record %d has no attribute %#x", r.number, kind)
	}
	return nil
}

// readList reads an attribute list, which may have clusters of its own.
func (v *volume) readList(r *record, a *attr) ([]byte, error) {
	if a.resident {
		return a.value, nil
	}
	const most = 256 << 10
	f := &file{v, a.runs, a.size, a.ready}
	if a.lowest != 0 || a.size > most || slices.ContainsFunc(a.runs, func(p run) bool { return p.lcn < 0 }) {
		return nil, damaged("file record %d: attribute list of %d bytes", r.number, a.size)
	}
	if n := len(a.runs); n == 0 || a.size > (a.runs[n-1].vcn+a.runs[n-1].n)*v.cluster {
		return nil, damaged("file record %d: attribute list of %d bytes", r.number, a.size)
	}
	b := make([]byte, a.size)
	return b, freespace.ReadAt(f, b, 0)
}

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if at < 0 || at >= f.size {
			return done, io.EOF
		}
		vcn := at / f.v.cluster
		i := sort.Search(len(f.runs), func(i int) bool { return f.runs[i].vcn > vcn }) - 1
		r := f.runs[i]
		in := at - r.vcn*f.v.cluster
		q := p[done:]
		q = q[:min(int64(len(q)), r.n*f.v.cluster-in, f.size-at)]
		n, err := f.v.r.ReadAt(q, r.lcn*f.v.cluster+in)
		if done += n; n < len(q) {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return done, err
		}
	}
	return done, nil
}
