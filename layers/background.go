package layers

import (
	"context"
	"sync"
)

// background runs what readers will want soon. A nil one runs nothing.
type background struct {
	ctx    context.Context
	cancel context.CancelFunc
	mu     sync.Mutex
	closed bool
	work   sync.WaitGroup
}

func newBackground() *background {
	b := new(background)
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b
}

// start runs f, unless nothing is to be begun any more.
func (b *background) start(f func(context.Context)) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.work.Go(func() { f(b.ctx) })
	}
}

// stop returns when nothing is under way any more, and nothing will be.
func (b *background) stop() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	b.work.Wait()
}
