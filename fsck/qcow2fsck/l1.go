package qcow2fsck

import (
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/fsck"
)

// clearing says which of the L1 entries that name a table are to be cleared:
// those of the indexes in drop and, with others, those of all indexes that are
// not in known.
type clearing struct {
	drop, known []uint32
	others      bool
}

func (w *clearing) hits(idx uint32) bool {
	return slices.Contains(w.drop, idx) || w.others && !slices.Contains(w.known, idx)
}

// clearL1 clears entries, by the clusters that they name, in all L1 tables.
func (c *check) clearL1(what map[int64]clearing) {
	if len(what) == 0 {
		return
	}
	for _, t := range c.l1s {
		err := c.eachL1Part(t, func(off int64, b []byte) {
			from := -1 // of the run of entries to be cleared
			flush := func(to int) {
				if from >= 0 {
					c.planned(c.plan.Write(fsck.PhaseMap, off+int64(from), make([]byte, to-from)))
				}
				from = -1
			}
			for i := 0; i < len(b); i += 8 {
				w, ok := what[int64(be64(b[i:])&entryOffset>>c.bits)]
				switch {
				case !ok || !w.hits(uint32((off+int64(i)-t.off)/8)):
					flush(i)
				case from < 0:
					from = i
				}
			}
			flush(len(b))
		})
		if err != nil {
			return // run returns it
		}
	}
}

// eachL1Part reads an L1 table in parts, holes left out.
func (c *check) eachL1Part(t l1, do func(off int64, b []byte)) error {
	const part = 64 << 10
	n := t.entries * 8
	var buf []byte
	for pos := int64(0); pos < n; {
		if err := c.failed(); err != nil {
			return err
		}
		if n >= part { // a hole can be very long
			data := min(c.dataAt(t.off+pos)-t.off, n)
			if pos = max(pos, data&^7); pos >= n {
				break
			}
		}
		if buf == nil {
			buf = make([]byte, min(n, part))
		}
		b := buf[:min(n-pos, part)]
		c.read(b, t.off+pos)
		do(t.off+pos, b)
		pos += int64(len(b))
	}
	return nil
}

// eachL1 calls do for every L2 table that an L1 table names rightly. report
// says whether the others are findings.
func (c *check) eachL1(t l1, report bool, do func(tableRec)) error {
	return c.eachL1Part(t, func(off int64, b []byte) {
		for i := 0; i < len(b); i += 8 {
			e := be64(b[i:])
			if e == 0 {
				continue
			}
			idx := (off + int64(i) - t.off) / 8
			if e = c.judgeL1(t, idx, e, report); e == 0 {
				continue
			}
			do(tableRec{cluster: int64(e & entryOffset >> c.bits), idx: uint32(idx), owner: t.owner, weight: 1, copied: t.owner == 0 && e&entryCopied != 0})
		}
	})
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
	if _, ok := c.blockAt(int64(off >> c.bits)); ok {
		c.suspect()
		if !c.isTable(int64(off)) || !c.isSuspect(int64(off>>c.bits)) {
			return bad(codeL1Metadata, "the L2 table lies in a refcount block", e)
		}
		if report {
			c.dropBlock(int64(off >> c.bits))
		}
	}
	return e
}

// Bounds of isTable.
const (
	maxLookedAt      = 1 << 16 // clusters
	maxLookedAtBytes = 1 << 30
)

// isTable reports that the cluster at off may be an L2 table. What millions of
// damaged entries name is not read at all and taken for none.
func (c *check) isTable(off int64) bool {
	if is, ok := c.lookedAt[off]; ok {
		return is
	}
	if n := int64(len(c.lookedAt)); n >= maxLookedAt || n*c.cs >= maxLookedAtBytes {
		return false
	}
	b := make([]byte, c.cs)
	c.read(b, off)
	good, bad := c.garbage(b)
	c.lookedAt[off] = bad <= good
	return bad <= good
}
