package fsck

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/imagestack/imagestack/backend"
)

// A qcow2 image names its parent in its first cluster (QEMU docs/interop/
// qcow2.txt, Header and Header extensions): the name at backing_file_offset,
// the format as an extension. Here the two are read tolerantly and changed, and
// nothing else, so that whatever else is in the header stays.
const (
	linkMagic      = 0x514649fb
	linkExtFormat  = 0xe2792aca
	linkMaxName    = 1023
	linkMaxCluster = 2 << 20

	linkOffName = 8 // u64 offset, u32 length
	linkOffBits = 20
	linkOffLen  = 100
)

var errLink = errors.New("the header of the image is damaged")

// link is what a qcow2 image says about its parent.
type link struct {
	head    []byte // the first cluster, as far as the file reaches
	cluster int
	start   int // of the extensions
	exts    []linkExt
	extEnd  int  // behind the mark of their end, or where they end without one
	marked  bool // there is such a mark
	nameOff int
	name    string // "" for none
	format  string // "" when it is not stated
}

type linkExt struct {
	typ  uint32
	data []byte
}

// readLink reads the first cluster of a qcow2 image.
func readLink(r io.ReaderAt) (*link, error) {
	be := binary.BigEndian
	b := make([]byte, 512)
	n, err := r.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	b = b[:n]
	if len(b) < 104 || be.Uint32(b) != linkMagic {
		return nil, errLink
	}
	l := &link{start: 72}
	if v := be.Uint32(b[4:]); v >= 3 {
		l.start = int(min(be.Uint32(b[linkOffLen:]), linkMaxCluster))
	}
	bits := be.Uint32(b[linkOffBits:])
	if bits < 9 || bits > 21 {
		return nil, errLink
	}
	l.cluster = 1 << bits
	l.head = make([]byte, l.cluster)
	if n, err = r.ReadAt(l.head, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if l.head = l.head[:n]; n < len(b) {
		return nil, errLink // it has become shorter meanwhile
	}
	off, size := be.Uint64(l.head[linkOffName:]), be.Uint32(l.head[linkOffName+8:])
	end := len(l.head)
	if off != 0 {
		if size > linkMaxName || off < uint64(l.start) || off > uint64(end) || uint64(size) > uint64(end)-off {
			return nil, errLink
		}
		l.nameOff, l.name = int(off), string(l.head[off:off+uint64(size)])
		end = l.nameOff
	}
	return l, l.readExts(end)
}

// readExts reads the extensions in front of end.
func (l *link) readExts(end int) error {
	be := binary.BigEndian
	if l.start < 72 || l.start%8 != 0 || l.start > end {
		return errLink
	}
	at := l.start
	for end-at >= 8 {
		typ, n := be.Uint32(l.head[at:]), be.Uint32(l.head[at+4:])
		at += 8
		if typ == 0 {
			l.marked = true
			break
		}
		if uint64(n) > uint64(end-at) {
			return errLink
		}
		e := linkExt{typ, l.head[at : at+int(n)]}
		l.exts = append(l.exts, e)
		if typ == linkExtFormat {
			l.format = string(e.data)
		}
		at = min(at+(int(n)+7)&^7, end)
	}
	l.extEnd = at
	return nil
}

// marshal appends the extension to b, whose length is a multiple of 8.
func (e linkExt) marshal(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, e.typ)
	b = binary.BigEndian.AppendUint32(b, uint32(len(e.data)))
	b = append(b, e.data...)
	return append(b, make([]byte, -len(b)&7)...)
}

// states reports whether there is an extension for the format.
func (l *link) states() bool {
	return slices.ContainsFunc(l.exts, func(e linkExt) bool { return e.typ == linkExtFormat })
}

// extensions is the area as it is with another format, "" for none.
func (l *link) extensions(format string) []byte {
	var b []byte
	add := func(e linkExt) { b = e.marshal(b) }
	stated := linkExt{linkExtFormat, []byte(format)}
	done := format == ""
	if !l.states() && !done {
		add(stated)
		done = true
	}
	for _, e := range l.exts {
		switch {
		case e.typ != linkExtFormat:
			add(e)
		case !done:
			add(stated)
			done = true
		}
	}
	return append(b, make([]byte, 8)...)
}

// change is a change of a link that is wanted.
type change struct {
	path         string
	old          []byte // the header that it was decided upon
	name, format string // name "" takes the parent away
}

// plan enters the new name and format. The name comes to a place where nothing
// is, before the fields show it, which are in one sector: a power cut leaves
// the old name or the new one. So it is with a format that takes the place of
// one of the same length (in units of 8), as raw and qcow2 do, and with one
// where none was, see insert. One that is longer than what it replaces shifts
// the extensions behind it: what a power cut leaves of that may have to be
// taken back with the undo file.
func (c *change) plan(l *link, p *Plan) error {
	if done, err := c.insert(l, p); done || err != nil {
		return err
	}
	exts := l.extensions(c.format)
	if c.name == "" && l.marked {
		exts = l.head[l.start:l.extEnd] // a format without a name says nothing
	}
	old := l.head[l.start:min(l.extEnd, len(l.head))]
	at := l.start + len(exts)
	same := bytes.Equal(exts, old)
	if same && at < l.nameOff+len(l.name) && l.nameOff < at+len(c.name) {
		at = l.nameOff + len(l.name) // behind the name that still counts
	}
	if at+len(c.name) > l.cluster || len(c.name) > linkMaxName {
		return fmt.Errorf("%w: the name of the parent does not fit into the first cluster", ErrNoRoom)
	}
	ref := make([]byte, 12)
	if c.name != "" {
		binary.BigEndian.PutUint64(ref, uint64(at))
		binary.BigEndian.PutUint32(ref[8:], uint32(len(c.name)))
		ph := PhaseNew
		if !same {
			ph = PhaseHeader
		}
		if err := p.Write(ph, int64(at), []byte(c.name)); err != nil {
			return err
		}
	}
	if !same {
		if err := p.Write(PhaseHeader, int64(l.start), exts); err != nil {
			return err
		}
	}
	return p.Write(PhaseHeader, linkOffName, ref)
}

// insert enters a format where none is stated, as the last extension, in steps
// of which each leaves a sound header: the name moves out of the way, the
// content of the extension and a new mark of the end come behind the old mark,
// where nobody reads, and then the old mark, 8 bytes of one sector, becomes the
// head of the extension. It reports false when that cannot be done so.
func (c *change) insert(l *link, p *Plan) (done bool, err error) {
	if c.name == "" || c.format == "" || !l.marked || l.states() || len(c.name) > linkMaxName {
		return false, nil
	}
	mark := l.extEnd - 8
	ext := append(linkExt{linkExtFormat, []byte(c.format)}.marshal(nil), make([]byte, 8)...)
	at := mark + len(ext)
	stays := c.name == l.name && l.nameOff >= at
	if at < l.nameOff+len(l.name) && l.nameOff < at+len(c.name) {
		at = l.nameOff + len(l.name) // behind the name that still counts
	}
	if !stays && at+len(c.name) > l.cluster {
		return false, nil
	}
	if !stays {
		ref := make([]byte, 12)
		binary.BigEndian.PutUint64(ref, uint64(at))
		binary.BigEndian.PutUint32(ref[8:], uint32(len(c.name)))
		if err := p.Write(PhaseNew, int64(at), []byte(c.name)); err != nil {
			return false, err
		}
		if err := p.Write(PhaseCounts, linkOffName, ref); err != nil {
			return false, err
		}
	}
	if err := p.Write(PhaseMap, int64(mark+8), ext[8:]); err != nil {
		return false, err
	}
	return true, p.Write(PhaseHeader, int64(mark), ext[:8])
}

// make makes the change, behind an undo file.
func (c *change) make(ctx context.Context, f backend.File, o ExecuteOptions) (undone bool, err error) {
	l, err := readLink(f)
	if err != nil {
		return true, err
	}
	if !bytes.Equal(l.head, c.old) {
		return true, fmt.Errorf("%w: somebody has changed the image meanwhile", ErrChanged)
	}
	p, err := NewPlan(f, PlanOptions{})
	if err != nil {
		return true, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	if err := c.plan(l, p); err != nil {
		return true, err
	}
	return p.Execute(ctx, o)
}
