package scavenge

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
)

// spot is a byte of a piece.
type spot struct {
	piece int32
	rel   int64 // from the beginning of the piece, on the disk
}

// pieces are what gets a place as a whole. A place is the number of a unit of
// the disk.
type pieces struct {
	unit  int64   // bytes of the disk that a piece covers
	units int64   // that the disk has; 0 is not known
	place []int32 // by piece; -1 is none
	why   []uint8 // by piece: index in codes, of the proof or of what prevents a place
	votes []uint16
	// idle marks pieces that need no place: stale, or of a snapshot.
	idle  bitset
	taken places
	cands map[int32][]int64
	// contested are units that most of the evidence in a piece names which has
	// no place because the rest of it says something else: the piece, or -1
	// for several.
	contested map[int32]int32
	// spots appends where a loc lies, in every piece that has it.
	spots func(loc int64, dst []spot) []spot
	// clustered: a piece is one cluster of the file, with all that is in it.
	clustered bool
	// same tells whether two pieces have the same content.
	same func(a, b int32) bool
}

var codes = []string{whyNone, whyConflict, whyUnclear, whyStale, whyOccupied, whyExtension, whyNoTable, whyElsewhere, whySnapshot,
	ProofSurvived, ProofFoundL1, ProofSnapshot, ProofOnlyPlace, ProofGuest, ProofShared, ProofTails, GuessRun}

func codeOf(s string) uint8 { return uint8(slices.Index(codes, s)) }

const pieceBytes = 4 + 1 + 2 + 1

func newPieces(src *source, n, unit, units int64) (*pieces, error) {
	if n >= 1<<31 || units >= 1<<31 {
		return nil, fmt.Errorf("%w: %d pieces for %d places", ErrMemory, n, units)
	}
	if err := src.take(n*pieceBytes+bitsetBytes(units), "the places of the clusters"); err != nil {
		return nil, err
	}
	p := &pieces{unit: unit, units: units, place: make([]int32, n), why: make([]uint8, n), votes: make([]uint16, n),
		idle: newBitset(n), taken: places{m: map[int32]struct{}{}}, cands: map[int32][]int64{}, contested: map[int32]int32{}}
	p.taken.b = newBitset(units)
	for i := range p.place {
		p.place[i] = -1
	}
	return p, nil
}

// places is a set of units that have a piece: a bitset where their number is
// known, else a map, for there are few.
type places struct {
	b bitset
	m map[int32]struct{}
}

func (t *places) has(u int32) bool {
	_, ok := t.m[u]
	return ok || t.b.has(int64(u))
}

func (t *places) add(u int32) {
	if int64(u)>>6 < int64(len(t.b)) {
		t.b.set(int64(u))
		return
	}
	t.m[u] = struct{}{}
}

func (t *places) remove(u int32) {
	if int64(u)>>6 < int64(len(t.b)) {
		t.b[u>>6] &^= 1 << (u & 63)
	}
	delete(t.m, u)
}

// put gives a piece a place that is free.
func (p *pieces) put(piece int32, unit int32, proof string, votes int64) {
	p.place[piece], p.why[piece] = unit, codeOf(proof)
	p.votes[piece] = uint16(min(votes, 1<<16-1))
	p.taken.add(unit)
}

func (p *pieces) proof(piece int32) string { return codes[p.why[piece]] }

// inDisk tells whether unit u can be one of the disk.
func (p *pieces) inDisk(u int64) bool { return u >= 0 && u < 1<<31-1 && (p.units == 0 || u < p.units) }

func (p *pieces) refuse(piece int32, why string, places ...int64) {
	p.why[piece] = codeOf(why)
	if len(p.cands) < maxListed && len(places) > 0 {
		p.cands[piece] = places
	}
}

// tally is what the evidence in a piece says.
type tally struct {
	best    [4]score
	used    int
	more    int64 // votes for further units
	against score // blocks that do not belong where they lie
	dup     bool  // one block with two places
	journal bool  // with blocks of a journal
	// from and to are the hits of a piece that is one cluster.
	from, to int
}

// score counts blocks that say the same. Some of them may be copies in the
// journal: they are, if the piece is one of the units from lo to hi.
type score struct {
	unit, n, copies, lo, hi int64
}

func (s *score) add(n int64, j journalUnits) {
	s.n += n
	if j.hi >= j.lo {
		if s.copies == 0 {
			s.lo, s.hi = j.lo, j.hi
		}
		s.lo, s.hi = min(s.lo, j.lo), max(s.hi, j.hi)
		s.copies += n
	}
}

// unless is how many blocks contradict that the piece is at unit u.
func (s *score) unless(u int64) int64 {
	if s.copies > 0 && u >= s.lo && u <= s.hi {
		return s.n - s.copies
	}
	return s.n
}

// journalUnits are the units in which a byte of a piece would lie in the
// journal; none when hi is less than lo.
type journalUnits struct{ lo, hi int64 }

func (t *tally) vote(unit, n int64, j journalUnits) {
	if unit >= j.lo && unit <= j.hi {
		j = journalUnits{0, -1} // it does not take itself for a copy
	}
	for i := range t.used {
		if t.best[i].unit == unit {
			t.best[i].add(n, j)
			return
		}
	}
	if t.used == len(t.best) {
		t.more += n
		return
	}
	t.best[t.used].unit = unit
	t.best[t.used].add(n, j)
	t.used++
}

// Evidence has to agree but for one block in dominance.
const dominance = 16

// decide returns the units that the evidence names: none, one, or two equal
// ones, each of which holds a copy. clear is false when it contradicts itself.
func (p *pieces) decide(t *tally) (units []int64, votes int64, clear bool) {
	b := t.best[:t.used]
	slices.SortFunc(b, func(x, y score) int { return cmp.Or(cmp.Compare(y.n, x.n), cmp.Compare(x.unit, y.unit)) })
	if len(b) == 0 {
		return nil, 0, true
	}
	if t.dup && len(b) == 2 && b[0].n == b[1].n && t.more == 0 {
		// The block and its copy.
		return []int64{b[0].unit, b[1].unit}, b[0].n, !p.clustered || b[0].n >= dominance*t.against.n
	}
	for i := range b {
		units = append(units, b[i].unit)
	}
	right := -1
	for i := range b {
		if p.holds(t, b, i) {
			if right >= 0 {
				return units, b[0].n, false
			}
			right = i
		}
	}
	if right < 0 {
		return units, b[0].n, false
	}
	return []int64{b[right].unit}, b[right].n, true
}

// holds tells whether the piece can be at the unit of b[i].
func (p *pieces) holds(t *tally, b []score, i int) bool {
	c := &b[i]
	rest, against := t.more, t.against.unless(c.unit)
	for k := range b {
		if k != i {
			rest += b[k].unless(c.unit)
		}
	}
	if p.clustered && c.copies == c.n && t.journal {
		return false
	}
	if p.clustered || c.copies == c.n {
		// It may well be a part of the journal, where few things fit, and in
		// a small cluster one of few by chance.
		return c.n >= dominance*(rest+against) && (c.n > 1 || c.copies == 0)
	}
	// So many copies may be there that a few fit by chance.
	return c.n >= dominance*rest && (c.n >= 3 || against*64 < p.unit/4096)
}

// claim is a piece that has proof for a unit.
type claim struct {
	piece, unit int32
	pair        int32 // the other unit, or -1
	votes       int64
}

// tallies counts the evidence of every piece without a place (or, when placed
// is set, of every one whose place is that of an entry), and calls visit with
// those that have any.
func (p *pieces) tallies(e *evidence, placed bool, visit func(piece int32, t *tally)) error {
	open := map[int32]*tally{}
	var spots []spot
	var offs []int64
	last := int32(-1)
	for i, h := range e.hits {
		var base int64
		if h.fs >= 0 && h.kind < kindAgainst {
			g := e.guests[h.fs]
			if g.rank == rankNone {
				continue
			}
			base = g.base
		}
		offs = e.resolve(h, offs[:0])
		if len(offs) == 0 && h.kind < kindAgainst {
			continue
		}
		spots = p.spots(h.loc, spots[:0])
		for _, s := range spots {
			if p.idle.get(int64(s.piece)) || placed != p.byEntry(s.piece) || !placed && p.place[s.piece] >= 0 {
				continue
			}
			if p.clustered && s.piece != last {
				if t := open[last]; t != nil {
					visit(last, t)
				}
				delete(open, last)
				last = s.piece
			}
			t := open[s.piece]
			if t == nil {
				if !p.clustered {
					if err := e.src.take(128, "votes"); err != nil {
						return err
					}
				}
				t = &tally{from: i}
				open[s.piece] = t
			}
			t.to = i + 1
			t.journal = t.journal || h.kind == kindJournal
			fit := 0
			ju := journalUnits{0, -1}
			if h.fs >= 0 {
				ju = p.inJournal(e.guests[h.fs], s.rel)
			}
			for _, off := range offs {
				if v := base + off - s.rel; v%p.unit == 0 && p.inDisk(v/p.unit) {
					t.vote(v/p.unit, int64(h.n), ju)
					fit++
				}
			}
			if fit == 0 {
				t.against.add(int64(h.n), ju)
			}
			t.dup = t.dup || fit > 1
		}
	}
	if !p.clustered {
		e.src.left += 128 * int64(len(open))
	}
	for piece, t := range open {
		visit(piece, t)
	}
	return nil
}

// inJournal tells in which units byte rel of a piece would lie in the journal
// of g.
func (p *pieces) inJournal(g *guest, rel int64) journalUnits {
	out := journalUnits{0, -1}
	if g.ext == nil || g.rank == rankNone {
		return out
	}
	for _, r := range g.ext.journal {
		// The first and the last u with from <= u*unit+rel < to.
		from, to := g.base+r.Off-rel, g.base+r.Off+r.Len-rel
		lo, hi := (max(from, 0)+p.unit-1)/p.unit, (to-1)/p.unit
		if to <= 0 || hi < lo {
			continue
		}
		if out.hi < out.lo {
			out = journalUnits{lo, hi}
		}
		out.lo, out.hi = min(out.lo, lo), max(out.hi, hi)
	}
	return out
}

// byEvidence places what the evidence proves and reports how many.
func (p *pieces) byEvidence(e *evidence, proof string) (placed int, err error) {
	var claims []claim
	err = p.tallies(e, false, func(piece int32, t *tally) {
		units, votes, clear := p.decide(t)
		switch {
		case len(units) == 0:
			if t.against.n > 0 && p.clustered && p.why[piece] == codeOf(whyNone) {
				p.refuse(piece, whyUnclear)
			}
		case !clear:
			p.refuse(piece, whyUnclear, p.bytes(units)...)
			p.contest(piece, t)
		case p.clustered && slices.ContainsFunc(units, func(u int64) bool { return !p.besideJournal(e, t, u) }):
			p.refuse(piece, whyUnclear, p.bytes(units)...)
		default:
			c := claim{piece, int32(units[0]), -1, votes}
			if len(units) == 2 {
				c.pair = int32(units[1])
			}
			claims = append(claims, c)
		}
	})
	if err != nil {
		return 0, err
	}
	claims = p.pairs(claims)
	return p.settle(claims, proof), nil
}

// contest enters the unit that most of the evidence in a piece names. A copy of
// that unit, in a file of the guest or in its journal, may look better than the
// unit itself, of which a block has changed since, and must not take its place.
// What has blocks of a journal in it is a copy itself.
func (p *pieces) contest(piece int32, t *tally) {
	if !p.clustered || t.journal {
		return
	}
	sum := t.more + t.against.n
	for _, s := range t.best[:t.used] {
		sum += s.n
	}
	for _, s := range t.best[:t.used] {
		if 2*s.n <= sum || len(p.contested) >= maxListed {
			continue
		}
		if by, ok := p.contested[int32(s.unit)]; ok && by != piece {
			piece = -1
		}
		p.contested[int32(s.unit)] = piece
		return // no other has more than half
	}
}

// byEntry tells whether a piece has the place that an entry said.
func (p *pieces) byEntry(piece int32) bool {
	return p.place[piece] >= 0 && (p.proof(piece) == ProofSurvived || p.proof(piece) == ProofFoundL1)
}

// contradicted takes the place from pieces whose content says that the entry
// is wrong, and from those that lie where such a piece belongs.
func (p *pieces) contradicted(e *evidence) (dropped int, err error) {
	drop := map[int32]int64{} // piece -> where its content belongs
	err = p.tallies(e, true, func(piece int32, t *tally) {
		units, _, clear := p.decide(t)
		if clear && len(units) == 1 && units[0] != int64(p.place[piece]) && len(drop) < maxListed {
			drop[piece] = units[0]
		}
	})
	if err != nil || len(drop) == 0 {
		return 0, err
	}
	wanted := map[int32]bool{}
	for piece, u := range drop {
		p.free(piece)
		p.refuse(piece, whyElsewhere, u*p.unit)
		wanted[int32(u)] = true
	}
	for i, u := range p.place {
		if u >= 0 && wanted[u] && p.byEntry(int32(i)) {
			p.free(int32(i))
			p.refuse(int32(i), whyElsewhere)
			dropped++
		}
	}
	return dropped + len(drop), nil
}

// free takes the place from a piece.
func (p *pieces) free(piece int32) {
	p.taken.remove(p.place[piece])
	p.place[piece] = -1
}

func (p *pieces) bytes(units []int64) []int64 {
	out := make([]int64, 0, len(units))
	for _, u := range units {
		out = append(out, u*p.unit)
	}
	return out
}

// pairs turns the claims of two pieces for the same two units into one for
// each, when the two are alike; nothing tells them apart, and nothing has to.
func (p *pieces) pairs(claims []claim) []claim {
	slices.SortFunc(claims, func(a, b claim) int {
		return cmp.Or(cmp.Compare(a.pair, b.pair), cmp.Compare(a.unit, b.unit), cmp.Compare(a.piece, b.piece))
	})
	out := claims[:0]
	for i := 0; i < len(claims); {
		k := i + 1
		for k < len(claims) && claims[i].pair >= 0 && claims[k].pair == claims[i].pair && claims[k].unit == claims[i].unit {
			k++
		}
		group := claims[i:k]
		i = k
		if group[0].pair < 0 {
			out = append(out, group...)
			continue
		}
		u, v := group[0].unit, group[0].pair
		uTaken := p.taken.has(u)
		vTaken := p.taken.has(v)
		switch {
		case len(group) == 2 && !uTaken && !vTaken && p.same != nil && p.same(group[0].piece, group[1].piece):
			a, b := group[0], group[1]
			a.pair, b.pair, b.unit = -1, -1, v
			out = append(out, a, b)
		case len(group) == 1 && uTaken != vTaken:
			c := group[0]
			if c.pair = -1; uTaken {
				c.unit = v
			}
			out = append(out, c)
		default:
			for _, c := range group {
				p.refuse(c.piece, whyUnclear, int64(u)*p.unit, int64(v)*p.unit)
			}
		}
	}
	return out
}

// settle gives places to the claims that nobody contradicts.
func (p *pieces) settle(claims []claim, proof string) (placed int) {
	slices.SortFunc(claims, func(a, b claim) int { return cmp.Or(cmp.Compare(a.unit, b.unit), cmp.Compare(a.piece, b.piece)) })
	for i := 0; i < len(claims); {
		k := i + 1
		for k < len(claims) && claims[k].unit == claims[i].unit {
			k++
		}
		group := claims[i:k]
		i = k
		at := int64(group[0].unit) * p.unit
		if p.taken.has(group[0].unit) {
			for _, c := range group {
				p.refuse(c.piece, whyOccupied, at)
			}
			continue
		}
		by, contested := p.contested[group[0].unit]
		alike := !contested || by == group[0].piece
		for _, c := range group[1:] {
			alike = alike && p.same != nil && p.same(group[0].piece, c.piece)
		}
		if !alike {
			for _, c := range group {
				p.refuse(c.piece, whyConflict, at)
			}
			continue
		}
		p.put(group[0].piece, group[0].unit, proof, group[0].votes)
		placed++
		for _, c := range group[1:] {
			p.idle.set(int64(c.piece)) // a copy, byte for byte
		}
	}
	return placed
}

// bitset is a set of small numbers.
type bitset []uint64

func newBitset(n int64) bitset    { return make(bitset, (n+63)/64) }
func (b bitset) get(i int64) bool { return b[i>>6]>>(i&63)&1 != 0 }
func (b bitset) set(i int64)      { b[i>>6] |= 1 << (i & 63) }
func (b bitset) has(i int64) bool { return i >= 0 && i>>6 < int64(len(b)) && b.get(i) }
func bitsetBytes(n int64) int64   { return (n + 63) / 64 * 8 }
func (s *source) sameBytes(a, b, n int64) bool {
	x, y := make([]byte, 256<<10), make([]byte, 256<<10)
	for at := int64(0); at < n; at += int64(len(x)) {
		c := min(int64(len(x)), n-at)
		if !s.read(x[:c], a+at) || !s.read(y[:c], b+at) || !bytes.Equal(x[:c], y[:c]) {
			return false
		}
	}
	return true
}
