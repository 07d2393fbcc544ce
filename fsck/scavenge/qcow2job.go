package scavenge

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

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
			j.refs2, err = append1(j.src, j.refs2, tableRef{uint32(w.host >> j.bits), int32(i), int32(entry)}, 12, "the index of evidence")
		})
	}
	slices.SortFunc(j.refs2, func(a, b tableRef) int {
		return cmp.Or(cmp.Compare(a.cluster, b.cluster), cmp.Compare(a.table, b.table))
	})
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
			j.refs.trusted && j.refs.counted(c) && j.refs.count(c) == 0 {
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
