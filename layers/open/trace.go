package open

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers/ploop"
)

// ErrLoop says that an image is its own parent, directly or over others.
var ErrLoop = errors.New("loop of parents")

// Traced is an image that belongs to a stack.
type Traced struct {
	Path   string
	Format string // raw, ploop or qcow2
	// Opened tells that the format's Open accepted it; Size and Granule are
	// those of the layer then.
	Opened        bool
	Size, Granule int64 // bytes
	// Descriptor is that of the ploop bundle that the image was opened as a
	// part of, GUID what it is called there; "" for others.
	Descriptor, GUID string
}

// Trace is what belongs to an image, as far as it could be found: for
// image-fsck, which has to do with stacks that do not open.
type Trace struct {
	// Images, the top first. The last one may not be Opened.
	Images []Traced
	// Descriptors of the ploop bundles that images are parts of, in the order
	// of the images.
	Descriptors []string
	// Err says why the trace ends, as Open would; nil when it reached the
	// lowest layer.
	Err error
}

// Follow finds the files of the stack at path, opening them for reading only,
// and closes them again. Only options that Open would refuse at once are
// errors; what is wrong with the stack is in the Trace.
func Follow(ctx context.Context, path string, o Options) (*Trace, error) {
	o.Writable, o.Scratch = false, false
	op, err := newOpener(ctx, path, o)
	if err != nil {
		return nil, err
	}
	defer op.policy.close()
	defer op.abandon()
	t := &Trace{Err: op.openTop(path), Images: op.found, Descriptors: op.xmls}
	for i, l := range op.pile {
		t.Images[i].Opened, t.Images[i].Size, t.Images[i].Granule = true, l.Size(), l.Granule()
	}
	if len(t.Images) == 0 && len(t.Descriptors) == 0 {
		t.alone(op, path, o)
	}
	return t, nil
}

// alone enters an image whose stack could not even be begun, say because the
// descriptor beside it is damaged.
func (t *Trace) alone(op *opener, path string, o Options) {
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return // as t.Err says
	}
	defer f.Close()
	head, err := readHead(f)
	format := normalFormat(o.Format)
	if err == nil && format == "" {
		format, err = detect(path, head)
	}
	if err != nil {
		return
	}
	t.Images = append(t.Images, Traced{Path: path, Format: format})
	xml := filepath.Join(filepath.Dir(path), ploop.DescriptorName)
	if _, err := os.Stat(xml); err == nil && format == formatPloop && op.mayRead(xml) == nil {
		t.Descriptors = append(t.Descriptors, xml)
	}
}

// Related opens, for reading, files that an image names, under the policy on
// the image at path. It stays usable until it is closed.
type Related struct {
	p    *policy
	path string
}

// NewRelated takes AllowPaths from o.
func NewRelated(path string, o Options) (*Related, error) {
	p, err := newPolicy(path, o.AllowPaths)
	if err != nil {
		return nil, err
	}
	return &Related{p, path}, nil
}

// Open opens the file that the image calls name in the given field, and
// returns it with its path.
func (r *Related) Open(field, name string) (backend.File, string, error) {
	return r.p.open(r.path, field, name, false)
}

// Close gives back what the policy holds.
func (r *Related) Close() error {
	r.p.close()
	return nil
}

var _ io.Closer = (*Related)(nil)
