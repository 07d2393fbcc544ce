package qcow2

// batch collects moves of single clusters until they are committed together.
type batch struct {
	m     *mover
	free  hostRun // taken from the holes, counted, not yet used
	moves []move
	n     int64 // clusters
	words []word
}

// move is a run of host clusters that goes from one place to another.
type move struct{ from, to, n int64 }

// add plans the move of the cluster that all of same name; rest are the
// references behind them. It reports false when there is no hole left.
func (b *batch) add(same, rest []ref) (bool, error) {
	m := b.m
	bits := m.img.clusterBits
	from := same[0].target >> bits
	if b.free.n == 0 {
		var err error
		if b.free, err = m.hole(runLength(same[0].target, rest, m.img.clusterSize, m.batch-b.n)); err != nil || b.free.n == 0 {
			return false, err
		}
		// Counted at once, so that the next look for a hole does not find it.
		if err := m.take(b.free, 1); err != nil {
			return false, err
		}
	}
	to := b.free.first
	b.free = hostRun{to + 1, b.free.n - 1}
	count, err := m.ed.ref.count(from)
	if err == nil && count != 1 {
		err = m.take(hostRun{to, 1}, count)
	}
	if err != nil {
		return false, err
	}
	if k := len(b.moves) - 1; k >= 0 && b.moves[k].from+b.moves[k].n == from && b.moves[k].to+b.moves[k].n == to {
		b.moves[k].n++
	} else {
		b.moves = append(b.moves, move{from, to, 1})
	}
	for _, r := range same {
		b.words = append(b.words, word{at: r.at, mask: entryOffset, from: uint64(from << bits), to: uint64(to << bits)})
	}
	if b.n++; b.n < m.batch {
		return true, nil
	}
	return true, b.commit()
}

// runLength is the number of clusters, from target on, that follow each other
// in the file and so should do so afterwards.
func runLength(target int64, rest []ref, clusterSize, limit int64) int64 {
	n := int64(1)
	for i := 0; i < len(rest) && n < limit; i++ {
		switch r := &rest[i]; {
		case r.kind == refPacked || r.kind == refBlock:
			return n
		case r.target == target+n*clusterSize:
			n++
		case r.target > target+n*clusterSize:
			return n
		}
	}
	return n
}

// commit carries the moves out: copy, sync, change the words, sync, free.
func (b *batch) commit() error {
	m := b.m
	if b.free.n > 0 {
		// Room for clusters that went elsewhere.
		if err := m.give(b.free); err != nil {
			return err
		}
		b.free = hostRun{}
	}
	if len(b.moves) == 0 {
		return nil
	}
	bits := m.img.clusterBits
	for _, v := range b.moves {
		if err := m.copyHost(v.from<<bits, v.to<<bits, v.n<<bits); err != nil {
			return b.undo(err)
		}
	}
	if err := m.publish(b.words); err != nil {
		return err
	}
	for _, v := range b.moves {
		if err := m.forget(hostRun{v.from, v.n}); err != nil {
			return err
		}
	}
	n := b.n << bits
	b.moves, b.words, b.n = b.moves[:0], b.words[:0], 0
	return m.done(n)
}

// publish makes the copies and the counts of their places durable, and then
// the words that name them.
func (m *mover) publish(words []word) error {
	if err := m.ed.ref.writePages(); err != nil {
		return err
	}
	if err := m.ed.syncFile(m.img.f); err != nil {
		return err
	}
	if err := m.patch(words); err != nil {
		return err
	}
	return m.ed.syncFile(m.img.f)
}

// forget frees clusters to which nothing refers any more.
func (m *mover) forget(run hostRun) error {
	for c := run.first; c < run.first+run.n; {
		// Those with the same count together.
		count, err := m.ed.ref.count(c)
		if err != nil {
			return err
		}
		n := int64(1)
		for c+n < run.first+run.n {
			next, err := m.ed.ref.count(c + n)
			if err != nil {
				return err
			}
			if next != count {
				break
			}
			n++
		}
		if err := m.drop(hostRun{c, n}, count); err != nil {
			return err
		}
		c += n
	}
	return m.ed.ref.writePages()
}

// give frees clusters that were taken and never used.
func (m *mover) give(run hostRun) error {
	r := m.ed.ref
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.set(run.first, run.n, 0); err != nil {
		return err
	}
	r.markFree(run.first)
	r.markFree(run.first + run.n - 1)
	m.next = min(m.next, run.first)
	return nil
}

// undo gives the places back when nothing names them yet, and returns err.
func (b *batch) undo(err error) error {
	for _, v := range b.moves {
		if b.m.give(hostRun{v.to, v.n}) != nil {
			break // a leak
		}
	}
	b.moves, b.words, b.n = nil, nil, 0
	return err
}
