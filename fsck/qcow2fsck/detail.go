package qcow2fsck

import (
	"cmp"
	"fmt"
	"slices"
	"sync"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// Bounds of the second look. What is more is left to the next round.
const (
	maxDoubts  = 1 << 18 // clusters whose owners are looked up
	ownerBytes = 96
)

// owner is an entry that refers to a cluster in doubt.
type owner struct {
	cluster int64
	guest   int64
	at      int64 // of the entry in the file
	e       entryAt
	weight  uint32
	active  bool
}

// look finds the entries behind cells in which something is odd.
func (c *check) look() error {
	var mu sync.Mutex
	var owners []owner
	limit := max(int(c.budget/16/ownerBytes), 4096)
	err := c.eachTable(3, false, func(w *worker, rec *tableRec, b []byte, _ int) {
		found := w.look(rec, b)
		mu.Lock()
		defer mu.Unlock()
		if len(owners)+len(found) <= limit {
			owners = append(owners, found...)
		} else {
			c.doubtAll = true
		}
	})
	if err != nil {
		return err
	}
	slices.SortFunc(owners, func(a, b owner) int {
		return cmp.Or(cmp.Compare(a.cluster, b.cluster), cmp.Compare(a.guest, b.guest), cmp.Compare(a.at, b.at))
	})
	for i := 0; i < len(owners); {
		j := i + 1
		for j < len(owners) && owners[j].cluster == owners[i].cluster {
			j++
		}
		c.resolve(owners[i:j])
		if err := c.failed(); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// odd reports whether the L2 tables have to be read again, for the owners of
// cells.
func (c *check) odd() bool {
	if c.external {
		return false
	}
	for _, no := range c.cells.numbers(c.cells.lo / pageCells) {
		p := c.cells.page(no, false)
		if p.two != nil {
			continue // states in which nothing is odd
		}
		for i := range pageCells {
			n, fl := p.get(i)
			if fl&fCross != 0 || fl&fCopied != 0 && n > 1 || fl&fUncopied != 0 && n == 1 {
				return true
			}
		}
	}
	return false
}

// look collects the owners in doubt of one table, and mends COPIED flags.
func (w *worker) look(rec *tableRec, b []byte) []owner {
	c := w.c
	var owners []owner
	type flip struct {
		i    int
		want bool
	}
	var flips []flip
	for i := 0; i < len(b); i += int(c.entryBytes) {
		entry, sub := be64(b[i:]), uint64(0)
		if c.extended {
			sub = be64(b[i+8:])
		}
		if entry == 0 {
			continue
		}
		guest := int64(rec.idx)*c.l2Span + int64(i)/c.entryBytes<<c.bits
		e, p := c.judge(guest, entry, sub)
		if p != nil && p.code != codeDataCut || e.kind == 0 {
			continue
		}
		first, k := int64(e.off>>c.bits), int64(1)
		if e.kind == fPacked {
			k = int64((e.off+uint64(e.n)-1)>>c.bits) - first + 1
		}
		cross := false
		for m := range k {
			if n, fl := c.cells.get(first + m); n > 0 && fl&fCross != 0 && fl&fMeta == 0 {
				owners = append(owners, owner{first + m, guest, rec.cluster<<c.bits + int64(i), e, rec.weight, rec.owner == 0})
				cross = true
			}
		}
		if cross || e.kind == fPacked || rec.owner != 0 {
			continue
		}
		if n, fl := c.cells.get(first); n > 0 && fl&fMeta == 0 && (n == 1) != (entry&entryCopied != 0) {
			flips = append(flips, flip{i, n == 1})
		}
	}
	for k := 0; k < len(flips); {
		j := k + 1
		for j < len(flips) && flips[j].want == flips[k].want && flips[j].i == flips[j-1].i+int(c.entryBytes) {
			j++
		}
		i := flips[k].i
		guest := int64(rec.idx)*c.l2Span + int64(i)/c.entryBytes<<c.bits
		if c.copiedL2(flips[k].want, rec.cluster<<c.bits+int64(i), guest, be64(b[i:]), j-k) {
			for ; k < j; k++ {
				c.put64(fsck.PhaseMap, rec.cluster<<c.bits+int64(flips[k].i), be64(b[flips[k].i:])^entryCopied)
			}
		}
		k = j
	}
	return owners
}

// copiedL2 reports entries whose COPIED flag should be want.
func (c *check) copiedL2(want bool, at, guest int64, entry uint64, n int) bool {
	code, text, fix := codeL2CopiedSet, "the flag is set, but the cluster is shared", "clear the flag"
	if want {
		code, text, fix = codeL2CopiedOff, "the flag is clear, but the cluster is not shared", "set the flag"
	}
	if n > 1 {
		text = fmt.Sprintf("%s (%d entries)", text, n)
	}
	return c.report(fsck.Finding{Code: code, Place: fsck.Place{Offset: at, Field: fmt.Sprintf("L2 entry of guest offset %#x", guest), Value: entry},
		Guest: c.guest(guest, int64(n)<<c.bits), Text: text, Fix: preen(fix)})
}

// resolve settles the owners of one cluster.
func (c *check) resolve(list []owner) {
	cluster := list[0].cluster
	list = c.shorten(cluster, list)
	var plain, packed []owner
	for _, o := range list {
		if o.e.kind == fPacked {
			packed = append(packed, o)
		} else {
			plain = append(plain, o)
		}
	}
	guests := map[int64]bool{}
	for _, o := range plain {
		guests[o.guest] = true
	}
	n, _ := c.cells.get(cluster)
	crowded := uint64(n) > c.maxCount() && !c.blocks.unknown
	if len(plain) > 0 && (len(packed) > 0 || len(guests) > 1 || crowded && len(plain) > 1) {
		plain = c.separate(cluster, plain, packed, crowded)
	}
	if n, _ = c.cells.get(cluster); len(packed) > 0 && uint64(n) > c.maxCount() && !c.blocks.unknown && !c.kept[cluster] {
		c.spread(cluster, packed)
	}
	n, _ = c.cells.get(cluster)
	for _, o := range plain {
		if want := n == 1; o.active && n > 0 && want != (o.e.entry&entryCopied != 0) {
			if c.copiedL2(want, o.at, o.guest, o.e.entry, 1) {
				c.put64(fsck.PhaseMap, o.at, o.e.entry^entryCopied)
			}
		}
	}
}

// shorten mends compressed descriptors that reach into the cluster although
// their stream does not, and returns the owners that are left.
func (c *check) shorten(cluster int64, list []owner) []owner {
	left := list[:0:0]
	for _, o := range list {
		if c.spreads[o.at] {
			continue // moved out of the cluster in front, from where it reached here
		}
		e := o.e
		if e.kind != fPacked || int64(e.off>>c.bits) == cluster {
			left = append(left, o)
			continue
		}
		n, ok := c.needs(e.off, e.n)
		if !ok || int64((e.off+uint64(n)-1)>>c.bits) >= cluster {
			left = append(left, o)
			continue
		}
		entry, ok := qcow2.EncodePacked(e.off, n, c.bits)
		if !ok || !c.report(fsck.Finding{Code: codePackedLong, Place: fsck.Place{Offset: o.at, Field: fmt.Sprintf("L2 entry of guest offset %#x", o.guest), Value: e.entry},
			Guest: c.guest(o.guest, c.cs), Text: "the sector count reaches into what is not its own", Fix: preen("set the count that the stream needs")}) {
			left = append(left, o)
			continue
		}
		c.put64(fsck.PhaseMap, o.at, entry)
		for k := int64((e.off+uint64(n)-1)>>c.bits) + 1; k <= int64((e.off+uint64(e.n)-1)>>c.bits); k++ {
			c.release(k, o.weight)
		}
	}
	return left
}

// separate gives each guest cluster but one a cluster of its own, or makes it
// zeros where the guest has proved that it is free, or where there are too many
// of them. It returns the owners that stay.
func (c *check) separate(cluster int64, plain, packed []owner, crowded bool) []owner {
	free := func(o *owner) bool { return o.active && c.o.GuestFree != nil && c.o.GuestFree(o.guest, c.cs) }
	keep := -1 // index of the owner that stays, with all of its guest offset
	if len(packed) == 0 {
		for k := range plain {
			if !free(&plain[k]) && (keep < 0 || plain[k].active && !plain[keep].active) {
				keep = k
			}
		}
		if keep < 0 {
			keep = 0
		}
	}
	var doubt []blockmap.Range
	sure := 0
	for k := range plain {
		if free(&plain[k]) {
			doubt = append(doubt, c.guest(plain[k].guest, c.cs)...)
		} else {
			sure++
		}
	}
	if sure > 1 || len(packed) > 0 {
		for k := range plain {
			doubt = append(doubt, c.guest(plain[k].guest, c.cs)...)
		}
		for k := range packed {
			doubt = append(doubt, c.guest(packed[k].guest, c.cs)...)
		}
	}
	doubt = keepRanges(doubt)
	fates, excess := c.fates(cluster, plain, keep, crowded, free)
	fix := "leave it to one and copy it for the others"
	if excess > 0 {
		fix = fmt.Sprintf("leave it to one, copy it for the first of the others, and make the last %d zeros: so many copies could fill the disk of the host", excess)
	}
	text := fmt.Sprintf("%d entries name the cluster at %#x", len(plain)+len(packed), cluster<<c.bits)
	code := codeL2Duplicate
	if crowded && len(packed) == 0 {
		code = codeRefTooNarrow
	}
	f := fsck.Finding{Code: code, Place: fsck.Place{Offset: plain[0].at, Field: fmt.Sprintf("L2 entry of guest offset %#x", plain[0].guest), Value: plain[0].e.entry},
		Guest: doubt[:min(len(doubt), 8)], Text: text, Fix: full(fix, doubt...)}
	if !c.report(f) {
		c.kept[cluster] = true
		return plain
	}
	// Content that an owner of another cluster lost may lie in what is counted
	// and not used.
	c.mapLoss.Store(true)
	var stay []owner
	places := map[int64]int64{} // of the copies
	for k := range plain {
		o := &plain[k]
		if fates[k] == stays {
			stay = append(stay, *o)
			continue
		}
		c.release(cluster, o.weight)
		if fates[k] == emptied {
			entry, sub := c.nothing()
			c.put64(fsck.PhaseMap, o.at, entry)
			if c.extended {
				c.put64(fsck.PhaseMap, o.at+8, sub)
			}
			continue
		}
		to, ok := places[o.guest]
		if ok && fates[k] == shares {
			c.addTo(to, o.weight)
		} else {
			if to, ok = c.alloc(1, o.weight, fPlain); !ok {
				return stay
			}
			places[o.guest] = to
			c.copies.Spend(c.cs)
			src := cluster << c.bits
			c.sources[cluster] = true
			if !c.planned(c.plan.Copy(to<<c.bits, src, min(c.cs, max(c.size-src, 1)))) {
				return stay
			}
		}
		entry := o.e.entry&^(entryOffset|entryCopied) | uint64(to)<<c.bits
		if o.weight == 1 && o.active && c.alone(plain, o) {
			entry |= entryCopied
		}
		c.put64(fsck.PhaseMap, o.at, entry)
	}
	return stay
}

// fate is what becomes of an entry that names a cluster with others.
type fate uint8

const (
	emptied fate = iota
	stays        // names the cluster as before
	copies       // gets a copy
	shares       // names the copy of another entry of its guest cluster
)

// fates settles what becomes of each entry. excess of them are emptied only
// because there are too many.
func (c *check) fates(cluster int64, plain []owner, keep int, crowded bool, free func(*owner) bool) (fates []fate, excess int) {
	fates = make([]fate, len(plain))
	served := map[int64]bool{} // guest clusters
	if keep >= 0 {
		served[plain[keep].guest] = true
	}
	copied := map[int64]bool{}
	bytes := int64(0)
	zeros := c.h.version >= 3 && c.isHole(cluster<<c.bits, c.cs) // as the entries say without a copy
	for k := range plain {
		o := &plain[k]
		switch {
		case k == keep, keep >= 0 && o.guest == plain[keep].guest && !crowded:
			fates[k] = stays
		case free(o), zeros:
		case copied[o.guest] && !crowded:
			// In tables of several snapshots.
			fates[k] = shares
		case !served[o.guest] && len(served) >= fsck.MaxClaims, !c.copies.Allows(c.f, bytes+c.cs):
			excess++
		default:
			fates[k] = copies
			served[o.guest], copied[o.guest] = true, true
			bytes += c.cs
		}
	}
	return fates, excess
}

// alone reports that no other entry has the guest cluster of o.
func (c *check) alone(list []owner, o *owner) bool {
	n := 0
	for k := range list {
		if list[k].guest == o.guest {
			n++
		}
	}
	return n == 1
}

// addTo adds references to a cluster that this repair took.
func (c *check) addTo(cluster int64, w uint32) {
	if c.cells.in(cluster) {
		c.cells.update(cluster, func(n uint32, fl uint8) (uint32, uint8) { return n + w, fl })
		return
	}
	for k := range c.grown {
		if c.grown[k].cluster == cluster {
			c.grown[k].n += w
		}
	}
}
