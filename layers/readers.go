package layers

import (
	"sync"
	"sync/atomic"
)

// readerShards spreads the counters so that readers on different processors
// rarely touch the same cache line.
const readerShards = 16

// Readers counts the users of looked-up extents, so that whoever releases
// space can wait until nobody uses the old mapping any more. It is a
// sleepable read-copy-update counter with two phases: entering costs one
// atomic add and never waits.
type Readers struct {
	phase atomic.Uint32
	count [2][readerShards]struct {
		n atomic.Int64
		_ [56]byte // one cache line each
	}
	mu sync.Mutex // one Wait at a time
}

// Token is what Enter returns and Exit takes.
type Token uint32

// Enter begins a use. hint spreads the load (any cheap number that differs
// between concurrent callers, as an offset does).
func (r *Readers) Enter(hint int64) Token {
	shard := uint32(uint64(hint)>>12) % readerShards
	phase := r.phase.Load() & 1
	r.count[phase][shard].n.Add(1)
	return Token(phase<<16 | shard)
}

// Exit ends the use that t began.
func (r *Readers) Exit(t Token) {
	r.count[t>>16][t&0xffff].n.Add(-1)
}

// Wait returns when every use that had begun before the call has ended; it may
// wait for some that began during it, but never for those that begin after
// both of its turns. It must not be called between Enter and Exit.
func (r *Readers) Wait() {
	r.mu.Lock()
	defer r.mu.Unlock()
	// A reader may load the phase, be delayed, and count itself in the old
	// phase after it was drained; turning twice catches it.
	for range 2 {
		old := r.phase.Add(1) - 1
		waitFor(func() bool {
			var n int64
			for i := range r.count[old&1] {
				n += r.count[old&1][i].n.Load()
			}
			return n == 0
		})
	}
}
