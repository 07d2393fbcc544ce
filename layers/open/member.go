package open

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
)

// Member is the part that an image has in a ploop bundle.
type Member struct {
	Descriptor string
	Images     int      // of the bundle
	Parents    []string // image that it stands on; more than one if the bundle has several names for it
	Children   []string // images that stand on it
}

// Members are the parts that images have in ploop bundles.
type Members struct {
	// Of are those of each image, in the order in which they were given.
	Of [][]Member
	// Unclear are descriptors of bundles that cannot be understood.
	Unclear []string
}

// MembersOf looks for the images at the given paths in the bundles that are
// described by xmls, or by a file *.xml in a directory of the images (of a
// symbolic link: in that of the link and in that of the file) or in one of
// dirs. Of these one that cannot be read, or is no descriptor, is passed over,
// but for a DiskDescriptor.xml in a directory of the images, which is an error;
// links that lead out of all these directories are passed over as well.
func MembersOf(paths, xmls []string, dirs ...string) (Members, error) {
	l := memberSearch{m: Members{Of: make([][]Member, len(paths))}, seen: map[string]bool{}}
	var own []string
	for _, path := range paths {
		st, err := os.Stat(path)
		if err != nil {
			return l.m, err
		}
		homes, err := Homes(path)
		if err != nil {
			return l.m, err
		}
		if l.images = append(l.images, st); st.Mode().IsRegular() {
			own = append(own, homes...)
		}
	}
	for _, dir := range append(slices.Clone(own), dirs...) {
		if real, err := realPath(dir); err == nil {
			l.permitted = append(l.permitted, real)
		}
	}
	for _, xml := range xmls {
		if err := l.read(xml, true); err != nil {
			return l.m, err
		}
	}
	for _, dir := range own {
		// First, and also where names cannot be listed.
		if err := l.look(filepath.Join(dir, ploop.DescriptorName), true); err != nil {
			return l.m, err
		}
	}
	for _, dir := range own {
		_ = l.list(dir) // what can be read
	}
	for _, dir := range dirs {
		if err := l.list(dir); err != nil {
			return l.m, err
		}
	}
	return l.m, nil
}

// memberSearch is one call of MembersOf.
type memberSearch struct {
	m         Members
	images    []os.FileInfo
	permitted []string // directories, without symbolic links
	seen      map[string]bool
}

// list looks at what is called like a descriptor in one directory.
func (l *memberSearch) list(dir string) error {
	real, err := realPath(dir)
	if err != nil || l.seen[real] {
		return err
	}
	l.seen[real] = true
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		list, err := d.ReadDir(1024)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, e := range list {
			if strings.EqualFold(filepath.Ext(e.Name()), ".xml") {
				_ = l.look(filepath.Join(dir, e.Name()), false) // has no errors
			}
		}
	}
}

// look reads a file that may be a descriptor. must makes an error of what keeps
// it from being understood.
func (l *memberSearch) look(xml string, must bool) error {
	st, err := os.Lstat(xml)
	if err == nil && st.Mode()&os.ModeSymlink != 0 {
		if !l.leadsBelow(xml) {
			return nil
		}
		st, err = os.Stat(xml)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), err != nil && !must:
		return nil
	case err != nil:
		return err
	case !st.Mode().IsRegular():
		return nil
	}
	return l.read(xml, must)
}

// read reads the descriptor at xml, once.
func (l *memberSearch) read(xml string, must bool) error {
	dir, err := realPath(filepath.Dir(xml))
	if err != nil {
		return err
	}
	// By its own name and not by that of what a link leads to: the names in it
	// count from there.
	at := filepath.Join(dir, filepath.Base(xml))
	if l.seen[at] {
		return nil
	}
	l.seen[at] = true
	d, err := ploop.ReadDescriptor(xml)
	switch {
	case err == nil:
		l.enter(d, xml)
	case must:
		return err
	case errors.Is(err, layers.ErrCorrupt), errors.Is(err, layers.ErrUnsupported),
		filepath.Base(xml) == ploop.DescriptorName && errors.Is(err, layers.ErrFormat):
		l.m.Unclear = append(l.m.Unclear, xml)
	}
	return nil
}

// leadsBelow reports whether a link leads to a file below one of the
// directories that are looked at.
func (l *memberSearch) leadsBelow(link string) bool {
	real, err := realPath(link)
	return err == nil && slices.ContainsFunc(l.permitted, func(dir string) bool {
		_, below := root{real: dir}.below(real)
		return below
	})
}

// enter adds what the bundle tells of the images.
func (l *memberSearch) enter(d *ploop.Descriptor, xml string) {
	refs := d.Images()
	files := make([]os.FileInfo, len(refs))
	name := map[string]string{}
	for k, ref := range refs {
		name[ref.GUID] = resolve(xml, ref.File)
		files[k], _ = os.Stat(name[ref.GUID]) // nil where there is none
	}
	for i, image := range l.images {
		// The bundle may have several names for one file.
		var guids []string
		for k, ref := range refs {
			if files[k] != nil && os.SameFile(image, files[k]) {
				guids = append(guids, ref.GUID)
			}
		}
		if guids == nil {
			continue
		}
		part := Member{Descriptor: xml, Images: len(refs)}
		for _, s := range d.Snapshots() {
			if s.Parent != "" && slices.Contains(guids, s.Parent) {
				part.Children = append(part.Children, name[s.ID])
			}
			if s.Parent != "" && slices.Contains(guids, s.ID) {
				part.Parents = append(part.Parents, name[s.Parent])
			}
		}
		l.m.Of[i] = append(l.m.Of[i], part)
	}
}
