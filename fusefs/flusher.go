package fusefs

import (
	"sync"
	"sync/atomic"
	"time"
)

// flusher syncs changes that nobody syncs, some seconds after the first of
// them, as the kernel's writeback does for a file on a disk: a crash of the
// server then loses little even of what was never fsynced.
type flusher struct {
	since atomic.Int64 // time of the first unsynced change, 0 for none
	ended atomic.Int64 // changes that have ended
	// covered is one more than the changes that a sync covers which has
	// succeeded, 0 before the first.
	covered atomic.Int64
	done    chan struct{}
	end     sync.Once
	wg      sync.WaitGroup

	mu   sync.Mutex
	fail error // of a background sync, until somebody was told
}

// mark notes a change that ended at that time.
func (f *flusher) mark(now int64) {
	f.ended.Add(1)
	if f.since.Load() == 0 {
		f.since.CompareAndSwap(0, now)
	}
}

// flush runs sync; changes that come meanwhile count anew. When a sync that
// has succeeded began after the last change ended, there is nothing to do: the
// kernel passes the fsyncs of a file on one after the other, and the first
// covers what those behind it wait for (group commit).
func (f *flusher) flush(sync func() error) error {
	old := f.since.Swap(0)
	covers := f.ended.Load() + 1
	if f.covered.Load() == covers {
		return nil
	}
	err := sync()
	if err == nil {
		f.covered.Store(covers) // also when a later one was faster: then one more is made than needed
	} else if old != 0 {
		f.since.CompareAndSwap(0, time.Now().UnixNano())
	}
	return err
}

// start begins syncing in the background.
func (f *flusher) start(after time.Duration, sync func() error, report func(error)) {
	f.done = make(chan struct{})
	f.wg.Go(func() {
		tick := time.NewTicker(max(after/4, time.Millisecond))
		defer tick.Stop()
		for {
			select {
			case <-f.done:
				return
			case now := <-tick.C:
				since := f.since.Load()
				if since == 0 || now.UnixNano()-since < int64(after-after/4) {
					continue
				}
				if err := f.flush(sync); err != nil {
					f.mu.Lock()
					f.fail = err
					f.mu.Unlock()
					report(err)
				}
			}
		}
	})
}

// stop ends the background work and waits for a sync under way.
func (f *flusher) stop() {
	f.end.Do(func() {
		if f.done != nil {
			close(f.done)
		}
	})
	f.wg.Wait()
}

// failure takes the error of a background sync that nobody was told yet: the
// next fsync must fail, or its caller would believe that the data is safe.
func (f *flusher) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.fail
	f.fail = nil
	return err
}
