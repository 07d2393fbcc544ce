package open

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// policy says which files an image may make us open.
type policy struct {
	roots []root
}

// root is a directory with everything under it. Files are opened through its
// descriptor, so what was checked is what is opened.
type root struct {
	real    string // without symbolic links
	dir     *os.Root
	devices bool // block devices too: the user named this directory
}

// newPolicy allows the directory of the image at path and those in allow.
func newPolicy(path string, allow []string) (*policy, error) {
	dir := path
	if st, err := os.Stat(path); err != nil {
		return nil, err
	} else if !st.IsDir() {
		dir = filepath.Dir(path)
	}
	p := &policy{}
	for i, d := range append([]string{dir}, allow...) {
		real, err := filepath.EvalSymlinks(d)
		if err == nil {
			real, err = filepath.Abs(real)
		}
		var r *os.Root
		if err == nil {
			r, err = os.OpenRoot(real)
		}
		if err != nil {
			p.close()
			return nil, err
		}
		p.roots = append(p.roots, root{real: real, dir: r, devices: i > 0})
	}
	return p, nil
}

func (p *policy) close() {
	for _, r := range p.roots {
		_ = r.dir.Close() // opened for looking up only
	}
}

// protocol matches names that QEMU takes for something else than a path
// (json:…, nbd:…, file:…): letters before a colon in the first component.
var protocol = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]*:`)

// resolve is the path of the file that the image at from calls name.
func resolve(from, name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(filepath.Dir(from), name)
}

// open opens the file that the image at from calls name in its given field,
// and returns it with its path.
func (p *policy) open(from, field, name string, writable bool) (backend.File, string, error) {
	refuse := func(class error, why string) error {
		return &layers.ImageError{Path: from, Layer: -1, Offset: -1, Field: field, Value: name, Err: fmt.Errorf("%w: %s", class, why)}
	}
	switch {
	case name == "" || strings.ContainsRune(name, 0):
		return nil, "", refuse(layers.ErrFormat, "not a file name")
	case protocol.MatchString(name):
		return nil, "", refuse(layers.ErrPolicy, "only plain file names are followed, no protocols")
	}
	path := resolve(from, name)
	real, err := filepath.EvalSymlinks(path)
	if err == nil {
		real, err = filepath.Abs(real)
	}
	if err != nil {
		// Whether a file outside exists is not told: a name that is not even
		// under an allowed directory as written is refused as such.
		if abs, aerr := filepath.Abs(path); aerr != nil || !p.covers(abs) {
			return nil, "", refuse(layers.ErrPolicy, "outside the directory of the image; --allow-path DIR permits it")
		}
		if errno := unix.Errno(0); !errors.As(err, &errno) {
			return nil, "", refuse(layers.ErrPolicy, err.Error()) // a loop of links
		}
		return nil, "", refuse(plainCause(err), "cannot be opened")
	}
	for _, r := range p.roots {
		rel, ok := r.below(real)
		if !ok {
			continue
		}
		f, err := r.openBelow(rel, writable)
		if err != nil {
			return nil, "", refuse(err, "cannot be opened")
		}
		return f, path, nil
	}
	return nil, "", refuse(layers.ErrPolicy, "outside the directory of the image; --allow-path DIR permits it")
}

// plainCause is err without the path, which the ImageError names already.
func plainCause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// covers reports whether the path, whose file cannot be found, would lie under
// an allowed directory: its own directory if that exists, else as written.
func (p *policy) covers(abs string) bool {
	if dir, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		abs = filepath.Join(dir, filepath.Base(abs))
	}
	return slices.ContainsFunc(p.roots, func(r root) bool {
		_, ok := r.below(abs)
		return ok
	})
}

// below is the path relative to the root, when it lies under it.
func (r root) below(real string) (string, bool) {
	rel, err := filepath.Rel(r.real, real)
	if err != nil || !filepath.IsLocal(rel) {
		return "", false
	}
	return rel, true
}

// openBelow opens rel under the root. What is neither a regular file nor,
// where the user allowed it, a block device is refused without waiting for it.
func (r root) openBelow(rel string, writable bool) (backend.File, error) {
	flags := os.O_RDONLY
	if writable {
		flags = os.O_RDWR
	}
	// A FIFO must not make us wait, a terminal not become ours.
	st, err := r.dir.Lstat(rel)
	if err != nil {
		return nil, plainCause(err)
	}
	if !allowedType(st.Mode(), r.devices) {
		return nil, fmt.Errorf("%w: not a regular file", layers.ErrPolicy)
	}
	f, err := r.dir.OpenFile(rel, flags|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, plainCause(err)
	}
	if st, err = f.Stat(); err == nil && !allowedType(st.Mode(), r.devices) {
		err = fmt.Errorf("%w: not a regular file", layers.ErrPolicy)
	}
	var bf backend.File
	if err == nil {
		bf, err = backend.NewFile(f)
	}
	if err != nil {
		_ = f.Close() // the error that counts is the one above
		return nil, plainCause(err)
	}
	return bf, nil
}

func allowedType(m os.FileMode, devices bool) bool {
	block := m&os.ModeDevice != 0 && m&os.ModeCharDevice == 0
	return m.IsRegular() || devices && block
}
