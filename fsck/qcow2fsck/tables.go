package qcow2fsck

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/fsck"
)

// tableRec is an L2 table that L1 entries name, with the sum of those that do
// from the same index of their L1 tables.
type tableRec struct {
	cluster int64
	idx     uint32 // in the L1 table, which gives the guest offset
	owner   int32  // of the first of them: 0 active, else a snapshot
	weight  uint32
	copied  bool // the active entry has COPIED
}

const recBytes = 24

// tableList says how the L2 tables are to be gone through.
type tableList struct {
	bad map[int64]bool // clusters that are called L2 tables and are none
}

// eachBatch calls do for all L2 tables, by ascending cluster, as many at a
// time as the memory holds. report says that L1 entries are to be judged aloud.
func (c *check) eachBatch(report bool, do func([]tableRec) error) error {
	if c.tables == nil {
		c.tables = &tableList{bad: map[int64]bool{}}
	}
	limit := int(max(c.budget/4/recBytes, 1024))
	aloud := report // the first round judges all entries
	for lo := int64(0); ; aloud = false {
		hi := int64(1<<63 - 1)
		var list []tableRec
		for _, t := range c.l1s {
			if err := c.eachL1(t, aloud, func(rec tableRec) {
				if rec.cluster < lo || rec.cluster >= hi || c.tables.bad[rec.cluster] {
					return
				}
				list = append(list, rec)
				if len(list) < limit {
					return
				}
				if list = merge(list); len(list) > limit/2 {
					hi = list[len(list)/2].cluster
					k, _ := slices.BinarySearchFunc(list, hi, func(r tableRec, at int64) int { return cmp.Compare(r.cluster, at) })
					if k == 0 { // one table with very many entries: damage
						hi++
						k = len(list)
					}
					list = list[:k]
				}
			}); err != nil {
				return err
			}
		}
		if err := do(c.settle(merge(list), report)); err != nil {
			return err
		}
		if hi == 1<<63-1 {
			return c.failed()
		}
		lo = hi
	}
}

// merge sorts a list and joins what names the same table from the same index.
func merge(list []tableRec) []tableRec {
	slices.SortFunc(list, func(a, b tableRec) int {
		return cmp.Or(cmp.Compare(a.cluster, b.cluster), cmp.Compare(a.idx, b.idx), cmp.Compare(a.owner, b.owner))
	})
	out := list[:0]
	for _, r := range list {
		if n := len(out); n > 0 && out[n-1].cluster == r.cluster && out[n-1].idx == r.idx {
			out[n-1].weight += r.weight
			out[n-1].copied = out[n-1].copied || r.copied
			continue
		}
		out = append(out, r)
	}
	return out
}

// settle leaves one record for each table. Tables that different indexes name
// have one owner too many; COPIED flags are judged.
func (c *check) settle(list []tableRec, report bool) []tableRec {
	out := list[:0]
	for i := 0; i < len(list); {
		j := i + 1
		for j < len(list) && list[j].cluster == list[i].cluster {
			j++
		}
		keep := list[i]
		if j > i+1 {
			keep = c.chooseOwner(list[i:j], report)
		}
		if report {
			c.copiedL1(&keep)
		}
		out = append(out, keep)
		i = j
	}
	return out
}

// chooseOwner leaves an L2 table to one of the L1 indexes that name it.
func (c *check) chooseOwner(list []tableRec, report bool) tableRec {
	best := 0
	score := func(r *tableRec) int {
		s := 0
		if r.owner == 0 {
			s += 2
			if c.o.GuestFree != nil && !c.o.GuestFree(int64(r.idx)*c.l2Span, c.l2Span) {
				s += 4
			}
		}
		return s + int(b2i(r.copied))
	}
	for k := range list {
		if score(&list[k]) > score(&list[best]) {
			best = k
		}
	}
	keep := list[best]
	for k := range list {
		if k == best {
			continue
		}
		r := &list[k]
		loses := append(c.guest(int64(r.idx)*c.l2Span, c.l2Span), c.guest(int64(keep.idx)*c.l2Span, c.l2Span)...)
		f := fsck.Finding{
			Code:  codeL1Duplicate,
			Place: fsck.Place{Offset: c.l1Place(r), Field: fmt.Sprintf("L1 entry %d", r.idx), Value: uint64(r.cluster) << c.bits},
			Guest: loses,
			Text:  fmt.Sprintf("entry %d names the same L2 table", keep.idx),
			Fix:   full(fmt.Sprintf("leave the table to entry %d and clear this one", keep.idx), loses...),
		}
		if report {
			c.mapLoss.Store(true)
			if c.report(f) {
				c.clearL1(r)
				continue
			}
		}
		keep.weight += r.weight
	}
	return keep
}

func (c *check) l1Place(r *tableRec) int64 {
	for _, t := range c.l1s {
		if t.owner == r.owner {
			return t.off + int64(r.idx)*8
		}
	}
	return -1
}

// clearL1 clears the entries, of all L1 tables, that r stands for.
func (c *check) clearL1(r *tableRec) {
	for _, t := range c.l1s {
		if int64(r.idx) >= t.entries {
			continue
		}
		at := t.off + int64(r.idx)*8
		var b [8]byte
		c.read(b[:], at)
		if int64(be64(b[:])&entryOffset>>c.bits) == r.cluster {
			c.put64(fsck.PhaseMap, at, 0)
		}
	}
}

// copiedL1 judges the COPIED flag of an active entry: it says that the table
// has one reference (section Cluster mapping).
func (c *check) copiedL1(r *tableRec) {
	if r.owner != 0 || r.copied == (r.weight == 1) {
		return
	}
	code, text, fix := codeL1CopiedSet, fmt.Sprintf("the table has %d references", r.weight), "clear the flag"
	if r.weight == 1 {
		code, text, fix = codeL1CopiedOff, "the table has one reference", "set the flag"
	}
	at := c.l1s[0].off + int64(r.idx)*8
	entry := uint64(r.cluster) << c.bits
	f := fsck.Finding{Code: code, Place: fsck.Place{Offset: at, Field: fmt.Sprintf("L1 entry %d", r.idx), Value: entry | uint64(b2i(r.copied))<<63},
		Guest: c.guest(int64(r.idx)*c.l2Span, c.l2Span), Text: text, Fix: preen(fix)}
	if c.report(f) {
		c.put64(fsck.PhaseMap, at, entry|uint64(b2i(!r.copied))<<63)
	}
}

// eachL1 calls do for every L2 table that an L1 table names rightly. report
// says whether the others are findings.
func (c *check) eachL1(t l1, report bool, do func(tableRec)) error {
	buf := make([]byte, 64<<10)
	for pos := int64(0); pos < t.entries*8; {
		if err := c.failed(); err != nil {
			return err
		}
		b := buf[:min(t.entries*8-pos, int64(len(buf)))]
		c.read(b, t.off+pos)
		for i := 0; i < len(b); i += 8 {
			e := be64(b[i:])
			if e == 0 {
				continue
			}
			idx := (pos + int64(i)) / 8
			if e = c.judgeL1(t, idx, e, report); e == 0 {
				continue
			}
			do(tableRec{cluster: int64(e & entryOffset >> c.bits), idx: uint32(idx), owner: t.owner, weight: 1, copied: t.owner == 0 && e&entryCopied != 0})
		}
		pos += int64(len(b))
	}
	return nil
}

// judgeL1 returns the entry as it is to be believed, 0 for nothing.
func (c *check) judgeL1(t l1, idx int64, e uint64, report bool) uint64 {
	at := t.off + idx*8
	bad := func(code *fsck.Code, text string, value uint64) uint64 {
		if report {
			fix := full("clear the entry", c.guest(idx*c.l2Span, c.l2Span)...)
			c.mapLoss.Store(true)
			if c.report(fsck.Finding{Code: code, Place: fsck.Place{Offset: at, Field: fmt.Sprintf("L1 entry %d", idx), Value: value},
				Guest: c.guest(idx*c.l2Span, c.l2Span), Text: text, Fix: fix}) {
				c.put64(fsck.PhaseMap, at, 0)
			}
		}
		return 0
	}
	off := e & entryOffset
	if e&l1Reserved != 0 || off == 0 {
		clean := e &^ l1Reserved
		var fix *fsck.Fix
		switch {
		case off == 0: // it names no table
			clean, fix = 0, preen("clear the entry")
		case c.aligned(off, 1) && c.claims.at(int64(off>>c.bits), 1) == nil && (c.blocks.unknown || c.blocks.rebuild || c.stored(int64(off>>c.bits)) > 0) && c.isTable(int64(off)):
			fix = preen("clear the reserved bits")
		default:
			return bad(codeL1Reserved, "reserved bits are set", e)
		}
		if report && c.report(fsck.Finding{Code: codeL1Reserved, Place: fsck.Place{Offset: at, Field: fmt.Sprintf("L1 entry %d", idx), Value: e},
			Guest: c.guest(idx*c.l2Span, c.l2Span), Text: "reserved bits are set", Fix: fix}) {
			c.put64(fsck.PhaseMap, at, clean)
		}
		return clean
	}
	switch {
	case off&uint64(c.cs-1) != 0:
		return bad(codeL1Unaligned, "the L2 table is not on a cluster boundary", e)
	case !c.aligned(off, 1):
		return bad(codeL1PastEOF, "the L2 table lies behind the end of the file", e)
	}
	if cl := c.claims.at(int64(off>>c.bits), 1); cl != nil {
		return bad(codeL1Metadata, "the L2 table lies in "+cl.what, e)
	}
	if c.blockAt(int64(off >> c.bits)) {
		if !c.isTable(int64(off)) || !c.isSuspect(int64(off>>c.bits)) {
			return bad(codeL1Metadata, "the L2 table lies in a refcount block", e)
		}
		if report {
			c.dropBlock(int64(off >> c.bits))
		}
	}
	return e
}

// isTable reports that the cluster at off may be an L2 table.
func (c *check) isTable(off int64) bool {
	b := make([]byte, c.cs)
	c.read(b, off)
	good, bad := c.garbage(b)
	return bad <= good
}

// blockAt reports that a refcount block is in use at a cluster.
func (c *check) blockAt(cluster int64) bool {
	if c.blocks.at == nil {
		c.blocks.at = map[int64]struct{}{}
		for _, off := range c.blocks.table {
			if off != 0 {
				c.blocks.at[int64(off>>c.bits)] = struct{}{}
			}
		}
	}
	_, ok := c.blocks.at[cluster]
	return ok
}
