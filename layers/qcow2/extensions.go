package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/imagestack/imagestack/layers"
)

// Header extension types (section Header extensions).
const (
	extEnd           = 0x00000000
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extCrypto        = 0x0537be77
	extDataFile      = 0x44415441
)

// Extension is one header extension as found.
type Extension struct {
	Type uint32
	Off  int64 // of Data in the image; 0 for one that was not read from it
	Data []byte
	Pad  []byte // what stood between Data and the next multiple of 8; nil pads with zeros
}

// parseExtensions reads the extension area, from header_length on to the
// backing file name or the end of the cluster. b is the first cluster.
func (h *Header) parseExtensions(b []byte) error {
	end := uint64(len(b))
	if h.BackingOffset != 0 {
		end = h.BackingOffset
	}
	off := uint64(h.HeaderLength)
	for off < end {
		if end-off < 8 {
			return nil // no room for another one: an implicit end
		}
		typ := binary.BigEndian.Uint32(b[off:])
		n := uint64(binary.BigEndian.Uint32(b[off+4:]))
		if typ == extEnd {
			return nil
		}
		data := off + 8
		if n > end-data {
			return fieldError(int64(off)+4, "header extension length", uint32(n),
				fmt.Errorf("%w: extension %#x reaches behind the header", layers.ErrFormat, typ))
		}
		switch typ {
		case extBackingFormat, extBitmaps, extCrypto, extDataFile:
			// Which of two would another program believe?
			if h.extension(typ) != nil {
				return fieldError(int64(off), "header extension type", typ, fmt.Errorf("%w: it appears twice", layers.ErrFormat))
			}
		}
		next := min(data+(n+7)&^7, end)
		h.Extensions = append(h.Extensions, Extension{
			Type: typ,
			Off:  int64(data),
			Data: bytes.Clone(b[data : data+n]),
			Pad:  bytes.Clone(b[data+n : next]),
		})
		off = next
	}
	return nil
}

// appendExtensions appends the area with its end mark.
func appendExtensions(b []byte, exts []Extension) []byte {
	for _, e := range exts {
		b = binary.BigEndian.AppendUint32(b, e.Type)
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.Data)))
		b = append(b, e.Data...)
		b = append(b, e.Pad...)
		b = append(b, make([]byte, -len(b)&7)...)
	}
	return append(b, make([]byte, 8)...)
}

// extension returns the first extension of a type, or nil.
func (h *Header) extension(typ uint32) *Extension {
	for i := range h.Extensions {
		if h.Extensions[i].Type == typ {
			return &h.Extensions[i]
		}
	}
	return nil
}

// featureName is what the image's feature name table calls a bit of one of
// the three bitmaps (0 incompatible, 1 compatible, 2 autoclear), "" when it
// does not say.
func (h *Header) featureName(bitmap, bit uint8) string {
	e := h.extension(extFeatureNames)
	if e == nil {
		return ""
	}
	const entry = 48
	for t := e.Data; len(t) >= entry; t = t[entry:] {
		if t[0] == bitmap && t[1] == bit {
			name, _, _ := bytes.Cut(t[2:entry], []byte{0})
			return string(name)
		}
	}
	return ""
}
