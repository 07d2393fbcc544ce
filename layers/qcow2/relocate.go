package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/RoaringBitmap/roaring/v2/roaring64"
	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// Relocation: moving what an image holds within its file.
//
// Design note. It stands on the write side, but works on the tables in the
// file rather than on cached pages: it has the image for itself, everything
// was synced before, and the pages are dropped afterwards. Reference counts
// are those of the allocator (refcounts), so its rule holds here, too: counts
// are raised before anything refers to a cluster and lowered after the commit
// that unlinked it.
//
// Moving n clusters is: count the new places as the old ones are, copy, sync;
// change the words that name them, sync; count the old places as free. Between
// the two syncs any subset of the words may name the new place, so both places
// have their full count then: leaks at worst, also when snapshots share the
// cluster. The COPIED flag moves along with the word.
//
// The order of a pass (relocate_pass.go) is: tables of several clusters (L1,
// snapshot table, bitmap directory and tables, refcount table), then L2 tables,
// bits of bitmaps and refcount blocks, then guest data. So the words of each
// step stand still while it runs.
//
// Compressed clusters are moved stream by stream, because a host cluster holds
// many and the cluster boundary may cut one (relocate_packed.go).

var _ layers.Relocator = (*Image)(nil)

// HostUnit implements layers.HostSpace.
func (img *Image) HostUnit() int64 { return img.clusterSize }

// CanZero implements layers.Relocator: version 3 has zero clusters.
func (img *Image) CanZero() bool { return img.zeroFlag || img.extended }

// BeginRelocation implements layers.Relocator.
func (img *Image) BeginRelocation(ctx context.Context, step func(done, total int64)) error {
	ed := img.ed
	if ed == nil {
		return img.errorf(-1, "", nil, layers.ErrReadOnly)
	}
	if err := ed.failed(); err != nil {
		return err
	}
	if err := img.Sync(ctx); err != nil {
		return err
	}
	if _, err := img.countedHeader(); err != nil {
		return err
	}
	if !ed.started.Load() {
		if err := ed.ref.load(); err != nil {
			return err
		}
	}
	census, err := ed.takeCensus(ctx, step)
	if err != nil {
		if !ed.started.Load() { // as a failed prepare
			ed.ref.abandon()
			ed.ref = newRefcounts(img)
		}
		return err
	}
	ed.relocating, ed.census = true, census
	return ed.prepare(ctx)
}

// countedHeader is the header of an image whose counts may be believed.
func (img *Image) countedHeader() (*Header, error) {
	h, err := img.header()
	switch {
	case err != nil:
		return nil, err
	case h.Dirty():
		return nil, img.corrupt(offIncompatible, "incompatible_features", h.Incompatible, "the dirty bit is set, the reference counts may be wrong")
	case h.Corrupt():
		return nil, img.corrupt(offIncompatible, "incompatible_features", h.Incompatible, "the corrupt bit is set")
	}
	return h, nil
}

// relocator is the editor of an image for which BeginRelocation was called.
func (img *Image) relocator(ctx context.Context) (*editor, error) {
	ed := img.ed
	if ed == nil {
		return nil, img.errorf(-1, "", nil, layers.ErrReadOnly)
	}
	if !ed.relocating {
		return nil, img.errorf(-1, "", nil, fmt.Errorf("%w: relocation of an image that was not checked", layers.ErrUnsupported))
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return ed, ed.failed()
}

// quiesce writes and syncs everything, so that the file is what the editor
// knows.
func (ed *editor) quiesce(ctx context.Context) error {
	if err := ed.img.Sync(ctx); err != nil {
		return err
	}
	if ed.ref.dirtyBytes() == 0 && !ed.unsynced {
		return nil
	}
	return ed.syncCounts()
}

// syncCounts makes the reference counts durable.
func (ed *editor) syncCounts() error {
	if err := ed.ref.writePages(); err != nil {
		return err
	}
	if err := ed.syncFile(ed.img.f); err != nil {
		return err
	}
	ed.unsynced = false
	return nil
}

// Unmap implements layers.Relocator.
func (img *Image) Unmap(ctx context.Context, off, n int64) error {
	ed, err := img.relocator(ctx)
	if err != nil {
		return err
	}
	if _, err := img.usable(ctx, off, n); err != nil {
		return err
	}
	if img.external && img.hdr.RawDataFile() {
		return img.errorf(-1, "", nil, fmt.Errorf("%w: unmapping parts of a raw external data file", layers.ErrUnsupported))
	}
	mask := img.clusterSize - 1
	end := off + n
	if end != img.size {
		end &^= mask
	}
	for off = (off + mask) &^ mask; off < end; off += img.clusterSize {
		if err := ed.unmapCluster(off); err != nil {
			return err
		}
		if err := ed.relieve(ctx); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

func (ed *editor) unmapCluster(guest int64) error {
	defer ed.stripes.Lock(guest >> ed.img.clusterBits).Unlock()
	s, err := ed.look(guest)
	if err != nil || s.e.zero == 0 && !s.e.hasHost && !s.e.isPacked {
		return err
	}
	if s, err = ed.ownTable(guest); err != nil {
		return err
	}
	return ed.store(&s, l2Entry{}, ed.old(guest, &s.e, true))
}

// Own implements layers.HostSpace: a cluster is exclusive when both its L1 and
// its L2 entry carry COPIED. Of a compressed cluster only the first is known.
func (img *Image) Own(ctx context.Context, off, n int64, visit func(blockmap.Extent) error) error {
	if err := blockmap.CheckRange(off, n); err != nil {
		return err
	}
	j := joiner{visit: visit}
	first := off &^ (img.clusterSize - 1)
	end := min(off+n, img.size)
	for guest := first; guest < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		next, err := img.ownRun(ctx, &j, guest, end)
		if err != nil {
			return err
		}
		guest = next
	}
	return j.flush()
}

// ownRun visits what one L2 table says from guest on, or passes over the empty
// L1 entries there, and returns how far it came.
func (img *Image) ownRun(ctx context.Context, j *joiner, guest, end int64) (int64, error) {
	const perPage = maxPageBytes / 8
	index := img.l1Index(guest)
	p, err := img.l1Page(index / perPage)
	if err != nil {
		return 0, err
	}
	i := int(index % perPage)
	entry := p.load(i)
	if entry&entryCopied == 0 {
		for i++; i < len(p.w) && p.load(i)&entryCopied == 0; i++ {
		}
		if last := index/perPage*perPage + int64(i); last <= img.l1Index(end-1) {
			return last * img.l2Span, nil
		}
		return end, nil
	}
	table, err := img.checkL1(img.l1Off+index*8, entry)
	if err != nil {
		return 0, err
	}
	start := index * img.l2Span
	err = img.eachL2(ctx, table, start, func(g int64, e *l2Entry) error {
		if g < guest || g >= end {
			return nil
		}
		x := blockmap.Extent{Guest: g, Len: min(img.clusterSize, img.size-g)}
		switch {
		case e.isPacked:
			x.Kind, x.Host, x.PackedLen = blockmap.Packed, int64(e.packed.off), e.packed.len
		case !e.hasHost || !e.copied && !img.external:
			return nil
		case e.alloc == 0:
			x.Kind = blockmap.Zero
			if e.zero != allSubclusters {
				x.Kind = blockmap.Unmapped
			}
		case e.alloc != allSubclusters:
			x.Kind = blockmap.Unmapped
		default:
			x.Kind, x.Host = blockmap.Data, int64(e.host)
			if img.external && img.hdr.RawDataFile() && img.isHole(x.Host, x.Len) {
				return nil // it stays mapped, and has no space to give back
			}
		}
		return j.add(x)
	})
	if end-start <= img.l2Span {
		return end, err
	}
	return start + img.l2Span, err
}

// isHole reports whether a range of the data file takes no space.
func (img *Image) isHole(off, n int64) bool {
	data, err := img.data.SeekData(off)
	return errors.Is(err, io.EOF) || err == nil && data >= off+n
}

// joiner joins neighbouring extents.
type joiner struct {
	visit func(blockmap.Extent) error
	last  blockmap.Extent
}

func (j *joiner) add(x blockmap.Extent) error {
	l := &j.last
	if l.Len > 0 && l.Kind == x.Kind && l.End() == x.Guest &&
		(x.Kind == blockmap.Zero || x.Kind == blockmap.Data && l.Host+l.Len == x.Host) {
		l.Len += x.Len
		return nil
	}
	err := j.flush()
	j.last = x
	return err
}

func (j *joiner) flush() error {
	x := j.last
	j.last.Len = 0
	if x.Len == 0 {
		return nil
	}
	return j.visit(x)
}

// Counted implements layers.HostSpace: the clusters with a reference count.
func (img *Image) Counted(ctx context.Context, visit func(off, n int64) error) error {
	if img.ed != nil && img.ed.started.Load() {
		if err := img.ed.quiesce(ctx); err != nil {
			return err
		}
	}
	h, err := img.countedHeader()
	if err != nil {
		return err
	}
	order := uint(h.RefcountOrder)
	perBlock := img.clusterSize << 3 >> order
	pageBytes := min(img.clusterSize, maxPageBytes)
	perPage := pageBytes << 3 >> order
	block := make([]byte, img.clusterSize)
	var parts []int64 // of the block that count anything, in pages
	var hole fileHole // counts nothing
	var run hostRun
	seen := roaring64.New() // blocks
	w := walker{img: img, ctx: ctx, holes: stillHoles{img: img, still: img.isStill()}}
	err = w.words(int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<img.clusterBits, "refcount table", func(k, at int64, entry uint64) error {
		if entry&uint64(img.clusterSize-1) != 0 || !inFile(entry, uint64(img.clusterSize)) {
			return img.corrupt(at, "refcount table entry", entry, "it is not a cluster offset")
		}
		// A small file could name one block a million times, and have all that
		// it counts gone through each time.
		if !seen.CheckedAdd(entry >> img.clusterBits) {
			return img.corrupt(at, "refcount table entry", entry, "another entry names the same block")
		}
		if hole.has(int64(entry), img.clusterSize) {
			return nil
		}
		if err := img.readMeta(block, int64(entry), "refcount block"); err != nil {
			return err
		}
		parts = parts[:0]
		for p := int64(0); p*pageBytes < img.clusterSize; p++ {
			if !backend.IsZero(block[p*pageBytes : (p+1)*pageBytes]) {
				parts = append(parts, p)
			}
		}
		if len(parts) == 0 {
			hole = img.holeAt(int64(entry), hole)
			return nil
		}
		for _, p := range parts {
			for i := p * perPage; i < (p+1)*perPage; i++ {
				if getRefcount(block, order, int(i)) == 0 {
					continue
				}
				c := k*perBlock + i
				if c > math.MaxInt64>>img.clusterBits-1 {
					return img.corrupt(at, "refcount table entry", entry, "clusters are counted that no file has")
				}
				if run.first+run.n != c {
					if run.n > 0 {
						if err := visit(run.first<<img.clusterBits, run.n<<img.clusterBits); err != nil {
							return err
						}
					}
					run = hostRun{first: c}
				}
				run.n++
			}
		}
		return nil
	})
	if err == nil && run.n > 0 {
		err = visit(run.first<<img.clusterBits, run.n<<img.clusterBits)
	}
	return err
}
