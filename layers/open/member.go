package open

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/layers/ploop"
)

// Member is the part that an image has in the ploop bundle of its directory.
type Member struct {
	Descriptor string
	Images     int      // of the bundle
	Children   []string // images that stand on it
}

// MemberOf looks whether the descriptor in the directory of the image at path
// names that image; nil when it does not, or there is none. A descriptor that
// cannot be read is an error, one that is no regular file is none.
func MemberOf(path string) (*Member, error) {
	xml := filepath.Join(filepath.Dir(path), ploop.DescriptorName)
	st, err := os.Lstat(xml)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, nil
	}
	return MemberIn(xml, path)
}

// MemberIn is MemberOf for the bundle that the regular file at xml describes.
func MemberIn(xml, path string) (*Member, error) {
	d, err := ploop.ReadDescriptor(xml)
	if err != nil {
		return nil, err
	}
	guid, err := guidOf(d, xml, path)
	if err != nil || guid == "" {
		return nil, err
	}
	m := &Member{Descriptor: xml, Images: len(d.Images())}
	for _, s := range d.Snapshots() {
		if s.Parent != guid {
			continue
		}
		chain, err := d.Chain(s.ID)
		if err != nil {
			return nil, err
		}
		m.Children = append(m.Children, resolve(xml, chain[0].File))
	}
	return m, nil
}
