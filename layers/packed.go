package layers

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/imagestack/imagestack/blockmap"
)

// readPacked fills p with the compressed clusters, or parts of them, that e
// covers, for a read of that many bytes in all. (Two clusters that name the same
// compressed bytes can be one extent.)
func (s *Stack) readPacked(ctx context.Context, l Layer, e blockmap.Extent, p []byte, request int) error {
	cluster := l.Granule()
	for len(p) > 0 {
		within := e.Guest & (cluster - 1)
		n := int(min(cluster-within, int64(len(p))))
		if err := s.readPackedPart(ctx, l, e, p[:n], within, request); err != nil {
			return err
		}
		e.Guest += int64(n)
		e.Len -= int64(n)
		p = p[n:]
	}
	return nil
}

// readPackedPart fills p from one cluster. A whole cluster is decompressed in
// place. Of others the decompressed cluster is kept, since its neighbours are
// asked for next; but not when a read in its middle is the first. A sequential
// reader finds it decompressed, and does not come back for a whole one.
func (s *Stack) readPackedPart(ctx context.Context, l Layer, e blockmap.Extent, p []byte, within int64, request int) error {
	cluster := l.Granule()
	owner, whole := s.packed[e.Layer], int64(len(p)) == cluster
	inRow := int64(request) <= cluster && s.ahead.read(e.Guest-within, cluster)
	page := owner.Get(e.Host)
	switch {
	case page != nil:
	case whole && !inRow, !whole && !inRow && !s.parts.again(e.Layer, e.Host) && within > 0:
		return l.Unpack(ctx, e, within, p)
	default:
		var err error
		page, err = owner.Load(e.Host, func() (any, int64, error) { return s.unpack(ctx, e) })
		if err != nil {
			return err
		}
	}
	copy(p, page.Value.([]byte)[within:])
	if whole && inRow {
		owner.Drop(e.Host)
	}
	return nil
}

// unpack is the decompressed cluster that e is a part of, for a Cache.
func (s *Stack) unpack(ctx context.Context, e blockmap.Extent) (any, int64, error) {
	l := s.layers[e.Layer]
	b := make([]byte, l.Granule())
	return b, l.Granule(), l.Unpack(ctx, e, 0, b)
}

// helpers are the goroutines that may decompress beside those that read: as
// many as there are processors besides.
type helpers chan struct{}

func newHelpers() helpers { return make(helpers, max(1, runtime.GOMAXPROCS(0)-1)) }

// worthHelpBytes is how much must be decompressed for a helper to be worth
// its start.
const worthHelpBytes = 128 << 10

// worthHelp reports whether found is to be read by several.
func worthHelp(found []blockmap.Extent) bool {
	var n, bytes int64
	for _, e := range found {
		if e.Kind == blockmap.Packed {
			n++
			bytes += e.Len
		}
	}
	return n > 1 && bytes >= worthHelpBytes
}

// together is one read by several.
type together struct {
	s       *Stack
	ctx     context.Context
	found   []blockmap.Extent
	p       []byte
	request int          // length of the read that this is a part of
	next    atomic.Int64 // extent to be read next
	mu      sync.Mutex
	bad     int64 // the first one that failed
	err     error
	work    sync.WaitGroup
	help    func() // what a helper does
}

var togethers = sync.Pool{New: func() any {
	t := new(together)
	t.help = func() {
		t.read()
		<-t.s.helper
		t.work.Done()
	}
	return t
}}

// readTogether fills the beginning of p with the extents found, which follow
// each other, with what help there is, for a read of that many bytes in all.
// It returns the bytes in front of the first extent that failed.
func (s *Stack) readTogether(ctx context.Context, found []blockmap.Extent, p []byte, request int) (int, error) {
	t := togethers.Get().(*together)
	t.s, t.ctx, t.found, t.p, t.request, t.bad, t.err = s, ctx, found, p, request, int64(len(found)), nil
	t.next.Store(0)
	for range len(found) - 1 {
		if !s.helper.take() {
			break
		}
		t.work.Add(1)
		go t.help()
	}
	t.read()
	t.work.Wait()
	end, err := found[0].Guest, t.err
	for _, e := range found[:t.bad] {
		end = e.End()
	}
	t.s, t.ctx, t.found, t.p, t.err = nil, nil, nil, nil, nil
	togethers.Put(t)
	return int(end - found[0].Guest), err
}

// take reports whether there was a helper to take.
func (h helpers) take() bool {
	select {
	case h <- struct{}{}:
		return true
	default:
		return false
	}
}

// read fills the pieces that nobody else has begun with.
func (t *together) read() {
	for {
		i := t.next.Add(1) - 1
		if i >= int64(len(t.found)) {
			return
		}
		e := t.found[i]
		at := e.Guest - t.found[0].Guest
		if err := t.s.readExtent(t.ctx, e, t.p[at:at+e.Len], t.request, false); err != nil {
			t.fail(i, err)
			return
		}
	}
}

// fail notes that extent i cannot be read.
func (t *together) fail(i int64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next.Store(int64(len(t.found)))
	if i < t.bad {
		t.bad, t.err = i, err
	}
}
