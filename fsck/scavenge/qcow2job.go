package scavenge

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// maxShared bounds how many clusters of a snapshot's table are evidence.
const maxShared = 512

func (j *qcow2Job) prepare(ctx context.Context) error {
	if err := j.geometry(j.o); err != nil {
		return err
	}
	j.ev.shift = j.bits
	j.ev.readLoc = j.readLoc
	if j.backing != "" && j.o.To != "qcow2" {
		return fmt.Errorf("%w: the image has a backing file, which only qcow2 can name", layers.ErrUnsupported)
	}
	j.readSnapshots()
	if err := j.findTables(ctx); err != nil {
		return err
	}
	units := int64(0)
	if j.qcow2Image.size > 0 {
		units = (j.qcow2Image.size + j.span() - 1) / j.span()
	}
	j.job.size = j.qcow2Image.size
	var err error
	if j.p, err = newPieces(j.src, int64(len(j.tables)), j.span(), units); err != nil {
		return err
	}
	j.p.spots = j.spots
	var more func(visit func(b []byte, loc int64) error) error
	if j.packed > 0 {
		more = func(visit func(b []byte, loc int64) error) error { return j.eachPacked(ctx, visit) }
	}
	return j.passes(ctx, more)
}

// eachPacked shows every compressed cluster, decompressed.
func (j *qcow2Job) eachPacked(ctx context.Context, visit func(b []byte, loc int64) error) error {
	table, out := make([]byte, j.cluster), make([]byte, j.cluster)
	for i, t := range j.tables {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if !j.src.read(table, t.host) {
			continue
		}
		for k := range j.entries() {
			w, ok := j.decode(table, k)
			if !ok || !w.packed || !j.unpack(w, out) {
				continue
			}
			if err := visit(out, packedLoc+int64(i)*j.span()+k<<j.bits); err != nil {
				return err
			}
		}
	}
	return nil
}

// unpack decompresses a cluster. Without a header the method is tried.
func (j *qcow2Job) unpack(w l2Word, out []byte) bool {
	in := make([]byte, w.packedBytes)
	if !j.src.read(in, w.host) {
		return false
	}
	if j.header {
		return qcow2.Decompress(j.packing, in, out) == nil
	}
	for _, c := range []qcow2.CompressionType{j.packing, qcow2.Deflate, qcow2.Zstd} {
		if qcow2.Decompress(c, in, out) == nil {
			j.packing = c
			return true
		}
	}
	return false
}

// readLoc reads evidence again.
func (j *qcow2Job) readLoc(p []byte, loc int64) bool {
	if loc < packedLoc {
		return j.src.read(p, loc)
	}
	loc -= packedLoc
	piece, rel := loc/j.span(), loc%j.span()
	out := make([]byte, j.cluster)
	x := rel & (j.cluster - 1)
	if piece >= int64(len(j.tables)) || x+int64(len(p)) > j.cluster || !j.src.read(j.buf, j.tables[piece].host) {
		return false
	}
	w, ok := j.decode(j.buf, rel>>j.bits)
	if !ok || !w.packed || !j.unpack(w, out) {
		return false
	}
	copy(p, out[x:])
	return true
}

// spots tells which tables have the cluster of a loc.
func (j *qcow2Job) spots(loc int64, dst []spot) []spot {
	if loc >= packedLoc {
		loc -= packedLoc
		if i := loc / j.span(); i < int64(len(j.tables)) {
			dst = append(dst, spot{int32(i), loc % j.span()})
		}
		return dst
	}
	c := uint32(loc >> j.bits)
	i, _ := slices.BinarySearchFunc(j.refs2, c, func(r tableRef, c uint32) int { return cmp.Compare(r.cluster, c) })
	for ; i < len(j.refs2) && j.refs2[i].cluster == c; i++ {
		r := j.refs2[i]
		dst = append(dst, spot{r.table, int64(r.entry)<<j.bits + loc&(j.cluster-1)})
	}
	return dst
}

// index makes what spots needs: the entries that name clusters with evidence.
func (j *qcow2Job) index() error {
	wanted := newBitset(j.clusters)
	want := func(loc int64) {
		if loc < packedLoc && loc>>j.bits < j.clusters {
			wanted.set(loc >> j.bits)
		}
	}
	for _, h := range j.ev.hits {
		want(h.loc)
	}
	for _, s := range j.ev.seeds {
		want(s.loc)
	}
	for _, t := range j.ev.tables {
		want(t.loc)
	}
	for _, g := range j.ev.guests {
		for _, s := range g.supers {
			want(s.loc)
		}
	}
	j.refs2 = nil
	var err error
	for i, t := range j.tables {
		j.targets(t, func(entry int64, w l2Word) {
			if w.packed || !wanted.get(w.host>>j.bits) || err != nil {
				return
			}
			if len(j.refs2) == cap(j.refs2) {
				grow := max(1024, len(j.refs2))
				if err = j.src.take(int64(grow)*12, "the index of evidence"); err != nil {
					return
				}
				j.refs2 = slices.Grow(j.refs2, grow)
			}
			j.refs2 = append(j.refs2, tableRef{uint32(w.host >> j.bits), int32(i), int32(entry)})
		})
	}
	slices.SortFunc(j.refs2, func(a, b tableRef) int {
		return cmp.Or(cmp.Compare(a.cluster, b.cluster), cmp.Compare(a.table, b.table))
	})
	return err
}

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

// content writes what a table maps.
func (j *qcow2Job) content(ctx context.Context, piece int32, at int64, out sink) error {
	table, data := make([]byte, j.cluster), make([]byte, j.cluster)
	if !j.src.read(table, j.tables[piece].host) {
		return out.unreadable(at, j.span())
	}
	for k := range j.entries() {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		w, ok := j.decode(table, k)
		guest := at + k<<j.bits
		var err error
		switch {
		case !ok:
			err = out.unreadable(guest, j.cluster)
		case w.packed:
			if !j.unpack(w, data) {
				err = out.unreadable(guest, j.cluster)
			} else {
				err = out.write(guest, data)
			}
		case w.zero:
			err = out.zero(guest, j.cluster)
		case w.host == 0 && w.zeros == 0:
		case w.alloc == ^uint32(0):
			err = j.copy(w.host, data, guest, out)
		default:
			err = j.subclusters(w, data, guest, out)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (j *qcow2Job) copy(host int64, data []byte, guest int64, out sink) error {
	if !j.used.get(host >> j.bits) {
		return out.zeros(guest, data)
	}
	if !j.src.read(data, host) {
		return out.unreadable(guest, int64(len(data)))
	}
	return out.write(guest, data)
}

// subclusters copies runs of subclusters that are alike.
func (j *qcow2Job) subclusters(w l2Word, data []byte, guest int64, out sink) error {
	sub := j.cluster / 32
	state := func(i int64) uint32 { return w.alloc>>i&1 | w.zeros>>i&1<<1 }
	for i := int64(0); i < 32; {
		k := i + 1
		for k < 32 && state(k) == state(i) {
			k++
		}
		var err error
		switch state(i) {
		case 1:
			err = j.copy(w.host+i*sub, data[:(k-i)*sub], guest+i*sub, out)
		case 2:
			err = out.zero(guest+i*sub, (k-i)*sub)
		}
		if err != nil {
			return err
		}
		i = k
	}
	return nil
}

func (j *qcow2Job) blocks(ctx context.Context, piece int32, visit func(b []byte, loc int64) error) error {
	if !j.src.read(j.buf, j.tables[piece].host) {
		return nil
	}
	table, data := slices.Clone(j.buf), make([]byte, j.cluster)
	for k := range j.entries() {
		w, ok := j.decode(table, k)
		if !ok || w.host == 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		loc := packedLoc + int64(piece)*j.span() + k<<j.bits
		if w.packed && !j.unpack(w, data) || !w.packed && !j.src.read(data, w.host) {
			continue
		}
		// As a loc of the table: the index knows only clusters with evidence.
		if err := visit(data, loc); err != nil {
			return err
		}
	}
	return nil
}

// leftovers reports tables without a place, and clusters in use that no table
// names.
func (j *qcow2Job) leftovers(ctx context.Context) error {
	for i, t := range j.tables {
		if j.p.place[i] >= 0 || j.p.idle.get(int64(i)) {
			continue
		}
		k := int32(i)
		u := Unplaced{Host: t.host, Length: int64(t.mapped) << j.bits, Why: j.p.proof(k), Places: j.p.cands[k]}
		err := j.keep(u, fmt.Sprintf("l2-%#x.raw", t.host), func(f backend.File) error { return j.tableFile(ctx, k, f) })
		if err != nil {
			return err
		}
	}
	// Where a snapshot has a table the active state has one too.
	for i := range j.tables {
		u, ok := j.snapAt[int32(i)]
		if !ok || j.p.place[i] >= 0 || !j.p.idle.get(int64(i)) || j.p.taken.has(int32(u)) || !j.p.inDisk(u) {
			continue
		}
		t := j.tables[i]
		err := j.keep(Unplaced{Host: t.host, Length: int64(t.mapped) << j.bits, Why: whySnapshot, Places: []int64{u * j.span()}},
			fmt.Sprintf("l2-%#x.raw", t.host), func(f backend.File) error { return j.tableFile(ctx, int32(i), f) })
		if err != nil {
			return err
		}
	}
	return j.loose(ctx, j.clusters, 0, j.cluster, func(c int64) string {
		if !j.used.get(c) || j.meta.get(c) || j.mapped.get(c) || j.isTab.get(c) || slices.Contains(j.l1like, c<<j.bits) ||
			j.refs.trusted && j.refs.count(c) == 0 {
			return ""
		}
		return whyNoTable
	})
}

// tableFile writes what a table maps into a sparse file.
func (j *qcow2Job) tableFile(ctx context.Context, piece int32, f backend.File) error {
	if err := f.Truncate(j.span()); err != nil {
		return err
	}
	return j.content(ctx, piece, 0, fileSink{f})
}

func (j *qcow2Job) create(ctx context.Context, f backend.File, to string) (layers.Editor, error) {
	co := qcow2.CreateOptions{Size: j.rep.VirtualSize, ClusterSize: j.cluster, Version: j.version, ExtendedL2: j.extended,
		BackingFile: j.backing, BackingFormat: j.backFmt, RefcountBits: 1 << j.order}
	if j.version == 3 {
		co.CompressionType = j.packing
	}
	if co.BackingFile != "" && co.BackingFormat == "" {
		j.rep.note("the backing file " + co.BackingFile + " is not named by the new image: its format is not stated")
		co.BackingFile = ""
	}
	if co.BackingFile != "" {
		j.rep.note("the new image names the same backing file")
	}
	if j.snaps > 0 {
		j.rep.note("internal snapshots are not in the new image")
	}
	return createImage(ctx, f, to, co, j.rep.VirtualSize)
}
