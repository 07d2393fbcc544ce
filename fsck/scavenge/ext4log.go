package scavenge

import (
	"encoding/binary"
	"slices"

	"github.com/imagestack/imagestack/blockmap"
)

// journalled are the blocks of which the journal of an ext4 has, or had,
// copies. Mounted with data=journal it has copies of the data of files as well:
// one behind the other as in the file, they look like a place of the disk whose
// own content may be older or missing.
type journalled struct {
	blocks []uint64
	full   bool // there are more than are kept
	data   int  // of them, how often they are blocks of regular files
}

// maxJournalled bounds the blocks that are kept: those of a journal of 4 GiB.
const maxJournalled = 1 << 20

// Tags of a descriptor block with checksums of version 3, which filesystems
// with checksums have (kernel documentation, ext4 data structures, Journal).
const (
	logHeader   = 12
	logTag      = 16
	logUUID     = 16
	logSameUUID = 2
	logLast     = 8
	logFlags    = 15
)

// descriptor takes the tags of a descriptor block.
func (l *journalled) descriptor(e *evidence, b []byte, blocks uint64) error {
	be := binary.BigEndian
	for at := logHeader; at+logTag <= len(b)-4; {
		t := b[at:]
		block, flags := uint64(be.Uint32(t))|uint64(be.Uint32(t[8:]))<<32, be.Uint32(t[4:])
		if flags&^logFlags != 0 || block >= blocks {
			return nil // something else
		}
		if len(l.blocks) >= maxJournalled {
			l.full = true
			return nil
		}
		var err error
		if l.blocks, err = append1(e.src, l.blocks, block, 8, "the journal"); err != nil {
			return err
		}
		at += logTag
		if flags&logSameUUID == 0 {
			at += logUUID
		}
		if flags&logLast != 0 {
			return nil
		}
	}
	return nil
}

// sort makes the blocks ready for what follows.
func (l *journalled) sort() {
	slices.Sort(l.blocks)
	l.blocks = slices.Compact(l.blocks)
}

// file counts the blocks that are data of a regular file.
func (l *journalled) file(extents []extent) {
	for _, x := range extents {
		if x.unwritten || x.n > 1<<48 || x.phys > 1<<48 {
			continue
		}
		from, _ := slices.BinarySearch(l.blocks, x.phys)
		to, _ := slices.BinarySearch(l.blocks, x.phys+x.n)
		l.data += to - from
	}
}

func (l *journalled) has(block uint64) bool {
	_, found := slices.BinarySearch(l.blocks, block)
	return found
}

// ofData reports whether the journal has, or had, data of files. Blocks of
// directories that became those of files are few.
func (l *journalled) ofData() bool { return l.full || l.data > len(l.blocks)/8 }

// minBeside is how many blocks have to be in their place in a unit that the
// journal has a part of.
const minBeside = 3

// besideJournal decides about a cluster at a unit that has a part of the
// journal of an ext4 in it. What is in a journal contradicts nothing there, so
// that any cluster of the journal looks right in which a copy lies where its
// original would: what is not of the journal in this unit has to tell.
func (p *pieces) besideJournal(e *evidence, t *tally, unit int64) bool {
	inside := func(g *guest, off int64) bool {
		return slices.ContainsFunc(g.ext.journal, func(r blockmap.Range) bool { return off >= r.Off && off < r.End() })
	}
	if !slices.ContainsFunc(e.guests, func(g *guest) bool {
		from := unit*p.unit - g.base
		return g.ext != nil && g.rank != rankNone && slices.ContainsFunc(g.ext.journal, func(r blockmap.Range) bool {
			return r.Off < from+p.unit && from < r.End()
		})
	}) {
		return true
	}
	right, wrong := int64(0), int64(0)
	var spots []spot
	var offs []int64
	for _, h := range e.hits[t.from:t.to] {
		if h.fs < 0 || h.kind >= kindAgainst || e.guests[h.fs].ext == nil {
			continue
		}
		g := e.guests[h.fs]
		spots, offs = p.spots(h.loc, spots[:0]), e.resolve(h, offs[:0])
		if len(spots) != 1 || len(offs) != 1 {
			continue
		}
		for k := range int64(h.n) {
			switch at := unit*p.unit + spots[0].rel + k*g.block - g.base; {
			case inside(g, at):
			case at == offs[0]+k*g.block:
				right++
			default:
				wrong++
			}
		}
	}
	return right >= minBeside && right >= dominance*wrong
}
