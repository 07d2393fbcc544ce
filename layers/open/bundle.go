package open

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
)

// bundleOf finds the bundle of which the ploop image at path is a part: the
// DiskDescriptor.xml beside it names it. It returns the descriptor's path and
// the image's GUID there, or "" when the image stands alone. Without its
// parents a delta would read as zeros where it has to show them.
func (op *opener) bundleOf(path string) (xml, guid string, err error) {
	xml = filepath.Join(filepath.Dir(path), ploop.DescriptorName)
	d, err := op.readDescriptor(xml)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", nil
	}
	if err != nil {
		return "", "", fmt.Errorf("%w (--format ploop opens the image alone)", err)
	}
	guid, err = guidOf(d, xml, path)
	return xml, guid, err
}

// readDescriptor reads a descriptor, which has to be a regular file. One that
// the user did not name may not be a link out of the allowed directories.
func (op *opener) readDescriptor(xml string) (*ploop.Descriptor, error) {
	st, err := os.Stat(xml)
	if err != nil {
		return nil, err
	}
	if err := op.mayRead(xml); err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, &layers.ImageError{Path: xml, Layer: 0, Offset: -1, Err: fmt.Errorf("%w: not a regular file", layers.ErrFormat)}
	}
	return ploop.ReadDescriptor(xml)
}

// mayRead refuses a descriptor that is a link out of the allowed directories,
// unless the user named it.
func (op *opener) mayRead(xml string) error {
	if xml == op.named {
		return nil
	}
	real, err := realPath(xml)
	if err != nil {
		return err
	}
	if !op.policy.covers(real) {
		return &layers.ImageError{Path: xml, Layer: -1, Offset: -1,
			Err: fmt.Errorf("%w: a link to outside the directory of the image; --allow-path DIR permits it", layers.ErrPolicy)}
	}
	return nil
}

// guidOf is the GUID of the image at path in the bundle, "" if it is none of
// its images.
func guidOf(d *ploop.Descriptor, xml, path string) (string, error) {
	want, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	for _, ref := range d.Images() {
		have, err := os.Stat(resolve(xml, ref.File))
		if err == nil && os.SameFile(want, have) {
			return ref.GUID, nil
		}
	}
	return "", nil
}

// openBundle adds the layers of the bundle described at xml, from the given
// snapshot down ("" is the current top). named is the GUID of the image that
// the user named instead of the bundle, "" if it was the bundle.
func (op *opener) openBundle(xml, snapshot, named string) error {
	if err := op.mayRead(xml); err != nil {
		return err
	}
	op.xmls = append(op.xmls, xml)
	writable := op.writableLayer()
	lock, err := lockBundle(xml, writable)
	if err != nil {
		return err
	}
	if lock != nil {
		op.closers = append(op.closers, lock)
	}
	d, err := op.readDescriptor(xml)
	if err != nil {
		return err
	}
	if len(op.pile) == 0 {
		op.bundle = d.Snapshots()
	}
	if writable {
		top, err := d.Chain("")
		if err != nil {
			return err
		}
		if named != "" && named != top[0].GUID {
			return &layers.ImageError{Path: xml, Layer: 0, Offset: -1, Field: "Snapshots/TopGUID", Value: top[0].GUID,
				Err: fmt.Errorf("%w: only the top image of a bundle is written, others have children that depend on them", layers.ErrUnsupported)}
		}
	}
	chain, err := d.Chain(snapshot)
	if err != nil {
		return err
	}
	// The selection is done; no image of a bundle has snapshots of its own.
	op.o.Snapshot = ""
	for _, ref := range chain {
		f, path, err := op.policy.open(xml, "StorageData/Storage/Image/File", ref.File, op.writableLayer())
		if err != nil {
			return err
		}
		if ref.Format == formatRaw && normalFormat(op.o.BackingFormat) != formatRaw {
			var head []byte
			if head, err = readHead(f); err == nil {
				err = confirmRaw(path, len(op.pile), head)
			}
		}
		if err == nil {
			_, err = op.add(f, path, ref.Format)
		}
		if err != nil {
			_ = f.Close() // never changed
			return err
		}
		image := &op.found[len(op.found)-1]
		image.Descriptor, image.GUID = xml, ref.GUID
		l := op.pile[len(op.pile)-1]
		if err := d.CheckImage(ref, l.Size(), l.Granule()); err != nil {
			return err
		}
	}
	return nil
}

// lockBundle keeps ploop's tools away while the bundle is open. A reader does
// not leave a lock file behind where there was none, and reads where it may
// not write.
func lockBundle(xml string, writable bool) (io.Closer, error) {
	if writable {
		return backend.LockDescriptor(xml)
	}
	if _, err := os.Stat(xml + ".lck"); err != nil {
		return nil, nil
	}
	c, err := backend.LockDescriptorShared(xml)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) {
		return nil, nil
	}
	return c, err
}
