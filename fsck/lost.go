package fsck

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
)

// LostStore keeps content that has no place in a repaired image.
type LostStore interface {
	// Create makes an empty file with that name, or one that ends in a number
	// when the name is taken.
	Create(name string) (backend.File, error)
	// Sync makes the names durable.
	Sync() error
}

// LostDir is a LostStore in a directory, which it makes when it is needed.
type LostDir string

// Create implements LostStore.
func (d LostDir) Create(name string) (backend.File, error) {
	if err := os.Mkdir(string(d), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	for i := 0; ; i++ {
		path := filepath.Join(string(d), name)
		if i > 0 {
			path = fmt.Sprintf("%s.%d", path, i)
		}
		f, err := backend.Open(path, backend.Options{Writable: true, Create: true, Exclusive: true})
		if !errors.Is(err, fs.ErrExist) || i == 1000 {
			return f, err
		}
	}
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

// saveLost copies what the plan quarantines.
func (p *Plan) saveLost(ctx context.Context, store LostStore) error {
	if len(p.lost) == 0 && p.lostRest.Len() == 0 {
		return nil
	}
	if store == nil {
		return fmt.Errorf("%w: nowhere to keep lost content", ErrPlan)
	}
	for _, l := range p.lost {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		err := inLost(store, l.Name(), func(f backend.File) error {
			if l.Bytes != nil {
				_, err := f.WriteAt(l.Bytes, 0)
				return err
			}
			return p.copyLost(ctx, f, 0, l.Host, l.Len)
		})
		if err != nil {
			return err
		}
	}
	if p.lostRest.Len() > 0 {
		err := inLost(store, LostRest, func(f backend.File) error {
			for r := range p.lostRest.Ranges() {
				if err := p.copyLost(ctx, f, r.Off, r.Off, r.Len); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return store.Sync()
}

// inLost makes a file and fills it.
func inLost(store LostStore, name string, fill func(backend.File) error) error {
	f, err := store.Create(name)
	if err != nil {
		return fmt.Errorf("lost+found: %w", err)
	}
	if err := fill(f); err != nil {
		return errors.Join(fmt.Errorf("lost+found: %w", err), f.Close())
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("lost+found: %w", err)
	}
	return nil
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
