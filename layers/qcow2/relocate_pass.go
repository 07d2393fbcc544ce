package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"slices"

	"github.com/imagestack/imagestack/layers"
)

// mover is one run of Evacuate.
type mover struct {
	ctx   context.Context
	ed    *editor
	img   *Image
	cut   int64 // cluster
	batch int64 // clusters
	limit int   // references in memory
	step  func(n int64) error
	next  int64 // no cluster below is free
	moved int64 // bytes
}

// Evacuate implements layers.Relocator.
func (img *Image) Evacuate(ctx context.Context, cut int64, o layers.Relocation) (int64, error) {
	ed, err := img.relocator(ctx)
	if err != nil {
		return 0, err
	}
	if o.Batch <= 0 {
		o.Batch = layers.DefaultBatch
	}
	if o.Memory <= 0 {
		o.Memory = layers.DefaultRelocationMemory
	}
	if err := ed.quiesce(ctx); err != nil {
		return 0, err
	}
	m := &mover{
		ctx: ctx, ed: ed, img: img, step: o.Moved,
		cut:   min((cut+img.clusterSize-1)>>img.clusterBits, ed.ref.hwm),
		batch: max(o.Batch>>img.clusterBits, 1),
		limit: int(max(o.Memory/refBytes, 16)),
	}
	// What was cached of tables stands elsewhere afterwards.
	defer img.l1Pages.DropAll()
	defer img.l2Pages.DropAll()
	err = m.run()
	if err == nil {
		err = ed.quiesce(ctx)
	}
	if err != nil {
		ed.census.inexact, ed.census.parts = true, nil // FreeLeaks has to look everywhere
	}
	return m.moved, err
}

func (m *mover) run() error {
	if err := m.moveTables(); err != nil {
		return err
	}
	if err := m.sweep(false); err != nil {
		return err
	}
	return m.sweep(true)
}

// sweep moves what the references of one kind name, from the end of the file
// on, a window of clusters at a time.
func (m *mover) sweep(data bool) error {
	for {
		w := refWindow{img: m.img, low: m.cut, limit: m.limit}
		if err := m.img.eachRef(m.ctx, data, w.add); err != nil || len(w.refs) == 0 {
			return err
		}
		w.sort()
		before := m.moved
		if err := m.window(w.refs); err != nil {
			return err
		}
		if w.low == m.cut || m.moved == before {
			return nil
		}
	}
}

// window moves the targets of sorted references, as far as there is room.
func (m *mover) window(refs []ref) error {
	var packed, blocks []ref
	b := batch{m: m}
	full := false
	for len(refs) > 0 {
		n := 1
		for n < len(refs) && refs[n].target == refs[0].target && refs[n].kind == refs[0].kind {
			n++
		}
		same := refs[:n]
		refs = refs[n:]
		switch {
		case same[0].kind == refPacked:
			packed = append(packed, same...)
		case same[0].kind == refBlock:
			blocks = append(blocks, same...)
		case !full:
			ok, err := b.add(same, refs)
			if err != nil {
				return err
			}
			full = !ok
		}
	}
	if err := b.commit(); err != nil {
		return err
	}
	if err := m.moveBlocks(blocks); err != nil {
		return err
	}
	return m.movePacked(packed)
}

// done tells that a batch is durable.
func (m *mover) done(n int64) error {
	m.moved += n
	if m.step != nil {
		if err := m.step(n); err != nil {
			return err
		}
	}
	return m.ctx.Err()
}

// hole finds the first run of free clusters below the cut, of at most want,
// and does not take it.
func (m *mover) hole(want int64) (hostRun, error) {
	r := m.ed.ref
	r.mu.Lock()
	defer r.mu.Unlock()
	for m.next < m.cut {
		run, err := r.freeAt(m.next, m.cut, want)
		if err != nil || run.n > 0 {
			m.next = max(m.next, run.first)
			return run, err
		}
		m.next = (m.next>>r.pageBits + 1) << r.pageBits
	}
	return hostRun{}, nil
}

// freeAt finds the first run of free clusters in the page of cluster from, not
// in front of it and below cut. Clusters that no block counts are left out.
func (r *refcounts) freeAt(from, cut, want int64) (hostRun, error) {
	p := from >> r.pageBits
	off, err := r.pageAt(p)
	if err != nil || off == 0 {
		return hostRun{}, err
	}
	page, err := r.page(p)
	if err != nil {
		return hostRun{}, err
	}
	first := p << r.pageBits
	i, n := freeRun(page.b, r.order, int(from-first), int(min(cut-first, 1<<r.pageBits)), int(min(want, 1<<r.pageBits)))
	run := hostRun{first + int64(i), int64(n)}
	if n > 0 {
		err = r.guard(run)
	}
	return run, err
}

// take counts a run of free clusters.
func (m *mover) take(run hostRun, count uint64) error {
	r := m.ed.ref
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.set(run.first, run.n, count)
}

// drop counts n references less to a run of clusters, after the commit that
// unlinked it, and gives the storage of those back that are free then.
func (m *mover) drop(run hostRun, n uint64) error {
	r := m.ed.ref
	free := hostRun{first: run.first}
	punch := func() {
		if free.n > 0 && !m.ed.noPunch.Load() {
			m.ed.punch(m.img.f, free.first<<m.img.clusterBits, free.n<<m.img.clusterBits)
		}
	}
	for c := run.first; c < run.first+run.n; c++ {
		r.mu.Lock()
		have, err := r.get(c)
		if err == nil && have < n {
			err = m.img.corrupt(c<<m.img.clusterBits, "reference count", have, "it has more references than are counted")
		}
		if err == nil {
			err = r.set(c, 1, have-n)
		}
		if err == nil && have == n {
			r.markFree(c)
		}
		r.mu.Unlock()
		if errors.Is(err, layers.ErrCorrupt) {
			return m.ed.fail(err)
		}
		if err != nil {
			return err
		}
		if have != n {
			continue
		}
		if free.first+free.n != c {
			punch()
			free = hostRun{first: c}
		}
		free.n++
	}
	punch()
	m.ed.unsynced = true
	return nil
}

// copyHost copies n bytes of the image file to a place that nothing refers to.
// Holes stay holes; what lies behind the end of the file is zeros.
func (m *mover) copyHost(from, to, n int64) error {
	f := m.img.f
	for n > 0 {
		data, err := f.SeekData(from)
		switch {
		case errors.Is(err, io.EOF):
			data = from + n
		case err != nil:
			data = from // every file can be read
		}
		if hole := min(data-from, n); hole > 0 {
			if err := m.clear(to, hole); err != nil {
				return err
			}
			from, to, n = from+hole, to+hole, n-hole
			continue
		}
		part := n
		if end, err := f.SeekHole(from); err == nil && end > from {
			part = min(n, end-from)
		}
		if _, err := f.CopyRange(f, from, to, part); err != nil {
			return err
		}
		from, to, n = from+part, to+part, n-part
	}
	return nil
}

// clear makes a place that nothing refers to zeros.
func (m *mover) clear(off, n int64) error {
	f := m.img.f
	if data, err := f.SeekData(off); errors.Is(err, io.EOF) || err == nil && data >= off+n {
		return nil // a hole already
	}
	if err := f.PunchHole(off, n); err == nil {
		return nil
	}
	zeros := m.ed.zeros
	for n > 0 {
		part := min(n, int64(len(zeros)))
		if _, err := f.WriteAt(zeros[:part], off); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

// word is a change of a word in the image file.
type word struct {
	at       int64
	from, to uint64 // of the bits in mask
	mask     uint64
}

// patchPage is the unit in which words are read, changed and written back.
const patchPage = 4096

// patch changes words in place. They must not be in the caches any more when
// somebody reads through them.
func (m *mover) patch(words []word) error {
	slices.SortFunc(words, func(a, b word) int { return int(min(max(a.at-b.at, -1), 1)) })
	var b [patchPage]byte
	for len(words) > 0 {
		base := words[0].at &^ (patchPage - 1)
		n := 1
		for n < len(words) && words[n].at < base+patchPage {
			n++
		}
		// Whole sectors, as the crash model and disks have it.
		lo, hi := words[0].at&^511, words[n-1].at&^511+512
		p := b[:hi-lo]
		got, err := m.img.f.ReadAt(p, lo)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		end := int64(0)
		for _, w := range words[:n] {
			i := w.at - lo
			if i+8 > int64(got) {
				return m.img.corrupt(w.at, "table", nil, "it reaches behind the end of the file")
			}
			old := binary.BigEndian.Uint64(p[i:])
			if old&w.mask != w.from {
				return m.img.corrupt(w.at, "table entry", old, "it changed while the image was relocated")
			}
			binary.BigEndian.PutUint64(p[i:], old&^w.mask|w.to)
			end = i + 8
		}
		// A file may end within the sector.
		if _, err := m.img.f.WriteAt(p[:max(end, int64(got))], lo); err != nil {
			return err
		}
		words = words[n:]
	}
	return nil
}
