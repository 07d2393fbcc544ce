package qcow2

import "slices"

// stream is a compressed cluster, with all words that name it.
type stream struct {
	off, len int64 // bytes; up to the end of its last sector
	refs     []ref
	count    uint64 // references, each snapshot that reaches it counted
}

// movePacked moves compressed clusters stream by stream. Streams that overlap
// or touch in their last sector stay together, so that the bytes of one may go
// on serving as the padding of another; gaps between them are closed. The
// offset within a sector is kept, which leaves the number of sectors in the
// descriptor as it is.
func (m *mover) movePacked(refs []ref) error {
	slices.SortFunc(refs, func(a, b ref) int {
		return int(min(max(a.target-b.target, -1), 1))*2 + int(min(max(int64(a.len)-int64(b.len), -1), 1))
	})
	p := packer{m: m}
	for len(refs) > 0 {
		n := 1
		for n < len(refs) && refs[n].target == refs[0].target && refs[n].len == refs[0].len {
			n++
		}
		s, err := m.stream(refs[:n])
		if err != nil {
			return err
		}
		refs = refs[n:]
		ok, err := p.add(s)
		if err != nil || !ok {
			return errorOr(err, p.commit)
		}
	}
	return p.commit()
}

func errorOr(err error, do func() error) error {
	if err != nil {
		return err
	}
	return do()
}

// stream counts the references of one compressed cluster: one for each way to
// each word, as many as its L2 table has.
func (m *mover) stream(refs []ref) (stream, error) {
	s := stream{off: refs[0].target, len: int64(refs[0].len), refs: refs}
	for _, r := range refs {
		n, err := m.ed.ref.count(r.at >> m.img.clusterBits)
		if err != nil {
			return s, err
		}
		s.count += n
	}
	return s, nil
}

// packer puts streams into holes.
type packer struct {
	m *mover
	// The hole in use, in clusters, and what has been put there.
	hole  hostRun
	pos   int64 // bytes: where the next piece may begin
	count map[int64]uint64
	piece piece
	done  []piece
	words []word
	freed []stream
	n     int64 // bytes
}

// piece is a run of bytes that is copied as a whole.
type piece struct{ from, to, n int64 }

// add plans the move of a stream. It reports false when there is no room.
func (p *packer) add(s stream) (bool, error) {
	m := p.m
	bits := m.img.clusterBits
	if p.count == nil {
		p.count = make(map[int64]uint64)
	}
	for tries := 0; ; tries++ {
		if to, joins := p.place(s); to >= 0 {
			p.put(s, to, joins)
			break
		}
		p.endPiece()
		if p.n >= m.batch<<bits {
			if err := p.commit(); err != nil {
				return false, err
			}
		}
		// What is left of the hole is too small.
		if err := p.endHole(true); err != nil {
			return false, err
		}
		want := max(m.batch, (s.len+m.img.clusterSize-1)>>bits+1)
		run, err := m.hole(want)
		if err != nil || run.n == 0 || tries > maxTries {
			return false, err
		}
		p.hole, p.pos = run, run.first<<bits
		// Counted at once, exactly when the batch is committed.
		if err := m.take(run, 1); err != nil {
			return false, err
		}
	}
	if p.n >= m.batch<<bits {
		return true, p.commit()
	}
	return true, nil
}

// maxTries is the number of holes that may be too small for one stream.
const maxTries = 1 << 16

// place is where a stream may go in the present hole, -1 for nowhere. joins
// tells that it belongs to the piece before it.
func (p *packer) place(s stream) (to int64, joins bool) {
	if p.hole.n == 0 {
		return -1, false
	}
	if q := p.piece; q.n > 0 && s.off <= q.from+q.n {
		if to = q.to + s.off - q.from; p.fits(s, to) {
			return to, true
		}
	}
	in := s.off & 511
	if to = p.pos + in; p.fits(s, to) {
		return to, false
	}
	// A narrow count may be full while the next cluster's is not.
	mask := p.m.img.clusterSize - 1
	if to = (p.pos+mask)&^mask + in; p.fits(s, to) {
		return to, false
	}
	return -1, false
}

// fits reports whether the place lies in the hole and the counts of its
// clusters can take the stream's, too.
func (p *packer) fits(s stream, to int64) bool {
	bits := p.m.img.clusterBits
	if to+s.len > (p.hole.first+p.hole.n)<<bits {
		return false
	}
	for c := to >> bits; c <= (to+s.len-1)>>bits; c++ {
		if p.count[c]+s.count > maxRefcount(p.m.ed.ref.order) {
			return false
		}
	}
	return true
}

// put enters a stream at its new place.
func (p *packer) put(s stream, to int64, joins bool) {
	bits := p.m.img.clusterBits
	if !joins {
		p.endPiece()
		p.piece = piece{from: s.off, to: to}
	}
	grown := max(p.piece.n, s.off+s.len-p.piece.from)
	p.n += grown - p.piece.n
	p.piece.n = grown
	// The last byte of a stream is the last of a sector.
	p.pos = max(p.pos, to+s.len)
	for c := to >> bits; c <= (to+s.len-1)>>bits; c++ {
		p.count[c] += s.count
	}
	x := 62 - (bits - 8)
	mask := uint64(1)<<x - 1
	for _, r := range s.refs {
		p.words = append(p.words, word{at: r.at, mask: mask, from: uint64(s.off), to: uint64(to)})
	}
	p.freed = append(p.freed, s)
}

func (p *packer) endPiece() {
	if p.piece.n > 0 {
		p.done = append(p.done, p.piece)
	}
	p.piece = piece{}
}

// endHole gives back what was not used of the hole. With skip it is not looked
// at again in this pass.
func (p *packer) endHole(skip bool) error {
	m := p.m
	h := p.hole
	p.hole = hostRun{}
	for c := h.first; c < h.first+h.n; c++ {
		if p.count[c] != 0 {
			continue
		}
		n := int64(1)
		for c+n < h.first+h.n && p.count[c+n] == 0 {
			n++
		}
		next := m.next
		if err := m.give(hostRun{c, n}); err != nil {
			return err
		}
		if skip {
			m.next = next
		}
		c += n
	}
	if skip {
		m.next = max(m.next, min(h.first+h.n, m.cut))
	}
	return nil
}

// commit carries the moves out.
func (p *packer) commit() error {
	m := p.m
	bits := m.img.clusterBits
	p.endPiece()
	if err := p.endHole(false); err != nil {
		return err
	}
	if len(p.freed) == 0 {
		return nil
	}
	for c, n := range p.count {
		if err := m.take(hostRun{c, 1}, n); err != nil {
			return err
		}
	}
	for _, q := range p.done {
		if err := m.copyHost(q.from, q.to, q.n); err != nil {
			return err
		}
	}
	if err := m.publish(p.words); err != nil {
		return err
	}
	for _, s := range p.freed {
		first := s.off >> bits
		if err := m.drop(hostRun{first, (s.off+s.len-1)>>bits - first + 1}, s.count); err != nil {
			return err
		}
	}
	if err := m.ed.ref.writePages(); err != nil {
		return err
	}
	n := p.n
	*p = packer{m: m}
	return m.done(n)
}
