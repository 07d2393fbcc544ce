package fsck

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
)

// tempFile is a file without a name in os.TempDir().
func tempFile() (backend.File, error) {
	dir := os.TempDir()
	var f *os.File
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		f = os.NewFile(uintptr(fd), dir+"/(image-fsck)")
	} else {
		// Not every filesystem can make a file without a name.
		if f, err = os.CreateTemp(dir, ".image-fsck-*"); err != nil {
			return nil, err
		}
		if err := os.Remove(f.Name()); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	bf, err := backend.NewFile(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return bf, nil
}

// SpillFiles are temporary files that were made early, by a process that may
// not make any later.
type SpillFiles struct{ files chan backend.File }

// NewSpillFiles makes n of them. Where that is not possible, the plan that
// needs one gets the error.
func NewSpillFiles(n int) *SpillFiles {
	s := &SpillFiles{make(chan backend.File, n)}
	for range n {
		if f, err := tempFile(); err == nil {
			s.files <- f
		}
	}
	return s
}

// Get is for PlanOptions.Spill. Closing the file gives it back.
func (s *SpillFiles) Get() (backend.File, error) {
	select {
	case f := <-s.files:
		return &spillFile{File: f, home: s}, nil
	default:
		return tempFile()
	}
}

// Close closes the files that were given back.
func (s *SpillFiles) Close() error {
	var errs []error
	for {
		select {
		case f := <-s.files:
			errs = append(errs, f.Close())
		default:
			return errors.Join(errs...)
		}
	}
}

type spillFile struct {
	backend.File
	home *SpillFiles
}

func (f *spillFile) Close() error {
	if err := f.File.Truncate(0); err != nil {
		return errors.Join(err, f.File.Close())
	}
	f.home.files <- f.File
	return nil
}
