package qcow2

import (
	"fmt"

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
