package fat

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// chunk is how much of a table is read at once: a multiple of the entries of
// all kinds, and more than a FAT12 has.
const chunk = 48 << 10

// table is a file allocation table while it is judged.
type table struct {
	*geometry
	r   io.ReaderAt
	ctx context.Context
	// window is for the links of directories, which are followed one by one.
	window *freespace.Window
	// named has a bit for each cluster that an entry names: 32 MiB at most.
	named []uint64
}

// visit calls f for the entries of all clusters in order, 28 bits of which
// count in FAT32. With compare the copy must be equal.
func (t *table) visit(compare bool, f func(cluster, entry uint32) error) error {
	buf, other := make([]byte, chunk), make([]byte, chunk)
	per := uint32(chunk * 8 / t.bits)
	end := t.clusters + 2
	for first := uint32(0); first < end; first += per {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		n := min(per, end-first)
		at := t.tableStart + int64(first)*int64(t.bits)/8
		b := buf[:(int64(n)*int64(t.bits)+7)/8]
		if err := freespace.ReadAt(t.r, b, at); err != nil {
			return err
		}
		if compare && t.tables == 2 {
			o := other[:len(b)]
			if err := freespace.ReadAt(t.r, o, at+t.tableBytes); err != nil {
				return err
			}
			if !bytes.Equal(b, o) {
				return damaged("the two tables differ near cluster %d: run fsck.fat", first)
			}
		}
		for i := range n {
			if err := f(first+i, t.entry(b, i)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *table) entry(b []byte, i uint32) uint32 {
	le := binary.LittleEndian
	switch t.bits {
	case 12:
		k := i + i/2
		v := uint32(b[k])
		if k+1 < uint32(len(b)) {
			v |= uint32(b[k+1]) << 8
		}
		return v >> (i % 2 * 4) & 0xfff
	case 16:
		return uint32(le.Uint16(b[2*i:]))
	}
	return le.Uint32(b[4*i:]) & 0x0fffffff
}

// check goes through the table once: flags, copies, links.
func (t *table) check() error {
	ones := uint32(1)<<min(t.bits, 28) - 1
	bad, end := ones-8, ones-7 // of the values: a bad cluster, the least that ends a file
	return t.visit(true, func(cluster, e uint32) error {
		switch {
		case cluster == 0:
			if e != ones&^0xff|uint32(t.media) {
				return damaged("the table begins with %#x, media %#x", e, t.media)
			}
			return nil
		case cluster == 1:
			return t.checkFlags(e)
		case cluster == t.rootCluster && (e == 0 || e == bad):
			return damaged("cluster %d of the root directory has the entry %#x", cluster, e)
		case e == 0 || e == bad || e >= end:
			return nil
		case e < 2 || e-2 >= t.clusters:
			return damaged("the entry of cluster %d is %#x, of %d clusters", cluster, e, t.clusters)
		}
		word, bit := &t.named[(e-2)/64], uint64(1)<<((e-2)%64)
		if *word&bit != 0 {
			return damaged("two clusters are followed by cluster %d: run fsck.fat", e)
		}
		*word |= bit
		return nil
	})
}

// checkFlags looks at what Windows keeps in the entry of cluster 1: whether
// the filesystem was unmounted, and whether reading and writing went well.
func (t *table) checkFlags(e uint32) error {
	clean, good := uint32(0), uint32(0)
	switch t.bits {
	case 16:
		clean, good = 0x8000, 0x4000
	case 32:
		clean, good = 0x08000000, 0x04000000
	}
	if e&clean != clean {
		return freespace.Refuse(freespace.NotClean, "fat: not cleanly unmounted: run fsck.fat")
	}
	if e&good != good {
		return freespace.Refuse(freespace.ErrorState, "fat: the filesystem records errors of its disk: run fsck.fat")
	}
	return nil
}

// emit hands over the free clusters, none of which may be part of a file.
func (t *table) emit(emit freespace.Emit) error {
	start, n := uint32(0), uint32(0)
	flush := func() error {
		if n == 0 {
			return nil
		}
		err := emit(t.heap+int64(start-2)*t.cluster, int64(n)*t.cluster)
		n = 0
		return err
	}
	err := t.visit(false, func(cluster, e uint32) error {
		if cluster < 2 || e != 0 {
			return nil
		}
		if t.named[(cluster-2)/64]>>((cluster-2)%64)&1 != 0 {
			return damaged("cluster %d is part of a file and is marked as free", cluster)
		}
		if n > 0 && start+n != cluster {
			if err := flush(); err != nil {
				return err
			}
		}
		if n == 0 {
			start = cluster
		}
		n++
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}
