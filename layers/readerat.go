package layers

import (
	"context"
	"io"
)

// ReaderAt is the stack as an io.ReaderAt, for one call that has ctx.
func (s *Stack) ReaderAt(ctx context.Context) io.ReaderAt { return readerAt{ctx, s} }

type readerAt struct {
	ctx   context.Context
	stack *Stack
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) { return r.stack.ReadAt(r.ctx, p, off) }
