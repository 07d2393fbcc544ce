package backend

import (
	"errors"
	"os"
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
