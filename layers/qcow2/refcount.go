package qcow2

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/RoaringBitmap/roaring/v2"
	"github.com/RoaringBitmap/roaring/v2/roaring64"
	"github.com/imagestack/imagestack/layers"
)

// refcounts is the reference counts of the host clusters and the allocator
// that works on them (section Host cluster management).
//
// Design note. The table (at most 8 MiB) is in memory, the blocks are cut into
// pages that live in the layers.Cache. The counts in memory are at every
// moment at least the number of references from the map that is durable and
// from the map that is in memory: they are raised before an entry that refers
// to a cluster is published, and lowered only after the commit that unlinked
// the cluster is durable. Therefore pages may be written at any time: at worst
// a crash leaves a leak.
//
// What has to be ordered is the table: its entries must not name a block
// before the block's content (with its own count in it) is durable, and the
// header must not name a table before the table is. See flush.
//
// All fields are under mu, the allocator lock of package layers' lock order.
type refcounts struct {
	img   *Image
	mu    sync.Mutex
	order uint

	table      []uint64 // refcount table, entries as in the file
	tableOff   int64
	blocks     *roaring64.Bitmap // clusters that hold refcount blocks
	blockBits  uint              // log2 of the clusters that a block counts
	pageBits   uint              // log2 of the clusters that a page counts
	pageBytes  int64
	pages      layers.Owner           // key: cluster >> pageBits; values are *refPage
	dirty      map[int64]*layers.Page // pinned, changed since they were written
	dirtyTable map[int64]struct{}     // sectors (of 512 bytes) of the table that changed
	tableMoved bool                   // the whole table is new; the header names the old one
	oldTables  []hostRun              // tables that were replaced, to free once the header is durable
	newBlocks  bool                   // the table names a block that was never synced
	noTruncate bool                   // the file cannot grow (a block device)
	hwm        int64                  // first cluster behind everything ever used: reads as zeros
	fileEnd    int64                  // bytes; the file is at least that long
	hasFree    *roaring.Bitmap        // pages below scan that have free clusters
	scan       int64                  // pages from here on have not been looked at
	hintPage   int64                  // in this page nothing is free
	hintIndex  int                    // before this entry
}

// refPage is a slice of a refcount block, as in the file.
type refPage struct{ b []byte }

// hostRun is a run of host clusters.
type hostRun struct{ first, n int64 }

// scanBudget is the number of pages of refcounts that one allocation looks at
// for free clusters before it lets the file grow.
const scanBudget = 64

// fullScan is the number of pages that it looks at when the file cannot grow:
// enough for tens of TiB, and an end where a damaged table has none.
const fullScan = 1 << 22

func newRefcounts(img *Image) *refcounts {
	r := &refcounts{
		img:        img,
		order:      uint(img.hdr.RefcountOrder),
		pages:      img.cache.NewOwner(),
		dirty:      make(map[int64]*layers.Page),
		dirtyTable: make(map[int64]struct{}),
		hasFree:    roaring.New(),
		blocks:     roaring64.New(),
		hintPage:   -1,
	}
	r.pageBytes = min(img.clusterSize, maxPageBytes)
	r.blockBits = img.clusterBits + 3 - r.order
	for r.pageBits = 0; int64(1)<<r.pageBits < r.pageBytes<<3>>r.order; r.pageBits++ {
	}
	return r
}

// load reads the refcount table and learns how long the file is.
func (r *refcounts) load() error {
	size, err := r.img.f.Size()
	if err != nil {
		return err
	}
	// An attempt to prepare the image may have moved the table and failed
	// later on: the header in the file counts.
	h, err := readHeader(r.img.f)
	if err != nil {
		return r.img.located(err)
	}
	if err := h.checkTables(&r.img.geometry); err != nil {
		return r.img.located(err)
	}
	r.fileEnd = size
	r.hwm = (size + r.img.clusterSize - 1) >> r.img.clusterBits
	r.tableOff = int64(h.RefcountTableOffset)
	if r.tableOff == 0 || h.RefcountTableClusters == 0 {
		return r.img.corrupt(offRefcountTableOffset, "refcount_table_offset", h.RefcountTableOffset, "there is no refcount table")
	}
	b := make([]byte, int64(h.RefcountTableClusters)<<r.img.clusterBits)
	if err := r.img.readMeta(b, r.tableOff, "refcount table"); err != nil {
		return err
	}
	r.table = make([]uint64, len(b)/8)
	for i := range r.table {
		v := binary.BigEndian.Uint64(b[8*i:])
		r.table[i] = v
		if v != 0 && v&uint64(r.img.clusterSize-1) == 0 && inFile(v, uint64(r.img.clusterSize)) {
			r.blocks.Add(v >> r.img.clusterBits)
		}
	}
	first, err := r.get(0)
	if err != nil {
		return err
	}
	if first == 0 && !h.Dirty() {
		return r.img.corrupt(r.tableOff, "refcount of the header", first, "the cluster is counted as free")
	}
	return nil
}

// blockOffset is where the refcount block with an index lies, 0 when there is
// none.
func (r *refcounts) blockOffset(k int64) (int64, error) {
	if k >= int64(len(r.table)) {
		return 0, nil
	}
	v := r.table[k]
	if v&uint64(r.img.clusterSize-1) != 0 || !inFile(v, uint64(r.img.clusterSize)) {
		return 0, r.img.corrupt(r.tableOff+8*k, "refcount table entry", v, "it is not a cluster offset")
	}
	return int64(v), nil
}

// pageAt returns where page p lies in the file, 0 when its block is missing.
func (r *refcounts) pageAt(p int64) (int64, error) {
	k := p >> (r.blockBits - r.pageBits)
	off, err := r.blockOffset(k)
	if off == 0 || err != nil {
		return 0, err
	}
	return off + (p-k<<(r.blockBits-r.pageBits))*r.pageBytes, nil
}

// page returns page p for reading, nil when its block is missing: all counts
// are zero then. The result is valid as long as mu is held.
func (r *refcounts) page(p int64) (*refPage, error) {
	if c := r.pages.Get(p); c != nil {
		return c.Value.(*refPage), nil
	}
	off, err := r.pageAt(p)
	if off == 0 || err != nil {
		return nil, err
	}
	c, err := r.pages.Load(p, func() (any, int64, error) { return r.readPage(off) })
	if err != nil {
		return nil, err
	}
	return c.Value.(*refPage), nil
}

func (r *refcounts) readPage(off int64) (any, int64, error) {
	b := make([]byte, r.pageBytes)
	if err := r.img.readMeta(b, off, "refcount block"); err != nil {
		return nil, 0, err
	}
	return &refPage{b}, r.pageBytes, nil
}

// change returns page p for changing: pinned until it has been written. Its
// block must exist.
func (r *refcounts) change(p int64) (*refPage, error) {
	if c := r.dirty[p]; c != nil {
		return c.Value.(*refPage), nil
	}
	off, err := r.pageAt(p)
	if err != nil {
		return nil, err
	}
	if off == 0 {
		return nil, r.img.corrupt(r.tableOff, "refcount table", p, "a cluster in use has no refcount block")
	}
	c, err := r.pages.Pin(p, func() (any, int64, error) { return r.readPage(off) })
	if err != nil {
		return nil, err
	}
	r.dirty[p] = c
	return c.Value.(*refPage), nil
}

// get is the reference count of a cluster.
func (r *refcounts) get(cluster int64) (uint64, error) {
	p, err := r.page(cluster >> r.pageBits)
	if p == nil || err != nil {
		return 0, err
	}
	return getRefcount(p.b, r.order, r.inPage(cluster)), nil
}

func (r *refcounts) inPage(cluster int64) int { return int(cluster & (1<<r.pageBits - 1)) }

// set sets the count of a run of clusters whose blocks exist. It changes all
// or, with an error, none.
func (r *refcounts) set(first, n int64, v uint64) error {
	if v > maxRefcount(r.order) {
		return r.overflow(first, v)
	}
	for p := first >> r.pageBits; p <= (first+n-1)>>r.pageBits; p++ {
		if _, err := r.change(p); err != nil {
			return err
		}
	}
	for c := first; c < first+n; c++ {
		p := r.dirty[c>>r.pageBits].Value.(*refPage)
		putRefcount(p.b, r.order, r.inPage(c), v)
	}
	return nil
}

func (r *refcounts) overflow(cluster int64, v uint64) error {
	return r.img.errorf(cluster<<r.img.clusterBits, "reference count", v,
		fmt.Errorf("%w: it does not fit into %d bits", layers.ErrUnsupported, 1<<r.order))
}

// decrement counts one reference less and makes the cluster allocatable when
// none is left. A count of zero is damage that was there before.
func (r *refcounts) decrement(cluster int64) error {
	v, err := r.get(cluster)
	if err != nil {
		return err
	}
	if v == 0 {
		return r.img.corrupt(cluster<<r.img.clusterBits, "reference count", v, "a cluster in use is counted as free")
	}
	if err := r.set(cluster, 1, v-1); err != nil {
		return err
	}
	if v == 1 {
		r.markFree(cluster)
	}
	return nil
}

// markFree remembers that the page of a cluster has something to allocate.
func (r *refcounts) markFree(cluster int64) {
	p := cluster >> r.pageBits
	if p <= 1<<32-1 {
		r.hasFree.Add(uint32(p))
	}
	if p == r.hintPage && r.inPage(cluster) < r.hintIndex {
		r.hintIndex = r.inPage(cluster)
	}
}

// undo takes back an allocation that was never published.
func (r *refcounts) undo(first, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := first; c < first+n; c++ {
		// An error leaves a leak and nothing worse; the error that made us
		// come here is the one to report.
		if r.decrement(c) != nil {
			return
		}
	}
}

// abandon lets go of all pages without writing them.
func (r *refcounts) abandon() {
	for _, c := range r.dirty {
		c.Unpin()
	}
	r.dirty = nil
	r.pages.DropAll()
}
