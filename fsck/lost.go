package fsck

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
)

// LostStore keeps content that has no place in a repaired image.
type LostStore interface {
	// Create makes an empty file with that name, or one that ends in a number
	// when the name is taken, and returns the name that it has. The error is
	// fs.ErrExist when no such name is left.
	Create(name string) (f backend.File, used string, err error)
	// Remove removes a file that Create has named so.
	Remove(used string) error
	// Sync makes the names durable.
	Sync() error
}

// LostDir is a LostStore in a directory, which it makes when it is needed, and
// which goes with the last file that Remove removes.
type LostDir string

// maxLostNames is how many files may have the same name but for their number.
const maxLostNames = 1000

// Create implements LostStore.
func (d LostDir) Create(name string) (f backend.File, used string, err error) {
	if err := d.make(); err != nil {
		return nil, "", err
	}
	for i := 0; ; i++ {
		used = name
		if i > 0 {
			used = fmt.Sprintf("%s.%d", name, i)
		}
		f, err = backend.Open(filepath.Join(string(d), used), backend.Options{Writable: true, Create: true, Exclusive: true})
		if err == nil {
			return f, used, nil
		}
		if !errors.Is(err, fs.ErrExist) || i == maxLostNames {
			return nil, "", errors.Join(err, d.removeEmpty())
		}
	}
}

// make makes the directory. What is there already has to be one: a link would
// lead the content of an image, and its owner, to anywhere.
func (d LostDir) make() error {
	err := os.Mkdir(string(d), 0o700)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, err := os.Lstat(string(d))
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return &fs.PathError{Op: "mkdir", Path: string(d), Err: unix.ENOTDIR}
	}
	return nil
}

// Remove implements LostStore.
func (d LostDir) Remove(used string) error {
	if err := os.Remove(filepath.Join(string(d), used)); err != nil {
		return err
	}
	return d.removeEmpty()
}

// removeEmpty removes the directory unless something is in it.
func (d LostDir) removeEmpty() error {
	if err := os.Remove(string(d)); err != nil && !errors.Is(err, fs.ErrExist) { // ENOTEMPTY is one
		return err
	}
	return nil
}

// Sync implements LostStore.
func (d LostDir) Sync() error {
	return errors.Join(backend.SyncDir(string(d)), backend.SyncDir(filepath.Dir(string(d))))
}

// Bounds of the pieces that have files of their own, for a plan: entries of a
// hostile image may name the same bytes again and again.
const (
	maxLostFiles = 4096
	maxLostTimes = 2 // their lengths together, in lengths of the image
)

// LostRest is the name of the file with what is more than that: all of it is at
// the offsets that it has in the image, with holes between.
const LostRest = "more.at-host-offsets"

// savedLost are the files that a plan has made in a LostStore.
type savedLost struct {
	store LostStore
	made  []string
}

// saveLost copies what the plan quarantines. After an error too, the caller
// drops what it returns unless the image is changed.
func (p *Plan) saveLost(ctx context.Context, store LostStore) (*savedLost, error) {
	s := &savedLost{store: store}
	if len(p.lost) == 0 && p.lostRest.Len() == 0 {
		return s, nil
	}
	if store == nil {
		return s, fmt.Errorf("%w: nowhere to keep lost content", ErrPlan)
	}
	var rest blockmap.Set
	for r := range p.lostRest.Ranges() {
		rest.Add(r.Off, r.Len)
	}
	for _, l := range p.lost {
		if err := ctx.Err(); err != nil {
			return s, context.Cause(ctx)
		}
		err := s.file(l.Name(), func(f backend.File) error { return p.copyLost(ctx, f, 0, l.Host, l.Len) })
		if errors.Is(err, errNoName) {
			rest.Add(l.Host, l.Len)
		} else if err != nil {
			return s, err
		}
	}
	if rest.Len() > 0 {
		err := s.file(LostRest, func(f backend.File) error {
			for r := range rest.Ranges() {
				if err := p.copyLost(ctx, f, r.Off, r.Off, r.Len); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return s, err
		}
	}
	return s, store.Sync()
}

// errNoName: all names of a piece are taken, by earlier repairs perhaps.
var errNoName = errors.New("no name is left")

// file makes a file and fills it.
func (s *savedLost) file(name string, fill func(backend.File) error) error {
	f, used, err := s.store.Create(name)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("lost+found: %w: %w", errNoName, err)
	}
	if err != nil {
		return fmt.Errorf("lost+found: %w", err)
	}
	s.made = append(s.made, used)
	if err := fill(f); err != nil {
		return errors.Join(fmt.Errorf("lost+found: %w", err), f.Close())
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("lost+found: %w", err)
	}
	return nil
}

// drop removes the files: the image still has what is in them.
func (s *savedLost) drop() error {
	var errs []error
	for _, used := range s.made {
		if err := s.store.Remove(used); err != nil {
			errs = append(errs, fmt.Errorf("lost+found: %w", err))
		}
	}
	return errors.Join(errs...)
}

// copyLost copies n bytes of the image at host to f at dst, holes as holes.
// What the image does not have any more, because it ends, is left out.
func (p *Plan) copyLost(ctx context.Context, f backend.File, dst, host, n int64) error {
	n = min(n, p.old-host)
	if n <= 0 {
		return nil
	}
	buf := make([]byte, min(n, undoBlock))
	holes := holeFinder{f: p.f}
	for at := int64(0); at < n; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		data, err := holes.next(host + at)
		if err != nil {
			return err
		}
		if at = max(at, data-host); at >= n {
			break
		}
		b := buf[:min(n-at, undoBlock)]
		if err := p.readOld(b, host+at); err != nil {
			return err
		}
		if _, err := f.WriteAt(b, dst+at); err != nil {
			return err
		}
		at += int64(len(b))
	}
	return f.Truncate(dst + n)
}
