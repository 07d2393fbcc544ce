package layers

import "sync"

// Commit lets concurrent callers share one flush: a caller that arrives while
// a flush runs waits for the next one, and all that wait get it together. A
// caller is served only by a flush that began after it called.
type Commit struct {
	mu   sync.Mutex
	next *round // the flush that callers arriving now will get
	run  sync.Mutex
}

type round struct {
	once sync.Once
	err  error
}

// Do runs flush, or shares the run of another caller, and returns its error.
func (c *Commit) Do(flush func() error) error {
	c.mu.Lock()
	if c.next == nil {
		c.next = new(round)
	}
	r := c.next
	c.mu.Unlock()

	c.run.Lock()
	defer c.run.Unlock()
	r.once.Do(func() {
		c.mu.Lock()
		c.next = nil // later callers need a flush of their own
		c.mu.Unlock()
		r.err = flush()
	})
	return r.err
}
