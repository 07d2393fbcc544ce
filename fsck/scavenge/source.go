package scavenge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/imagestack/imagestack/backend"
)

// ErrMemory says that the bound of memory is too small for the image.
var ErrMemory = errors.New("the memory bound is too small")

const (
	window    = 2 << 20  // what a pass reads at once; a whole number of qcow2 clusters
	lookahead = 64 << 10 // the largest structure that is looked at
	sector    = 512
)

// source is the damaged file.
type source struct {
	f    backend.File
	size int64
	// left is the memory that may still be used, in bytes.
	left     int64
	progress func(pass string, done, total int64)
	// bad counts bytes that could not be read.
	bad int64
	// failed is the first error of the system: what was asked for counts as
	// lost, and the user has to know why.
	failed error
}

// take accounts for n bytes of memory.
func (s *source) take(n int64, what string) error {
	if n > s.left {
		return fmt.Errorf("%w for %s: %d more bytes are needed (see --memory)", ErrMemory, what, n-s.left)
	}
	s.left -= n
	return nil
}

// append1 is append of one item for lists that grow with what the image says:
// their memory, size bytes an item, is taken from s.
func append1[T any](s *source, list []T, item T, size int64, what string) ([]T, error) {
	if len(list) == cap(list) {
		grow := max(1024, len(list))
		if err := s.take(int64(grow)*size, what); err != nil {
			return list, err
		}
		list = slices.Grow(list, grow)
	}
	return append(list, item), nil
}

// read fills p from off; what lies behind the end of the file is zero, and ok
// is false when something could not be read.
func (s *source) read(p []byte, off int64) (ok bool) {
	n, err := s.f.ReadAt(p, off)
	clear(p[max(n, 0):])
	if err == nil || errors.Is(err, io.EOF) {
		return true
	}
	if s.failed == nil {
		s.failed = err
	}
	return false
}

// each calls visit for every window of the file that holds data. b reaches up
// to lookahead bytes behind the n bytes of the window itself.
func (s *source) each(ctx context.Context, pass string, visit func(b []byte, n int, off int64) error) error {
	buf := make([]byte, window+lookahead)
	for off := int64(0); off < s.size; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		data, err := s.f.SeekData(off)
		switch {
		case errors.Is(err, io.EOF):
			data = s.size
		case err != nil:
			data = off // cannot tell
		}
		if off = max(off, data&^(window-1)); off >= s.size {
			break
		}
		n := min(window, s.size-off)
		b := buf[:min(window+lookahead, s.size-off)]
		if !s.read(b, off) {
			s.readPieces(b[:n], off)
			b = b[:n]
		}
		if err := visit(b, int(n), off); err != nil {
			return err
		}
		off += n
		if s.progress != nil {
			s.progress(pass, off, s.size)
		}
	}
	if s.progress != nil {
		s.progress(pass, s.size, s.size)
	}
	return nil
}

// readPieces reads what can be read of a window that cannot be read whole.
func (s *source) readPieces(b []byte, off int64) {
	for at := 0; at < len(b); at += 4096 {
		p := b[at:min(at+4096, len(b))]
		if !s.read(p, off+int64(at)) {
			clear(p)
			s.bad += int64(len(p))
		}
	}
}

// sameBytes tells whether the n bytes at a and those at b could be read and are
// the same.
func (s *source) sameBytes(a, b, n int64) bool {
	x, y := make([]byte, 256<<10), make([]byte, 256<<10)
	for at := int64(0); at < n; at += int64(len(x)) {
		c := min(int64(len(x)), n-at)
		if !s.read(x[:c], a+at) || !s.read(y[:c], b+at) || !bytes.Equal(x[:c], y[:c]) {
			return false
		}
	}
	return true
}
