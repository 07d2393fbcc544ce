package qcow2fsck

import (
	"cmp"
	"fmt"
	"math"
	"runtime"
	"slices"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
)

// tableRec is a run of L2 tables that stand one behind the other and that
// consecutive L1 entries name, mostly a single one. The rest is the same for all
// of them.
//
// Runs keep an image cheap whose millions of tables lie in a hole. Whatever there
// is to be said of a table is said of it alone.
type tableRec struct {
	cluster int64  // of the first table
	idx     uint32 // of its entry in the L1 table, which gives the guest offset
	owner   int32  // of the first entry that names it: 0 active, else a snapshot
	weight  uint32 // entries with that index that name it
	copied  bool   // the active entry has COPIED
	more    uint16 // further tables of the run
}

func (r *tableRec) n() int64   { return int64(r.more) + 1 }
func (r *tableRec) end() int64 { return r.cluster + r.n() }

// table is table k of the run.
func (r *tableRec) table(k int64) tableRec {
	t := *r
	t.cluster, t.idx, t.more = r.cluster+k, r.idx+uint32(k), 0
	return t
}

// cut is what of the run is in front of a cluster.
func (r *tableRec) cut(cluster int64) int64 { return max(0, min(cluster-r.cluster, r.n())) }

// extend makes the run one table longer if t is that table.
func (r *tableRec) extend(t *tableRec) bool {
	if t.more > 0 || t.cluster != r.end() || int64(t.idx) != int64(r.idx)+r.n() || t.owner != r.owner || t.weight != r.weight || t.copied != r.copied || r.more == math.MaxUint16 {
		return false
	}
	r.more++
	return true
}

// tablesIn is the number of tables in a list.
func tablesIn(list []tableRec) (n int64) {
	for i := range list {
		n += list[i].n()
	}
	return n
}

const recBytes = 24

// maxRivals is how many L1 indexes that name the same table are looked at one
// by one; the others are a crowd, so that an image in which millions of entries
// name one table costs no more than another.
const maxRivals = 16

// crowd sums up the L1 entries of a table beyond its rivals.
type crowd struct {
	entries uint32
	lo, hi  uint32 // their smallest and largest index
	// Of the rivals: their indexes, and the smallest credit.
	rivals []uint32
	credit int
}

// tableList says how the L2 tables are to be gone through.
type tableList struct {
	bad   map[int64]bool // clusters that are called L2 tables and are none
	whole []tableRec     // all tables, when known
	known bool           // they fit in the memory and are listed
}

// drop takes tables out of the list.
func (t *tableList) drop(bad []tableRec) {
	for i := range bad {
		t.bad[bad[i].cluster] = true
	}
	if len(bad) == 0 {
		return
	}
	var parts []tableRec // of runs that have bad tables
	t.whole = slices.DeleteFunc(t.whole, func(r tableRec) bool {
		hit := false
		for k := int64(0); k < r.n() && !hit; k++ {
			hit = t.bad[r.cluster+k]
		}
		if !hit {
			return false
		}
		first := len(parts)
		for k := range r.n() {
			one := r.table(k)
			if !t.bad[one.cluster] && (len(parts) == first || !parts[len(parts)-1].extend(&one)) {
				parts = append(parts, one)
			}
		}
		return true
	})
	if len(parts) > 0 {
		t.whole = append(t.whole, parts...)
		sortRecs(t.whole)
	}
}

// listBytes is the memory for the records of tables: as many as there can be L1
// entries, if the user leaves the default. So that nothing else has to go
// through such a table again and again.
func (c *check) listBytes() int64 { return c.budget / 8 * 3 }

// cellBytes is the memory for cells: half of it all, less what the list takes
// that the cells share most of it with.
func (c *check) cellBytes() int64 {
	list := c.listBytes()
	if c.tables == nil {
		list = 0 // not listed yet
	} else if c.tables.known {
		list = int64(cap(c.tables.whole)) * recBytes
	}
	return min(c.budget/2, c.budget/16*11-list)
}

// eachBatch calls do for all L2 tables, by ascending cluster, as many at a
// time as the memory holds; whole says that these are all. report says that L1
// entries are to be judged aloud. Once it has gone through them as a whole the
// L1 tables are not read again.
func (c *check) eachBatch(report bool, do func(list []tableRec, whole bool) error) error {
	if c.tables == nil {
		c.tables = &tableList{bad: map[int64]bool{}}
	}
	if c.tables.known {
		return do(c.tables.whole, true)
	}
	limit := int(max(c.listBytes()/recBytes, 1024))
	entries := int64(0)
	for _, t := range c.l1s {
		entries += t.entries
	}
	if entries *= recBytes; entries > c.budget/8 {
		runtime.GC() // the list of a check before this one may be as long
	}
	room := make([]tableRec, 0, min(entries/recBytes, int64(limit))) // memory that is not used is none
	aloud := report                                                  // the first round judges all entries
	for lo := int64(0); ; aloud = false {
		hi := int64(1<<63 - 1)
		list := room[:0]
		crowds := map[int64]*crowd{}
		next := min(limit, 1<<16) // records at which they are merged
		for _, t := range c.l1s {
			if err := c.eachL1(t, aloud, func(rec tableRec) {
				if rec.cluster < lo || rec.cluster >= hi || c.tables.bad[rec.cluster] {
					return
				}
				if w := crowds[rec.cluster]; w != nil && credit(&rec) <= w.credit && !slices.Contains(w.rivals, rec.idx) {
					w.add(&rec)
					return
				}
				if n := len(list); n > 0 && list[n-1].extend(&rec) {
					return
				}
				if len(list) < next {
					list = append(list, rec)
					return
				}
				list, hi = merge(list, crowds, limit/4, hi)
				if len(list) > limit/4*3 {
					hi = list[len(list)/2].cluster
					k, _ := slices.BinarySearchFunc(list, hi, func(r tableRec, at int64) int { return cmp.Compare(r.cluster, at) })
					list = list[:k]
				}
				for at := range crowds {
					if at >= hi {
						delete(crowds, at)
					}
				}
				next = min(limit, 4*len(list)+1<<16)
				if rec.cluster < hi {
					list = append(list, rec)
				}
			}); err != nil {
				return err
			}
		}
		list, hi = merge(list, crowds, limit/4, hi)
		list = c.settle(list, crowds, report)
		whole := lo == 0 && hi == 1<<63-1
		if whole {
			if len(list) < cap(list)/2 {
				list = slices.Clone(list)
			}
			room = nil
			c.tables.whole, c.tables.known = list, true
		}
		if err := do(list, whole); err != nil {
			return err
		}
		if hi == 1<<63-1 {
			return c.failed()
		}
		lo = hi
	}
}

func (w *crowd) add(r *tableRec) {
	if w.entries == 0 {
		w.lo, w.hi = r.idx, r.idx
	}
	w.entries += r.weight
	w.lo, w.hi = min(w.lo, r.idx), max(w.hi, r.idx)
}

// credit says how credible it is that a table belongs to a record.
func credit(r *tableRec) int {
	return int(b2i(r.owner == 0)*2 + b2i(r.copied))
}

// settle leaves one record for each table. Tables that different indexes name
// have one owner too many; COPIED flags are judged.
func (c *check) settle(list []tableRec, crowds map[int64]*crowd, report bool) []tableRec {
	out := list[:0]
	clear := map[int64]clearing{}
	for i := 0; i < len(list); {
		j := i + 1
		for j < len(list) && list[j].cluster == list[i].cluster {
			j++
		}
		keep := list[i]
		if j > i+1 {
			keep = c.chooseOwner(list[i:j], crowds[keep.cluster], report, clear)
		}
		for k := int64(0); report && k < keep.n() && keep.owner == 0 && keep.copied != (keep.weight == 1); k++ {
			one := keep.table(k)
			c.copiedL1(&one)
		}
		out = append(out, keep)
		i = j
	}
	c.clearL1(clear)
	return out
}

// chooseOwner leaves an L2 table to one of the L1 indexes that name it.
func (c *check) chooseOwner(list []tableRec, more *crowd, report bool, clear map[int64]clearing) tableRec {
	best := 0
	score := func(r *tableRec) int {
		s := credit(r)
		if r.owner == 0 && c.o.GuestFree != nil && !c.o.GuestFree(int64(r.idx)*c.l2Span, c.l2Span) {
			s += 4
		}
		return s
	}
	top := score(&list[0])
	for k := 1; k < len(list); k++ {
		if s := score(&list[k]); s > top {
			best, top = k, s
		}
	}
	keep := list[best]
	what := clearing{}
	judge := func(r *tableRec, text, fix string, ranges ...blockmap.Range) bool {
		if !report {
			return false
		}
		c.mapLoss.Store(true)
		loses := keepRanges(append(ranges, c.guest(int64(keep.idx)*c.l2Span, c.l2Span)...))
		return c.report(fsck.Finding{
			Code:  codeL1Duplicate,
			Place: fsck.Place{Offset: c.l1Place(r), Field: fmt.Sprintf("L1 entry %d", r.idx), Value: uint64(r.cluster) << c.bits},
			Guest: loses, Text: text, Fix: full(fix, loses...),
		})
	}
	for k := range list {
		r := &list[k]
		what.known = append(what.known, r.idx)
		if k == best {
			continue
		}
		if judge(r, fmt.Sprintf("entry %d names the same L2 table", keep.idx),
			fmt.Sprintf("leave the table to entry %d and clear this one", keep.idx), c.guest(int64(r.idx)*c.l2Span, c.l2Span)...) {
			what.drop = append(what.drop, r.idx)
			continue
		}
		keep.weight += r.weight
	}
	if more != nil {
		r := tableRec{cluster: keep.cluster, idx: more.lo, owner: keep.owner}
		if judge(&r, fmt.Sprintf("%d further entries, up to %d, name the L2 table of entry %d", more.entries, more.hi, keep.idx),
			fmt.Sprintf("leave the table to entry %d and clear these", keep.idx), c.guest(int64(more.lo)*c.l2Span, int64(more.hi-more.lo+1)*c.l2Span)...) {
			what.others = true
		} else {
			keep.weight += more.entries
		}
	}
	if len(what.drop) > 0 || what.others {
		clear[keep.cluster] = what
	}
	return keep
}

// l1Place is the place of an L1 entry that r stands for.
func (c *check) l1Place(r *tableRec) int64 {
	i, ok := slices.BinarySearchFunc(c.l1s, r.owner, func(t l1, owner int32) int { return cmp.Compare(t.owner, owner) })
	if !ok {
		return -1
	}
	return c.l1s[i].off + int64(r.idx)*8
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
