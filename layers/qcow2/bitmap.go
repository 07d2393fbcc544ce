package qcow2

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
)

// Limits of bitmaps, those of QEMU.
const (
	maxBitmaps          = 65535
	maxBitmapName       = 1023
	maxBitmapTableBytes = 128 << 20
	maxBitmapDirBytes   = 64 << 20
)

// Offsets in the bitmaps extension and in a directory entry (section Bitmaps).
const (
	bitmapsCount     = 0
	bitmapsReserved  = 4
	bitmapsDirSize   = 8
	bitmapsDirOffset = 16
	bitmapsExtLen    = 24

	bmTableOffset = 0
	bmTableSize   = 8
	bmFlags       = 12
	bmType        = 16
	bmGranularity = 17
	bmNameLen     = 18
	bmExtraLen    = 20
	bmFixed       = 24
)

// Flags of a bitmap.
const (
	bitmapInUse     = 1 << 0
	bitmapAuto      = 1 << 1
	bitmapExtraOK   = 1 << 2
	bitmapFlagsMask = bitmapInUse | bitmapAuto | bitmapExtraOK
)

// bitmapEntry is one persistent bitmap of the directory.
type bitmapEntry struct {
	off          int64 // of the entry in the image file
	tableOff     uint64
	tableEntries uint32
	flags        uint32
	typ          uint8
	granularity  uint8 // log2 of bytes
	name         string
}

// bitmapsValid reports whether the image has bitmaps that may be believed.
func (h *Header) bitmapsValid() bool {
	return h.Autoclear&autoclearBitmaps != 0 && h.extension(extBitmaps) != nil
}

// bitmapDir returns the place of the bitmap directory and the number of its
// entries.
func (img *Image) bitmapDir(h *Header) (off, size int64, n uint32, err error) {
	e := h.extension(extBitmaps)
	if len(e.Data) < bitmapsExtLen {
		return 0, 0, 0, img.corrupt(e.Off, "bitmaps extension", nil, "it is too short")
	}
	n = be32(e.Data[bitmapsCount:])
	dirSize, dirOff := be64(e.Data[bitmapsDirSize:]), be64(e.Data[bitmapsDirOffset:])
	switch {
	case n == 0 || n > maxBitmaps:
		return 0, 0, 0, img.corrupt(e.Off+bitmapsCount, "nb_bitmaps", n, "out of range")
	case be32(e.Data[bitmapsReserved:]) != 0:
		return 0, 0, 0, img.corrupt(e.Off+bitmapsReserved, "bitmaps extension reserved", be32(e.Data[bitmapsReserved:]), "must be 0")
	case dirSize > maxBitmapDirBytes || dirSize < uint64(n)*bmFixed:
		return 0, 0, 0, img.corrupt(e.Off+bitmapsDirSize, "bitmap_directory_size", dirSize, "out of range")
	case !img.tableAt(dirOff, dirSize) || dirOff < uint64(img.clusterSize):
		return 0, 0, 0, img.corrupt(e.Off+bitmapsDirOffset, "bitmap_directory_offset", dirOff, "not on a cluster boundary of the file")
	}
	return int64(dirOff), int64(dirSize), n, nil
}

// eachBitmap reads the directory of the valid bitmaps that h names.
func (img *Image) eachBitmap(ctx context.Context, h *Header, do func(*bitmapEntry) error) error {
	start, size, n, err := img.bitmapDir(h)
	if err != nil {
		return err
	}
	r := bufio.NewReaderSize(io.NewSectionReader(img.f, start, size), 16<<10)
	off := start
	for range n {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, next, err := img.readBitmap(r, off)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = img.corrupt(off, "bitmap directory entry", nil, "it reaches behind the end of the directory")
			}
			return err
		}
		if err := do(b); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// readBitmap reads the directory entry that begins at off.
func (img *Image) readBitmap(r io.Reader, off int64) (*bitmapEntry, int64, error) {
	var h [bmFixed]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, 0, err
	}
	b := &bitmapEntry{
		off: off, tableOff: be64(h[bmTableOffset:]), tableEntries: be32(h[bmTableSize:]),
		flags: be32(h[bmFlags:]), typ: h[bmType], granularity: h[bmGranularity],
	}
	nameLen, extra := int(h[bmNameLen])<<8|int(h[bmNameLen+1]), be32(h[bmExtraLen:])
	switch {
	case nameLen == 0 || nameLen > maxBitmapName:
		return nil, 0, img.corrupt(off+bmNameLen, "bitmap name_size", uint16(nameLen), "out of range")
	case extra > maxBitmapDirBytes:
		return nil, 0, img.corrupt(off+bmExtraLen, "bitmap extra_data_size", extra, "out of range")
	case b.flags&^bitmapFlagsMask != 0:
		return nil, 0, img.corrupt(off+bmFlags, "bitmap flags", b.flags, "reserved bits are set")
	case b.granularity > 62:
		return nil, 0, img.corrupt(off+bmGranularity, "bitmap granularity_bits", b.granularity, "out of range")
	case uint64(b.tableEntries)*8 > maxBitmapTableBytes:
		return nil, 0, img.corrupt(off+bmTableSize, "bitmap_table_size", b.tableEntries, "out of range")
	case !img.tableAt(b.tableOff, uint64(b.tableEntries)*8) || b.tableOff < uint64(img.clusterSize):
		return nil, 0, img.corrupt(off+bmTableOffset, "bitmap_table_offset", b.tableOff, "not on a cluster boundary of the file")
	}
	if _, err := io.CopyN(io.Discard, r, int64(extra)); err != nil {
		return nil, 0, err
	}
	name := make([]byte, nameLen)
	if _, err := io.ReadFull(r, name); err != nil {
		return nil, 0, err
	}
	b.name = string(name)
	n := bmFixed + int64(extra) + int64(nameLen)
	if _, err := io.CopyN(io.Discard, r, -n&7); err != nil {
		return nil, 0, err
	}
	return b, off + (n+7)&^7, nil
}

// flagNames are the names of a bitmap's flags, as QEMU spells them.
func (b *bitmapEntry) flagNames() []string {
	var names []string
	for _, f := range []struct {
		bit  uint32
		name string
	}{{bitmapInUse, "in-use"}, {bitmapAuto, "auto"}, {bitmapExtraOK, "extra-data-compatible"}} {
		if b.flags&f.bit != 0 {
			names = append(names, f.name)
		}
	}
	if b.typ != 1 {
		names = append(names, fmt.Sprintf("type-%d", b.typ))
	}
	return names
}
