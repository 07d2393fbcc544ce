package qcow2fsck

import (
	"encoding/binary"
	"fmt"

	"github.com/imagestack/imagestack/fsck"
)

// Layout of a snapshot table entry (section Snapshots).
const (
	snapFixed    = 40
	maxSnapExtra = 1024
	snapExtraV3  = 16
)

// snapshot is an entry of the snapshot table as it is to be.
type snapshot struct {
	fixed [snapFixed]byte
	extra []byte
	names []byte // id and name
}

func (s *snapshot) marshal(out []byte) []byte {
	out = append(out, s.fixed[:]...)
	out = append(out, s.extra...)
	out = append(out, s.names...)
	return append(out, make([]byte, -len(out)&7)...)
}

// snapshots judges the snapshot table and the L1 tables that it names.
func (c *check) snapshots() {
	h := &c.h
	if h.nbSnap == 0 {
		return
	}
	dropAll := func(off int64, field string, value any, text string) {
		c.mapLoss.Store(true)
		if c.found(codeSnapTable, off, field, value, text, full("drop all snapshots")) {
			c.put32(fsck.PhaseHeader, offNbSnap, 0)
			c.put64(fsck.PhaseHeader, offSnapOffset, 0)
			h.nbSnap, h.snapOff = 0, 0
		} else {
			c.blocks.unknown = true // everything of the snapshots would look like a leak
		}
	}
	switch {
	case !c.aligned(h.snapOff, 1):
		dropAll(offSnapOffset, "snapshots_offset", h.snapOff, "there is no snapshot table")
		return
	case h.nbSnap > maxSnapshots:
		dropAll(offNbSnap, "nb_snapshots", h.nbSnap, "there cannot be so many snapshots")
		return
	}
	if what := c.claims.at(int64(h.snapOff>>c.bits), 1); what != nil {
		dropAll(offSnapOffset, "snapshots_offset", h.snapOff, "the snapshot table lies in "+what.what)
		return
	}
	start := int64(h.snapOff)
	off := start
	var list []*snapshot
	var tables []l1
	changed := false
	for i := range h.nbSnap {
		s, n, text := c.snapshotAt(off, start)
		if text == "" && i == 0 && c.claim(h.snapOff, uint64(n), "the snapshot table") != "" {
			text = "the snapshot table lies upon something else"
		}
		if text != "" {
			if i == 0 {
				dropAll(off, "snapshot table entry 0", nil, text)
				return
			}
			c.mapLoss.Store(true)
			if c.found(codeSnapEntry, off, fmt.Sprintf("snapshot table entry %d", i), nil, text, full("drop it and what follows")) {
				h.nbSnap = i
				c.put32(fsck.PhaseHeader, offNbSnap, i)
			} else {
				c.blocks.unknown = true
			}
			break
		}
		keep, mended := c.judgeSnapshot(int(i), off, s, &tables, int32(len(list)+1))
		changed = changed || mended
		if keep {
			list = append(list, s)
		}
		off += n
	}
	// The table may end in a later cluster than its first entry does.
	old := off - start
	first := int64(h.snapOff >> c.bits)
	c.claims.remove(first)
	if what := c.claim(h.snapOff, uint64(max(old, 1)), "the snapshot table"); what != "" {
		c.claims.insert(first, 1, "the snapshot table")
	}
	c.l1s = append(c.l1s, tables...)
	if changed && c.plan != nil {
		c.writeSnapshots(list, old)
	}
	c.snapshotIDs(list)
}

// snapshotAt reads the entry at off. n is its length with padding; text says
// why it cannot be read.
func (c *check) snapshotAt(off, start int64) (s *snapshot, n int64, text string) {
	s = new(snapshot)
	if off-start > maxSnapTableBytes {
		return nil, 0, "the table is longer than 64 MiB"
	}
	if c.read(s.fixed[:], off) < snapFixed {
		return nil, 0, "it reaches behind the end of the file"
	}
	if be64(s.fixed[:])|be64(s.fixed[8:]) == 0 {
		return nil, 0, "it is empty"
	}
	extra := int64(be32(s.fixed[36:]))
	names := int64(be16(s.fixed[12:])) + int64(be16(s.fixed[14:]))
	if extra > maxSnapExtra && !c.namesAt(s, off+snapFixed+extra) {
		// Not the extra data is long but the field is damaged.
		found := false
		for _, k := range []int64{24, 16} {
			if c.namesAt(s, off+snapFixed+k) {
				extra, found = k, true
				break
			}
		}
		if !found {
			return nil, 0, "its extra data is impossibly long"
		}
	}
	n = (snapFixed + extra + names + 7) &^ 7
	if off+snapFixed+extra+names > c.size || extra > maxSnapTableBytes {
		return nil, 0, "it reaches behind the end of the file"
	}
	s.extra = make([]byte, min(extra, maxSnapExtra))
	c.read(s.extra, off+snapFixed)
	s.names = make([]byte, names)
	c.read(s.names, off+snapFixed+extra)
	return s, n, ""
}

// namesAt reports that the ID and the name of a snapshot may be at off.
func (c *check) namesAt(s *snapshot, off int64) bool {
	id := int(be16(s.fixed[12:]))
	b := make([]byte, id+int(be16(s.fixed[14:])))
	if id == 0 || c.read(b, off) < len(b) {
		return false
	}
	for _, v := range b {
		if v < 0x20 || v == 0x7f {
			return false
		}
	}
	return true
}

// judgeSnapshot judges what an entry says. keep is false when it is to be
// dropped.
func (c *check) judgeSnapshot(i int, off int64, s *snapshot, tables *[]l1, owner int32) (keep, mended bool) {
	h := &c.h
	field := func(name string) string { return fmt.Sprintf("snapshot %d (%q) %s", i, s.name(), name) }
	if extra := be32(s.fixed[36:]); extra > maxSnapExtra {
		if c.found(codeSnapExtra, off+36, field("extra_data_size"), extra, "more than 1024 bytes", full(fmt.Sprintf("make it %d bytes", len(s.extra)))) {
			binary.BigEndian.PutUint32(s.fixed[36:], uint32(len(s.extra)))
			mended = true
		}
	}
	if h.version >= 3 && len(s.extra) < snapExtraV3 {
		if c.found(codeSnapShort, off+36, field("extra_data_size"), be32(s.fixed[36:]), "version 3 demands 16 bytes", preen("add them")) {
			extra := make([]byte, snapExtraV3)
			copy(extra, s.extra)
			if len(s.extra) < 8 {
				binary.BigEndian.PutUint64(extra, uint64(be32(s.fixed[32:])))
			}
			binary.BigEndian.PutUint64(extra[8:], h.size)
			s.extra = extra
			binary.BigEndian.PutUint32(s.fixed[36:], snapExtraV3)
			mended = true
		}
	}
	l1Off, l1Size, size := be64(s.fixed[:]), be32(s.fixed[8:]), h.size
	if len(s.extra) >= snapExtraV3 {
		size = be64(s.extra[8:])
	}
	text := ""
	switch {
	case uint64(l1Size) > maxL1Entries:
		text = "the L1 table is too large"
	case l1Size == 0 && l1Off == 0 && size == 0:
		return true, mended
	case !c.aligned(l1Off, uint64(l1Size)*8):
		text = "the L1 table does not lie in the file"
	case !c.looksLikeL1(l1Off, l1Size):
		text = "what is there is no L1 table"
	default:
		if need := c.l1Need(size); uint64(l1Size) < need {
			change, n := c.smallL1(i, off, s, l1Off, l1Size, size, need)
			mended = mended || change
			l1Size = n
		}
		if what := c.claim(l1Off, max(uint64(l1Size)*8, 1), "the L1 table of a snapshot"); what != "" {
			text = "the L1 table lies in " + what
		}
	}
	if text != "" {
		c.mapLoss.Store(true)
		if !c.found(codeSnapL1, off, field("l1_table_offset"), l1Off, text, full("drop the snapshot")) {
			c.blocks.unknown = true
			return true, mended
		}
		return false, true
	}
	*tables = append(*tables, l1{int64(l1Off), int64(l1Size), owner})
	return true, mended
}

// smallL1 settles an L1 table of fewer entries than the snapshot's disk needs.
func (c *check) smallL1(i int, off int64, s *snapshot, l1Off uint64, l1Size uint32, size, need uint64) (change bool, n uint32) {
	fix := full("make the snapshot's disk as small as the table")
	grow := need <= maxL1Entries && c.aligned(l1Off, need*8) && c.looksLikeL1(l1Off, uint32(need)) && c.counted(l1Off, need*8)
	if grow {
		fix = full(fmt.Sprintf("set it to %d: the table goes on", need))
	}
	if !c.found(codeSnapL1Small, off+8, fmt.Sprintf("snapshot %d (%q) l1_size", i, s.name()), l1Size, fmt.Sprintf("a disk of %d bytes needs %d entries", size, need), fix) {
		return false, l1Size
	}
	if grow {
		binary.BigEndian.PutUint32(s.fixed[8:], uint32(need))
		return true, uint32(need)
	}
	if len(s.extra) >= snapExtraV3 {
		binary.BigEndian.PutUint64(s.extra[8:], uint64(l1Size)*uint64(c.l2Span))
	}
	return true, l1Size
}

func (s *snapshot) name() string { return string(s.names[be16(s.fixed[12:]):]) }
func (s *snapshot) id() string   { return string(s.names[:be16(s.fixed[12:])]) }

// snapshotIDs notes IDs that do not identify.
func (c *check) snapshotIDs(list []*snapshot) {
	seen := map[string]bool{}
	for _, s := range list {
		if id := s.id(); id == "" || seen[id] {
			c.found(codeSnapID, int64(c.h.snapOff), "snapshot id", id, "it is empty or appears twice", nil)
		} else {
			seen[id] = true
		}
	}
}

// writeSnapshots writes the table anew: in place when it is no longer than it
// was, else in clusters of its own.
func (c *check) writeSnapshots(list []*snapshot, old int64) {
	var b []byte
	for _, s := range list {
		b = s.marshal(b)
	}
	h := &c.h
	if len(list) == 0 {
		c.claims.remove(int64(h.snapOff >> c.bits))
		c.put32(fsck.PhaseHeader, offNbSnap, 0)
		c.put64(fsck.PhaseHeader, offSnapOffset, 0)
		return
	}
	if int64(len(b)) <= (old+c.cs-1)&^(c.cs-1) {
		c.planned(c.plan.Write(fsck.PhaseMap, int64(h.snapOff), b))
		if int(h.nbSnap) != len(list) {
			c.put32(fsck.PhaseHeader, offNbSnap, uint32(len(list)))
		}
		first := int64(h.snapOff >> c.bits)
		c.claims.remove(first)
		c.claim(h.snapOff, uint64(len(b)), "the snapshot table")
		return
	}
	// Where is free is not known yet: the new table goes behind the end.
	n := (int64(len(b)) + c.cs - 1) >> c.bits
	at := c.end
	if !c.planned(c.plan.Write(fsck.PhaseNew, at<<c.bits, append(b, make([]byte, n<<c.bits-int64(len(b)))...))) {
		return
	}
	c.end += n
	for i := range n {
		c.fresh[at+i] = true
		c.grown = append(c.grown, ref{at + i, 1, fMeta})
	}
	c.claims.remove(int64(h.snapOff >> c.bits))
	c.put64(fsck.PhaseHeader, offSnapOffset, uint64(at)<<c.bits)
	if int(h.nbSnap) != len(list) {
		c.put32(fsck.PhaseHeader, offNbSnap, uint32(len(list)))
	}
}
