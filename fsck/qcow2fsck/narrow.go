package qcow2fsck

import (
	"fmt"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// spread moves compressed clusters out of a cluster that has more references
// than a count of the image's width can say. They may share one by the dozen
// (section Compressed Clusters Descriptor); a writer that knows the width does
// not let them. The streams are copied as they are, each to a place of its own,
// so that nothing is lost; as many stay as can be counted.
func (c *check) spread(cluster int64, packed []owner) {
	type moving struct {
		owner
		n uint32 // bytes that the stream needs
	}
	var move []moving
	stay := uint64(0)
	for _, o := range packed {
		switch w := uint64(o.weight); {
		case w <= c.maxCount() && stay <= c.maxCount()-w:
			stay += w
		case w > c.maxCount():
			// The table that names it is shared by more snapshots than that.
		default:
			// What does not decode is left: it is not known how long it is.
			if n, ok := c.needs(o.e.off, o.e.n); ok {
				move = append(move, moving{o, n})
			}
		}
	}
	if len(move) == 0 {
		return
	}
	o := &move[0]
	n, _ := c.cells.get(cluster)
	c.told[cluster] = true
	if !c.report(fsck.Finding{Code: codeRefTooNarrow, Place: fsck.Place{Offset: o.at, Field: fmt.Sprintf("L2 entry of guest offset %#x", o.guest), Value: o.e.entry},
		Guest: c.guest(o.guest, c.cs), Text: fmt.Sprintf("%d references to the cluster at %#x by compressed clusters, %d can be counted", n, cluster<<c.bits, c.maxCount()),
		Fix: full(fmt.Sprintf("copy %d of the compressed clusters to places of their own", len(move)))}) {
		return
	}
	for k := range move {
		if !c.spreadOne(&move[k].owner, move[k].n) {
			return
		}
	}
}

// spreadOne gives one compressed cluster, a stream of n bytes, a place of its
// own.
func (c *check) spreadOne(o *owner, n uint32) bool {
	to, ok := c.alloc((int64(n)+c.cs-1)>>c.bits, o.weight, fPacked)
	if !ok {
		return false
	}
	entry, ok := qcow2.EncodePacked(uint64(to)<<c.bits, n, c.bits)
	if !ok || !c.planned(c.plan.Copy(to<<c.bits, int64(o.e.off), max(min(int64(n), c.size-int64(o.e.off)), 1))) {
		return false
	}
	for at := int64(o.e.off >> c.bits); at <= int64((o.e.off+uint64(o.e.n)-1)>>c.bits); at++ {
		c.sources[at] = true
		c.release(at, o.weight)
	}
	c.spreads[o.at] = true
	return c.put64(fsck.PhaseMap, o.at, entry)
}

// release takes references from a cluster.
func (c *check) release(cluster int64, w uint32) {
	c.cells.update(cluster, func(n uint32, fl uint8) (uint32, uint8) {
		if n <= w {
			return 0, 0
		}
		return n - w, fl
	})
}
