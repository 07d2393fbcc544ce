package qcow2

import "encoding/binary"

// moveTables moves the structures of several clusters that reach behind the
// cut. Each is a batch of its own, because it needs a run of free clusters and
// the words that name the next one may lie in it.
func (m *mover) moveTables() error {
	stay := map[int64]bool{} // tables for which there is no room
	for {
		tables, err := m.img.hostTables(m.ctx)
		if err != nil {
			return err
		}
		again := false
		for _, t := range tables {
			run := m.img.tableRun(t)
			if t.n == 0 || run.first+run.n <= m.cut || stay[t.off] {
				continue
			}
			to, err := m.holeOf(run.n)
			if err != nil {
				return err
			}
			if to < 0 {
				stay[t.off] = true
				continue
			}
			if t.kind == tableRefcounts {
				err = m.moveRefcountTable(to, int64(len(m.ed.ref.table)))
			} else {
				err = m.moveTable(t, run, to)
			}
			if err != nil {
				return err
			}
			if err := m.done(run.n << m.img.clusterBits); err != nil {
				return err
			}
			if t.kind == tableSnapshots || t.kind == tableBitmapDir {
				again = true // what it says of the others stands elsewhere now
				break
			}
		}
		if !again {
			return nil
		}
	}
}

// tableRun is the clusters of a table.
func (img *Image) tableRun(t *hostTable) hostRun {
	first := t.off >> img.clusterBits
	return hostRun{first, (t.off+t.n+img.clusterSize-1)>>img.clusterBits - first}
}

// holeOf finds n free clusters in a run below the cut, -1 when there are none.
func (m *mover) holeOf(n int64) (int64, error) {
	r := m.ed.ref
	r.mu.Lock()
	defer r.mu.Unlock()
	var run hostRun
	for at := m.next; at < m.cut; {
		found, err := r.freeAt(at, m.cut, n-run.n)
		if err != nil {
			return -1, err
		}
		if found.n == 0 {
			at, run = (at>>r.pageBits+1)<<r.pageBits, hostRun{}
			continue
		}
		if run.first+run.n != found.first {
			run = hostRun{first: found.first}
		}
		run.n += found.n
		at = found.first + found.n
		if run.n >= n {
			return run.first, nil
		}
	}
	return -1, nil
}

// moveTable moves an L1 table, the snapshot table, the bitmap directory or a
// bitmap table.
func (m *mover) moveTable(t *hostTable, run hostRun, to int64) error {
	img := m.img
	for i := range run.n {
		count, err := m.ed.ref.count(run.first + i)
		if err == nil {
			err = m.take(hostRun{to + i, 1}, count)
		}
		if err != nil {
			return err
		}
	}
	bits := img.clusterBits
	if err := m.copyHost(run.first<<bits, to<<bits, run.n<<bits); err != nil {
		return err
	}
	words := []word{{at: t.at, mask: ^uint64(0), from: uint64(t.off), to: uint64(to << bits)}}
	for _, at := range t.shared {
		words = append(words, word{at: at, mask: ^uint64(0), from: uint64(t.off), to: uint64(to << bits)})
	}
	if err := m.publish(words); err != nil {
		return err
	}
	m.relocated(t, to<<bits)
	return m.forget(run)
}

// relocated tells the image where a table stands now.
func (m *mover) relocated(t *hostTable, to int64) {
	img := m.img
	switch t.kind {
	case tableL1:
		img.l1Off = to
		img.hdr.L1Offset = uint64(to)
		img.l1Pages.DropAll()
	case tableSnapshots:
		img.hdr.SnapshotsOffset = uint64(to)
	case tableBitmapDir:
		binary.BigEndian.PutUint64(img.hdr.extension(extBitmaps).Data[bitmapsDirOffset:], uint64(to))
	}
}

// moveRefcountTable makes the refcount table of so many entries stand at the
// free clusters from to on.
func (m *mover) moveRefcountTable(to, entries int64) error {
	r := m.ed.ref
	bits := m.img.clusterBits
	n := entries * 8 >> bits
	if err := m.take(hostRun{to, n}, 1); err != nil {
		return err
	}
	r.mu.Lock()
	old := hostRun{r.tableOff >> bits, int64(len(r.table)) * 8 >> bits}
	table := make([]uint64, entries)
	copy(table, r.table)
	r.table, r.tableOff, r.tableMoved = table, to<<bits, true
	r.oldTables = append(r.oldTables, old)
	r.mu.Unlock()
	if err := m.ed.flushCounts(true); err != nil {
		return err
	}
	m.ed.punch(m.img.f, old.first<<bits, old.n<<bits)
	return nil
}

// moveBlocks moves refcount blocks. Their new places are counted in the blocks
// as they stand before the first one moves, because one block may count the
// new place of another; then their pages are written to the new places, and
// the entries of the refcount table follow in the usual order: behind a sync,
// by which both are durable whichever of the entries get there.
func (m *mover) moveBlocks(refs []ref) error {
	const together = 16
	for len(refs) > 0 {
		n := min(len(refs), together, max(1, int(m.batch)))
		moved, err := m.moveSome(refs[:n])
		if err != nil {
			return err
		}
		if moved < n {
			return nil // no room
		}
		refs = refs[n:]
	}
	return nil
}

func (m *mover) moveSome(refs []ref) (int, error) {
	r, bits := m.ed.ref, m.img.clusterBits
	var to []int64
	for range refs {
		run, err := m.hole(1)
		if err != nil {
			return 0, err
		}
		if run.n == 0 {
			break
		}
		if err := m.take(run, 1); err != nil {
			return 0, err
		}
		to = append(to, run.first)
	}
	if len(to) == 0 {
		return 0, nil
	}
	if err := r.writePages(); err != nil {
		return 0, err
	}
	r.mu.Lock()
	var err error
	for i, t := range to {
		if err = r.moveBlock(refs[i].at, t); err != nil {
			break
		}
	}
	r.mu.Unlock()
	if err == nil {
		err = m.ed.flushCounts(true)
	}
	if err != nil {
		return 0, err
	}
	for i := range to {
		if err := m.drop(hostRun{refs[i].target >> bits, 1}, 1); err != nil {
			return 0, err
		}
	}
	if err := r.writePages(); err != nil {
		return 0, err
	}
	return len(to), m.done(int64(len(to)) << bits)
}

// moveBlock makes block k stand in the cluster at. All of its pages are
// changed ones from then on, so that the next flush writes them there.
func (r *refcounts) moveBlock(k, at int64) error {
	n := int64(1) << (r.blockBits - r.pageBits)
	for p := k * n; p < (k+1)*n; p++ {
		if _, err := r.change(p); err != nil {
			return err
		}
	}
	r.blocks.Remove(r.table[k] >> r.img.clusterBits)
	r.enterBlock(k, at)
	return nil
}
