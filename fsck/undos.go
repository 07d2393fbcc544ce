package fsck

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
)

// UndoStore makes undo files.
type UndoStore interface {
	// Create makes the undo file for the image at path, and returns it with
	// its name. It never overwrites one: an undo file is removed by the user
	// only. further says that it is not the first of this run.
	Create(path string, further bool) (backend.File, string, error)
	// Sync makes the name durable.
	Sync(name string) error
	// Remove removes one that turned out not to be needed.
	Remove(name string) error
}

// UndoPlace is an UndoStore: a file, or a directory for several; "" is beside
// each image, with .undo (.undo.1, …) added to its name. A file is that of the
// first file that a run repairs; where it repairs several files of one image,
// those of the others have .1, .2, … added.
type UndoPlace string

// Create implements UndoStore.
func (u UndoPlace) Create(path string, further bool) (f backend.File, name string, err error) {
	name, err = u.Choose(path, further, func(name string) (err error) {
		f, err = backend.Open(name, backend.Options{Writable: true, Create: true, Exclusive: true})
		return err
	})
	return f, name, err
}

// Choose finds the name of the undo file for the image at path. It calls
// create with one name after the other until there was no such file. further
// is that of Create.
func (u UndoPlace) Choose(path string, further bool, create func(name string) error) (string, error) {
	where := string(u)
	named := where != ""
	if st, err := os.Stat(where); named && err == nil && st.IsDir() {
		where, named = filepath.Join(where, filepath.Base(path)+".undo"), false
	} else if !named {
		where = path + ".undo"
	}
	for i := 0; ; i++ {
		name := where
		if i > 0 {
			name = fmt.Sprintf("%s.%d", where, i)
		}
		err := create(name)
		switch {
		case err == nil:
			return name, nil
		case !errors.Is(err, fs.ErrExist) || i == 1000:
			return "", fmt.Errorf("undo file: %w (--undo names another place)", err)
		case named && !further:
			return "", fmt.Errorf("undo file: %w: it belongs to an earlier repair", err)
		}
	}
}

// Sync implements UndoStore.
func (UndoPlace) Sync(name string) error { return backend.SyncDir(filepath.Dir(name)) }

// Remove implements UndoStore.
func (UndoPlace) Remove(name string) error { return os.Remove(name) }
