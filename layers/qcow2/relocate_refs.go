package qcow2

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/RoaringBitmap/roaring/v2/roaring64"
	"github.com/imagestack/imagestack/layers"
)

// ref is a word of the image that names something which can be moved: the
// offset of its target is in the word itself.
type ref struct {
	target int64 // byte offset in the image file
	at     int64 // of the word; the number of the entry for refBlock
	len    uint32
	kind   refKind
}

type refKind uint8

const (
	refTable  refKind = iota // L1 entry: an L2 table
	refBits                  // bitmap table entry: a cluster of bits
	refBlock                 // refcount table entry: a refcount block
	refData                  // L2 entry: a data cluster
	refPacked                // L2 entry: a compressed cluster of len bytes
)

// refBytes is what one ref costs in memory, with what processing it needs.
const refBytes = 48

// last is the last host cluster that the target touches.
func (r *ref) last(clusterBits uint) int64 {
	return (r.target + max(int64(r.len), 1) - 1) >> clusterBits
}

// hostTable is a structure of several clusters: where it lies, and the word
// that says so.
type hostTable struct {
	kind    tableKind
	off, n  int64 // bytes
	at      int64 // of the word with the offset, in the image file
	entries int64
	shared  []int64 // further words that name the same table
}

type tableKind uint8

const (
	tableL1 tableKind = iota
	tableSnapshotL1
	tableSnapshots
	tableBitmapDir
	tableBitmap
	tableRefcounts
)

// hostTables lists the structures of several clusters. The snapshot table and
// the bitmap directory come first, because words about the others are in them.
func (img *Image) hostTables(ctx context.Context) ([]*hostTable, error) {
	h, err := img.header()
	if err != nil {
		return nil, err
	}
	l1 := &hostTable{kind: tableL1, off: int64(h.L1Offset), n: int64(h.L1Size) * 8, at: offL1Offset, entries: int64(h.L1Size)}
	counts := &hostTable{kind: tableRefcounts, off: int64(h.RefcountTableOffset), n: int64(h.RefcountTableClusters) << img.clusterBits, at: offRefcountTableOffset}
	var first, rest []*hostTable
	if h.NbSnapshots > 0 {
		byOff := map[uint64]*hostTable{}
		size, err := img.eachSnapshot(ctx, h, func(s *snapshotEntry) error {
			if err := img.checkSnapshot(s); err != nil || s.l1Entries == 0 {
				return err
			}
			if t := byOff[s.l1Off]; t != nil {
				t.shared = append(t.shared, s.off+snapL1Offset)
				t.entries = max(t.entries, int64(s.l1Entries))
				t.n = t.entries * 8
				return nil
			}
			t := &hostTable{kind: tableSnapshotL1, off: int64(s.l1Off), n: int64(s.l1Entries) * 8, at: s.off + snapL1Offset, entries: int64(s.l1Entries)}
			byOff[s.l1Off] = t
			rest = append(rest, t)
			return nil
		})
		if err != nil {
			return nil, err
		}
		first = append(first, &hostTable{kind: tableSnapshots, off: int64(h.SnapshotsOffset), n: size, at: offSnapshotsOffset})
	}
	if h.bitmapsValid() {
		off, size, _, err := img.bitmapDir(h)
		if err != nil {
			return nil, err
		}
		first = append(first, &hostTable{kind: tableBitmapDir, off: off, n: size, at: h.extension(extBitmaps).Off + bitmapsDirOffset})
		err = img.eachBitmap(ctx, h, func(b *bitmapEntry) error {
			if b.tableEntries > 0 {
				rest = append(rest, &hostTable{kind: tableBitmap, off: int64(b.tableOff), n: int64(b.tableEntries) * 8,
					at: b.off + bmTableOffset, entries: int64(b.tableEntries)})
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	all := append(append(first, l1), rest...)
	all = append(all, counts)
	return all, img.checkDisjoint(all)
}

// checkDisjoint refuses tables that overlap.
func (img *Image) checkDisjoint(tables []*hostTable) error {
	end := int64(1) // the header
	for _, t := range sortTables(tables) {
		if t.off < end {
			return img.corrupt(t.off, "table", nil, "it overlaps another one")
		}
		end = (t.off + t.n + img.clusterSize - 1) &^ (img.clusterSize - 1)
	}
	return nil
}

// sortTables are the tables that occupy anything, in the order of the file.
func sortTables(tables []*hostTable) []*hostTable {
	sorted := slices.SortedFunc(slices.Values(tables), func(a, b *hostTable) int { return cmp.Compare(a.off, b.off) })
	return slices.DeleteFunc(sorted, func(t *hostTable) bool { return t.n == 0 })
}

// refWalk visits references, each word once, however many snapshots share its
// table.
type refWalk struct {
	w      walker
	sorted []*hostTable
	seen   *roaring64.Bitmap // L2 tables
	data   bool              // what L2 tables name; else what hangs above that
	visit  func(ref) error
	buf    []byte
}

// eachRef visits the references to data, or to everything else of one cluster.
func (img *Image) eachRef(ctx context.Context, data bool, visit func(ref) error) error {
	tables, err := img.hostTables(ctx)
	if err != nil {
		return err
	}
	w := refWalk{w: walker{img: img, ctx: ctx, holes: stillHoles{img: img, still: true}}, sorted: sortTables(tables), seen: roaring64.New(), data: data, visit: visit, buf: make([]byte, img.clusterSize)}
	for _, t := range tables {
		if err := w.table(t); err != nil {
			return err
		}
	}
	return nil
}

func (w *refWalk) table(t *hostTable) error {
	img := w.w.img
	switch {
	case t.kind == tableL1 || t.kind == tableSnapshotL1:
		return w.w.words(t.off, t.n, "L1 table", func(i, at int64, entry uint64) error { return w.l1(i, at, entry) })
	case w.data:
		return nil
	case t.kind == tableBitmap:
		return w.w.words(t.off, t.n, "bitmap table", func(_, at int64, entry uint64) error {
			host := entry & entryOffset
			if host == 0 {
				return nil
			}
			if host&uint64(img.clusterSize-1) != 0 {
				return img.corrupt(at, "bitmap table entry", entry, "the cluster is not on a cluster boundary")
			}
			return w.visit(ref{target: int64(host), at: at, kind: refBits})
		})
	case t.kind == tableRefcounts:
		return w.w.words(t.off, t.n, "refcount table", func(k, at int64, entry uint64) error {
			if entry&uint64(img.clusterSize-1) != 0 || !inFile(entry, uint64(img.clusterSize)) {
				return img.corrupt(at, "refcount table entry", entry, "it is not a cluster offset")
			}
			return w.visit(ref{target: int64(entry), at: k, kind: refBlock})
		})
	}
	return nil
}

// l1 visits an L1 entry, or what its L2 table names.
func (w *refWalk) l1(i, at int64, entry uint64) error {
	img := w.w.img
	if entry&^entryCopied == 0 {
		return nil
	}
	table, err := img.checkL1(at, entry)
	if err != nil {
		return err
	}
	if w.inTable(table) {
		return img.corrupt(at, "L1 entry", entry, "the L2 table lies in another table")
	}
	if !w.data {
		return w.visit(ref{target: table, at: at, kind: refTable})
	}
	if !w.seen.CheckedAdd(uint64(table) >> img.clusterBits) {
		return nil
	}
	if err := w.w.ctx.Err(); err != nil {
		return err
	}
	return w.l2(table, i*img.l2Span)
}

// inTable reports whether the cluster at off is a part of another structure.
func (w *refWalk) inTable(off int64) bool {
	i, _ := slices.BinarySearchFunc(w.sorted, off+1, func(t *hostTable, off int64) int { return cmp.Compare(t.off, off) })
	return i > 0 && off < w.sorted[i-1].off+w.sorted[i-1].n
}

// l2 visits what the L2 table at off names; first is the guest offset of its
// first entry.
func (w *refWalk) l2(table, first int64) error {
	img := w.w.img
	b := w.buf
	if w.w.holes.in(table, img.clusterSize) {
		return nil
	}
	if err := img.readMeta(b, table, "L2 table"); err != nil {
		return err
	}
	for i := int64(0); i < 1<<img.l2Bits; i++ {
		word := be64(b[i*img.entryBytes:])
		if word == 0 {
			continue
		}
		var sub uint64
		if img.extended {
			sub = be64(b[i*img.entryBytes+8:])
		}
		at := table + i*img.entryBytes
		e, err := img.checkL2(first+i<<img.clusterBits, word, sub, at)
		if err != nil {
			return err
		}
		switch {
		case e.isPacked:
			err = w.visit(ref{target: int64(e.packed.off), at: at, len: e.packed.len, kind: refPacked})
		case e.hasHost && !img.external:
			err = w.visit(ref{target: int64(e.host), at: at, kind: refData})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// refWindow collects the references to the highest clusters, all that there
// are to each of them, in bounded memory.
type refWindow struct {
	img   *Image
	low   int64 // clusters below are not collected (any more)
	limit int
	refs  []ref
}

func (w *refWindow) add(r ref) error {
	bits := w.img.clusterBits
	if r.last(bits) < w.low {
		return nil
	}
	w.refs = append(w.refs, r)
	if len(w.refs) < w.limit {
		return nil
	}
	// Keep the upper half.
	w.sort()
	low := w.refs[len(w.refs)/2].last(bits)
	if low == w.refs[0].last(bits) {
		low++ // too many in the lower half: keep only what is above
	}
	i, _ := slices.BinarySearchFunc(w.refs, low, func(r ref, low int64) int { return cmp.Compare(r.last(bits), low) })
	if i == len(w.refs) {
		return w.img.errorf(low<<bits, "reference count", nil, fmt.Errorf("%w: a cluster with %d references", layers.ErrUnsupported, len(w.refs)))
	}
	w.low = low
	w.refs = append(w.refs[:0], w.refs[i:]...)
	return nil
}

// sort brings the references in the order of their targets.
func (w *refWindow) sort() {
	bits := w.img.clusterBits
	slices.SortFunc(w.refs, func(a, b ref) int {
		return cmp.Or(cmp.Compare(a.last(bits), b.last(bits)), cmp.Compare(a.target, b.target), cmp.Compare(a.len, b.len), cmp.Compare(a.at, b.at))
	})
}
