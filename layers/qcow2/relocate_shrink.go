package qcow2

import (
	"context"
	"errors"
	"io"

	"github.com/imagestack/imagestack/backend"
)

// Shrink implements layers.Relocator: L2 tables without an entry go, refcount
// blocks behind the last cluster in use, the end of a refcount table that
// names none, and then the end of the file. What is free in front of that
// becomes a hole.
func (img *Image) Shrink(ctx context.Context) error {
	ed, err := img.relocator(ctx)
	if err != nil {
		return err
	}
	if err := ed.quiesce(ctx); err != nil {
		return err
	}
	if err := ed.dropEmptyTables(ctx); err != nil {
		return err
	}
	m := &mover{ctx: ctx, ed: ed, img: img, cut: ed.ref.hwm}
	end, err := ed.ref.lastUsed()
	if err == nil {
		err = m.dropBlocks(end)
	}
	if err == nil {
		err = m.shortenRefcountTable()
	}
	if err == nil {
		err = ed.quiesce(ctx)
	}
	if err == nil {
		// What was dropped may have been the last.
		end, err = ed.ref.lastUsed()
	}
	if err == nil {
		err = ed.cutFile(end)
	}
	if err != nil {
		return err
	}
	return m.punchHoles(end)
}

// dropEmptyTables unlinks the L2 tables of the active map that say nothing.
func (ed *editor) dropEmptyTables(ctx context.Context) error {
	img := ed.img
	holes := stillHoles{img: img, still: true} // only L1 tables are written
	err := img.eachL1(ctx, func(i, at int64, entry uint64) error {
		if entry&entryCopied == 0 || entry&^entryCopied == 0 {
			return nil
		}
		table, err := img.checkL1(at, entry)
		if err != nil {
			return err
		}
		if !holes.in(table, img.clusterSize) {
			err = img.eachL2(ctx, table, i*img.l2Span, func(int64, *l2Entry) error { return errStop })
		}
		if errors.Is(err, errStop) {
			return nil
		}
		if err != nil {
			return err
		}
		key := pageKey{l1: true, at: i / (maxPageBytes / 8)}
		page, t, err := img.pinL1Page(key.at)
		if err != nil {
			return err
		}
		j := int(i % (maxPageBytes / 8))
		ed.pub.RLock()
		t.store(j, 0)
		ed.changed(key, page, t, j, j+1,
			release{hostRun: hostRun{table >> img.clusterBits, 1}, table: true, punch: true})
		ed.pub.RUnlock()
		return ed.relieve(ctx)
	})
	if err != nil {
		return err
	}
	return ed.quiesce(ctx)
}

// errStop ends a walk early.
var errStop = errors.New("stop")

// lastUsed is the first cluster behind the last one that is counted.
func (r *refcounts) lastUsed() (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	perBlock := int64(1) << (r.blockBits - r.pageBits)
	for k := int64(len(r.table)) - 1; k >= 0; k-- {
		if r.table[k] == 0 {
			continue
		}
		for p := (k+1)*perBlock - 1; p >= k*perBlock; p-- {
			page, err := r.page(p)
			if err != nil {
				return 0, err
			}
			if page == nil || backend.IsZero(page.b) {
				continue
			}
			for i := 1<<r.pageBits - 1; i >= 0; i-- {
				if getRefcount(page.b, r.order, i) != 0 {
					return p<<r.pageBits + int64(i) + 1, nil
				}
			}
		}
	}
	return 0, nil
}

// dropBlocks unlinks the refcount blocks that count only clusters behind end.
func (m *mover) dropBlocks(end int64) error {
	r, bits := m.ed.ref, m.img.clusterBits
	perBlock := int64(1) << (r.blockBits - r.pageBits)
	var old []int64
	r.mu.Lock()
	for k := (end-1)>>r.blockBits + 1; k < int64(len(r.table)); k++ {
		if r.table[k] == 0 {
			continue
		}
		old = append(old, int64(r.table[k]>>bits))
		r.blocks.Remove(r.table[k] >> bits)
		r.table[k] = 0
		r.dirtyTable[k*8/512] = struct{}{}
		r.newBlocks = true
		for p := k * perBlock; p < (k+1)*perBlock; p++ {
			r.forget(p)
		}
	}
	r.mu.Unlock()
	if len(old) == 0 {
		return nil
	}
	if err := m.ed.flushCounts(true); err != nil {
		return err
	}
	for _, c := range old {
		if err := m.drop(hostRun{c, 1}, 1); err != nil {
			return err
		}
	}
	return nil
}

// shortenRefcountTable gives the clusters at the end of the refcount table
// back that name no block.
func (m *mover) shortenRefcountTable() error {
	r, bits := m.ed.ref, m.img.clusterBits
	perCluster := m.img.clusterSize / 8
	n := int64(len(r.table))
	for n > 0 && r.table[n-1] == 0 {
		n--
	}
	n = (n + perCluster - 1) / perCluster * perCluster
	if n == int64(len(r.table)) || n == 0 {
		return nil
	}
	if err := putTableRef(m.img.f, uint64(r.tableOff), uint32(n/perCluster)); err != nil {
		return err
	}
	if err := m.ed.syncFile(m.img.f); err != nil {
		return err
	}
	r.mu.Lock()
	old := hostRun{r.tableOff>>bits + n/perCluster, (int64(len(r.table)) - n) / perCluster}
	r.table = r.table[:n:n]
	r.mu.Unlock()
	return m.drop(old, 1)
}

// cutFile cuts the file off behind the cluster in front of end.
func (ed *editor) cutFile(end int64) error {
	r, img := ed.ref, ed.img
	r.mu.Lock()
	noTruncate := r.noTruncate
	if end < r.hwm && !noTruncate {
		r.hwm = end
	}
	r.mu.Unlock()
	// What lies behind the end of the last cluster is nobody's; a file that
	// ends within it stays as it is.
	size, err := img.f.Size()
	if err != nil || noTruncate || size <= end<<img.clusterBits {
		return err
	}
	err = r.shrinkFile()
	if errors.Is(err, errors.ErrUnsupported) || cannotGrow(err) {
		r.mu.Lock()
		r.noTruncate = true // a block device
		r.hwm = (size + img.clusterSize - 1) >> img.clusterBits
		r.mu.Unlock()
		return nil
	}
	if err != nil {
		return err
	}
	return ed.syncFile(img.f)
}

// punchHoles gives the storage of free clusters in front of end back.
func (m *mover) punchHoles(end int64) error {
	bits := m.img.clusterBits
	m.cut, m.next = end, 0
	for !m.ed.noPunch.Load() {
		run, err := m.hole(end)
		if err != nil || run.n == 0 {
			return err
		}
		off, n := run.first<<bits, run.n<<bits
		data, err := m.img.f.SeekData(off)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil || data < off+n {
			m.ed.punch(m.img.f, off, n)
		}
		m.next = run.first + run.n
		if err := m.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}
