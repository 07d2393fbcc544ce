package fsck

import (
	"context"
	"os"
	"path/filepath"
	"slices"

	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// checkChildren looks in the image's directory for images that stand on it.
func (s *Stack) checkChildren(ctx context.Context, sink Sink) error {
	if len(s.trace.Images) == 0 || namesBundle(s.path) {
		return nil
	}
	top := s.trace.Images[0].Path
	if _, err := os.Stat(top); err != nil {
		return nil
	}
	children, err := open.Children(ctx, top)
	for _, path := range children {
		sink.Report(Finding{Code: codeTopIsBase, Text: path + " names this image as its parent", Place: Place{File: top, Offset: -1}})
	}
	return err
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

// maxSiblings bounds how many files of a directory are looked at.
const maxSiblings = 4096

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
