package rewrite

import (
	"context"
	"time"
)

// pacer keeps to a rate.
type pacer struct {
	ctx   context.Context
	rate  int64 // bytes a second, 0 for no limit
	begun time.Time
	done  int64
}

// add tells that n bytes were read or moved, and waits until that many are
// due.
func (p *pacer) add(n int64) error {
	if err := p.ctx.Err(); err != nil || p.rate <= 0 {
		return err
	}
	if p.begun.IsZero() {
		p.begun = time.Now()
	}
	p.done += n
	due := time.Duration(float64(p.done) / float64(p.rate) * float64(time.Second))
	wait := due - time.Since(p.begun)
	if wait < time.Millisecond {
		return nil
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}
