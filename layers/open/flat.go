package open

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/raw"
)

// flatBlock is what a filesystem with reflinks shares at least: its block.
const flatBlock = 4096

// flatten returns a stack of one raw layer with the content of s, which it
// takes over: a file without a name that shares the storage of the files of s
// (reflinks, by clone: backend.CloneRange). The files of s stay open, and
// locked, as long as it lives. After an error s and f are still the caller's.
func flatten(ctx context.Context, s *layers.Stack, f backend.File, writable bool, clone cloner) (*layers.Stack, error) {
	fl := flattener{s: s, f: f, clone: clone}
	if err := fl.fill(ctx); err != nil {
		return nil, err
	}
	img, err := raw.Open(ctx, f, layers.OpenOptions{Writable: writable})
	if err != nil {
		return nil, err
	}
	return layers.NewStack([]layers.Layer{img}, layers.StackOptions{Writable: writable, Closers: []io.Closer{s}})
}

type cloner func(dst, src backend.File, srcOff, off, n int64) error

type flattener struct {
	s      *layers.Stack
	f      backend.File
	clone  cloner
	shared bool // a clone has worked
	buf    []byte
}

func (fl *flattener) fill(ctx context.Context) error {
	size := fl.s.Size()
	if err := fl.f.Truncate(size); err != nil {
		return err
	}
	room := make([]blockmap.Extent, 0, 1024)
	for at := int64(0); at < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		found, err := fl.s.Lookup(ctx, at, size-at, room)
		if err != nil {
			return err
		}
		for _, e := range found {
			switch e.Kind {
			case blockmap.Data:
				err = fl.share(ctx, e)
			case blockmap.Packed:
				err = fl.copy(ctx, e.Guest, e.Len)
			}
			if err != nil {
				return err
			}
			at = e.End()
		}
	}
	return nil
}

// share lets the file share the storage of a Data extent: all its whole
// blocks, the rest is copied.
func (fl *flattener) share(ctx context.Context, e blockmap.Extent) error {
	src := fl.s.Layers()[e.Layer].Data()
	head := min(-e.Guest&(flatBlock-1), e.Len)
	body := (e.Len - head) &^ (flatBlock - 1)
	if (e.Host+head)%flatBlock != 0 {
		head, body = e.Len, 0 // never on the same block boundary
	}
	if body > 0 {
		err := fl.clone(fl.f, src, e.Host+head, e.Guest+head, body)
		switch {
		case err == nil:
			fl.shared = true
		case !errors.Is(err, backend.ErrNotShared):
			return err
		case !fl.shared || !errors.Is(err, unix.EINVAL):
			return fmt.Errorf("a flat view shares storage with %s, which takes a filesystem with reflinks (xfs, btrfs) "+
				"that holds all files of the image: %w", src.Name(), err)
		default:
			head, body = e.Len, 0 // mapped behind the end of the file, perhaps: reading will tell
		}
	}
	if err := fl.copy(ctx, e.Guest, head); err != nil {
		return err
	}
	return fl.copy(ctx, e.Guest+head+body, e.Len-head-body)
}

// copy copies n bytes of the disk at off.
func (fl *flattener) copy(ctx context.Context, off, n int64) error {
	if n > 0 && fl.buf == nil {
		fl.buf = make([]byte, 1<<20)
	}
	for n > 0 {
		p := fl.buf[:min(n, int64(len(fl.buf)))]
		if _, err := fl.s.ReadAt(ctx, p, off); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if _, err := fl.f.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}
