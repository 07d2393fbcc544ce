package qcow2

import (
	"errors"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// DataFile is the name of the external data file as written in the image, ""
// when there is none or it is not named.
func (h *Header) DataFile() string {
	if !h.HasDataFile() {
		return ""
	}
	if e := h.extension(extDataFile); e != nil {
		return string(e.Data)
	}
	return ""
}

// openDataFile opens the external data file through the caller's policy.
func (img *Image) openDataFile() error {
	if !img.hdr.HasDataFile() {
		return nil
	}
	name := img.hdr.DataFile()
	if name == "" {
		return img.errorf(offIncompatible, "external data file name", nil,
			fmt.Errorf("%w: the image has an external data file and does not name it", layers.ErrUnsupported))
	}
	if img.o.OpenFile == nil {
		return img.errorf(offIncompatible, "external data file name", name,
			fmt.Errorf("%w: external data file", layers.ErrUnsupported))
	}
	f, err := img.o.OpenFile(name, img.o.Writable)
	if err != nil {
		return img.errorf(-1, "external data file name", name, err)
	}
	img.data = f
	return nil
}

// BackingName is the name of the backing file in the header of the image in f,
// "" for none. Nothing else is looked at, so that it is found also in images
// that Open refuses: encrypted ones, those with features that are not known,
// with an external data file, with damaged tables. (Version 1 has the fields
// at the same places.) A file of another format is layers.ErrFormat; of an image
// in which the name is not to be had, the error is an ImageError.
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
