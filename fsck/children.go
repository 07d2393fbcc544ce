package fsck

import (
	"context"
	"errors"
	"io"
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
		if s.parents[xml] == nil {
			s.parents[xml] = parentsIn(xml, d)
		}
		parent, ok := s.parents[xml][keyOf(f.Path)]
		return parent || !ok
	}
	if s.parents[""] == nil {
		s.parents[""] = s.parentsInChain()
	}
	parent, ok := s.parents[""][keyOf(f.Path)]
	return parent || !ok
}

// parentsIn tells of each image of a descriptor whether it has a parent.
func parentsIn(xml string, d *ploop.Descriptor) map[fileKey]bool {
	parent := map[string]string{}
	for _, snap := range d.Snapshots() {
		parent[snap.ID] = snap.Parent
	}
	has := firsts{}
	for _, ref := range d.Images() {
		has.add(resolveIn(xml, ref.File), parent[ref.GUID] != "")
	}
	return has
}

// parentsInChain tells of each image of the chain whether it has a parent.
func (s *Stack) parentsInChain() map[fileKey]bool {
	has := firsts{}
	for i, img := range s.trace.Images {
		has.add(img.Path, i+1 < len(s.trace.Images) || s.trace.Err != nil)
	}
	return has
}

// firsts keeps what was said first of each file that exists.
type firsts map[fileKey]bool

func (m firsts) add(path string, v bool) {
	k := keyOf(path)
	if _, ok := m[k]; !ok && k != (fileKey{}) {
		m[k] = v
	}
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
	if err != nil && !errors.Is(err, io.EOF) { // of an empty one
		return nil, err
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
