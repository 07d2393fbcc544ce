// Package lvm reads what LVM2 keeps on a physical volume: which of its extents
// no logical volume has, and where the linear logical volumes lie.
//
// Design note. A label in the first sectors names areas with metadata; each
// holds a ring of texts, of which its header names the present one. Everything
// up to the text has a checksum. All copies must be the same text.
//
// The text speaks of a whole volume group. It is only believed for a group of
// this one physical volume: of several, another may have a newer text.
// Extents are counted as used by any segment of any logical volume, hidden
// ones included. Segments that lie on physical volumes are of one type
// ("striped", of which linear is a case); a type that names a physical volume
// in any other way makes the whole group one of which nothing is known.
//
// A logical volume is handed over as a disk of its own when it is linear,
// visible and no other volume is made of it. Of snapshots, pools, mirrors and
// all others nothing is: what their upper side does not use is not what their
// lower side could lose.
//
// Sources: the format of labels and metadata as libblkid and the text format
// of LVM2 (vgcfgbackup(8), lvm.conf(5)) show them.
package lvm

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sort"
	"strings"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
)

const (
	sector     = 512
	labels     = 4 // sectors in which the label may be
	labelMagic = "LABELONE"
	labelType  = "LVM2 001"
	areaMagic  = " LVM2 x[5A%r0N*>"
	areaHead   = 512
	maxText    = 4 << 20
	maxAreas   = 8
	ignored    = 1 // flag of a text: the area is not in use
)

// PV is a physical volume and what is on it.
type PV struct {
	UUID, VG   string
	ExtentSize int64 // bytes
	// Free are the extents that no logical volume has, in bytes of the
	// physical volume, ascending.
	Free []blockmap.Range
	LVs  []LV // by name
}

// LV is a logical volume.
type LV struct {
	Name string
	Size int64 // bytes
	// Pieces are where a linear volume lies, in order.
	Pieces []Piece
	// Refusal is why it cannot be judged; then there are no Pieces.
	Refusal *freespace.Refusal
}

// Piece says that Len bytes from Off of a logical volume lie at At of the
// physical one.
type Piece struct{ Off, At, Len int64 }

// Detect reports whether head has the label of a physical volume.
func Detect(head []byte) bool {
	for at := 0; at < labels*sector; at += sector {
		if len(head) >= at+32 && string(head[at:at+8]) == labelMagic && string(head[at+24:at+32]) == labelType {
			return true
		}
	}
	return false
}

func damaged(format string, args ...any) error {
	return freespace.Refuse(freespace.Damaged, "lvm: %s", fmt.Sprintf(format, args...))
}

func refuse(format string, args ...any) error {
	return freespace.Refuse(freespace.Unsupported, "lvm: %s", fmt.Sprintf(format, args...))
}

// sum is the CRC-32 of LVM2, which is not inverted and begins with a number of
// its own.
func sum(p ...[]byte) uint32 {
	crc := ^uint32(0xf597a6cf)
	for _, b := range p {
		crc = crc32.Update(crc, crc32.IEEETable, b)
	}
	return ^crc
}

// area is a range of the physical volume.
type area struct{ off, n int64 }

// header is what the label says.
type header struct {
	uuid  string
	size  int64
	data  area
	texts []area
}

// Read reads the physical volume in [0, size) of r. An error is a
// *freespace.Refusal, or that of r or ctx.
func Read(ctx context.Context, r io.ReaderAt, size int64) (*PV, error) {
	h, err := readLabel(r, size)
	if err != nil {
		return nil, err
	}
	var text []byte
	for _, a := range h.texts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		t, err := readText(r, a)
		switch {
		case err != nil:
			return nil, err
		case t == nil:
		case text == nil:
			text = t
		case string(text) != string(t):
			return nil, damaged("two copies of the metadata differ")
		}
	}
	if text == nil {
		return nil, refuse("no metadata of a volume group on this physical volume")
	}
	root, err := parse(text)
	if err != nil {
		return nil, err
	}
	return decode(h, root)
}

func readLabel(r io.ReaderAt, size int64) (*header, error) {
	head := make([]byte, min(size, labels*sector))
	if err := freespace.ReadAt(r, head, 0); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	var b []byte
	for i := 0; (i+1)*sector <= len(head); i++ {
		s := head[i*sector:][:sector]
		if string(s[:8]) != labelMagic {
			continue
		}
		if b != nil || le.Uint64(s[8:]) != uint64(i) || string(s[24:32]) != labelType {
			return nil, damaged("label in sector %d: it says %d, or there are two", i, le.Uint64(s[8:]))
		}
		b = s
	}
	if b == nil {
		return nil, damaged("no label")
	}
	if got, want := sum(b[20:]), le.Uint32(b[16:]); got != want {
		return nil, freespace.Refuse(freespace.BadChecksum, "lvm: label: checksum %#x, computed %#x", want, got)
	}
	at := int64(le.Uint32(b[20:]))
	if at < 32 || at > sector-40 {
		return nil, damaged("label: header at %d", at)
	}
	b = b[at:]
	h := &header{uuid: string(b[:32]), size: int64(le.Uint64(b[32:]))}
	if !plainName(h.uuid) {
		return nil, damaged("label: UUID %q", h.uuid)
	}
	if h.size <= 0 || h.size > size {
		return nil, freespace.Refuse(freespace.Truncated, "lvm: a physical volume of %d bytes does not fit into %d bytes", h.size, size)
	}
	data, rest, err := readAreas(b[40:], h.size)
	if err != nil {
		return nil, err
	}
	if len(data) != 1 {
		return nil, refuse("%d data areas", len(data))
	}
	h.data = data[0]
	h.texts, _, err = readAreas(rest, h.size)
	return h, err
}

// readAreas decodes a list of areas, which ends with an empty one. A length of
// 0 is up to the end.
func readAreas(b []byte, size int64) (areas []area, rest []byte, err error) {
	le := binary.LittleEndian
	for len(b) >= 16 {
		off, n := int64(le.Uint64(b)), int64(le.Uint64(b[8:]))
		b = b[16:]
		if off == 0 {
			return areas, b, nil
		}
		if off < 0 || off > size || n < 0 || n > size-off || len(areas) == maxAreas {
			break
		}
		if n == 0 {
			n = size - off
		}
		areas = append(areas, area{off, n})
	}
	return nil, nil, damaged("label: its areas")
}

// readText reads the text that an area holds; nil when there is none.
func readText(r io.ReaderAt, a area) ([]byte, error) {
	if a.n < 2*areaHead {
		return nil, damaged("metadata area of %d bytes", a.n)
	}
	b := make([]byte, areaHead)
	if err := freespace.ReadAt(r, b, a.off); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if got, want := sum(b[4:]), le.Uint32(b); got != want {
		return nil, freespace.Refuse(freespace.BadChecksum, "lvm: metadata area at %d: checksum %#x, computed %#x", a.off, want, got)
	}
	if string(b[4:20]) != areaMagic || le.Uint32(b[20:]) != 1 || int64(le.Uint64(b[24:])) != a.off || int64(le.Uint64(b[32:])) != a.n {
		return nil, damaged("metadata area at %d of %d bytes: its header says otherwise", a.off, a.n)
	}
	off, n, want, flags := int64(le.Uint64(b[40:])), int64(le.Uint64(b[48:])), le.Uint32(b[56:]), le.Uint32(b[60:])
	if flags&ignored != 0 || off == 0 && n == 0 {
		return nil, nil
	}
	if flags != 0 || le.Uint64(b[64:]) != 0 {
		return nil, freespace.Refuse(freespace.NotClean, "lvm: a change of the metadata was interrupted (flags %#x)", flags)
	}
	if off < areaHead || off >= a.n || n <= 0 || n > a.n-areaHead {
		return nil, damaged("metadata area at %d: text of %d bytes at %d", a.off, n, off)
	}
	if n > maxText {
		return nil, freespace.Refuse(freespace.TooLarge, "lvm: metadata of %d bytes", n)
	}
	text := make([]byte, n)
	first := min(n, a.n-off)
	if err := freespace.ReadAt(r, text[:first], a.off+off); err != nil {
		return nil, err
	}
	if err := freespace.ReadAt(r, text[first:], a.off+areaHead); err != nil {
		return nil, err
	}
	if got := sum(text); got != want {
		return nil, freespace.Refuse(freespace.BadChecksum, "lvm: metadata text: checksum %#x, computed %#x", want, got)
	}
	return text, nil
}

// ReaderAt reads a linear logical volume from its physical one.
func (l *LV) ReaderAt(pv io.ReaderAt) io.ReaderAt { return reader{l, pv} }

type reader struct {
	lv *LV
	pv io.ReaderAt
}

func (r reader) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	var err error
	r.lv.Place(off, min(int64(len(p)), r.lv.Size-off), func(at, n int64) {
		if err != nil {
			return
		}
		var k int
		k, err = r.pv.ReadAt(p[done:][:n], at)
		if done += k; int64(k) == n {
			err = nil
		} else if err == nil {
			err = io.ErrUnexpectedEOF
		}
	})
	if err == nil && done < len(p) {
		err = io.EOF
	}
	return done, err
}

// Place calls f for the pieces of the physical volume that hold [off, off+n)
// of a linear logical one, in the order of the latter.
func (l *LV) Place(off, n int64, f func(at, n int64)) {
	if off < 0 {
		return
	}
	i := sort.Search(len(l.Pieces), func(i int) bool { return l.Pieces[i].Off+l.Pieces[i].Len > off })
	for ; n > 0 && i < len(l.Pieces); i++ {
		p := l.Pieces[i]
		k := min(n, p.Off+p.Len-off)
		f(p.At+off-p.Off, k)
		off, n = off+k, n-k
	}
}

// claims are the extents that segments use.
type claims []claim

type claim struct {
	start, n int64 // extents
	by       string
}

// check orders the claims and refuses two that overlap.
func (c claims) check() error {
	slices.SortFunc(c, func(a, b claim) int { return cmp.Compare(a.start, b.start) })
	for i := 1; i < len(c); i++ {
		if a, b := c[i-1], c[i]; b.start < a.start+a.n {
			return damaged("logical volumes %s and %s share extent %d", a.by, b.by, b.start)
		}
	}
	return nil
}

// plainName reports whether a name is one that LVM2 permits: it ends up in
// reports.
func plainName(s string) bool {
	return s != "" && len(s) < 128 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+_.-") == ""
}
