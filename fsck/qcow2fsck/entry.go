package qcow2fsck

import (
	"fmt"
	"math/bits"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// badEntry is an L2 entry with which something is wrong, and what it is to
// become.
type badEntry struct {
	i           int // byte offset in the table
	code        *fsck.Code
	text        string
	level       fsck.Level
	fixText     string
	entry, bits uint64 // after the fix
	zeroed      bool   // the fix unmaps the cluster
	lose        bool   // the fix loses the guest range [guest+loseOff, …+loseLen)
	loseOff     int64
	loseLen     int64
	keepOff     int64 // quarantine, when keepLen > 0
	keepLen     int64
	grow        int64 // the file has to be this long
}

// entryAt is an L2 entry taken apart.
type entryAt struct {
	entry, bits uint64
	kind        uint8 // 0, fPlain or fPacked
	off         uint64
	n           uint32 // of packed
}

// nothing is the entry of a cluster that was lost: zeros where the version can
// say so, else unmapped.
func (c *check) nothing() (entry, bits uint64) {
	switch {
	case c.extended:
		return 0, 0xffffffff << 32
	case c.h.version >= 3:
		return entryZero, 0
	}
	return 0, 0
}

// judge takes an entry apart and returns what is wrong with it, nil when
// nothing is that can be seen without the cells.
func (c *check) judge(guest int64, entry, sub uint64) (entryAt, *badEntry) {
	e := entryAt{entry: entry, bits: sub}
	lost := func(code *fsck.Code, text string) *badEntry {
		p := &badEntry{code: code, text: text, level: fsck.Full, fixText: "make the cluster zeros", zeroed: true, lose: true, loseLen: c.cs}
		p.entry, p.bits = c.nothing()
		return p
	}
	fileEnd := uint64(c.clusters) << c.bits
	if entry&entryCompressed != 0 {
		off, n := qcow2.DecodePacked(entry, c.bits)
		e.kind, e.off, e.n = fPacked, off, n
		switch {
		case c.external:
			return e, lost(codePackedExt, "a compressed cluster")
		case entry&entryCopied != 0 || off>>56 != 0:
			p := lost(codePackedBits, "reserved bits are set")
			clean := entry &^ (entryCopied | 0x3f<<56&(1<<(62-(c.bits-8))-1))
			if o, k := qcow2.DecodePacked(clean, c.bits); o != 0 && o < uint64(c.size) && c.decodes(o, k) {
				*p = badEntry{code: codePackedBits, text: p.text, level: fsck.Preen, fixText: "clear the bits", entry: clean}
			} else if o != 0 && o < uint64(c.size) {
				p.keepOff, p.keepLen = int64(o), int64(k)
			}
			return e, p
		case off == 0 || off >= uint64(c.size):
			return e, lost(codePackedEOF, "the cluster lies behind the end of the file")
		case off+uint64(n) > fileEnd:
			return e, c.tooLong(e, lost, uint64(c.size))
		}
		return e, nil
	}
	off := entry & entryOffset
	e.off = off
	if entry&l2Reserved != 0 {
		p := lost(codeL2Reserved, "reserved bits are set")
		clean := entry &^ l2Reserved
		if c.credible(guest, clean, sub) {
			*p = badEntry{code: codeL2Reserved, text: p.text, level: fsck.Preen, fixText: "clear the bits", entry: clean, bits: sub}
		} else {
			p.keepOff, p.keepLen = int64(off&^uint64(c.cs-1)), c.cs
		}
		return e, p
	}
	if entry&entryZero != 0 && (c.extended || c.h.version < 3) {
		code, text := codeL2Bit0, "bit 0 is set in an extended entry"
		if !c.extended {
			code, text = codeL2ZeroV2, "the zero flag is set in a version 2 image"
		}
		clean := entry &^ entryZero
		if c.credible(guest, clean, sub) {
			return e, &badEntry{code: code, text: text, level: fsck.Preen, fixText: "clear the flag", entry: clean, bits: sub}
		}
		p := lost(code, text)
		if off == 0 && (c.extended || c.h.backingOff == 0) { // unmapped reads as zeros, or says nothing
			*p = badEntry{code: code, text: text, level: fsck.Preen, fixText: "clear the flag", entry: clean, bits: sub}
		}
		return e, p
	}
	has := off != 0 || c.external && entry&entryCopied != 0
	if off&uint64(c.cs-1) != 0 {
		p := lost(codeL2Unaligned, "the cluster is not on a cluster boundary")
		if c.external {
			return e, c.offsetIsGuest(guest, entry, sub)
		}
		p.keepOff, p.keepLen = int64(off&^uint64(c.cs-1)), c.cs
		return e, p
	}
	if c.external && has && off != uint64(guest) {
		return e, c.offsetIsGuest(guest, entry, sub)
	}
	if !c.external && off >= fileEnd {
		return e, lost(codeL2PastEOF, "the cluster lies behind the end of the file")
	}
	if c.extended {
		alloc, zero := uint32(sub), uint32(sub>>32)
		if both := alloc & zero; both != 0 {
			if has {
				from := int64(bits.TrailingZeros32(both)) * c.cs / 32
				to := int64(32-bits.LeadingZeros32(both)) * c.cs / 32
				return e, &badEntry{code: codeL2AllocZero, text: "subclusters are both allocated and zero", level: fsck.Full,
					fixText: "take them as allocated", entry: entry, bits: sub &^ (uint64(both) << 32), lose: true, loseOff: from, loseLen: to - from}
			}
			return e, &badEntry{code: codeL2AllocZero, text: "subclusters are both allocated and zero", level: fsck.Full,
				fixText: "take them as zero", entry: entry, bits: sub &^ uint64(both), lose: true, loseLen: c.cs}
		}
		if alloc != 0 && !has {
			return e, &badEntry{code: codeL2AllocNone, text: "subclusters are allocated without a cluster", level: fsck.Full,
				fixText: "make them zeros", entry: 0, bits: uint64(zero|alloc) << 32, lose: true, loseLen: c.cs}
		}
	}
	if entry&entryCopied != 0 && !has {
		return e, &badEntry{code: codeL2Copied0, text: "the COPIED flag is set without a cluster", level: fsck.Preen, fixText: "clear the flag",
			entry: entry &^ entryCopied, bits: sub}
	}
	if has {
		e.kind = fPlain
		if !c.external && int64(off)+c.cs > c.size {
			return e, c.cutData(guest, entry, sub)
		}
	}
	return e, nil
}

// credible reports that an entry of which something was taken away is a good
// one: it names a cluster that the file has, that is no table and is counted.
func (c *check) credible(guest int64, entry, sub uint64) bool {
	off := entry & entryOffset
	if c.external {
		return off == uint64(guest)
	}
	if off == 0 {
		return entry == 0 && uint32(sub) == 0
	}
	if !c.aligned(off, 1) || c.extended && uint32(sub)&uint32(sub>>32) != 0 {
		return false
	}
	if _, fl := c.cells.get(int64(off >> c.bits)); fl&fMeta != 0 {
		return false
	}
	return c.blocks.unknown || c.blocks.rebuild || c.stored(int64(off>>c.bits)) > 0
}

// offsetIsGuest is what the format demands of an external data file.
func (c *check) offsetIsGuest(guest int64, entry, sub uint64) *badEntry {
	return &badEntry{code: codeExtMismatch, text: "the offset in the external data file is not the guest offset", level: fsck.Preen,
		fixText: "set it", entry: entry&^entryOffset | uint64(guest) | entryCopied, bits: sub}
}

// cutData judges a cluster at the end of the file of which the file has only a
// part. That is as it should be when no byte of the disk is missing.
func (c *check) cutData(guest int64, entry, sub uint64) *badEntry {
	off := int64(entry & entryOffset)
	need := min(c.cs, c.stats.VirtualSize-guest)
	if c.stats.VirtualSize <= guest {
		need = c.cs
	}
	switch {
	case c.extended:
		need = min(need, int64(32-bits.LeadingZeros32(uint32(sub)))*c.cs/32)
	case entry&entryZero != 0:
		need = 0
	}
	if c.size-off >= need {
		return nil
	}
	return &badEntry{code: codeDataCut, text: fmt.Sprintf("the file has only %d bytes of the cluster", c.size-off), level: fsck.Full,
		fixText: "make the file longer", entry: entry, bits: sub, lose: true, loseOff: c.size - off, loseLen: c.cs - (c.size - off), grow: off + c.cs}
}

// maxDecoded is how many bytes are decompressed at most to see what damaged
// descriptors of compressed clusters may mean.
const maxDecoded = 512 << 20

// decodes reports that the compressed cluster in [off, off+n) decodes.
func (c *check) decodes(off uint64, n uint32) bool {
	if c.decoded.Add(c.cs) > maxDecoded {
		return false // what cannot be mended is kept, and this has to end
	}
	src := make([]byte, min(int64(n), 2*c.cs+1))
	src = src[:c.read(src, int64(min(off, 1<<62)))]
	return qcow2.Decompress(qcow2.CompressionType(c.h.ctype), src, make([]byte, c.cs)) == nil
}

// needs is how many of n bytes at off the stream of a compressed cluster
// needs, in whole sectors; false when it does not decode at all.
func (c *check) needs(off uint64, n uint32) (uint32, bool) {
	if !c.decodes(off, n) {
		return 0, false
	}
	sectors := func(k uint32) uint32 { return k*512 - uint32(off&511) }
	lo, hi := uint32(1), uint32((off&511+uint64(n)+511)/512) // hi suffices
	for lo < hi {
		mid := (lo + hi) / 2
		if c.decodes(off, sectors(mid)) {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return sectors(hi), true
}

// tooLong is what to do about a compressed cluster that reaches behind limit.
func (c *check) tooLong(e entryAt, lost func(*fsck.Code, string) *badEntry, limit uint64) *badEntry {
	if n, ok := c.needs(e.off, e.n); ok && n < e.n && (e.off+uint64(n)-1)>>c.bits <= (limit-1)>>c.bits {
		if entry, ok := qcow2.EncodePacked(e.off, n, c.bits); ok {
			return &badEntry{code: codePackedLong, text: "the sector count reaches into what is not its own", level: fsck.Preen,
				fixText: "set the count that the stream needs", entry: entry}
		}
	}
	p := lost(codePackedEOF, "the cluster reaches behind the end of the file")
	p.keepOff, p.keepLen = int64(e.off), int64(e.n)
	return p
}

// entry judges the entry at byte i of a table and counts it when it is good.
func (w *worker) entry(rec *tableRec, b []byte, i int, next *uint64) bool {
	c := w.c
	var sub uint64
	entry := be64(b[i:])
	if c.extended {
		sub = be64(b[i+8:])
	}
	if entry|sub == 0 {
		return true
	}
	guest := int64(rec.idx)*c.l2Span + int64(i)/c.entryBytes<<c.bits
	e, p := c.judge(guest, entry, sub)
	if p == nil {
		p = w.count(rec, guest, e, next)
	}
	if p != nil {
		p.i = i
		w.bad = append(w.bad, *p)
	}
	return p == nil
}

// count enters a good entry in the cells. What it returns is wrong after all.
func (w *worker) count(rec *tableRec, guest int64, e entryAt, next *uint64) *badEntry {
	c := w.c
	active := rec.owner == 0
	if e.kind == 0 {
		return nil
	}
	if c.external {
		w.n.dataEnd = max(w.n.dataEnd, min(guest+c.cs, max(c.stats.VirtualSize, guest)))
		if c.first && active {
			w.n.allocated++
			w.n.highest = max(w.n.highest, guest+c.cs)
			if *next != 0 && *next != e.off {
				w.n.fragmented++
			}
			*next = e.off + uint64(c.cs)
		}
		return nil
	}
	first := int64(e.off >> c.bits)
	n := int64(1)
	fl := uint8(fPlain)
	if e.kind == fPacked {
		fl = fPacked
		n = int64((e.off+uint64(e.n)-1)>>c.bits) - first + 1
		// All of it, or nothing.
		for k := range n {
			if _, fl := c.cells.get(first + k); fl&fMeta != 0 {
				return c.packedMeta(e, first+k)
			}
		}
		if p := w.payload(e); p != nil {
			return p
		}
	} else if active {
		fl |= fActive | fUncopied
		if e.entry&entryCopied != 0 {
			fl ^= fUncopied | fCopied
		}
	}
	if done := c.cells.add(first, n, rec.weight, fl); done < n {
		return c.metadata()
	}
	if !c.first || !active {
		return nil
	}
	w.n.allocated++
	w.n.highest = max(w.n.highest, guest+c.cs)
	if e.kind == fPacked {
		w.n.compressed++
		w.n.fragmented++
		return nil
	}
	if *next != 0 && *next != e.off {
		w.n.fragmented++
	}
	*next = e.off + uint64(c.cs)
	return nil
}

// metadata is what is wrong with an entry whose cluster holds metadata.
func (c *check) metadata() *badEntry {
	p := &badEntry{code: codeL2Metadata, text: "the cluster holds metadata", level: fsck.Full, fixText: "make the cluster zeros", zeroed: true, lose: true, loseLen: c.cs}
	p.entry, p.bits = c.nothing()
	return p
}

// packedMeta is the same for a compressed cluster that touches metadata at
// cluster m.
func (c *check) packedMeta(e entryAt, m int64) *badEntry {
	lost := func(*fsck.Code, string) *badEntry {
		p := c.metadata()
		p.code = codePackedMeta
		p.keepOff, p.keepLen = int64(e.off), int64(e.n)
		return p
	}
	if m<<c.bits <= int64(e.off) {
		return lost(nil, "")
	}
	return c.tooLong(e, lost, uint64(m)<<c.bits)
}

// payload decodes a compressed cluster when that is asked for.
func (w *worker) payload(e entryAt) *badEntry {
	c := w.c
	if !c.o.Data || !c.first {
		return nil
	}
	if w.dst == nil {
		w.dst, w.src = make([]byte, c.cs), make([]byte, 2*c.cs+512)
	}
	src := w.src[:min(int(e.n), len(w.src))]
	src = src[:c.read(src, int64(e.off))]
	err := qcow2.Decompress(qcow2.CompressionType(c.h.ctype), src, w.dst)
	if err == nil {
		return nil
	}
	p := &badEntry{code: codePackedData, text: err.Error(), level: fsck.Full, fixText: "make the cluster zeros", zeroed: true, lose: true, loseLen: c.cs,
		keepOff: int64(e.off), keepLen: int64(e.n)}
	p.entry, p.bits = c.nothing()
	return p
}

// intoMetadata notes the entry at byte i, which is a plain one.
func (w *worker) intoMetadata(rec *tableRec, b []byte, i int) {
	p := w.c.metadata()
	p.i = i
	w.bad = append(w.bad, *p)
}

// settle reports the bad entries of a table, neighbours with the same trouble
// as one finding. Entries that were mended are judged again.
func (w *worker) settle(rec *tableRec, b []byte) {
	c := w.c
	for round := 0; len(w.bad) > 0 && round < 8; round++ {
		todo := w.bad
		w.bad = nil
		for k := 0; k < len(todo); {
			j := k + 1
			for j < len(todo) && todo[j].code == todo[k].code && todo[j].level == todo[k].level && todo[j].lose == todo[k].lose &&
				todo[j].i == todo[j-1].i+int(c.entryBytes) && todo[j].loseOff == 0 && todo[k].loseOff == 0 && todo[j].loseLen == todo[k].loseLen {
				j++
			}
			w.group(rec, b, todo[k:j])
			k = j
		}
	}
}

// group reports one run of bad entries.
func (w *worker) group(rec *tableRec, b []byte, run []badEntry) {
	c := w.c
	p := &run[0]
	at := func(i int) int64 { return rec.cluster<<c.bits + int64(i) }
	guestOf := func(i int) int64 { return int64(rec.idx)*c.l2Span + int64(i)/c.entryBytes<<c.bits }
	span := c.guest(guestOf(p.i), int64(len(run))<<c.bits)
	if p.zeroed {
		c.mapLoss.Store(true)
	}
	silent := !c.first && p.code != codeL2Metadata && p.code != codePackedMeta
	if silent {
		w.believe(rec, b, run)
		return
	}
	var loses []blockmap.Range
	if p.lose {
		loses = c.guest(guestOf(p.i)+p.loseOff, int64(len(run)-1)<<c.bits+p.loseLen)
	}
	text := p.text
	if len(run) > 1 {
		text = fmt.Sprintf("%s (%d entries)", text, len(run))
	}
	f := fsck.Finding{Code: p.code, Place: fsck.Place{Offset: at(p.i), Field: fmt.Sprintf("L2 entry of guest offset %#x", guestOf(p.i)), Value: be64(b[p.i:])},
		Guest: span, Text: text, Fix: &fsck.Fix{Text: p.fixText, Level: p.level, Loses: loses}}
	if !c.report(f) {
		w.believe(rec, b, run)
		return
	}
	for k := range run {
		q := &run[k]
		c.put64(fsck.PhaseMap, at(q.i), q.entry)
		if c.extended {
			c.put64(fsck.PhaseMap, at(q.i)+8, q.bits)
		}
		if q.keepLen > 0 {
			c.keep(guestOf(q.i), q.keepOff, q.keepLen)
		}
		if q.grow > 0 {
			c.growTo(q.grow)
			w.countOnly(rec, guestOf(q.i), entryAt{entry: q.entry, bits: q.bits, kind: fPlain, off: q.entry & entryOffset})
			continue
		}
		e, next := c.judge(guestOf(q.i), q.entry, q.bits)
		var none uint64
		if next == nil {
			next = w.count(rec, guestOf(q.i), e, &none)
		}
		if next != nil {
			next.i = q.i
			w.bad = append(w.bad, *next)
		}
	}
}

// believe counts what bad entries that stay as they are refer to all the same:
// data of which the file has only a part is still in use, and what a fix that
// loses nothing would make of an entry is what it means.
func (w *worker) believe(rec *tableRec, b []byte, run []badEntry) {
	c := w.c
	for k := range run {
		q := &run[k]
		guest := int64(rec.idx)*c.l2Span + int64(q.i)/c.entryBytes<<c.bits
		switch {
		case q.code == codePackedData:
			e, _ := c.judge(guest, be64(b[q.i:]), 0)
			w.countOnly(rec, guest, e)
		case q.code == codeDataCut, q.level == fsck.Preen:
			if e, p := c.judge(guest, q.entry, q.bits); p == nil || p.code == codeDataCut {
				w.countOnly(rec, guest, e)
			}
		}
	}
}

// countOnly enters an entry in the cells and looks at nothing else.
func (w *worker) countOnly(rec *tableRec, guest int64, e entryAt) {
	if e.kind == 0 || w.c.external {
		return
	}
	first, n, fl := int64(e.off>>w.c.bits), int64(1), uint8(fPlain)
	if e.kind == fPacked {
		n, fl = int64((e.off+uint64(e.n)-1)>>w.c.bits)-first+1, fPacked
	} else if rec.owner == 0 {
		fl |= fActive | fUncopied
		if e.entry&entryCopied != 0 {
			fl ^= fUncopied | fCopied
		}
	}
	w.c.cells.add(first, n, rec.weight, fl)
}
