package qcow2

import (
	"context"

	"github.com/imagestack/imagestack/layers"
)

// WalkHost implements layers.Layer. Every range is rounded to the clusters it
// touches, which is what the format counts; a compressed cluster is visited as
// the one, two or three host clusters over which it lies. Clusters in an
// external data file are not visited, and neither are bitmaps that the
// autoclear bit calls inconsistent: nobody may use those again.
//
// Preallocated clusters of zero entries are RoleData. VM state lies behind the
// end of the disk and has guest offsets accordingly. An editor is synced first.
func (img *Image) WalkHost(ctx context.Context, visit func(layers.HostRange) error) error {
	if img.ed != nil {
		if err := img.Sync(ctx); err != nil {
			return err
		}
	}
	return img.walkHost(ctx, img.isStill(), visit)
}

// walkHost is WalkHost for who has synced. still says that nobody writes
// meanwhile.
func (img *Image) walkHost(ctx context.Context, still bool, visit func(layers.HostRange) error) error {
	w := walker{img: img, ctx: ctx, visit: visit, holes: stillHoles{img: img, still: still}}
	h, err := img.header()
	if err != nil {
		return err
	}
	if err := w.clusters(0, 1, layers.RoleHeader); err != nil {
		return err
	}
	if err := w.refcountTable(int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<img.clusterBits); err != nil {
		return err
	}
	if err := w.mapping(int64(h.L1Offset), int64(h.L1Size)); err != nil {
		return err
	}
	if h.NbSnapshots > 0 {
		size, err := img.eachSnapshot(ctx, h, func(s *snapshotEntry) error {
			if err := img.checkSnapshot(s); err != nil {
				return err
			}
			w.snapshot, w.inSnapshot = s.id, true
			return w.mapping(int64(s.l1Off), int64(s.l1Entries))
		})
		if err != nil {
			return err
		}
		w.snapshot, w.inSnapshot = "", false
		if err := w.clusters(int64(h.SnapshotsOffset), size, layers.RoleSnapshotTable); err != nil {
			return err
		}
	}
	if h.bitmapsValid() {
		return w.bitmaps(h)
	}
	return nil
}

// walker is the state of one walk.
type walker struct {
	img        *Image
	ctx        context.Context
	visit      func(layers.HostRange) error
	snapshot   string
	inSnapshot bool
	holes      stillHoles
	buf        [maxPageBytes]byte
}

// clusters visits the clusters that [off, off+n) touches.
func (w *walker) clusters(off, n int64, role layers.Role) error {
	return w.guest(off, n, role, -1)
}

func (w *walker) guest(off, n int64, role layers.Role, guest int64) error {
	if n == 0 {
		return nil
	}
	mask := w.img.clusterSize - 1
	start := off &^ mask
	r := layers.HostRange{Off: start, Len: (off+n+mask)&^mask - start, Role: role, Guest: guest, Snapshot: w.snapshot}
	if w.inSnapshot {
		r.Guest = -1
	}
	return w.visit(r)
}

// words reads a table of n bytes at off in pieces and calls do for every word
// that is not 0, with its number and its place.
func (w *walker) words(off, n int64, field string, do func(i, at int64, word uint64) error) error {
	for pos := int64(0); pos < n; {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		// A long table may be a hole, and there may be many of these.
		if n-pos >= int64(len(w.buf)) && w.holes.in(off+pos, int64(len(w.buf))) {
			pos += (min(w.holes.end(off+pos), off+n) - off - pos) &^ 7
			continue
		}
		b := w.buf[:min(n-pos, int64(len(w.buf)))]
		if err := w.img.readRegion(b, off+pos, off+n, field); err != nil {
			return err
		}
		// do may come back here and use the same buffer.
		p := decodeTablePage(b)
		if !p.used.Load() {
			pos += int64(len(b))
			continue
		}
		for i := range p.w {
			if word := p.load(i); word != 0 {
				at := pos + int64(i)*8
				if err := do(at/8, off+at, word); err != nil {
					return err
				}
			}
		}
		pos += int64(len(b))
	}
	return nil
}

// refcountTable visits the refcount table and the blocks it names.
func (w *walker) refcountTable(off, n int64) error {
	if err := w.clusters(off, n, layers.RoleRefcountTable); err != nil {
		return err
	}
	img := w.img
	end := img.refreshEnd(img.f)
	return w.words(off, n, "refcount table", func(_, at int64, entry uint64) error {
		switch {
		case entry&0x1ff != 0:
			return img.corrupt(at, "refcount table entry", entry, "reserved bits are set")
		case entry&uint64(img.clusterSize-1) != 0:
			return img.corrupt(at, "refcount table entry", entry, "the refcount block is not on a cluster boundary")
		case !inFile(entry, uint64(img.clusterSize)) || int64(entry) >= end && int64(entry) >= img.refreshEnd(img.f):
			return img.corrupt(at, "refcount table entry", entry, "the refcount block lies behind the end of the file")
		}
		return w.clusters(int64(entry), img.clusterSize, layers.RoleRefcountBlock)
	})
}

// mapping visits an L1 table and all that hangs below it.
func (w *walker) mapping(off, entries int64) error {
	img := w.img
	role := layers.RoleMap
	if w.inSnapshot {
		role = layers.RoleSnapshotMap
	}
	if err := w.clusters(off, entries*8, role); err != nil {
		return err
	}
	tables := tableCount{img: img}
	l1 := func(i, at int64, entry uint64) error {
		if entry&^entryCopied == 0 {
			return nil
		}
		table, err := tables.next(at, entry)
		if err != nil {
			return err
		}
		if err := w.clusters(table, img.clusterSize, role); err != nil {
			return err
		}
		if w.holes.in(table, img.clusterSize) {
			return nil
		}
		return img.eachL2(w.ctx, table, i*img.l2Span, func(guest int64, e *l2Entry) error { return w.entry(guest, e) })
	}
	if off != img.l1Off {
		return w.words(off, entries*8, "L1 table", l1)
	}
	// The table that Lookup uses is read through its pages, in which an
	// editor's changes stand first.
	return img.eachL1(w.ctx, l1)
}

// entry visits what one L2 entry names.
func (w *walker) entry(guest int64, e *l2Entry) error {
	switch {
	case e.isPacked:
		// The end of the file may cut off the last sector.
		return w.guest(int64(e.packed.off), int64(e.packed.len), layers.RolePacked, guest)
	case e.hasHost && !w.img.external:
		return w.guest(int64(e.host), w.img.clusterSize, layers.RoleData, guest)
	}
	return nil
}

// bitmaps visits the bitmap directory, the tables it names and their clusters.
func (w *walker) bitmaps(h *Header) error {
	img := w.img
	off, size, _, err := img.bitmapDir(h)
	if err != nil {
		return err
	}
	if err := w.clusters(off, size, layers.RoleBitmap); err != nil {
		return err
	}
	return img.eachBitmap(w.ctx, h, func(b *bitmapEntry) error {
		n := int64(b.tableEntries) * 8
		if err := w.clusters(int64(b.tableOff), n, layers.RoleBitmap); err != nil {
			return err
		}
		return w.words(int64(b.tableOff), n, "bitmap table", func(_, at int64, entry uint64) error {
			host := entry & entryOffset
			switch {
			case entry&^(entryOffset|1) != 0 || host != 0 && entry&1 != 0:
				return img.corrupt(at, "bitmap table entry", entry, "reserved bits are set")
			case host == 0:
				return nil
			case host&uint64(img.clusterSize-1) != 0:
				return img.corrupt(at, "bitmap table entry", entry, "the cluster is not on a cluster boundary")
			case int64(host) >= img.refreshEnd(img.f):
				return img.corrupt(at, "bitmap table entry", entry, "the cluster lies behind the end of the file")
			}
			return w.clusters(int64(host), img.clusterSize, layers.RoleBitmap)
		})
	})
}

// tableCount notices an L1 table that names more L2 tables than the file has
// clusters, before a walk through a small file takes days.
type tableCount struct {
	img *Image
	n   int64
}

// next is Image.checkL1 for one more entry.
func (c *tableCount) next(at int64, entry uint64) (int64, error) {
	if c.n++; c.n > c.img.imageEnd.Load()>>c.img.clusterBits+1 && c.n > c.img.refreshEnd(c.img.f)>>c.img.clusterBits+1 {
		return 0, c.img.corrupt(at, "L1 entry", entry, "the L1 table names more L2 tables than the file has clusters")
	}
	return c.img.checkL1(at, entry)
}

// eachL1 calls do for every entry of the L1 table in use that is not 0.
func (img *Image) eachL1(ctx context.Context, do func(i, at int64, entry uint64) error) error {
	const perPage = maxPageBytes / 8
	for page := int64(0); page*perPage < img.l1Entries; page++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		p, err := img.l1Page(page)
		if err != nil {
			return err
		}
		if !p.used.Load() {
			continue
		}
		for i := range p.w {
			if entry := p.load(i); entry != 0 {
				n := page*perPage + int64(i)
				if err := do(n, img.l1Off+n*8, entry); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// eachL2 calls do for every entry of an L2 table that says anything. first is
// the guest offset of its first entry. e is valid during the call.
func (img *Image) eachL2(ctx context.Context, table, first int64, do func(guest int64, e *l2Entry) error) error {
	if img.inHole(table) {
		return nil
	}
	perPage := img.l2PageBytes / img.entryBytes
	for index := int64(0); index < 1<<img.l2Bits; index += perPage {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := table + index*img.entryBytes
		p, err := img.l2Page(off)
		if err != nil {
			return err
		}
		if !p.used.Load() {
			continue
		}
		for i := range int(perPage) {
			var entry, sub uint64
			if img.extended {
				entry, sub = p.pair(i)
			} else {
				entry = p.load(i)
			}
			if entry|sub == 0 {
				continue
			}
			guest := first + (index+int64(i))<<img.clusterBits
			e, err := img.checkL2(guest, entry, sub, off+int64(i)*img.entryBytes)
			if err != nil {
				return err
			}
			if err := do(guest, &e); err != nil {
				return err
			}
		}
	}
	return nil
}
