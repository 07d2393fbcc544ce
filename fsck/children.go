package fsck

import (
	"context"
	"os"
	"path/filepath"
	"slices"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// checkChildren looks in the image's directory for images that stand on it.
func (s *Stack) checkChildren(ctx context.Context, sink Sink) error {
	if len(s.trace.Images) == 0 || namesBundle(s.path) {
		return nil
	}
	top := s.trace.Images[0].Path
	st, err := os.Stat(top)
	if err != nil || !st.Mode().IsRegular() {
		return nil // a device has no siblings
	}
	return siblings(filepath.Dir(top), func(path string, sib os.FileInfo, head []byte) {
		if !qcow2.Probe(head) || os.SameFile(st, sib) {
			return
		}
		name := parentOf(ctx, path)
		if base, err := os.Stat(resolveIn(path, name)); name != "" && err == nil && os.SameFile(st, base) {
			sink.Report(Finding{Code: codeTopIsBase, Text: path + " names this image as its parent", Place: Place{File: top, Offset: -1}})
		}
	})
}

// parentOf is the parent that a qcow2 image names, "" if there is none or the
// image does not open.
func parentOf(ctx context.Context, path string) string {
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
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

// hasParent reports whether an image stands on another one, also when that
// cannot be found out.
func (s *Stack) hasParent(f StackFile) bool {
	switch f.Format {
	case "raw", "ploop-descriptor":
		return false
	case "ploop":
		// Only a descriptor tells.
		xml := filepath.Join(filepath.Dir(f.Path), ploop.DescriptorName)
		if _, err := os.Stat(xml); err != nil {
			return false
		}
		d := s.desc[xml]
		if d == nil {
			var err error
			if d, err = ploop.ReadDescriptor(xml); err != nil {
				return true
			}
		}
		parent := map[string]string{}
		for _, snap := range d.Snapshots() {
			parent[snap.ID] = snap.Parent
		}
		for _, ref := range d.Images() {
			if sameFile(resolveIn(xml, ref.File), f.Path) {
				return parent[ref.GUID] != ""
			}
		}
		return true
	}
	for i, img := range s.trace.Images {
		if sameFile(img.Path, f.Path) {
			return i+1 < len(s.trace.Images) || s.trace.Err != nil
		}
	}
	return true
}

// listFiles lists the regular files in a directory, up to maxSiblings.
func listFiles(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	list, err := d.ReadDir(maxSiblings)
	if err != nil && len(list) == 0 {
		return nil, nil // empty
	}
	var names []string
	for _, e := range list {
		if e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}
