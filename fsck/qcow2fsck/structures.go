package qcow2fsck

import (
	"cmp"
	"fmt"
	"slices"
	"sort"

	"github.com/imagestack/imagestack/fsck"
)

// claim is a run of clusters that a structure takes.
type claim struct {
	first, n int64
	what     string
}

// claims are runs that do not overlap, sorted, in parts that keep the cost of
// an insertion small: every snapshot and every bitmap claims something.
type claims struct{ parts [][]claim }

const maxClaimPart = 512

// part is the index of the first part that reaches behind a cluster.
func (l *claims) part(cluster int64) int {
	return sort.Search(len(l.parts), func(i int) bool {
		p := l.parts[i]
		return p[len(p)-1].first+p[len(p)-1].n > cluster
	})
}

// at returns the claim that overlaps [first, first+n).
func (l *claims) at(first, n int64) *claim {
	k := l.part(first)
	if k == len(l.parts) {
		return nil
	}
	p := l.parts[k]
	i := sort.Search(len(p), func(i int) bool { return p[i].first+p[i].n > first })
	if p[i].first < first+n {
		return &p[i]
	}
	return nil
}

func (l *claims) insert(first, n int64, what string) {
	k := min(l.part(first), len(l.parts)-1)
	if k < 0 {
		l.parts = append(l.parts, []claim{{first, n, what}})
		return
	}
	p := l.parts[k]
	i := sort.Search(len(p), func(i int) bool { return p[i].first > first })
	p = slices.Insert(p, i, claim{first, n, what})
	l.parts[k] = p
	if half := len(p) / 2; len(p) > maxClaimPart {
		l.parts[k] = p[:half:half]
		l.parts = slices.Insert(l.parts, k+1, slices.Clone(p[half:]))
	}
}

func (l *claims) remove(first int64) {
	k := l.part(first)
	if k == len(l.parts) {
		return
	}
	p := slices.DeleteFunc(l.parts[k], func(c claim) bool { return c.first == first })
	if l.parts[k] = p; len(p) == 0 {
		l.parts = slices.Delete(l.parts, k, k+1)
	}
}

// all calls do for every claim, ascending.
func (l *claims) all(do func(claim)) {
	for _, p := range l.parts {
		for _, c := range p {
			do(c)
		}
	}
}

// clone is a copy that does not change with l.
func (l *claims) clone() claims {
	n := claims{}
	for _, p := range l.parts {
		n.parts = append(n.parts, slices.Clone(p))
	}
	return n
}

// claim takes the clusters of [off, off+n), whose off is on a cluster boundary,
// and returns what is there already, "" for success.
func (c *check) claim(off, n uint64, what string) string {
	if n == 0 {
		return ""
	}
	first := int64(off >> c.bits)
	k := int64((n + uint64(c.cs) - 1) >> c.bits)
	if first == 0 {
		return "the header"
	}
	if old := c.claims.at(first, k); old != nil {
		return old.what
	}
	c.claims.insert(first, k, what)
	return ""
}

// l1 is an L1 table that is walked.
type l1 struct {
	off     int64
	entries int64
	owner   int32 // 0 active, else number of the snapshot from 1
}

// structures claims everything that the header names. It reports whether there
// is a map to walk.
func (c *check) structures() bool {
	h := &c.h
	if h.l1Size > 0 {
		if what := c.claim(h.l1Off, uint64(h.l1Size)*8, "the L1 table"); what != "" {
			c.found(codeL1Offset, offL1Offset, "l1_table_offset", h.l1Off, "the table lies in "+what, nil)
			return false
		}
		if h.rtOff == h.l1Off && c.counted(0, 1) {
			c.found(codeL1Offset, offL1Offset, "l1_table_offset", h.l1Off, "the refcount table is there", nil)
			return false
		}
		c.l1s = append(c.l1s, l1{int64(h.l1Off), int64(h.l1Size), 0})
	}
	c.refcountTable()
	if e := h.extension(extCrypto); e != nil && len(e.data) >= 16 {
		off, n := be64(e.data), be64(e.data[8:])
		if c.aligned(off, n) {
			c.claim(off, n, "the encryption header")
		}
	}
	c.snapshots()
	c.bitmaps()
	c.refcountBlocks()
	c.compressionType()
	return true
}

// blocks is the refcount table.
type blocks struct {
	off      uint64
	table    []uint64 // offset of each block, 0 where there is none that can be used
	clusters int64    // that the table takes in the file
	rebuild  bool     // a new table has to be made
	unknown  bool     // counts cannot be judged
	gone     map[int]bool
	made     map[int64]bool // blocks of this repair
	declined map[int64]bool // blocks that nobody wants made
	place    int64          // cluster of the new table, 0 for none
	placeN   int64          // and its clusters
	at       []blockPlace   // of the blocks, by cluster; made when first asked for
}

// blockPlace is the cluster that entry k of the refcount table names.
type blockPlace struct {
	cluster int64
	k       int
}

// places are the places of all entries that are not 0, by cluster and entry.
func (b *blocks) places(bits uint) []blockPlace {
	n := 0
	for _, off := range b.table {
		n += int(b2i(off != 0))
	}
	all := make([]blockPlace, 0, n)
	for k, off := range b.table {
		if off != 0 {
			all = append(all, blockPlace{int64(off >> bits), k})
		}
	}
	slices.SortFunc(all, func(a, b blockPlace) int { return cmp.Or(cmp.Compare(a.cluster, b.cluster), cmp.Compare(a.k, b.k)) })
	return all
}

// blockAt returns the entry of the refcount block that is in use at a cluster.
func (c *check) blockAt(cluster int64) (k int, ok bool) {
	t := &c.blocks
	if t.at == nil {
		t.at = t.places(c.bits)
	}
	i, ok := slices.BinarySearchFunc(t.at, cluster, func(p blockPlace, at int64) int { return cmp.Compare(p.cluster, at) })
	if !ok || t.table[t.at[i].k] == 0 { // dropped meanwhile
		return 0, false
	}
	return t.at[i].k, true
}

// drop takes a block out; a new one is made silently.
func (b *blocks) drop(k int) {
	b.table[k] = 0
	if b.gone == nil {
		b.gone = map[int]bool{}
	}
	b.gone[k] = true
}

// refcountTable judges the table's place in the header and reads it.
func (c *check) refcountTable() {
	h, t := &c.h, &c.blocks
	lost := func(off int64, field string, value any, text string) {
		if t.unknown {
			return
		}
		if c.found(codeRTHeader, off, field, value, text, preen("make a new table")) {
			t.rebuild = true
		} else {
			t.unknown = true
		}
	}
	n := uint64(h.rtClusters) << c.bits
	switch {
	case t.rebuild: // the width of counts is another: no block can be used
		return
	case h.rtOff&uint64(c.cs-1) != 0 || h.rtOff == 0 || !c.aligned(h.rtOff, 1):
		lost(offRTOffset, "refcount_table_offset", h.rtOff, "there is no refcount table")
		return
	case h.rtClusters == 0:
		lost(offRTClusters, "refcount_table_clusters", h.rtClusters, "the refcount table has no clusters")
		return
	case n > max(maxRefTableBytes, uint64(c.cs)) || !c.aligned(h.rtOff, n):
		lost(offRTClusters, "refcount_table_clusters", h.rtClusters, "the refcount table is too long")
		return
	}
	if what := c.claim(h.rtOff, n, "the refcount table"); what != "" {
		lost(offRTOffset, "refcount_table_offset", h.rtOff, "the refcount table lies in "+what)
		return
	}
	t.off, t.clusters = h.rtOff, int64(h.rtClusters)
	b := make([]byte, n)
	c.read(b, int64(h.rtOff))
	t.table = make([]uint64, n/8)
	last := 0
	for k := range t.table {
		if t.table[k] = be64(b[8*k:]); t.table[k] != 0 {
			last = k + 1
		}
	}
	// Most of a table that lies in data is impossible.
	good, bad := 0, 0
	for _, e := range t.table[:last] {
		switch {
		case e == 0:
		case e&0x1ff != 0 || !c.aligned(e, 1):
			bad++
		default:
			good++
		}
	}
	if bad > 2 && bad > good {
		c.claims.remove(int64(h.rtOff >> c.bits))
		*t = blocks{}
		lost(offRTOffset, "refcount_table_offset", h.rtOff, "what is there is no refcount table")
	}
}

// refcountBlocks judges the entries of the refcount table, once everything
// else that the header names is known.
func (c *check) refcountBlocks() {
	t := &c.blocks
	for k, e := range t.table {
		if e == 0 {
			continue
		}
		at := int64(t.off) + int64(k)*8
		field := fmt.Sprintf("refcount table entry %d", k)
		bad := func(code *fsck.Code, text string) {
			if c.found(code, at, field, e, text, preen("make a new block")) {
				c.put64(fsck.PhaseCounts, at, 0)
			}
			t.drop(k)
		}
		off := e
		if e&0x1ff != 0 {
			// With the reserved bits cleared it may be a good entry.
			off = e &^ 0x1ff
			if c.aligned(off, 1) && c.claims.at(int64(off>>c.bits), 1) == nil {
				if c.found(codeRTReserved, at, field, e, "reserved bits are set", preen("clear them")) {
					c.put64(fsck.PhaseCounts, at, off)
				}
				t.table[k] = off
			} else {
				bad(codeRTReserved, "reserved bits are set")
				continue
			}
		}
		switch {
		case off&uint64(c.cs-1) != 0:
			bad(codeRTUnaligned, "the block is not on a cluster boundary")
			continue
		case !c.aligned(off, 1):
			bad(codeRTPastEOF, "the block lies behind the end of the file")
			continue
		}
		if cl := c.claims.at(int64(off>>c.bits), 1); cl != nil {
			bad(codeRTMetadata, "the block lies in "+cl.what)
			continue
		}
	}
	first := blockPlace{cluster: -1}
	for _, p := range t.places(c.bits) {
		if p.cluster != first.cluster {
			first = p
			continue
		}
		at := int64(t.off) + int64(p.k)*8
		if c.found(codeRTShared, at, fmt.Sprintf("refcount table entry %d", p.k), t.table[p.k],
			fmt.Sprintf("entry %d names the same block", first.k), preen("make a new block")) {
			c.put64(fsck.PhaseCounts, at, 0)
		}
		t.drop(p.k)
	}
}

// openData opens the external data file.
func (c *check) openData() {
	if !c.external {
		return
	}
	e := c.h.extension(extDataFile)
	if e == nil || len(e.data) == 0 {
		c.found(codeDataNoName, offIncompat, "external data file name", nil, "the image does not name its external data file", nil)
		return
	}
	name := string(e.data)
	if c.o.OpenFile == nil {
		c.found(codeDataMissing, e.off, "external data file name", name, "it was not looked at", nil)
		return
	}
	f, err := c.o.OpenFile(name)
	if err != nil {
		c.found(codeDataMissing, e.off, "external data file name", name, err.Error(), nil)
		return
	}
	end, err := f.Size()
	if err != nil {
		f.Close()
		c.found(codeDataMissing, e.off, "external data file name", name, err.Error(), nil)
		return
	}
	c.data, c.dataEnd = f, end
}
