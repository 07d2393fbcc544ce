package open

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// addScratch puts an empty layer on top that is gone when it is closed.
func (op *opener) addScratch() error {
	f, own, err := op.scratchFile()
	if err != nil {
		return err
	}
	err = qcow2.Create(op.ctx, f, qcow2.CreateOptions{Size: op.pile[0].Size()})
	var l *qcow2.Image
	if err == nil {
		l, err = qcow2.Open(op.ctx, f, layers.OpenOptions{Path: f.Name(), Writable: true, Cache: op.cache})
	}
	if err != nil {
		if own {
			_ = f.Close() // it has no name: closing removes it
		}
		return err
	}
	op.pile = append([]layers.Layer{l}, op.pile...)
	return nil
}

// flat replaces the stack by its flat view.
func (op *opener) flat(s *layers.Stack) (*layers.Stack, error) {
	f, own, err := op.scratchFile()
	if err != nil {
		return nil, err
	}
	flat, err := flatten(op.ctx, s, f, op.o.Scratch, backend.CloneRange)
	if err != nil && own {
		_ = f.Close() // it has no name: closing removes it
	}
	return flat, err
}

// scratchFile is the file that the options name, or a new one, which is then
// the caller's own.
func (op *opener) scratchFile() (f backend.File, own bool, err error) {
	if op.o.ScratchFile != nil {
		return op.o.ScratchFile, false, nil
	}
	f, err = NewScratchFile(op.path, op.o)
	return f, true, err
}

// scratchDir is where the throw-away layer, or the flat view, of the image at
// path lives: a flat view beside the image, with which it can share storage
// there.
func scratchDir(path string, o Options) (string, error) {
	switch {
	case o.ScratchDir != "":
		return o.ScratchDir, nil
	case !o.Flat:
		return os.TempDir(), nil
	}
	real, err := realPath(path)
	if err != nil {
		return "", err
	}
	st, err := os.Stat(real)
	if err != nil || st.IsDir() {
		return real, err
	}
	return filepath.Dir(real), nil
}

// scratchFile is a file without a name.
func scratchFile(dir string) (backend.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	var f *os.File
	if err == nil {
		f = os.NewFile(uintptr(fd), dir+"/(scratch)")
	} else {
		// Not every filesystem can make a file without a name.
		if f, err = os.CreateTemp(dir, "imagestack-scratch-*"); err != nil {
			return nil, err
		}
		if err := os.Remove(f.Name()); err != nil {
			_ = f.Close()
			return nil, err
		}
	}
	bf, err := backend.NewFile(f)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return bf, nil
}
