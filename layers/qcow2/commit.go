package qcow2

import (
	"context"
	"errors"
	"maps"
	"slices"
)

// Sync implements layers.Editor.
//
// The order of a commit: guest data, new L2 tables and reference counts, sync,
// L2 and L1 entries, sync, and then, after the grace period, the places that
// the entries no longer name are punched where asked and counted as free. When
// no entry changed one sync of the file with the guest data is all.
func (img *Image) Sync(ctx context.Context) error {
	if img.ed == nil {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if !img.ed.started.Load() {
		return img.ed.failed()
	}
	return img.ed.commit.Do(img.ed.flush)
}

// mapSnapshot is what one commit publishes.
type mapSnapshot struct {
	pages    map[pageKey]*dirtyPage
	words    map[pageKey][]byte // the changed words as they were at that moment
	released []release
}

// flush is one commit. Only one runs at a time.
func (ed *editor) flush() error { return ed.flushCounts(false) }

// flushCounts is flush. With counts it writes changed reference counts also
// when no entry changed.
func (ed *editor) flushCounts(counts bool) error {
	if err := ed.failed(); err != nil {
		return err
	}
	img := ed.img
	snap := ed.snapshot()
	if img.external {
		if err := ed.syncFile(img.data); err != nil {
			return err
		}
	}
	if len(snap.pages) == 0 && !counts && !ed.ref.changed() {
		if img.external {
			return nil
		}
		return ed.syncFile(img.f)
	}
	oldTables, err := ed.ref.flush(func() error { return ed.syncFile(img.f) })
	if err == nil {
		err = ed.syncFile(img.f)
	}
	if err == nil {
		err = ed.writeMap(snap)
	}
	if err != nil {
		ed.restore(snap, oldTables)
		return err
	}
	if len(snap.pages) > 0 {
		if err := ed.syncFile(img.f); err != nil {
			return err
		}
	}
	ed.unsynced = false
	ed.unpin(snap)
	for _, t := range oldTables {
		snap.released = append(snap.released, release{hostRun: t, table: true})
	}
	return ed.free(snap.released)
}

// snapshot takes all that was stored up to one moment.
func (ed *editor) snapshot() *mapSnapshot {
	ed.pub.Lock()
	defer ed.pub.Unlock()
	ed.mu.Lock()
	defer ed.mu.Unlock()
	s := &mapSnapshot{pages: ed.dirty, released: ed.released, words: make(map[pageKey][]byte, len(ed.dirty))}
	for key, d := range s.pages {
		s.words[key] = d.encode(!key.l1 && ed.img.extended)
	}
	ed.dirty = make(map[pageKey]*dirtyPage)
	ed.released = nil
	return s
}

// encode widens the changed range to whole sectors and returns its words.
func (d *dirtyPage) encode(pairs bool) []byte {
	const sector = 512 / 8
	d.lo = d.lo &^ (sector - 1)
	d.hi = min((d.hi+sector-1)&^(sector-1), len(d.table.w))
	b := make([]byte, len(d.table.w)*8)
	d.table.encode(b, pairs)
	return b[d.lo*8 : d.hi*8]
}

// writeMap writes the entries of a commit.
func (ed *editor) writeMap(s *mapSnapshot) error {
	keys := slices.SortedFunc(maps.Keys(s.pages), func(a, b pageKey) int {
		if a.l1 != b.l1 {
			if a.l1 {
				return 1 // L1 entries behind the tables that they name
			}
			return -1
		}
		return int(min(max(a.at-b.at, -1), 1))
	})
	for _, key := range keys {
		off := key.at
		if key.l1 {
			off = ed.img.l1Off + key.at*maxPageBytes
		}
		if _, err := ed.img.f.WriteAt(s.words[key], off+int64(s.pages[key].lo)*8); err != nil {
			return err
		}
	}
	return nil
}

// unpin lets go of the pages of a commit that is done.
func (ed *editor) unpin(s *mapSnapshot) {
	ed.mu.Lock()
	defer ed.mu.Unlock()
	for _, d := range s.pages {
		ed.pinned -= d.page.Size()
		d.page.Unpin()
	}
}

// restore puts back what a commit could not write, for the next one.
func (ed *editor) restore(s *mapSnapshot, oldTables []hostRun) {
	ed.mu.Lock()
	defer ed.mu.Unlock()
	for key, d := range s.pages {
		if now := ed.dirty[key]; now != nil {
			now.lo, now.hi = min(now.lo, d.lo), max(now.hi, d.hi)
			ed.pinned -= d.page.Size()
			d.page.Unpin()
			continue
		}
		ed.dirty[key] = d
	}
	ed.released = append(s.released, ed.released...)
	for _, t := range oldTables {
		ed.released = append(ed.released, release{hostRun: t, table: true})
	}
}

// free gives back what a durable commit unlinked, once nobody reads it any
// more. The counts are lowered in memory and written without a sync: until
// they are durable they are leaks.
func (ed *editor) free(released []release) error {
	if len(released) == 0 {
		return nil
	}
	img := ed.img
	img.readers.Wait()
	ed.unsynced = true
	var first error
	for _, r := range released {
		if img.external && !r.table {
			if err := ed.punchExternal(r); err != nil && first == nil {
				first = err
			}
			continue
		}
		if err := ed.freeRun(r); err != nil && first == nil {
			first = err
		}
	}
	// Pages that cannot be written stay changed for the next commit. The
	// changes that this one covers are durable all the same; the error is
	// reported because the disk is in trouble.
	return errors.Join(first, ed.ref.writePages())
}

// freeRun lowers the counts of a run of host clusters by one. Clusters that
// nothing refers to then are punched before they can be allocated again.
func (ed *editor) freeRun(run release) error {
	r := ed.ref
	if run.punch && !ed.noPunch.Load() {
		for c := run.first; c < run.first+run.n; {
			n := int64(0)
			r.mu.Lock()
			for c+n < run.first+run.n {
				if v, err := r.get(c + n); err != nil || v != 1 {
					break
				}
				n++
			}
			r.mu.Unlock()
			if n == 0 {
				c++
				continue
			}
			ed.punch(ed.img.f, c<<ed.img.clusterBits, n<<ed.img.clusterBits)
			c += n
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := run.first; c < run.first+run.n; c++ {
		if err := r.decrement(c); err != nil {
			return ed.freeFailed(c, run, err)
		}
	}
	return nil
}
