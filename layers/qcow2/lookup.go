package qcow2

import (
	"context"
	"math/bits"

	"github.com/imagestack/imagestack/blockmap"
)

// Lookup implements blockmap.Map. It takes no lock and does not allocate as
// long as the table pages it needs are cached. The damage it meets is an
// ErrCorrupt that names the entry.
//
// A Packed extent is always that of one guest cluster. Two neighbouring
// clusters may name the same compressed bytes; to keep them apart PackedLen,
// an upper bound, is one byte longer in clusters of odd number.
func (img *Image) Lookup(ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return nil, err
	}
	t := blockmap.NewTiler(guest, n, dst)
	end := min(guest+n, img.size)
	for !t.Done() {
		pos := t.Next()
		if pos >= end {
			t.Add(blockmap.Extent{Guest: pos, Len: guest + n - pos, Kind: blockmap.Zero})
			break
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := img.lookupL1(&t, pos, end); err != nil {
			return nil, err
		}
	}
	return t.Extents(), nil
}

// lookupL1 tiles on from pos: either the run of empty entries in the L1 page
// of pos, or what one L2 page describes.
func (img *Image) lookupL1(t *blockmap.Tiler, pos, end int64) error {
	index := img.l1Index(pos)
	page := index / (maxPageBytes / 8)
	p, err := img.l1Page(page)
	if err != nil {
		return err
	}
	i := int(index % (maxPageBytes / 8))
	entry := p.load(i)
	if entry&^entryCopied == 0 {
		j := i + 1
		if !p.used.Load() {
			j = len(p.w)
		}
		for j < len(p.w) && p.load(j)&^entryCopied == 0 {
			j++
		}
		stop := end
		// The page's entries may span more than an int64 holds.
		if last := page*(maxPageBytes/8) + int64(j); last <= img.l1Index(end-1) {
			stop = last * img.l2Span
		}
		t.Add(blockmap.Extent{Guest: pos, Len: stop - pos, Kind: blockmap.Unmapped})
		return nil
	}
	table, err := img.checkL1(img.l1Off+index*8, entry)
	if err != nil {
		return err
	}
	if img.inHole(table) {
		stop := end
		if index < img.l1Index(end-1) {
			stop = (index + 1) * img.l2Span
		}
		t.Add(blockmap.Extent{Guest: pos, Len: stop - pos, Kind: blockmap.Unmapped})
		return nil
	}
	return img.lookupL2(t, table, pos, end)
}

// checkL1 validates an L1 entry that is not empty, found at offset at, and
// returns the offset of its L2 table.
func (img *Image) checkL1(at int64, entry uint64) (int64, error) {
	off, bad := img.l1Target(entry)
	switch {
	case bad != "":
	case off < uint64(img.clusterSize):
		bad = "the L2 table lies in the header"
	case img.overlapsL1(off):
		bad = "the L2 table lies in the L1 table"
	case int64(off) >= img.imageEnd.Load() && int64(off) >= img.refreshEnd(img.f):
		bad = "the L2 table lies behind the end of the file"
	}
	if bad != "" {
		return 0, img.corrupt(at, "L1 entry", entry, bad)
	}
	return int64(off), nil
}

// overlapsL1 reports whether the cluster at off is part of the L1 table.
func (img *Image) overlapsL1(off uint64) bool {
	return int64(off) >= img.l1Off && int64(off) < img.l1Off+img.l1Entries*8
}

// lookupL2 tiles what one page of the L2 table at table says from pos on.
func (img *Image) lookupL2(t *blockmap.Tiler, table, pos, end int64) error {
	index := img.l2Index(pos)
	pageOff, i := img.l2Slot(index)
	p, err := img.l2Page(table + pageOff)
	if err != nil {
		return err
	}
	count := int(img.l2PageBytes / img.entryBytes)
	guest := pos &^ (img.clusterSize - 1)
	for ; i < count && pos < end && !t.Done(); i++ {
		var entry, sub uint64
		if img.extended {
			entry, sub = p.pair(i)
		} else {
			entry = p.load(i)
		}
		if entry|sub == 0 {
			j := i + 1
			if !p.used.Load() {
				j = count
			}
			for j < count && p.empty(j, img.extended) {
				j++
			}
			// As above: entries behind end may not be countable in bytes.
			next := end
			if k := int64(j - i); k <= (end-1-guest)>>img.clusterBits {
				next = guest + k<<img.clusterBits
			}
			t.Add(blockmap.Extent{Guest: guest, Len: next - guest, Kind: blockmap.Unmapped})
			i, pos, guest = j-1, next, next
			continue
		}
		e, err := img.checkL2(guest, entry, sub, table+pageOff+int64(i)*img.entryBytes)
		if err != nil {
			return err
		}
		if pos, err = img.tileCluster(t, guest, pos, end, &e); err != nil {
			return err
		}
		guest = pos
	}
	return nil
}

// empty reports whether entry i is all zeros.
func (p *tablePage) empty(i int, extended bool) bool {
	if !extended {
		return p.load(i) == 0
	}
	desc, sub := p.pair(i)
	return desc|sub == 0
}

// checkL2 validates an L2 entry, found at offset at, and decodes it.
func (img *Image) checkL2(guest int64, entry, sub uint64, at int64) (l2Entry, error) {
	e, bad := img.parseL2(guest, entry, sub)
	if bad == "" {
		bad = img.checkPlace(&e)
	}
	if bad != "" {
		field, value := "L2 entry", entry
		if img.extended && entry&entryCompressed == 0 && (e.alloc&e.zero != 0 || e.alloc != 0 && !e.hasHost) {
			at, field, value = at+8, "subcluster bitmap", sub
		}
		return e, img.corrupt(at, field, value, bad)
	}
	return e, nil
}

// checkPlace looks whether the place that an entry names can be: it begins
// inside the file and is not the header nor the L1 table. An image may end
// within its last cluster, so the end of the place is not looked at.
func (img *Image) checkPlace(e *l2Entry) string {
	switch {
	case e.isPacked:
		if int64(e.packed.off) >= img.imageEnd.Load() && int64(e.packed.off) >= img.refreshEnd(img.f) {
			return "the compressed data lies behind the end of the file"
		}
		if e.packed.off < uint64(img.clusterSize) {
			return "the compressed data lies in the header"
		}
	case !e.hasHost:
	case img.external:
		if e.alloc != 0 && int64(e.host) >= img.dataEnd.Load() && int64(e.host) >= img.refreshEnd(img.data) {
			return "the cluster lies behind the end of the external data file"
		}
	case int64(e.host) >= img.dataEnd.Load() && int64(e.host) >= img.refreshEnd(img.data):
		return "the cluster lies behind the end of the file"
	case img.overlapsL1(e.host):
		return "the cluster lies in the L1 table"
	}
	return ""
}

// tileCluster adds the extents of one guest cluster that has a valid entry,
// from pos to its end or to end, and returns where it stopped.
func (img *Image) tileCluster(t *blockmap.Tiler, guest, pos, end int64, e *l2Entry) (int64, error) {
	stop := end
	if img.clusterSize < end-guest {
		stop = guest + img.clusterSize
	}
	if e.isPacked {
		t.Add(blockmap.Extent{
			Guest: guest, Len: stop - guest, Kind: blockmap.Packed,
			Host: int64(e.packed.off), PackedLen: e.packed.len + uint32(guest>>img.clusterBits&1),
		})
		return stop, nil
	}
	for pos < stop {
		// One run of subclusters that are alike.
		i := uint(pos-guest) >> img.subBits
		ext := blockmap.Extent{Guest: pos, Kind: blockmap.Unmapped}
		mask := e.alloc | e.zero
		switch {
		case e.alloc>>i&1 != 0:
			ext.Kind, ext.Host, mask = blockmap.Data, int64(e.host)+pos-guest, ^e.alloc
		case e.zero>>i&1 != 0:
			ext.Kind, mask = blockmap.Zero, ^e.zero
		}
		next := stop
		if run := int64(i) + int64(bits.TrailingZeros32(mask>>i)); run < 1<<(img.clusterBits-img.subBits) {
			next = min(stop, guest+run<<img.subBits)
		}
		ext.Len = next - pos
		if ext.Kind == blockmap.Data {
			img.tileData(t, ext)
		} else {
			t.Add(ext)
		}
		pos = next
	}
	return stop, nil
}

// tileData adds a Data extent. What lies behind the end of the file reads as
// zeros, as every implementation lets it: the last cluster of an image need
// not be stored to its end.
func (img *Image) tileData(t *blockmap.Tiler, e blockmap.Extent) {
	over := e.Host + e.Len - img.dataEnd.Load()
	if over > 0 {
		over = e.Host + e.Len - img.refreshEnd(img.data)
	}
	if over <= 0 {
		t.Add(e)
		return
	}
	zero := blockmap.Extent{Guest: e.Guest, Len: e.Len, Kind: blockmap.Zero}
	if e.Len -= over; e.Len > 0 {
		zero.Guest, zero.Len = e.End(), over
		if !t.Add(e) {
			return
		}
	}
	t.Add(zero)
}
