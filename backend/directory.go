package backend

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// SyncDir makes the names in the directory dir durable: those of files that
// were made, renamed or removed there (POSIX has an fsync of a file do nothing
// for its name).
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// SyncName makes the name of the new file at path durable. Its error says that
// the file is there and complete nevertheless.
func SyncName(path string) error {
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("%s is complete, but a power cut may take its name: %w", path, err)
	}
	return nil
}
