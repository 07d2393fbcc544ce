package scavenge

import (
	"slices"

	"github.com/imagestack/imagestack/guestfs"
)

// rank is how it is known where a filesystem begins on the disk. The higher
// one prevails where two would overlap.
type rank uint8

const (
	rankNone  rank = iota
	rankMBR        // a partition of an MBR that it fills
	rankGPT        // a partition of a GPT that it fills
	rankSize       // there is no other place for its length
	rankKnown      // pieces whose place is known say so
)

var basisText = map[rank]string{rankMBR: "fills a partition of the MBR", rankGPT: "fills a partition of the GPT",
	rankSize: "its length leaves one place only", rankKnown: "clusters whose place is known"}

// A partition may be a little longer than the filesystem in it.
const slack = 1 << 20

// maxBases bounds the places that are considered for one filesystem.
const maxBases = 16

// solver finds where the filesystems begin.
type solver struct {
	e    *evidence
	p    *pieces
	disk int64 // bytes; 0 is not known
}

// bases gives filesystems their base, as far as it can be proven now; it
// reports whether any was new.
func (s *solver) bases() (changed bool, err error) {
	parts := s.partitions()
	var found []*guest
	for _, g := range s.e.guests {
		if g.rank == rankNone {
			if s.base(g, parts); g.rank != rankNone {
				found = append(found, g)
			}
		}
	}
	// Two in one place: one of them lies in a file of the other, or is what
	// was there before.
	for _, g := range found {
		for _, o := range s.e.guests {
			if o != g && o.rank != rankNone && g.base < o.base+o.size && o.base < g.base+g.size {
				switch {
				case slices.Contains(found, o) && o.rank == g.rank:
					g.basis, o.basis = "overlaps another filesystem", "overlaps another filesystem"
				case !slices.Contains(found, o) || o.rank > g.rank:
					g.basis = "lies in another filesystem"
				}
			}
		}
	}
	for _, g := range found {
		if g.basis != basisText[g.rank] {
			g.rank, g.base = rankNone, 0
			continue
		}
		changed = true
		for _, sup := range g.supers {
			if err := s.e.add(g, kindPlain, sup.loc, sup.off, sector); err != nil {
				return changed, err
			}
		}
	}
	if changed {
		s.e.finish()
	}
	return changed, nil
}

// partition is one of a table that can be trusted, or of one that a
// filesystem would have to confirm.
type partition struct {
	guestfs.Partition
	table *table
	rank  rank
}

// partitions lists what the tables say.
func (s *solver) partitions() []partition {
	// A GPT says how long its disk is. One in a file of the guest would have
	// to be as long as the whole disk.
	var guids [][16]byte
	for i := range s.e.tables {
		if t := &s.e.tables[i]; t.gpt && !slices.Contains(guids, t.guid) {
			guids = append(guids, t.guid)
		}
	}
	if s.disk == 0 && len(guids) == 1 {
		for i := range s.e.tables {
			if t := &s.e.tables[i]; t.gpt {
				s.disk = max(s.disk, t.end)
			}
		}
	}
	var out []partition
	for i := range s.e.tables {
		t := &s.e.tables[i]
		switch {
		case !t.gpt:
			for _, p := range t.parts {
				if !p.Container && (s.disk == 0 || p.End() <= s.disk) {
					out = append(out, partition{p, t, rankMBR})
				}
			}
		case t.end == s.disk:
			s.use(t, t.my*sector)
			for _, p := range t.parts {
				out = append(out, partition{p, t, rankGPT})
			}
		}
	}
	return out
}

// use makes a table evidence of its own place.
func (s *solver) use(t *table, at int64) {
	if t.used {
		return
	}
	t.used = true
	if s.e.add(nil, kindPlain, t.loc, at, sector) == nil {
		s.e.finish()
	}
}

// base finds the base of one filesystem.
func (s *solver) base(g *guest, parts []partition) {
	if b, ok := s.known(g); ok {
		g.base, g.rank, g.basis = b, rankKnown, basisText[rankKnown]
		return
	}
	// Where its first superblock can lie, modulo a unit.
	var rests []int64
	var spots []spot
	for _, sup := range g.supers {
		if !sup.primary {
			continue
		}
		spots = s.p.spots(sup.loc, spots[:0])
		for _, sp := range spots {
			if s.p.idle.get(int64(sp.piece)) {
				continue
			}
			r := mod(sp.rel-sup.off, s.p.unit)
			if !slices.Contains(rests, r) && len(rests) < maxBases {
				rests = append(rests, r)
			}
		}
	}
	if len(rests) == 0 {
		g.basis = "no superblock of its beginning"
		return
	}
	g.basis = "nothing proves where it begins"
	var bySize []int64
	if s.disk > 0 && g.size <= s.disk {
		for _, r := range rests {
			for b := r; b <= s.disk-g.size && len(bySize) < 2; b += s.p.unit {
				bySize = append(bySize, b)
			}
		}
	}
	var byTable []partition
	for _, p := range parts {
		fills := p.Size >= g.size && p.Size-g.size < slack
		if !fills || !slices.Contains(rests, mod(p.Start, s.p.unit)) {
			continue
		}
		same := func(q partition) bool { return q.Start == p.Start }
		if i := slices.IndexFunc(byTable, same); i < 0 {
			byTable = append(byTable, p)
		} else if p.rank > byTable[i].rank {
			byTable[i] = p
		}
	}
	if len(bySize) == 1 {
		g.base, g.rank, g.basis = bySize[0], rankSize, basisText[rankSize]
	}
	if len(byTable) != 1 {
		return
	}
	p := byTable[0]
	switch {
	case g.rank == rankNone:
		g.base, g.rank, g.basis = p.Start, p.rank, basisText[p.rank]
	case g.base != p.Start:
		return // the length tells, and this table is of another disk
	}
	if p.rank == rankMBR && s.mbrFits(p.table) {
		s.use(p.table, 0)
	}
}

// mbrFits tells that an MBR stands where the first sector of a disk can.
func (s *solver) mbrFits(t *table) bool {
	for _, sp := range s.p.spots(t.loc, nil) {
		if sp.rel == 0 {
			return true
		}
	}
	return false
}

// known finds the base from pieces that have a place.
func (s *solver) known(g *guest) (int64, bool) {
	const most = 1 << 16
	counts := map[int64]int64{}
	var spots []spot
	count := func(loc, off, n int64) {
		spots = s.p.spots(loc, spots[:0])
		for _, sp := range spots {
			if u := s.p.place[sp.piece]; u >= 0 {
				b := int64(u)*s.p.unit + sp.rel - off
				if _, ok := counts[b]; ok || len(counts) < most {
					counts[b] += n
				}
			}
		}
	}
	for _, sup := range g.supers {
		count(sup.loc, sup.off, 1)
	}
	var offs []int64
	for _, h := range s.e.hits {
		if h.fs != g.index || h.kind >= kindAgainst {
			continue
		}
		if offs = s.e.resolve(h, offs[:0]); len(offs) == 1 {
			count(h.loc, offs[0], int64(h.n))
		}
	}
	// Copies in a journal differ from each other in where the filesystem
	// would begin.
	best, first, second := int64(0), int64(0), int64(0)
	for b, n := range counts {
		if n > first || n == first && b < best {
			best, first, second = b, n, first
		} else {
			second = max(second, n)
		}
	}
	if first == 0 || best < 0 || first < 8*second || s.disk > 0 && best > s.disk-g.size {
		return 0, false
	}
	return best, true
}

func mod(a, m int64) int64 { return (a%m + m) % m }
