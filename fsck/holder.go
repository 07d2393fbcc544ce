package fsck

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers/ploop"
)

// holder has the files of one image open and locked.
type holder struct {
	files map[string]backend.File // by clean path
	locks []io.Closer
	undo  map[string]*openUndo // by clean path, of the whole run
}

// openUndo is the undo file of an image. It stays open, and each repair of the
// image in this run adds to it.
type openUndo struct {
	backend.File
	name string
	used bool // it is needed to take something back
}

// undoFor is the undo file of the image at path.
func (h *holder) undoFor(path string, undos UndoStore) (*openUndo, error) {
	key := filepath.Clean(path)
	if u := h.undo[key]; u != nil {
		return u, nil
	}
	f, name, err := undos.Create(path, len(h.undo) > 0)
	if err != nil {
		return nil, err
	}
	if h.undo == nil {
		h.undo = map[string]*openUndo{}
	}
	h.undo[key] = &openUndo{File: f, name: name}
	return h.undo[key], nil
}

// closeUndos closes the undo files, and removes those that nobody needs.
func (h *holder) closeUndos(undos UndoStore) error {
	var errs []error
	for _, u := range h.undo {
		errs = append(errs, u.Close())
		if !u.used {
			errs = append(errs, undos.Remove(u.name))
		}
	}
	h.undo = nil
	return errors.Join(errs...)
}

// open opens and locks all files: own ones for writing when they are to be
// repaired, the others for reading.
func (h *holder) open(files []FileResult, repair bool) error {
	if h.files == nil {
		h.files = map[string]backend.File{}
	}
	for _, f := range files {
		if h.files[filepath.Clean(f.Path)] != nil {
			continue
		}
		if err := h.lockBundleOf(f, files, repair); err != nil {
			return err
		}
		write := repair && f.Own
		bf, err := backend.Open(f.Path, backend.Options{Writable: write})
		if err != nil {
			return err
		}
		h.files[filepath.Clean(f.Path)] = bf
		l := backend.LockerOf(bf)
		if l == nil {
			continue
		}
		use, unshare := backend.ReaderUse, backend.ReaderUnshare
		if write {
			use, unshare = backend.WriterUse, backend.WriterUnshare
		}
		if err := l.Lock(use, unshare); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return nil
}

// lockBundleOf takes the lock of the bundle to which f belongs, once: with the
// descriptor when that is among the files, which it is whenever the bundle was
// recognised.
func (h *holder) lockBundleOf(f FileResult, files []FileResult, repair bool) error {
	if f.Format == "ploop-descriptor" {
		write := false
		for _, g := range files {
			write = write || repair && g.Own && filepath.Dir(g.Path) == filepath.Dir(f.Path)
		}
		return h.lockBundle(f.Path, write)
	}
	if f.Format != "ploop" || !repair || !f.Own {
		return nil
	}
	xml := filepath.Join(filepath.Dir(f.Path), ploop.DescriptorName)
	for _, g := range files {
		if g.Format == "ploop-descriptor" && filepath.Dir(g.Path) == filepath.Dir(xml) {
			return nil
		}
	}
	if _, err := os.Stat(xml); err != nil {
		return nil // an image alone
	}
	return h.lockBundle(xml, true)
}

// lockBundle keeps ploop's tools away. A reader leaves no lock file behind
// where there was none.
func (h *holder) lockBundle(xml string, write bool) error {
	var c io.Closer
	var err error
	if write {
		c, err = backend.LockDescriptor(xml)
	} else {
		if _, serr := os.Stat(xml + ".lck"); serr != nil {
			return nil
		}
		c, err = backend.LockDescriptorShared(xml)
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) {
			return nil
		}
	}
	if err == nil {
		h.locks = append(h.locks, c)
	}
	return err
}

func (h *holder) close() error {
	var errs []error
	for _, f := range h.files {
		errs = append(errs, f.Close())
	}
	for _, l := range h.locks {
		errs = append(errs, l.Close())
	}
	h.files, h.locks = nil, nil
	return errors.Join(errs...)
}
