package qcow2

import (
	"encoding/binary"
	"maps"
	"slices"

	"github.com/imagestack/imagestack/layers"
)

// maxBatch is the largest write that adjacent pages are gathered into.
const maxBatch = 256 << 10

// tableSnapshot is what has to be written of the refcount table: some of its
// sectors, or all of it at a new place.
type tableSnapshot struct {
	off     int64
	moved   bool
	entries int
	sectors map[int64][]byte // key: number of the 512-byte sector
	old     []hostRun        // what may be freed once the header is durable
}

// changed reports whether the table has changed, which needs a sync more.
func (r *refcounts) changed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.newBlocks || r.tableMoved
}

// dirtyBytes is what the changed pages pin.
func (r *refcounts) dirtyBytes() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return int64(len(r.dirty)) * r.pageBytes
}

// flush writes the changed pages. When the table changed, the pages and a
// table that moved are made durable before the entry or the header field that
// names them is written; the caller's next sync covers that. It returns the
// tables that may be freed once this sync is done. Only one flush runs at a
// time.
func (r *refcounts) flush(sync func() error) ([]hostRun, error) {
	snap := r.snapshotTable()
	if snap == nil {
		return nil, r.writePages()
	}
	err := r.writePages()
	if err == nil && snap.moved {
		_, err = r.img.f.WriteAt(snap.bytes(), snap.off)
	}
	if err == nil {
		err = sync()
	}
	if err == nil {
		err = r.writeTable(snap)
	}
	if err != nil {
		r.restoreTable(snap)
		return nil, err
	}
	return snap.old, nil
}

// snapshotTable takes the changes of the table at this moment, nil when there
// are none.
func (r *refcounts) snapshotTable() *tableSnapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.newBlocks && !r.tableMoved {
		return nil
	}
	s := &tableSnapshot{off: r.tableOff, moved: r.tableMoved, entries: len(r.table), sectors: make(map[int64][]byte), old: r.oldTables}
	if s.moved {
		for i := range int64(len(r.table)+63) / 64 {
			s.sectors[i] = r.sector(i)
		}
	} else {
		for i := range r.dirtyTable {
			s.sectors[i] = r.sector(i)
		}
	}
	r.dirtyTable = make(map[int64]struct{})
	r.newBlocks, r.tableMoved, r.oldTables = false, false, nil
	return s
}

func (r *refcounts) sector(i int64) []byte {
	var b []byte
	for _, v := range r.table[i*64 : min(i*64+64, int64(len(r.table)))] {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// bytes is the whole table, for one that moved.
func (s *tableSnapshot) bytes() []byte {
	var b []byte
	for _, i := range slices.Sorted(maps.Keys(s.sectors)) {
		b = append(b, s.sectors[i]...)
	}
	return b
}

// writeTable makes the new blocks or the new table valid.
func (r *refcounts) writeTable(s *tableSnapshot) error {
	if s.moved {
		clusters := uint32(int64(s.entries) * 8 >> r.img.clusterBits)
		return putTableRef(r.img.f, uint64(s.off), clusters)
	}
	for _, i := range slices.Sorted(maps.Keys(s.sectors)) {
		if _, err := r.img.f.WriteAt(s.sectors[i], s.off+i*512); err != nil {
			return err
		}
	}
	return nil
}

// restoreTable puts changes back that could not be written.
func (r *refcounts) restoreTable(s *tableSnapshot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.newBlocks = true
	r.tableMoved = r.tableMoved || s.moved
	r.oldTables = append(s.old, r.oldTables...)
	if !r.tableMoved {
		for i := range s.sectors {
			r.dirtyTable[i] = struct{}{}
		}
	}
}

// writePages writes the changed pages. A page that changes again meanwhile is
// written again by the next call.
func (r *refcounts) writePages() error {
	r.mu.Lock()
	dirty := r.dirty
	r.dirty = make(map[int64]*layers.Page)
	r.mu.Unlock()

	var (
		batch []byte
		start int64
		err   error
	)
	write := func() {
		if err == nil && len(batch) > 0 {
			_, err = r.img.f.WriteAt(batch, start)
		}
		batch = batch[:0]
	}
	for _, p := range slices.Sorted(maps.Keys(dirty)) {
		r.mu.Lock()
		off, bad := r.pageAt(p)
		if bad != nil || off == 0 {
			r.mu.Unlock()
			if err == nil {
				err = bad
			}
			continue
		}
		if start+int64(len(batch)) != off || len(batch) >= maxBatch {
			r.mu.Unlock()
			write()
			start = off
			r.mu.Lock()
		}
		batch = append(batch, dirty[p].Value.(*refPage).b...)
		r.mu.Unlock()
	}
	write()

	r.mu.Lock()
	defer r.mu.Unlock()
	for p, c := range dirty {
		if err != nil && r.dirty[p] == nil {
			r.dirty[p] = c
			continue
		}
		c.Unpin()
	}
	return err
}
