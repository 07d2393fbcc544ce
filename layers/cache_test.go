package layers

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func loadInt(v int64, size int64) func() (any, int64, error) {
	return func() (any, int64, error) { return v, size, nil }
}

func TestCacheKeepsItsBudget(t *testing.T) {
	c := NewCache(1 << 20)
	a, b := c.NewOwner(), c.NewOwner()
	for i := range int64(5000) {
		for n, o := range []Owner{a, b} {
			p, err := o.Load(i, loadInt(i*2+int64(n), 4096))
			if err != nil {
				t.Fatal(err)
			}
			if got := p.Value.(int64); got != i*2+int64(n) {
				t.Fatalf("page %d of owner %d holds %d", i, n, got)
			}
			if c.Bytes() > c.Budget() {
				t.Fatalf("%d bytes cached of %d", c.Bytes(), c.Budget())
			}
		}
	}
	if c.Bytes() < c.Budget()/2 {
		t.Errorf("only %d of %d bytes in use after 40 MB of pages", c.Bytes(), c.Budget())
	}
	a.DropAll()
	b.DropAll()
	if c.Bytes() != 0 {
		t.Errorf("%d bytes left after all was dropped", c.Bytes())
	}
}

func TestCacheKeepsPinnedPages(t *testing.T) {
	c := NewCache(1 << 20)
	o := c.NewOwner()
	pinned, err := o.Pin(1<<40, loadInt(7, 4096))
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(2000) {
		if _, err := o.Load(i, loadInt(i, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	if o.Get(1<<40) != pinned {
		t.Fatal("a pinned page was evicted")
	}
	pinned.Unpin()
	for i := range int64(2000) {
		if _, err := o.Load(10_000+i, loadInt(i, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	if o.Get(1<<40) != nil {
		t.Error("an unpinned page survived twice the budget")
	}
}

func TestCacheFailedLoadLeavesNothing(t *testing.T) {
	c := NewCache(0)
	o := c.NewOwner()
	boom := errors.New("boom")
	if _, err := o.Load(3, func() (any, int64, error) { return nil, 0, boom }); !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if o.Get(3) != nil || c.Bytes() != 0 {
		t.Error("a failed load left a page")
	}
	if p := o.Put(3, int64(1), 8); p.Value != int64(1) {
		t.Error("Put did not store")
	}
	if p := o.Put(3, int64(2), 8); p.Value != int64(1) {
		t.Error("Put replaced a page")
	}
}

// A page is never loaded twice at the same time, and never loaded anew while
// somebody has it pinned.
func TestCacheLoadsOnceAtATime(t *testing.T) {
	c := NewCache(256 << 10)
	o := c.NewOwner()
	var loading [64]atomic.Int32
	var pinned [64]atomic.Int32
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(g)))
			for range 5000 {
				i := r.Int64N(64)
				p, err := o.Pin(i, func() (any, int64, error) {
					if loading[i].Add(1) != 1 || pinned[i].Load() != 0 {
						t.Errorf("page %d loaded while in use", i)
					}
					loading[i].Add(-1)
					return i, 16 << 10, nil
				})
				if err != nil || p.Value.(int64) != i {
					t.Errorf("page %d: %v, %v", i, p, err)
					return
				}
				pinned[i].Add(1)
				if o.Get(i) != p {
					t.Errorf("page %d is not the one that is pinned", i)
				}
				pinned[i].Add(-1)
				p.Unpin()
			}
		})
	}
	wg.Wait()
}

func TestCacheHitDoesNotAllocate(t *testing.T) {
	o := NewCache(0).NewOwner()
	o.Put(5, int64(1), 8)
	if n := testing.AllocsPerRun(100, func() {
		if o.Get(5) == nil || o.Get(6) != nil {
			t.Fatal("wrong page")
		}
	}); n != 0 {
		t.Errorf("%v allocations a hit", n)
	}
}

func TestReadersWait(t *testing.T) {
	var r Readers
	r.Wait() // nobody there
	first := r.Enter(0)
	done := make(chan struct{})
	go func() { r.Wait(); close(done) }()
	select {
	case <-done:
		t.Fatal("Wait did not wait for a reader that had begun")
	case <-time.After(20 * time.Millisecond):
	}
	r.Exit(first)
	// Readers come and go all the time without holding it up for ever.
	for range 1000 {
		r.Exit(r.Enter(1 << 20))
	}
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("Wait does not return")
	}
}

// The use that Readers exists for: what a reader found published stays intact
// until it is done with it.
func TestReadersProtectReleasedSpace(t *testing.T) {
	var r Readers
	type slot struct{ alive atomic.Bool }
	var published atomic.Pointer[slot]
	s := new(slot)
	s.alive.Store(true)
	published.Store(s)
	var stop atomic.Bool
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := int64(0); !stop.Load(); i++ {
				tok := r.Enter(i<<12 + int64(g))
				p := published.Load()
				for range 50 {
					if !p.alive.Load() {
						t.Error("a reader sees released space")
						stop.Store(true)
					}
				}
				r.Exit(tok)
			}
		})
	}
	// The scheduler may let a reader stand still inside for some 10 ms, when
	// more of them spin than there are processors.
	end := time.Now().Add(time.Second)
	for i := 0; i < 2000 && (i < 10 || time.Now().Before(end)); i++ {
		next := new(slot)
		next.alive.Store(true)
		old := published.Swap(next)
		r.Wait()
		old.alive.Store(false)
	}
	stop.Store(true)
	wg.Wait()
}

// A caller is served only by a flush that began after it called, and many
// callers share few flushes.
func TestCommitServesOnlyLaterFlushes(t *testing.T) {
	var c Commit
	var clock, flushes atomic.Int64
	var lastStart atomic.Int64
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for range 50 {
				called := clock.Add(1)
				err := c.Do(func() error {
					lastStart.Store(clock.Add(1))
					flushes.Add(1)
					time.Sleep(50 * time.Microsecond)
					return nil
				})
				if err != nil || lastStart.Load() < called {
					t.Errorf("served by a flush that began before the call (%v)", err)
				}
			}
		})
	}
	wg.Wait()
	if n := flushes.Load(); n >= 32*50/2 {
		t.Errorf("%d flushes for %d calls: nothing was shared", n, 32*50)
	}
	boom := errors.New("boom")
	if err := c.Do(func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("error lost: %v", err)
	}
	if err := c.Do(func() error { return nil }); err != nil {
		t.Errorf("an old error came back: %v", err)
	}
}
