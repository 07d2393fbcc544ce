package open

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// addScratch puts an empty layer on top that is gone when it is closed.
func (op *opener) addScratch() error {
	f, own := op.o.ScratchFile, false
	var err error
	if f == nil {
		if f, err = scratchFile(op.o.ScratchDir); err != nil {
			return err
		}
		own = true
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

// scratchFile is a file without a name.
func scratchFile(dir string) (backend.File, error) {
	if dir == "" {
		dir = os.TempDir()
	}
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
