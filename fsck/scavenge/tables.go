package scavenge

import (
	"context"
	"encoding/binary"
	"slices"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// l2Table is a cluster of the file that was recognised as an L2 table.
type l2Table struct {
	host   int64
	mapped int32 // entries that name a cluster
}

const l2Bytes = 16

// l2Word is one decoded entry.
type l2Word struct {
	host        int64 // of the cluster, 0 for none
	zero        bool  // the whole cluster reads as zeros
	alloc       uint32
	zeros       uint32 // subclusters, extended entries only
	packed      bool
	packedBytes uint32
}

// decode reads entry i of the table in b; ok is false when it cannot be one.
func (q *qcow2Image) decode(b []byte, i int64) (w l2Word, ok bool) {
	e := binary.BigEndian.Uint64(b[i*q.entryBytes():])
	sub := uint64(0)
	if q.extended {
		sub = binary.BigEndian.Uint64(b[i*16+8:])
	}
	if e == 0 && sub == 0 {
		return w, true
	}
	if e&entryCompressed != 0 {
		off, n := qcow2.DecodePacked(e, q.bits)
		w.host, w.packedBytes, w.packed = int64(off), n, true
		return w, e&entryCopied == 0 && sub == 0 && off >= uint64(q.cluster) && off < uint64(q.src.size) &&
			int64(n) <= 2*q.cluster+sector && int64(off)+int64(n) <= q.src.size+sector
	}
	host := e & entryOffset
	w.host = int64(host)
	w.alloc = ^uint32(0)
	if q.extended {
		w.alloc, w.zeros = uint32(sub), uint32(sub>>32)
		if w.alloc&w.zeros != 0 || e&entryZero != 0 || w.alloc != 0 && host == 0 {
			return w, false
		}
		w.zero = w.zeros == ^uint32(0)
	} else {
		w.zero = e&entryZero != 0
		if w.zero && q.version < 3 {
			return w, false
		}
	}
	return w, e&l2Reserved == 0 && host%uint64(q.cluster) == 0 && host < uint64(q.src.size) &&
		(host != 0 || e&entryCopied == 0 && (w.zero || w.zeros != 0))
}

// recognise tells how many clusters the table in b names; 0 when b is none.
// No two entries of a table name the same cluster.
func (q *qcow2Image) recognise(b []byte, host int64, scratch []int64) (int32, []int64) {
	scratch = scratch[:0]
	for i := range q.entries() {
		w, ok := q.decode(b, i)
		if !ok || w.host == host {
			return 0, scratch
		}
		if w.host != 0 {
			scratch = append(scratch, w.host)
		}
	}
	n := len(scratch)
	slices.Sort(scratch)
	if n == 0 || len(slices.Compact(scratch)) != n {
		return 0, scratch
	}
	return int32(n), scratch
}

// qcow2Job is the work on a qcow2 image.
type qcow2Job struct {
	*job
	*qcow2Image
	src    *source // of both
	rep    *Report
	snapL1 []l1Range
	snapAt map[int32]int64 // table -> unit that a snapshot has it at
	tables []l2Table       // sorted by host
	used   bitset          // clusters of the file that hold data and not only zeros
	mapped bitset          // clusters that a table names
	isTab  bitset
	l1like []int64 // clusters that look like a part of an L1 table
	refs2  []tableRef
	buf    []byte
	packed int64 // entries that name compressed clusters
}

// tableRef is an entry of a table that names a cluster with evidence.
type tableRef struct {
	cluster uint32
	table   int32
	entry   int32
}

// findTables looks at every cluster of the file.
func (j *qcow2Job) findTables(ctx context.Context) error {
	j.used, j.mapped, j.isTab = newBitset(j.clusters), newBitset(j.clusters), newBitset(j.clusters)
	j.buf = make([]byte, j.cluster)
	scan := func(add bool) (int, error) {
		count := 0
		var scratch []int64
		err := j.src.each(ctx, "tables", func(b []byte, n int, off int64) error {
			for x := int64(0); x < int64(n); x += j.cluster {
				c := b[x:min(x+j.cluster, int64(len(b)))]
				if backend.IsZero(c) {
					continue
				}
				at := (off + x) >> j.bits
				if add {
					j.used.set(at)
				}
				if int64(len(c)) < j.cluster || j.meta.get(at) {
					continue
				}
				var m int32
				m, scratch = j.recognise(c, off+x, scratch)
				if m == 0 {
					continue
				}
				count++
				if !add {
					continue
				}
				var err error
				if j.tables, err = append1(j.src, j.tables, l2Table{off + x, m}, l2Bytes, "L2 tables"); err != nil {
					return err
				}
			}
			return nil
		})
		return count, err
	}
	if !j.header && j.bits >= 14 {
		// Plain tables seldom look like extended ones, never the reverse.
		plain, err := scan(false)
		if err != nil {
			return err
		}
		j.extended = true
		ext, err := scan(false)
		if err != nil {
			return err
		}
		if j.extended = ext > 4*plain; j.extended {
			j.rep.Geometry["extended-l2"] = "content (inferred)"
		}
	}
	if _, err := scan(true); err != nil {
		return err
	}
	for _, t := range j.tables {
		j.isTab.set(t.host >> j.bits)
	}
	return j.sift(ctx)
}

// targets calls visit for what the table names.
func (j *qcow2Job) targets(t l2Table, visit func(entry int64, w l2Word)) {
	if !j.src.read(j.buf, t.host) {
		return
	}
	for i := range j.entries() {
		if w, ok := j.decode(j.buf, i); ok && w.host != 0 {
			visit(i, w)
		}
	}
}

// sift takes out what only looks like L2 tables: parts of L1 tables, which
// name tables, and tables of images inside the disk, which are data of it.
func (j *qcow2Job) sift(ctx context.Context) error {
	keep := j.tables[:0]
	for _, t := range j.tables {
		n := int32(0)
		j.targets(t, func(_ int64, w l2Word) {
			if !w.packed && j.isTab.get(w.host>>j.bits) {
				n++
			}
		})
		if n*2 >= t.mapped {
			j.l1like = append(j.l1like, t.host)
		} else {
			keep = append(keep, t)
		}
	}
	j.tables = keep
	for _, h := range j.l1like {
		j.isTab[h>>j.bits>>6] &^= 1 << (h >> j.bits & 63)
	}
	named := newBitset(j.clusters)
	for _, t := range j.tables {
		j.targets(t, func(_ int64, w l2Word) {
			if j.isTab.get(w.host >> j.bits) {
				named.set(w.host >> j.bits)
			}
		})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	// What a table that nobody names names is data.
	inner := newBitset(j.clusters)
	for _, t := range j.tables {
		if named.get(t.host >> j.bits) {
			continue
		}
		j.targets(t, func(_ int64, w l2Word) {
			if j.isTab.get(w.host >> j.bits) {
				inner.set(w.host >> j.bits)
			}
		})
	}
	dropped := 0
	j.tables = slices.DeleteFunc(j.tables, func(t l2Table) bool {
		if inner.get(t.host >> j.bits) {
			j.isTab[t.host>>j.bits>>6] &^= 1 << (t.host >> j.bits & 63)
			dropped++
			return true
		}
		return false
	})
	if dropped > 0 {
		j.rep.note("clusters that look like L2 tables are data of the disk: it holds images of its own")
	}
	for _, t := range j.tables {
		j.targets(t, func(_ int64, w l2Word) {
			j.mapped.set(w.host >> j.bits)
			if w.packed {
				j.packed++
				last := min(w.host+int64(w.packedBytes), j.src.size) - 1
				for c := w.host >> j.bits; c <= last>>j.bits; c++ {
					j.mapped.set(c)
				}
			}
		})
	}
	return nil
}

// tableAt is the number of the table at host, or -1.
func (j *qcow2Job) tableAt(host int64) int32 {
	i, ok := slices.BinarySearchFunc(j.tables, host, func(t l2Table, h int64) int {
		switch {
		case t.host < h:
			return -1
		case t.host > h:
			return 1
		}
		return 0
	})
	if !ok {
		return -1
	}
	return int32(i)
}
