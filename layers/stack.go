package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
)

// MaxDepth is the largest number of layers in a stack.
const MaxDepth = 1000

// StackOptions are what NewStack needs to know besides the layers.
type StackOptions struct {
	// Writable sends changes to the top layer, which must be an Editor that
	// was opened writable.
	Writable bool
	// Cache holds resolved spans and decompressed clusters; it should be the
	// one that the layers were opened with. nil means one of
	// DefaultCacheSize.
	Cache *Cache
	// Closers are closed after the layers (locks that span several files).
	Closers []io.Closer
}

// Stack is a pile of layers seen as one disk, as long as its top layer. All
// methods except Close may be called concurrently.
type Stack struct {
	layers []Layer
	size   int64
	pile   *blockmap.Overlay // all layers
	spans  *spans            // all layers, or those under the editor; nil when there are none
	packed []Owner           // decompressed clusters, per layer
	parts  touched           // compressed clusters of which a part was read
	ahead  *ahead            // of the compressed clusters
	helper helpers           // who reads compressed clusters with us
	later  *background       // what readers will want soon
	flat   backend.File      // set when reads need no lookup
	top    Editor            // nil when read-only
	below  lower
	commit Commit
	also   []io.Closer
}

// NewStack piles up layers, the top one first. It takes them over: Close
// closes them.
func NewStack(pile []Layer, o StackOptions) (*Stack, error) {
	if len(pile) == 0 || len(pile) > MaxDepth {
		return nil, fmt.Errorf("a stack of %d layers: %w (1 to %d layers)", len(pile), ErrUnsupported, MaxDepth)
	}
	cache := o.Cache
	if cache == nil {
		cache = NewCache(DefaultCacheSize)
	}
	s := &Stack{layers: pile, size: pile[0].Size(), packed: make([]Owner, len(pile)), helper: newHelpers(),
		later: newBackground(), also: o.Closers}
	s.ahead = newAhead(s, cache)
	maps := make([]blockmap.Map, len(pile))
	for i, l := range pile {
		maps[i] = l
		s.packed[i] = cache.NewOwner()
	}
	s.pile = blockmap.NewOverlay(maps...)
	s.parts = newTouched(cache.Budget(), s.pile.Granule())
	if o.Writable {
		top, ok := pile[0].(Editor)
		if !ok {
			return nil, fmt.Errorf("top layer: %w", ErrReadOnly)
		}
		s.top = top
		if len(maps) > 1 {
			s.spans = newSpans(blockmap.NewOverlay(maps[1:]...), 1, cache, s.later)
		}
		s.below = lower{s}
	} else {
		s.spans = newSpans(s.pile, 0, cache, s.later)
		under := &Stack{layers: pile, size: s.size, packed: s.packed, parts: s.parts}
		if len(maps) > 1 {
			under.spans = newSpans(blockmap.NewOverlay(maps[1:]...), 1, cache, s.later)
		}
		s.below = lower{under}
	}
	if f, ok := pile[0].(Flat); ok && f.Flat() {
		s.flat = pile[0].Data()
	}
	return s, nil
}

// Size is the length of the disk in bytes: that of the top layer.
func (s *Stack) Size() int64 { return s.size }

// Granule is the smallest cluster size in the stack.
func (s *Stack) Granule() int64 { return s.pile.Granule() }

// Layers are the layers, top first. They stay the stack's.
func (s *Stack) Layers() []Layer { return s.layers }

// Writable reports whether the stack takes changes.
func (s *Stack) Writable() bool { return s.top != nil }

// Whole returns the one file that is this disk, byte for byte and to the same
// length, or nil when there is none.
func (s *Stack) Whole() backend.File {
	if s.flat == nil {
		return nil
	}
	if n, err := s.flat.Size(); err != nil || n != s.size {
		return nil
	}
	return s.flat
}

// Lookup implements blockmap.Map for the whole pile: no extent is Unmapped,
// and Layer tells where it was found.
func (s *Stack) Lookup(ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return dst, err
	}
	t := blockmap.NewTiler(guest, n, dst)
	end := guest + n
	var err error
	for more := true; more && err == nil; {
		if s.top != nil {
			more, err = s.addTop(ctx, &t, end)
		} else {
			more, err = s.spans.add(ctx, &t, end)
		}
	}
	if err != nil {
		return dst, err
	}
	return t.Extents(), nil
}

// addTop gives t some extents of the editor, with what lies below filled in
// where it has none.
func (s *Stack) addTop(ctx context.Context, t *blockmap.Tiler, end int64) (bool, error) {
	room := extentRoom.Get().(*[roomExtents]blockmap.Extent)
	defer extentRoom.Put(room)
	found, err := s.top.Lookup(ctx, t.Next(), end-t.Next(), room[:0])
	if err != nil {
		return false, err
	}
	for _, e := range found {
		more := true
		switch {
		case e.Kind != blockmap.Unmapped:
			more = t.Add(e)
		case s.spans == nil:
			e.Kind = blockmap.Zero
			more = t.Add(e)
		default:
			for more && err == nil && t.Next() < e.End() {
				more, err = s.spans.add(ctx, t, e.End())
			}
		}
		if !more || err != nil {
			return false, err
		}
	}
	return true, nil
}

// roomExtents is how many extents a read looks up at a time.
const roomExtents = 64

var extentRoom = sync.Pool{New: func() any { return new([roomExtents]blockmap.Extent) }}

// ReadAt reads as io.ReaderAt does: fewer than len(p) bytes only with an
// error, io.EOF at the end of the disk.
func (s *Stack) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read: %w", blockmap.ErrRange)
	}
	var eof error
	if off >= s.size {
		return 0, io.EOF
	}
	if int64(len(p)) > s.size-off {
		p, eof = p[:s.size-off], io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	if s.flat != nil {
		n, err := s.flat.ReadAt(p, off)
		if n < len(p) && errors.Is(err, io.EOF) {
			return n, s.truncated(0, off+int64(n))
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		return n, eof
	}
	if s.top != nil {
		r := s.top.Readers()
		defer r.Exit(r.Enter(off))
	}
	n, err := s.readMapped(ctx, s, p, off, false)
	if err != nil {
		return n, err
	}
	return n, eof
}

// ReadCached fills p from off, inside the disk, if all of it is in the host's
// page cache, and reports whether it did. It waits for no data (though for a
// table of the map, the first time).
func (s *Stack) ReadCached(p []byte, off int64) bool {
	if s.flat != nil {
		return backend.ReadCached(s.flat, p, off)
	}
	if s.top != nil {
		r := s.top.Readers()
		defer r.Exit(r.Enter(off))
	}
	_, err := s.readMapped(context.Background(), s, p, off, true)
	return err == nil
}

// errUncached ends a read that must not wait.
var errUncached = errors.New("not in the page cache")

// readMapped fills p from off on as the map m says, which is s or the part of
// it under the editor; with cached, from the host's page cache or not at all.
func (s *Stack) readMapped(ctx context.Context, m lookuper, p []byte, off int64, cached bool) (int, error) {
	room := extentRoom.Get().(*[roomExtents]blockmap.Extent)
	defer extentRoom.Put(room)
	done := 0
	for done < len(p) {
		found, err := m.Lookup(ctx, off+int64(done), int64(len(p)-done), room[:0])
		if err != nil {
			return done, err
		}
		if !cached && worthHelp(found) {
			n, err := s.readTogether(ctx, found, p[done:], len(p))
			done += n
			if err != nil {
				return done, err
			}
			continue
		}
		for _, e := range found {
			if err := s.readExtent(ctx, e, p[done:done+int(e.Len)], len(p), cached); err != nil {
				return done, err
			}
			done += int(e.Len)
		}
	}
	return done, nil
}

type lookuper interface {
	Lookup(ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error)
}

// readExtent fills p, len(p) == e.Len, with the bytes of e, for a read of that
// many bytes in all.
func (s *Stack) readExtent(ctx context.Context, e blockmap.Extent, p []byte, request int, cached bool) error {
	l := s.layers[e.Layer]
	if cached && e.Kind != blockmap.Zero {
		// Decompressing takes long.
		if e.Kind != blockmap.Data || !backend.ReadCached(l.Data(), p, e.Host) {
			return errUncached
		}
		return nil
	}
	switch e.Kind {
	case blockmap.Data:
		n, err := l.Data().ReadAt(p, e.Host)
		if n < len(p) && errors.Is(err, io.EOF) {
			return s.truncated(int(e.Layer), e.Host+int64(n))
		}
		if n < len(p) {
			return err
		}
		return nil
	case blockmap.Packed:
		return s.readPacked(ctx, l, e, p, request)
	}
	clear(p)
	return nil
}

// truncated is the error for mapped bytes that the file does not have.
func (s *Stack) truncated(layer int, host int64) error {
	return &ImageError{Path: s.layers[layer].Data().Name(), Layer: layer, Offset: host,
		Field: "data", Err: fmt.Errorf("mapped bytes behind the end of the file: %w", ErrCorrupt)}
}

// WriteAt stores p at off in the top layer: all of it, or an error. A range
// that reaches behind the end of the disk is an error and changes nothing.
func (s *Stack) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := s.checkChange(off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.top.WriteAt(ctx, p, off, s.below); err != nil {
		return 0, err
	}
	return len(p), nil
}

// pageSize is that of the host's page cache, or a multiple.
const pageSize = 4096

// WriteInPlace stores p at off, inside the disk, if that needs no more than
// copying it into the host's page cache, and reports whether it did. After
// false any part of p may have been stored, and WriteAt is to follow.
func (s *Stack) WriteInPlace(p []byte, off int64) bool {
	// The page cache reads the rest of a page that is written in part.
	if (off|int64(len(p)))%pageSize != 0 {
		return false
	}
	w, ok := s.top.(InPlaceWriter)
	return ok && w.WriteInPlace(p, off)
}

// ZeroAt makes [off, off+n) read as zeros, giving space back when punch is
// set (see Editor.ZeroAt).
func (s *Stack) ZeroAt(ctx context.Context, off, n int64, punch bool) error {
	if err := s.checkChange(off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	return s.top.ZeroAt(ctx, off, n, punch, s.below)
}

func (s *Stack) checkChange(off, n int64) error {
	if s.top == nil {
		return ErrReadOnly
	}
	if off < 0 || n < 0 || off > s.size || n > s.size-off {
		return fmt.Errorf("change of %d bytes at %d: %w", n, off, blockmap.ErrRange)
	}
	return nil
}

// Sync makes every change that returned before durable. Concurrent calls
// share one flush. On a read-only stack there is nothing to do.
func (s *Stack) Sync(ctx context.Context) error {
	if s.top == nil {
		return nil
	}
	// The flush is other callers' too: none may cancel it for all.
	ctx = context.WithoutCancel(ctx)
	return s.commit.Do(func() error { return s.top.Sync(ctx) })
}

// SeekData returns the first offset at or behind off that is stored in some
// layer, or io.EOF when only zeros follow.
func (s *Stack) SeekData(ctx context.Context, off int64) (int64, error) {
	return s.seek(ctx, off, true)
}

// SeekHole returns the first offset at or behind off that no layer stores;
// the end of the disk counts as one; off at or behind the end is io.EOF.
func (s *Stack) SeekHole(ctx context.Context, off int64) (int64, error) {
	return s.seek(ctx, off, false)
}

func (s *Stack) seek(ctx context.Context, off int64, stored bool) (int64, error) {
	if off < 0 || off >= s.size {
		return 0, io.EOF
	}
	at, err := blockmap.Seek(ctx, s, off, stored)
	if err == nil && stored && at == s.size {
		return 0, io.EOF
	}
	return at, err
}

// Allocated is the host storage of all layers in bytes.
func (s *Stack) Allocated() (int64, error) {
	var sum int64
	for _, l := range s.layers {
		n, err := l.Data().Allocated()
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// Close closes all layers, the top one first, which makes its changes
// durable. All errors are returned.
func (s *Stack) Close() error {
	s.Alone()
	var errs []error
	for _, l := range s.layers {
		errs = append(errs, l.Close())
	}
	for _, c := range s.also {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
