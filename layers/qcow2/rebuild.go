package qcow2

import (
	"context"

	"github.com/imagestack/imagestack/layers"
)

// maxRebuildBytes bounds the memory in which references are counted.
const maxRebuildBytes = 16 << 20

// rebuild makes the reference counts of an image with the dirty bit right
// (section incompatible_features, bit 0; lazy refcounts leave them behind):
// counts them anew from the metadata, as many clusters at a time as fit into
// memory, then sets the COPIED flags accordingly, makes all that durable and
// clears the bit. Until then the bit is set, so the order of the writes does
// not matter. Space is taken only behind the end of the file, because no count
// can be believed yet.
func (ed *editor) rebuild(ctx context.Context) error {
	img, r := ed.img, ed.ref
	end := r.hwm
	step := min(maxRebuildBytes, max(img.cache.Budget()/4, 64<<10)) / 4
	counts := make([]uint32, min(step, end))
	for first := int64(0); first < end; first += step {
		part := counts[:min(step, end-first)]
		clear(part)
		err := img.WalkHost(ctx, func(h layers.HostRange) error {
			from := max(h.Off>>img.clusterBits, first)
			to := min((h.Off+h.Len)>>img.clusterBits, first+int64(len(part)))
			for c := from; c < to; c++ {
				part[c-first]++
			}
			return nil
		})
		if err != nil {
			return err
		}
		if err := ed.setCounts(ctx, first, part); err != nil {
			return err
		}
	}
	if err := ed.fixCopied(ctx); err != nil {
		return err
	}
	if err := ed.flushCounts(true); err != nil {
		return err
	}
	clean := img.hdr.Incompatible &^ incompatDirty
	if err := putHeader64(img.f, offIncompatible, clean); err != nil {
		return err
	}
	if err := ed.syncFile(img.f); err != nil {
		return err
	}
	img.hdr.Incompatible = clean
	return nil
}

// setCounts corrects the counts of the clusters from first on.
func (ed *editor) setCounts(ctx context.Context, first int64, counts []uint32) error {
	r := ed.ref
	for i, want := range counts {
		c := first + int64(i)
		if c&(1<<r.pageBits-1) == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			// The table in the file stays the old one meanwhile, which is what
			// the walk reads.
			if r.dirtyBytes() > ed.img.cache.PinnedLimit() {
				if err := r.writePages(); err != nil {
					return err
				}
			}
		}
		if err := r.correct(c, uint64(want)); err != nil {
			return err
		}
	}
	return nil
}

// correct sets the count of one cluster, with a new block where none counts it.
func (r *refcounts) correct(c int64, want uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	have, err := r.get(c)
	if err != nil || have == want {
		return err
	}
	k := c >> r.blockBits
	off, err := r.blockOffset(k)
	if err != nil {
		return err
	}
	if off == 0 {
		if err := r.addBlockBehind(k); err != nil {
			return err
		}
	}
	return r.set(c, 1, want)
}

// addBlockBehind adds the refcount block k, whose clusters may be in use, at
// the end of the file. Unlike addBlock it relies on the dirty bit: another
// block may count the new one.
func (r *refcounts) addBlockBehind(k int64) error {
	if k >= int64(len(r.table)) {
		if err := r.growTable(k); err != nil {
			return err
		}
	}
	if r.table[k] != 0 {
		return nil
	}
	if r.hwm>>r.blockBits == k {
		return r.addBlock(k, r.hwm, true)
	}
	run, err := r.grow(1)
	if err == nil {
		r.enterBlock(k, run.first)
	}
	return err
}

// fixCopied makes the COPIED flags of the active map say what the counts say.
func (ed *editor) fixCopied(ctx context.Context) error {
	img := ed.img
	return img.eachL1(ctx, func(i, _ int64, entry uint64) error {
		if entry&^entryCopied == 0 {
			return nil
		}
		table, err := img.checkL1(img.l1Off+i*8, entry)
		if err != nil {
			return err
		}
		single, err := ed.single(table)
		if err != nil {
			return err
		}
		if single != (entry&entryCopied != 0) {
			if err := ed.flipL1(i, entry^entryCopied); err != nil {
				return err
			}
		}
		if img.external {
			return nil
		}
		return img.eachL2(ctx, table, i*img.l2Span, func(guest int64, e *l2Entry) error {
			if e.isPacked || !e.hasHost {
				return nil
			}
			single, err := ed.single(int64(e.host))
			if err != nil || single == e.copied {
				return err
			}
			s := slot{e: *e, table: table}
			s.page, s.i = img.l2Slot(img.l2Index(guest))
			s.page += table
			s.e.copied = single
			if err := ed.store(&s, s.e); err != nil {
				return err
			}
			if ed.pinned > img.cache.PinnedLimit() {
				return ed.flush()
			}
			return nil
		})
	})
}

// single reports whether the cluster at off has exactly one reference.
func (ed *editor) single(off int64) (bool, error) {
	ed.ref.mu.Lock()
	defer ed.ref.mu.Unlock()
	n, err := ed.ref.get(off >> ed.img.clusterBits)
	return n == 1, err
}

// flipL1 stores an L1 entry.
func (ed *editor) flipL1(index int64, entry uint64) error {
	img := ed.img
	at := index / (maxPageBytes / 8)
	page, t, err := img.pinL1Page(at)
	if err != nil {
		return err
	}
	i := int(index % (maxPageBytes / 8))
	ed.pub.RLock()
	t.store(i, entry)
	ed.changed(pageKey{l1: true, at: at}, page, t, i, i+1)
	ed.pub.RUnlock()
	return nil
}
