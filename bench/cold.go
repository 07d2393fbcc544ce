package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pageSize    = 4096
	pageSamples = 200
	// coldLimit is the largest share of pages that may be in the page cache
	// before a cold run, warmLimit the smallest before a warm one.
	coldLimit = 0.02
	warmLimit = 0.97
)

// dropTries is how often pages are dropped: those that were read just now may
// still be on their way into the kernel's lists, and stay.
const dropTries = 10

// dropPages drops the pages of files from the page cache and makes sure that
// they are gone. The rest of the machine is left alone.
func dropPages(paths []string) error {
	var share float64
	for try := range dropTries {
		time.Sleep(time.Duration(try) * 20 * time.Millisecond)
		for _, p := range paths {
			if err := withFile(p, func(f *os.File) error {
				return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
			}); err != nil {
				return err
			}
		}
		var err error
		if share, err = cachedShare(paths); err != nil || share <= coldLimit {
			return err
		}
	}
	return fmt.Errorf("the pages cannot be dropped: %.0f %% are still in the page cache (tmpfs, or in use)", share*100)
}

// warmTries is how often files are read into the page cache: the kernel may
// take pages away again while it makes room.
const warmTries = 3

// warmPages reads files into the page cache. It reads them also when all pages
// are there: to the host of a virtual machine memory that was not used for some
// seconds may have been worth something else, and the first to use it again pays
// for that, up to three times the processor time of a long write.
func warmPages(paths []string) error {
	var share float64
	for range warmTries {
		for _, p := range paths {
			if err := withFile(p, func(f *os.File) error {
				// Through memory, not by sendfile.
				_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 1<<20))
				return err
			}); err != nil {
				return err
			}
		}
		var err error
		if share, err = cachedShare(paths); err != nil || share >= warmLimit {
			return err
		}
	}
	return fmt.Errorf("only %.0f %% of the image stay in the page cache: the machine has too little memory for -size", share*100)
}

// cachedShare estimates the share of the data of files that is in the page
// cache. It asks for single pages without waiting for the disk: RWF_NOWAIT
// fails where a page is not there. Holes do not count. What the question itself
// brings in is forgotten again.
func cachedShare(paths []string) (float64, error) {
	var asked, there int
	for _, p := range paths {
		err := withFile(p, func(f *os.File) error {
			st, err := f.Stat()
			if err != nil {
				return err
			}
			fd := int(f.Fd())
			if err := unix.Fadvise(fd, 0, 0, unix.FADV_RANDOM); err != nil { // no readahead
				return err
			}
			pages := st.Size() / pageSize
			buf := make([]byte, 1)
			for i := range min(pages, int64(max(4, pageSamples/len(paths)))) {
				off := int64(mix(uint64(i)+7)%uint64(pages)) * pageSize
				if data, err := f.Seek(off, unix.SEEK_DATA); err != nil || data != off {
					continue // a hole
				}
				asked++
				_, err := unix.Preadv2(fd, [][]byte{buf}, off, unix.RWF_NOWAIT)
				switch {
				case err == nil:
					there++
				case errors.Is(err, unix.EAGAIN):
					_ = unix.Fadvise(fd, off, pageSize, unix.FADV_DONTNEED)
				case errors.Is(err, unix.EOPNOTSUPP):
					return errors.New("this filesystem cannot tell what is in the page cache")
				default:
					return err
				}
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	if asked == 0 {
		return 0, errors.New("no data in the image")
	}
	return float64(there) / float64(asked), nil
}

func withFile(path string, do func(*os.File) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := do(f); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
