package scavenge

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
)

// maxShared bounds how many clusters of a snapshot's table are evidence.
const maxShared = 512

// readSnapshots reads the table of internal snapshots, as far as it goes.
func (j *qcow2Job) readSnapshots() {
	be := binary.BigEndian
	at := j.snapOff
	for range j.snaps {
		var h [40]byte
		if at <= 0 || at+40 > j.src.size || !j.src.read(h[:], at) {
			return
		}
		off, n := be.Uint64(h[:]), int64(be.Uint32(h[8:]))
		if off == 0 || off%uint64(j.cluster) != 0 || off >= uint64(j.src.size) || n > qcow2MaxL1/8 {
			return
		}
		length := (40 + int64(be.Uint32(h[36:])) + int64(be.Uint16(h[12:])) + int64(be.Uint16(h[14:])) + 7) &^ 7
		j.mark(at, length)
		j.mark(int64(off), n*8)
		if len(j.snapL1) < 1024 {
			j.snapL1 = append(j.snapL1, l1Range{int64(off), n})
		}
		at += length
	}
}

// l1Range is an L1 table.
type l1Range struct{ off, n int64 }

// readL1 calls visit for the entries of an L1 table that name an L2 table.
func (j *qcow2Job) readL1(l l1Range, visit func(unit int64, table int32)) {
	b := make([]byte, 64<<10)
	for i := int64(0); i < l.n; i += int64(len(b)) / 8 {
		j.src.read(b, l.off+i*8)
		for k := int64(0); k < int64(len(b))/8 && i+k < l.n; k++ {
			e := binary.BigEndian.Uint64(b[k*8:])
			if e == 0 || e&l1Reserved != 0 || e&entryOffset%uint64(j.cluster) != 0 || !j.p.inDisk(i+k) {
				continue
			}
			if t := j.tableAt(int64(e & entryOffset)); t >= 0 {
				visit(i+k, t)
			}
		}
	}
}

// survivors places what L1 tables say, and sorts out what is not in use.
func (j *qcow2Job) survivors(ctx context.Context) error {
	snapAt := map[int32]int64{} // table -> unit
	j.snapAt = snapAt
	snapRefs := map[int32]uint64{}
	for _, l := range j.snapL1 {
		j.readL1(l, func(u int64, t int32) {
			snapAt[t] = u
			snapRefs[t]++
		})
	}
	active := map[int32]int64{}
	double := map[int32]bool{}
	if j.l1Off > 0 {
		j.readL1(l1Range{j.l1Off, j.l1Size}, func(u int64, t int32) {
			if _, ok := active[t]; ok {
				double[t] = true
			}
			active[t] = u
		})
	}
	var stale []int32
	for i, t := range j.tables {
		k := int32(i)
		_, named := active[k]
		if named && !double[k] {
			continue
		}
		switch {
		case !j.refs.trusted || !j.refs.counted(t.host>>j.bits):
			if snapRefs[k] > 0 {
				j.p.idle.set(int64(i)) // for now, see below
			}
		case j.refs.count(t.host>>j.bits) <= snapRefs[k]:
			// Of a snapshot only, or of nobody.
			j.p.idle.set(int64(i))
			if snapRefs[k] == 0 {
				j.p.refuse(k, whyStale)
				stale = append(stale, k)
			}
		}
	}
	stale = j.reallyStale(stale)
	if len(stale) > 0 {
		j.rep.note(fmt.Sprintf("%d L2 tables are of earlier times: the reference counts say that they are not in use", len(stale)))
	}
	var claims []claim
	for t, u := range active {
		if !double[t] {
			claims = append(claims, claim{t, int32(u), -1, 0})
		}
	}
	j.p.settle(claims, ProofSurvived)
	claims = nil
	for t, u := range snapAt {
		if !j.p.idle.get(int64(t)) && j.p.place[t] < 0 {
			claims = append(claims, claim{t, int32(u), -1, 0})
		}
	}
	j.p.settle(claims, ProofSnapshot)
	j.foundL1()
	j.onlyPlace()
	if err := j.shared(snapAt); err != nil {
		return err
	}
	if err := j.index(); err != nil {
		return err
	}
	if len(snapAt) > 0 {
		if _, err := j.p.byEvidence(j.ev, ProofShared); err != nil {
			return err
		}
	}
	if !j.refs.trusted && !j.anyOpen() {
		// Nothing else is there that the active state could have used.
		claims = nil
		for t, u := range snapAt {
			if j.p.place[t] < 0 && !j.p.taken.has(int32(u)) {
				claims = append(claims, claim{t, int32(u), -1, 0})
			}
		}
		j.p.settle(claims, ProofSnapshot)
	}
	return ctx.Err()
}

// reallyStale takes out tables that are not counted and name clusters that are,
// and that no other table names: there the count of the table is wrong.
func (j *qcow2Job) reallyStale(stale []int32) []int32 {
	if len(stale) == 0 {
		return nil
	}
	live := newBitset(j.clusters)
	for i, t := range j.tables {
		if !slices.Contains(stale, int32(i)) {
			j.targets(t, func(_ int64, w l2Word) { live.set(w.host >> j.bits) })
		}
	}
	return slices.DeleteFunc(stale, func(k int32) bool {
		needed := false
		j.targets(j.tables[k], func(_ int64, w l2Word) {
			c := w.host >> j.bits
			needed = needed || !live.get(c) && j.refs.count(c) > 0
		})
		if needed {
			j.p.idle[k>>6] &^= 1 << (k & 63)
			j.p.refuse(k, whyNone)
		}
		return needed
	})
}

// anyOpen tells whether a table still wants a place.
func (j *qcow2Job) anyOpen() bool {
	for i := range j.tables {
		if j.p.place[i] < 0 && !j.p.idle.get(int64(i)) {
			return true
		}
	}
	return false
}

// foundL1 uses clusters that look like an L1 table of a single cluster, when
// nothing tells where that table was. Those that a table names are data: an
// image in a file of the guest has one too.
func (j *qcow2Job) foundL1() {
	if j.l1Off > 0 {
		return
	}
	if j.p.units > j.cluster/8 || j.p.units == 0 && j.cluster < 64<<10 {
		return // a part of a table does not say which
	}
	at := map[int32]int64{}
	clash := map[int32]bool{}
	for _, host := range j.l1like {
		if j.mapped.get(host>>j.bits) || j.refs.trusted && j.refs.count(host>>j.bits) == 0 {
			continue
		}
		j.readL1(l1Range{host, j.cluster / 8}, func(u int64, t int32) {
			if v, ok := at[t]; ok && v != u {
				clash[t] = true
			}
			at[t] = u
		})
	}
	var claims []claim
	for t, u := range at {
		if !clash[t] && j.p.place[t] < 0 && !j.p.idle.get(int64(t)) {
			claims = append(claims, claim{t, int32(u), -1, 0})
		}
	}
	j.p.settle(claims, ProofFoundL1)
}

// onlyPlace: a disk that needs one table has one place for it.
func (j *qcow2Job) onlyPlace() {
	if j.p.units != 1 {
		return
	}
	var claims []claim
	for i := range j.tables {
		if j.p.place[i] < 0 && !j.p.idle.get(int64(i)) {
			claims = append(claims, claim{int32(i), 0, -1, 0})
		}
	}
	if len(claims) == 1 {
		j.p.settle(claims, ProofOnlyPlace)
	}
}

// shared makes evidence of the clusters of snapshots: a table of the active
// state that has one of them has it at the same place.
func (j *qcow2Job) shared(snapAt map[int32]int64) error {
	tables := make([]int32, 0, len(snapAt))
	for t := range snapAt {
		tables = append(tables, t)
	}
	slices.Sort(tables)
	var err error
	for _, t := range tables {
		step := max(int(j.tables[t].mapped)/maxShared, 1)
		n := 0
		j.targets(j.tables[t], func(entry int64, w l2Word) {
			if n++; n%step == 0 && !w.packed && err == nil {
				err = j.ev.add(nil, kindPlain, w.host, snapAt[t]*j.span()+entry<<j.bits, j.cluster)
			}
		})
	}
	j.ev.finish()
	return err
}
