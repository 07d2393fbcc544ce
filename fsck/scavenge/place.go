package scavenge

import (
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

// claim is a piece that has proof for a unit.
type claim struct {
	piece, unit int32
	pair        int32 // the other unit, or -1
	votes       int64
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
