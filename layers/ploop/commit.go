package ploop

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/RoaringBitmap/roaring/v2"
)

// swap sets entry idx in the cached BAT and returns what it was. The page
// stays pinned until a commit has written it.
func (t *table) swap(idx int64, entry uint32) (uint32, error) {
	n, w := pageOf(idx)
	pg, err := t.owner.Pin(n, t.loader(n))
	if err != nil {
		return 0, err
	}
	old := pg.Value.(*page)[w].Swap(entry)
	// Only now: a commit that takes the mark must see the change.
	t.dirtyMu.Lock()
	fresh := t.dirty.CheckedAdd(uint32(n))
	t.dirtyMu.Unlock()
	if fresh {
		t.dirtyPages.Add(1)
	} else {
		pg.Unpin()
	}
	return old, nil
}

// piece is a part of the BAT as it was when a commit began.
type piece struct {
	off int64
	b   []byte
}

// maxPiece is the number of pages that are written at once.
const maxPiece = 64

// snapshot takes the dirty pages and copies them. They count as being written
// until written or unwritten is called.
func (t *table) snapshot() []piece {
	t.dirtyMu.Lock()
	t.writing, t.dirty = t.dirty, roaring.New()
	t.dirtyMu.Unlock()
	var pieces []piece
	for it := t.writing.Iterator(); it.HasNext(); {
		n := int64(it.Next())
		words := t.owner.Get(n).Value.(*page) // pinned, so it is there
		b := make([]byte, pageSize)
		for w := range words {
			binary.LittleEndian.PutUint32(b[4*w:], words[w].Load())
		}
		off := n * pageSize
		b = b[:min(pageSize, t.h.batEnd()-off)]
		if n == 0 {
			off, b = headerSize, b[headerSize:]
		}
		if k := len(pieces) - 1; k >= 0 && pieces[k].off+int64(len(pieces[k].b)) == off && len(pieces[k].b) < maxPiece*pageSize {
			pieces[k].b = append(pieces[k].b, b...)
			continue
		}
		pieces = append(pieces, piece{off, b})
	}
	return pieces
}

// written ends the state that snapshot began.
func (t *table) written() {
	t.dirtyMu.Lock()
	done := t.writing
	t.writing = roaring.New()
	t.dirtyMu.Unlock()
	t.unpin(done)
}

// unwritten makes the pages dirty again whose writing failed.
func (t *table) unwritten() {
	t.dirtyMu.Lock()
	twice := roaring.And(t.dirty, t.writing)
	t.dirty.Or(t.writing)
	t.writing = roaring.New()
	t.dirtyMu.Unlock()
	t.unpin(twice)
}

func (t *table) unpin(pages *roaring.Bitmap) {
	for it := pages.Iterator(); it.HasNext(); {
		t.owner.Get(int64(it.Next())).Unpin()
	}
	t.dirtyPages.Add(-int64(pages.GetCardinality()))
}

// Sync implements layers.Editor.
func (i *Image) Sync(context.Context) error {
	e, err := i.change(0, 0)
	if err != nil {
		return err
	}
	return e.commit.Do(i.flush)
}

// flush is one commit: data, sync, BAT, sync, and then the clusters that were
// unlinked are free.
func (i *Image) flush() error {
	e := i.edit
	if err := e.broken(); err != nil || !e.started.Load() {
		return err
	}
	// First what was released, then the pages: every unlinking in the list is
	// in the copies. First the pages, then the sync: every entry in the copies
	// points to data that was written before the sync.
	released := e.alloc.takeReleased()
	pieces := i.bat.snapshot()
	if err := i.sync(); err != nil {
		return err
	}
	for _, p := range pieces {
		if _, err := i.f.WriteAt(p.b, p.off); err != nil {
			i.bat.unwritten()
			e.alloc.putReleased(released)
			return fmt.Errorf("%s: write of the BAT at %#x: %w", i.path, p.off, err)
		}
	}
	if len(pieces) > 0 {
		if err := i.sync(); err != nil {
			return err
		}
	}
	i.bat.written()
	if released.IsEmpty() {
		return nil
	}
	i.readers.Wait()
	return e.alloc.freed(released)
}

// Close makes all changes durable, marks the image as closed and closes the
// file. After a failed sync the mark stays, so that the next writer verifies
// the image.
func (i *Image) Close() error {
	var err error
	if i.edit != nil {
		err = i.finish()
	}
	i.bat.owner.DropAll()
	return errors.Join(err, i.f.Close())
}

func (i *Image) finish() error {
	e := i.edit
	if err := e.broken(); err != nil || e.refused {
		return err
	}
	if e.takeOver {
		if err := i.begin(); err != nil {
			return err
		}
	}
	if !e.started.Load() {
		return nil
	}
	if err := e.commit.Do(i.flush); err != nil {
		return err
	}
	if err := e.alloc.settle(); err != nil {
		return err
	}
	empty, err := i.empty()
	if err != nil {
		return err
	}
	// The file as it is has to be durable before the mark goes.
	if err := i.sync(); err != nil {
		return err
	}
	return i.setHeader(func(h *header) {
		h.inUse = inUseClosed
		if h.extension != 0 {
			h.inUse = inUseV21
		}
		h.flags &^= flagEmpty
		if empty {
			h.flags |= flagEmpty
		}
	})
}
