package open

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// The formats by name.
const (
	formatRaw   = "raw"
	formatPloop = "ploop"
	formatQcow2 = "qcow2"
)

// normalFormat maps the names that users and images write to ours.
func normalFormat(name string) string {
	if name == "parallels" {
		return formatPloop
	}
	return name
}

func checkFormat(name string) error {
	switch normalFormat(name) {
	case "", formatRaw, formatPloop, formatQcow2:
		return nil
	}
	return fmt.Errorf("format %q: %w (raw, ploop and qcow2 are)", name, layers.ErrUnsupported)
}

// headSize is how much of a file detection looks at.
const headSize = 512

func readHead(f backend.File) ([]byte, error) {
	head := make([]byte, headSize)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return head[:n], nil
}

// magicOf is the image format that the content suggests, "" for none.
func magicOf(head []byte) string {
	switch {
	case ploop.Probe(head):
		return formatPloop
	case qcow2.Probe(head):
		return formatQcow2
	}
	return ""
}

// foreign are formats that we do not read, but whose images must not be
// taken for raw disks by mistake.
var foreign = []struct {
	name, magic string
	off         int
}{
	{"VMDK", "KDMV", 0},
	{"VMDK", "COWD", 0},
	{"VMDK", "# Disk DescriptorFile", 0},
	{"VHDX", "vhdxfile", 0},
	{"VHD", "conectix", 0},
	{"VDI", "\x7f\x10\xda\xbe", 64},
	{"QED", "QED\x00", 0},
	{"QCOW1", "QFI\xfb\x00\x00\x00\x01", 0},
}

func foreignFormat(head []byte) string {
	for _, f := range foreign {
		if len(head) >= f.off+len(f.magic) && string(head[f.off:f.off+len(f.magic)]) == f.magic {
			return f.name
		}
	}
	return ""
}

// detect decides the format of the image that the user named, from its
// content; a name that contradicts the content is not overruled in silence.
func detect(path string, head []byte) (string, error) {
	if name := foreignFormat(head); name != "" {
		return "", &layers.ImageError{Path: path, Layer: 0, Offset: 0, Field: "magic", Value: name,
			Err: fmt.Errorf("%w: this format is not read (--format raw serves the bytes as they are)", layers.ErrUnsupported)}
	}
	found := magicOf(head)
	said := map[string]string{
		".qcow2": formatQcow2, ".hds": formatPloop, ".hdd": formatPloop, ".raw": formatRaw,
	}[strings.ToLower(filepath.Ext(path))]
	switch {
	case said == formatRaw && found != "":
		// A guest that can write to a raw disk can make it begin like any
		// image it wishes.
		return "", &layers.ImageError{Path: path, Layer: 0, Offset: 0, Field: "magic", Value: found,
			Err: fmt.Errorf("%w: named like a raw image but begins like %s; state --format", layers.ErrPolicy, found)}
	case found != "":
		return found, nil
	case said != "" && said != formatRaw:
		return "", &layers.ImageError{Path: path, Layer: 0, Offset: 0, Field: "magic",
			Value: fmt.Sprintf("%x", head[:min(len(head), 16)]),
			Err:   fmt.Errorf("%w: named like %s but does not begin so (--format raw serves the bytes as they are)", layers.ErrFormat, said)}
	}
	return formatRaw, nil
}

// confirmRaw refuses a parent stated as raw whose content begins like an
// image: which of the two is meant can only the user say.
func confirmRaw(path string, layer int, head []byte) error {
	found := magicOf(head)
	if found == "" {
		return nil
	}
	return &layers.ImageError{Path: path, Layer: layer, Offset: 0, Field: "magic", Value: found,
		Err: fmt.Errorf("%w: stated as raw but begins like %s; state --backing-format", layers.ErrPolicy, found)}
}
