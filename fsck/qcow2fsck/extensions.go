package qcow2fsck

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// Header extension types (section Header extensions).
const (
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extCrypto        = 0x0537be77
	extDataFile      = 0x44415441
)

func knownExtension(typ uint32) bool {
	switch typ {
	case extBackingFormat, extFeatureNames, extBitmaps, extCrypto, extDataFile:
		return true
	}
	return false
}

// extension is a header extension; off is that of its type.
type extension struct {
	typ  uint32
	off  int64
	data []byte
	size int64 // of type, length, data and padding
}

func (h *header) extension(typ uint32) *extension {
	for i := range h.exts {
		if h.exts[i].typ == typ {
			return &h.exts[i]
		}
	}
	return nil
}

// featureName is what the image calls a feature; table reports whether it has
// a table of names at all.
func (h *header) featureName(bitmap, bit uint8) (name string, table bool) {
	e := h.extension(extFeatureNames)
	if e == nil {
		return "", false
	}
	const entry = 48
	for t := e.data; len(t) >= entry; t = t[entry:] {
		if t[0] == bitmap && t[1] == bit {
			n, _, _ := bytes.Cut(t[2:entry], []byte{0})
			return string(n), true
		}
	}
	return "", true
}

// extensions reads the extension area of b, the first cluster.
func (c *check) extensions(b []byte) {
	h := &c.h
	end := int64(len(b))
	if h.backingOff != 0 && h.backingOff >= uint64(h.length) && h.backingOff < uint64(len(b)) {
		end = int64(h.backingOff)
	}
	twice := false
	off := int64(h.length)
	for end-off >= 8 {
		typ, n := be32(b[off:]), int64(be32(b[off+4:]))
		if typ == 0 {
			break
		}
		if n > end-off-8 {
			text := fmt.Sprintf("extension %#x reaches behind the header", typ)
			if c.found(codeExtLength, off+4, "header extension length", uint32(n), text, full("drop it and what follows")) {
				c.writeExtensions(off, end)
			}
			break
		}
		e := extension{typ: typ, off: off, data: bytes.Clone(b[off+8 : off+8+n]), size: min(8+(n+7)&^7, end-off)}
		if knownExtension(typ) && h.extension(typ) != nil {
			if c.found(codeExtTwice, off, "header extension type", typ, "the extension appears twice", full("keep the first")) {
				twice = true
			}
		} else {
			h.exts = append(h.exts, e)
		}
		off += e.size
	}
	h.extEnd = min(off+8, end)
	if twice {
		c.writeExtensions(off, end)
	}
}

// writeExtensions writes the extensions that h has, where the area ends at
// used until now, and may reach to end.
func (c *check) writeExtensions(used, end int64) {
	h := &c.h
	out := make([]byte, 0, 512)
	for i := range h.exts {
		e := &h.exts[i]
		e.off = int64(h.length) + int64(len(out))
		out = binary.BigEndian.AppendUint32(out, e.typ)
		out = binary.BigEndian.AppendUint32(out, uint32(len(e.data)))
		out = append(out, e.data...)
		out = append(out, make([]byte, -len(out)&7)...)
	}
	n := min(max(used+8, int64(h.length)+int64(len(out))+8), end) - int64(h.length)
	if int64(len(out)) > n {
		out = out[:n]
	}
	out = append(out, make([]byte, n-int64(len(out)))...)
	h.extEnd = min(int64(h.length)+int64(len(out)), end)
	c.planned(c.plan.Write(fsck.PhaseHeader, int64(h.length), out))
}

// dropExtension removes an extension from the image.
func (c *check) dropExtension(typ uint32) {
	h := &c.h
	used := h.extEnd
	end := c.cs
	if h.backingOff != 0 {
		end = int64(min(h.backingOff, uint64(c.cs)))
	}
	kept := h.exts[:0]
	for _, e := range h.exts {
		if e.typ != typ {
			kept = append(kept, e)
		}
	}
	h.exts = kept
	c.writeExtensions(used-8, end)
}

// backingName judges the place of the backing file name in b, the first
// cluster.
func (c *check) backingName(b []byte) {
	h := &c.h
	if h.backingOff == 0 {
		return
	}
	n := uint64(len(b))
	if h.backingOff >= uint64(h.length) && h.backingOff <= n && uint64(h.backingSize) <= n-h.backingOff && h.backingSize <= maxBackingName {
		return
	}
	printable := func(off int64) int64 {
		k := int64(0)
		for off+k < int64(len(b)) && k < maxBackingName && b[off+k] >= 0x20 && b[off+k] != 0x7f {
			k++
		}
		return k
	}
	off, size := int64(-1), int64(0)
	if h.backingOff >= uint64(h.length) && h.backingOff < n {
		off, size = int64(h.backingOff), printable(int64(h.backingOff))
	}
	if size == 0 && h.extEnd < int64(n) {
		off, size = h.extEnd, printable(h.extEnd)
		if int64(h.backingSize) > 0 && int64(h.backingSize) <= size {
			size = int64(h.backingSize)
		}
	}
	var fix *fsck.Fix
	if off >= 0 && size > 0 {
		fix = full(fmt.Sprintf("take %q", b[off:off+size]))
	}
	if c.found(codeBackingName, offBackingOff, "backing_file_offset", h.backingOff,
		fmt.Sprintf("a name of %d bytes there does not lie in the first cluster", h.backingSize), fix) {
		h.backingOff, h.backingSize = uint64(off), uint32(size)
		c.put64(fsck.PhaseHeader, offBackingOff, h.backingOff)
		c.put32(fsck.PhaseHeader, offBackingSize, h.backingSize)
	}
}

// compressionType judges the compression type by what decodes.
func (c *check) compressionType() {
	h := &c.h
	bit := h.incompat&incompatCompression != 0
	if bit == (h.ctype == uint8(qcow2.Zstd)) && h.ctype <= uint8(qcow2.Zstd) {
		return
	}
	works := uint8(qcow2.Deflate)
	if c.samplePacked(qcow2.Zstd) > c.samplePacked(qcow2.Deflate) {
		works = uint8(qcow2.Zstd)
	}
	if c.found(codeCompression, offCType, "compression_type", h.ctype, fmt.Sprintf("the type is %d, the feature bit is %t", h.ctype, bit),
		full(fmt.Sprintf("make it %v, with which clusters decode", qcow2.CompressionType(works)))) {
		want := h.incompat &^ incompatCompression
		if works != 0 {
			want |= incompatCompression
		}
		if want != h.incompat {
			h.incompat = want
			c.put64(fsck.PhaseHeader, offIncompat, want)
		}
		if works != 0 && h.length <= offCType {
			// There has to be room for the type, before the extensions.
			end := c.cs
			if h.backingOff != 0 {
				end = int64(min(h.backingOff, uint64(c.cs)))
			}
			used := h.extEnd - 8
			h.length = lengthV3 + 8
			c.put32(fsck.PhaseHeader, offLength, h.length)
			c.planned(c.plan.Write(fsck.PhaseHeader, offCType, make([]byte, 8)))
			c.writeExtensions(used, end)
		}
		if h.ctype != works {
			c.planned(c.plan.Write(fsck.PhaseHeader, offCType, []byte{works}))
		}
	}
	h.ctype = works
}
