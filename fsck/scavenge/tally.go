package scavenge

import (
	"cmp"
	"slices"
)

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
