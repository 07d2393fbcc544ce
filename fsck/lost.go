package fsck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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

// saveLost copies what the plan quarantines.
func (p *Plan) saveLost(ctx context.Context, store LostStore) error {
	if len(p.lost) == 0 {
		return nil
	}
	if store == nil {
		return fmt.Errorf("%w: nowhere to keep lost content", ErrPlan)
	}
	for _, l := range p.lost {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := p.saveOne(store, l); err != nil {
			return fmt.Errorf("lost+found: %w", err)
		}
	}
	return store.Sync()
}

func (p *Plan) saveOne(store LostStore, l Lost) (err error) {
	f, err := store.Create(l.Name())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var src io.Reader = bytes.NewReader(l.Bytes)
	if l.Bytes == nil {
		src = io.NewSectionReader(p.f, l.Host, l.Len)
	}
	buf := make([]byte, 64<<10)
	for at := int64(0); ; {
		n, err := io.ReadFull(src, buf)
		if n > 0 {
			if _, err := f.WriteAt(buf[:n], at); err != nil {
				return err
			}
			at += int64(n)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return f.Sync()
		}
		if err != nil {
			return err
		}
	}
}
