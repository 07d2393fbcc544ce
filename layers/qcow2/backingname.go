package qcow2

import (
	"errors"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// parseBackingName reads the backing file name, which lies in the first
// cluster and is not terminated.
func (h *Header) parseBackingName(b []byte) error {
	if h.BackingOffset == 0 {
		return nil
	}
	if h.BackingSize > maxBackingName {
		return fieldError(offBackingSize, "backing_file_size", h.BackingSize, layers.ErrFormat)
	}
	n := uint64(len(b))
	if h.BackingOffset < uint64(h.HeaderLength) || h.BackingOffset > n || uint64(h.BackingSize) > n-h.BackingOffset {
		return fieldError(offBackingOffset, "backing_file_offset", h.BackingOffset, layers.ErrFormat)
	}
	h.BackingName = string(b[h.BackingOffset : h.BackingOffset+uint64(h.BackingSize)])
	return nil
}

// BackingName is the name of the backing file in the header of the image in f,
// "" for none. Nothing else is looked at, so that it is found also in images
// that Open refuses: encrypted ones, those with features that are not known,
// with an external data file, with damaged tables. (Version 1 has the fields
// at the same places.) layers.ErrFormat is a file of another format, and only
// that; of an image in which the name is not to be had, the error is another
// ImageError.
func BackingName(f backend.File) (string, error) {
	b := make([]byte, offBackingSize+4)
	n, err := readUpTo(f, b)
	if err != nil {
		return "", err
	}
	if n < 4 || be32(b) != Magic {
		return "", fieldError(offMagic, "magic", nil, layers.ErrFormat)
	}
	if n < len(b) {
		return "", fieldError(int64(n), "header", n, fmt.Errorf("%w: the header is cut off", layers.ErrCorrupt))
	}
	off, size := be64(b[offBackingOffset:]), be32(b[offBackingSize:])
	if off == 0 {
		return "", nil
	}
	if size > maxBackingName {
		return "", fieldError(offBackingSize, "backing_file_size", size, fmt.Errorf("%w: too long", layers.ErrCorrupt))
	}
	// The name lies in the first cluster.
	if off > 1<<maxClusterBits {
		return "", fieldError(offBackingOffset, "backing_file_offset", off, fmt.Errorf("%w: not in the first cluster", layers.ErrCorrupt))
	}
	name := make([]byte, size)
	if n, err := f.ReadAt(name, int64(off)); n < len(name) {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: it reaches behind the end of the file", layers.ErrCorrupt)
		}
		return "", fieldError(offBackingOffset, "backing_file_offset", off, err)
	}
	return string(name), nil
}

// Parent is what the image says about its backing file. Format is "" when the
// image does not state it; it is never guessed.
func (img *Image) Parent() layers.Parent {
	p := layers.Parent{Name: img.hdr.BackingName}
	if e := img.hdr.extension(extBackingFormat); e != nil && p.Name != "" {
		p.Format = string(e.Data)
	}
	return p
}
