package open

import (
	"context"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// maxSiblings bounds how many files of a directory are looked at.
const maxSiblings = 4096

// Children are the qcow2 images in the directory of the image at path that name
// it as their backing file. Images in other directories cannot be found; what
// cannot be read is passed over.
func Children(ctx context.Context, path string) ([]string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, nil // a device has no siblings
	}
	dir := filepath.Dir(path)
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	list, err := d.ReadDir(maxSiblings)
	if err != nil && len(list) == 0 {
		return nil, nil // empty, or not to be listed
	}
	var children []string
	for _, e := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		sib, err := e.Info()
		if err != nil || !sib.Mode().IsRegular() || os.SameFile(st, sib) {
			continue
		}
		child := filepath.Join(dir, e.Name())
		name := backingName(ctx, child)
		if name == "" {
			continue
		}
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		if base, err := os.Stat(name); err == nil && os.SameFile(st, base) {
			children = append(children, child)
		}
	}
	return children, nil
}

// backingName is the backing file that a qcow2 image names, "" if there is none
// or the file is no such image.
func backingName(ctx context.Context, path string) string {
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return ""
	}
	head := make([]byte, 512)
	n, _ := f.ReadAt(head, 0) // what cannot be read is no image
	if !qcow2.Probe(head[:n]) {
		_ = f.Close() // opened for reading
		return ""
	}
	img, err := qcow2.Open(ctx, f, layers.OpenOptions{Path: path, Cache: layers.NewCache(0)})
	if err != nil {
		_ = f.Close() // opened for reading
		return ""
	}
	defer img.Close()
	return img.Parent().Name
}
