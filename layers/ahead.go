package layers

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/imagestack/imagestack/blockmap"
)

// ahead decompresses clusters before a sequential reader of small pieces asks
// for them, so that several processors work for one that asks for the next
// piece only when it has the last one. (The kernel reads ahead into the page
// cache, but not for who reads with O_DIRECT.) With several such readers at a
// time nobody is taken for one. A nil ahead does nothing.
type ahead struct {
	stack  *Stack
	window int64 // clusters that are decompressed beforehand, and at a time
	bytes  int64 // at most

	last  atomic.Int64 // beginning of the cluster that was read last, in guest bytes
	inRow atomic.Bool  // it is one of several in a row

	mu        sync.Mutex
	row       int   // clusters that were read one after the other
	next, end int64 // what is still to be decompressed
	workers   int64
}

const (
	// sequentialRow is how many steps in a row make a sequential reader.
	sequentialRow = 3
	// sequentialStep is the longest of them in clusters: those between are
	// none that are compressed.
	sequentialStep = 4
	// aheadClusters bounds the clusters that are decompressed beforehand,
	// and aheadBytes, or a quarter of the cache, their bytes.
	aheadClusters = 8
	aheadBytes    = 4 << 20
)

func newAhead(s *Stack, cache *Cache) *ahead {
	return &ahead{stack: s, window: int64(max(2, min(runtime.GOMAXPROCS(0), aheadClusters))), bytes: min(aheadBytes, cache.Budget()/4)}
}

// read notes that a part of the cluster at guest, of that size, is being read,
// orders those behind it when the reader is a sequential one, and reports
// whether it is.
func (a *ahead) read(guest, cluster int64) bool {
	if a == nil {
		return false
	}
	if a.last.Load() == guest {
		return a.inRow.Load()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	step := guest - a.last.Swap(guest)
	if step <= 0 || step > sequentialStep*cluster {
		a.row, a.next, a.end = 0, 0, 0
	} else {
		a.row++
	}
	window := min(a.window, a.bytes/cluster)
	inRow := a.row >= sequentialRow && window > 0
	a.inRow.Store(inRow)
	if !inRow {
		return false
	}
	a.next = max(a.next, guest+cluster)
	a.end = min(guest+(window+1)*cluster, a.stack.size)
	for at := a.next; at < a.end && a.workers < window; at += cluster {
		a.workers++
		a.stack.later.start(func(ctx context.Context) { a.run(ctx, cluster) })
	}
	return true
}

// run decompresses what is ordered until nothing is left.
func (a *ahead) run(ctx context.Context, cluster int64) {
	for {
		a.mu.Lock()
		at := a.next
		if at >= a.end || ctx.Err() != nil {
			a.workers--
			a.mu.Unlock()
			return
		}
		a.next += cluster
		a.mu.Unlock()
		a.fetch(ctx, at, cluster)
	}
}

// errPassed ends what the reader has no use for any more.
var errPassed = errors.New("the reader is further on")

// fetch keeps the cluster of n bytes at guest, if it is a compressed one that
// the reader has not come to. What is wrong with it is told to who asks for it.
func (a *ahead) fetch(ctx context.Context, guest, n int64) {
	s := a.stack
	if s.top != nil {
		r := s.top.Readers()
		defer r.Exit(r.Enter(guest))
	}
	var room [1]blockmap.Extent
	found, err := s.Lookup(ctx, guest, min(n, s.size-guest), room[:0])
	if err != nil || found[0].Kind != blockmap.Packed || s.layers[found[0].Layer].Granule() != n {
		return
	}
	e := found[0]
	_, _ = s.packed[e.Layer].Load(e.Host, func() (any, int64, error) {
		if a.last.Load() >= guest {
			return nil, 0, errPassed
		}
		return s.unpack(ctx, e)
	})
}
