package qcow2

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// editor is the write side of an image.
//
// Design note. A cluster is owned when its L1 and its L2 entry carry COPIED:
// nothing but the active map refers to it. Owned clusters are written in
// place without a lock, between Readers.Enter and Exit. Every other change of
// an L2 entry is made under the stripe of its guest cluster: the content is
// completed and written to a place that nothing refers to, then the entry is
// stored into the cached page, which is the moment readers see it.
//
// What was stored is published to the file by a commit (commit.go). To give a
// commit one moment that it covers, stores hold pub for reading and the commit
// holds it for writing while it copies the changed parts of the pages: all
// that such a copy names has been written and counted before, so the sync that
// follows makes it durable.
//
// Places that an entry named before are collected in released, with the store
// that unlinked them, and freed by the commit that made the store durable.
//
// Lock order: commit -> stripe -> l2mu -> refcounts.mu -> cache stripes;
// pub and mu are leaves and taken in this order behind a stripe or l2mu.
type editor struct {
	img     *Image
	ref     *refcounts
	stripes layers.Stripes
	commit  layers.Commit
	l2mu    sync.Mutex   // creates and copies L2 tables
	pub     sync.RWMutex // see above

	mu       sync.Mutex // of what the next commit has to write
	dirty    map[pageKey]*dirtyPage
	pinned   int64 // bytes of the pages in dirty
	released []release

	started atomic.Bool // prepare has been done
	startMu sync.Mutex
	broken  atomic.Pointer[error] // why no change is accepted any more

	unsynced bool // counts were lowered behind the last sync; of the commit

	relocating bool        // BeginRelocation has been called
	census     *hostCensus // what it found
	wide       bool        // it needs wide words
	part       int64       // clusters that it counts at a time, 0 for all that fit
	noPunch    atomic.Bool
	zeros      []byte // one cluster
	bufs       sync.Pool
}

// pageKey is a table page: of the L1 table by its number, of an L2 table by
// its offset in the file.
type pageKey struct {
	l1 bool
	at int64
}

// dirtyPage is a pinned page with the range of words that changed.
type dirtyPage struct {
	page   *layers.Page
	table  *tablePage
	lo, hi int
}

// release is a run of host clusters that lost a reference each (in an external
// data file: clusters that may be punched).
type release struct {
	hostRun
	punch bool
	table bool // counted in the image file although guest data is external
}

// maxReleased is the number of releases after which a commit is due.
const maxReleased = 1 << 16

var _ layers.Editor = (*Image)(nil)

// openEditor makes img an Editor. Nothing is written before the first change.
func (img *Image) openEditor(ctx context.Context) error {
	ed := &editor{img: img, ref: newRefcounts(img), dirty: make(map[pageKey]*dirtyPage)}
	ed.zeros = make([]byte, img.clusterSize)
	ed.bufs.New = func() any { b := make([]byte, img.clusterSize); return &b }
	img.ed = ed
	return nil
}

// Readers implements layers.Editor.
func (img *Image) Readers() *layers.Readers { return &img.readers }

// usable returns nil when a change of [off, off+n) may begin.
func (img *Image) usable(ctx context.Context, off, n int64) (*editor, error) {
	ed := img.ed
	if ed == nil {
		return nil, img.errorf(-1, "", nil, layers.ErrReadOnly)
	}
	if off < 0 || n < 0 || off > img.size-n {
		return nil, img.errorf(-1, "", nil, fmt.Errorf("range %d+%d lies outside the disk of %d bytes", off, n, img.size))
	}
	if err := ed.failed(); err != nil {
		return nil, err
	}
	if n > 0 && !ed.started.Load() {
		if err := ed.prepare(ctx); err != nil {
			return nil, err
		}
	}
	return ed, nil
}

// failed is the error that ended all changes, or nil.
func (ed *editor) failed() error {
	if p := ed.broken.Load(); p != nil {
		return *p
	}
	return nil
}

// fail makes err the answer to every later change and sync.
func (ed *editor) fail(err error) error {
	err = ed.img.errorf(-1, "", nil, fmt.Errorf("no further change is possible: %w", err))
	ed.broken.CompareAndSwap(nil, &err)
	return err
}

// syncFile makes a file durable, or ends all changes.
func (ed *editor) syncFile(f backend.File) error {
	if err := f.Sync(); err != nil {
		return ed.fail(fmt.Errorf("sync failed: %w", err))
	}
	return nil
}

// slot is an L2 entry and where it stands.
type slot struct {
	e     l2Entry
	table int64 // offset of the L2 table, 0 when there is none
	page  int64 // offset of its page in the file
	i     int   // number in the page
	owned bool  // the L1 entry carries COPIED: the table may be changed
}

// look returns the L2 entry of the cluster at guest. It counts as a reader
// meanwhile: an L2 table that is replaced must not become something else while
// a page of it is being loaded.
func (ed *editor) look(guest int64) (slot, error) {
	t := ed.img.readers.Enter(guest)
	defer ed.img.readers.Exit(t)
	return ed.lookEntered(guest)
}

// lookEntered is look for who is between Enter and Exit already.
func (ed *editor) lookEntered(guest int64) (slot, error) {
	img := ed.img
	index := img.l1Index(guest)
	p, err := img.l1Page(index / (maxPageBytes / 8))
	if err != nil {
		return slot{}, err
	}
	entry := p.load(int(index % (maxPageBytes / 8)))
	if entry&^entryCopied == 0 {
		return slot{}, nil
	}
	s := slot{owned: entry&entryCopied != 0}
	if s.table, err = img.checkL1(img.l1Off+index*8, entry); err != nil {
		return slot{}, err
	}
	s.page, s.i = img.l2Slot(img.l2Index(guest))
	s.page += s.table
	t, err := img.l2Page(s.page)
	if err != nil {
		return slot{}, err
	}
	var word, sub uint64
	if img.extended {
		word, sub = t.pair(s.i)
	} else {
		word = t.load(s.i)
	}
	s.e, err = img.checkL2(guest, word, sub, s.page+int64(s.i)*img.entryBytes)
	return s, err
}

// ours reports whether the host cluster of s may be written in place. In an
// external data file nothing is ever shared.
func (ed *editor) ours(s *slot) bool {
	return s.owned && s.e.hasHost && !s.e.isPacked && (s.e.copied || ed.img.external)
}

// store makes s.e, with its table's page, the entry of the cluster at guest
// from now on. The caller holds the cluster's stripe, and s.table is owned.
func (ed *editor) store(s *slot, e l2Entry, rel ...release) error {
	img := ed.img
	word := encodeStandard(e.host, e.copied, !img.extended && e.zero != 0)
	page, t, err := img.pinL2Page(s.page)
	if err != nil {
		return err
	}
	ed.pub.RLock()
	lo, n := s.i, 1
	if img.extended {
		t.setPair(s.i, word, uint64(e.zero)<<32|uint64(e.alloc))
		lo, n = 2*lo, 2
	} else {
		t.store(s.i, word)
	}
	ed.changed(pageKey{at: s.page}, page, t, lo, lo+n, rel...)
	ed.pub.RUnlock()
	return nil
}

// changed records that words [lo, hi) of a page changed and what was released
// with them. It takes over the caller's pin.
func (ed *editor) changed(key pageKey, page *layers.Page, t *tablePage, lo, hi int, rel ...release) {
	ed.mu.Lock()
	defer ed.mu.Unlock()
	for _, r := range rel {
		ed.releaseLocked(r)
	}
	if d := ed.dirty[key]; d != nil {
		d.lo, d.hi = min(d.lo, lo), max(d.hi, hi)
		page.Unpin()
		return
	}
	ed.dirty[key] = &dirtyPage{page, t, lo, hi}
	ed.pinned += page.Size()
}

func (ed *editor) releaseLocked(r release) {
	if r.n == 0 {
		return
	}
	if last := len(ed.released) - 1; last >= 0 {
		p := &ed.released[last]
		if p.punch == r.punch && p.table == r.table && p.first+p.n == r.first {
			p.n += r.n
			return
		}
	}
	ed.released = append(ed.released, r)
}

// old is what an entry that is replaced releases.
func (ed *editor) old(guest int64, e *l2Entry, punch bool) release {
	bits := ed.img.clusterBits
	switch {
	case e.isPacked:
		first := int64(e.packed.off) >> bits
		last := (int64(e.packed.off) + int64(e.packed.len) - 1) >> bits
		return release{hostRun: hostRun{first, last - first + 1}}
	case !e.hasHost:
		return release{}
	case ed.img.external:
		if !punch {
			return release{}
		}
		return release{hostRun: hostRun{guest >> bits, 1}, punch: true}
	}
	return release{hostRun: hostRun{int64(e.host) >> bits, 1}, punch: punch}
}

// ownTable returns the slot of the cluster at guest in an L2 table that may be
// changed, creating or copying the table when there is none.
func (ed *editor) ownTable(guest int64) (slot, error) {
	s, err := ed.look(guest)
	if err != nil || s.owned && s.table != 0 {
		return s, err
	}
	ed.l2mu.Lock()
	defer ed.l2mu.Unlock()
	if s, err = ed.look(guest); err != nil || s.owned && s.table != 0 {
		return s, err
	}
	img := ed.img
	run, fresh, err := ed.ref.allocate(1)
	if err != nil {
		return s, err
	}
	off := run.first << img.clusterBits
	if err = ed.fillTable(off, s.table, fresh); err != nil {
		ed.ref.undo(run.first, 1)
		return s, err
	}
	index := img.l1Index(guest)
	at := index / (maxPageBytes / 8)
	page, t, err := img.pinL1Page(at)
	if err != nil {
		ed.ref.undo(run.first, 1)
		return s, err
	}
	var rel release
	if s.table != 0 {
		rel = release{hostRun: hostRun{s.table >> img.clusterBits, 1}, table: true}
	}
	i := int(index % (maxPageBytes / 8))
	ed.pub.RLock()
	t.store(i, uint64(off)|entryCopied)
	ed.changed(pageKey{l1: true, at: at}, page, t, i, i+1, rel)
	ed.pub.RUnlock()
	return ed.look(guest)
}

// fillTable writes the content of a new L2 table at off: a copy of the shared
// table at from, or zeros when from is 0. It is durable before the L1 entry
// that names the new table is written.
func (ed *editor) fillTable(off, from int64, fresh bool) error {
	img := ed.img
	// The cluster may have held another table before.
	for p := off; p < off+img.clusterSize; p += img.l2PageBytes {
		if img.l2Pages.Get(p) != nil {
			img.l2Pages.Drop(p)
		}
	}
	if from == 0 {
		if fresh {
			return nil
		}
		return backend.WriteZeros(img.f, off, img.clusterSize)
	}
	b := make([]byte, img.clusterSize)
	if err := img.readMeta(b, from, "L2 table"); err != nil {
		return err
	}
	if !img.external {
		// What a shared table names is shared as well. First words only; the
		// high bit of a bitmap word is subcluster 31.
		for i := int64(0); i < img.clusterSize; i += img.entryBytes {
			b[i] &^= entryCopied >> 56
		}
	}
	_, err := img.f.WriteAt(b, off)
	return err
}
