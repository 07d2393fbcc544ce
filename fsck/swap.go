package fsck

import (
	"errors"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/imagestack/imagestack/backend"
)

// swap replaces the file at path by one with the given content, at once and
// durably, and opens it.
func (h *holder) swap(path string, content []byte) (backend.File, error) {
	p, err := renameio.NewPendingFile(path, renameio.WithExistingPermissions(), renameio.WithTempDir(filepath.Dir(path)))
	if err != nil {
		return nil, err
	}
	defer func() { _ = p.Cleanup() }() // nothing to do once it is in its place
	if _, err := p.Write(content); err != nil {
		return nil, err
	}
	if err := p.CloseAtomicallyReplace(); err != nil {
		return nil, err
	}
	if err := backend.SyncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	f, err := backend.Open(path, backend.Options{Writable: true})
	if err != nil {
		return nil, err
	}
	key := filepath.Clean(path)
	err = h.files[key].Close()
	h.files[key] = f
	return f, errors.Join(err)
}
