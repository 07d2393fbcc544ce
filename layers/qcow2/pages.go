package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync/atomic"

	"github.com/imagestack/imagestack/layers"
)

// maxPageBytes is the largest slice of a table that one page holds. L2 pages
// are of min(cluster size, maxPageBytes), so that a table is a whole number of
// pages; L1 pages are of maxPageBytes, the last one possibly shorter.
const maxPageBytes = 4096

// tablePage is a slice of an L1 or L2 table: its words in host byte order,
// whole, reserved bits included.
//
// Readers use load and pair, without any lock. The editor stores into pages
// that it pinned, with store and setPair, and several goroutines may do so at
// once as long as they store to different entries.
//
// used is false as long as every word is 0, so that a lookup passes an empty
// page in one step. It is set before the first word is stored, and stays.
type tablePage struct {
	seq  atomic.Uint32 // odd while a pair is being stored
	used atomic.Bool
	w    []atomic.Uint64
}

func newTablePage(words int) *tablePage { return &tablePage{w: make([]atomic.Uint64, words)} }

// decodeTablePage is the page with the big-endian words of b.
func decodeTablePage(b []byte) *tablePage {
	p := newTablePage(len(b) / 8)
	for i := range p.w {
		if word := binary.BigEndian.Uint64(b[8*i:]); word != 0 {
			p.store(i, word)
		}
	}
	return p
}

// encode writes the words big-endian to dst, which holds len(p.w)*8 bytes.
// pairs tells that the words are extended entries, which are then written as
// they were stored, both words of one entry together.
func (p *tablePage) encode(dst []byte, pairs bool) {
	for i := 0; i < len(p.w); i++ {
		if pairs {
			d, bits := p.pair(i / 2)
			binary.BigEndian.PutUint64(dst[8*i:], d)
			i++
			binary.BigEndian.PutUint64(dst[8*i:], bits)
			continue
		}
		binary.BigEndian.PutUint64(dst[8*i:], p.w[i].Load())
	}
}

// load and store access one word: an L1 entry or a plain L2 entry.
func (p *tablePage) load(i int) uint64 { return p.w[i].Load() }
func (p *tablePage) store(i int, v uint64) {
	p.use()
	p.w[i].Store(v)
}

func (p *tablePage) use() {
	if !p.used.Load() {
		p.used.Store(true)
	}
}

// pair returns extended entry i: descriptor and subcluster bitmap, as they
// stood together at one moment.
func (p *tablePage) pair(i int) (desc, bits uint64) {
	for {
		seq := p.seq.Load()
		desc, bits = p.w[2*i].Load(), p.w[2*i+1].Load()
		if seq&1 == 0 && p.seq.Load() == seq {
			return desc, bits
		}
		runtime.Gosched()
	}
}

// setPair stores extended entry i.
func (p *tablePage) setPair(i int, desc, bits uint64) {
	p.use()
	for {
		seq := p.seq.Load()
		if seq&1 == 0 && p.seq.CompareAndSwap(seq, seq+1) {
			p.w[2*i].Store(desc)
			p.w[2*i+1].Store(bits)
			p.seq.Store(seq + 2)
			return
		}
		runtime.Gosched()
	}
}

// geometry is what follows from the cluster size and the entry format.
type geometry struct {
	clusterBits uint
	clusterSize int64
	entryBytes  int64 // 8, or 16 with extended L2 entries
	l2Bits      uint  // log2 of the entries of an L2 table
	l2Span      int64 // guest bytes under one L1 entry
	l2PageBytes int64 // bytes of an L2 page
	subBits     uint  // log2 of the subcluster size; clusterBits without extended entries
	extended    bool
	zeroFlag    bool // L2 entries may carry entryZero
	external    bool // guest data lies in an external data file
}

func newGeometry(h *Header) geometry {
	g := geometry{clusterBits: uint(h.ClusterBits), clusterSize: h.ClusterSize(), entryBytes: 8}
	g.l2Bits, g.subBits = g.clusterBits-3, g.clusterBits
	g.zeroFlag, g.external = h.Version >= 3, h.HasDataFile()
	if h.ExtendedL2() {
		g.extended, g.zeroFlag = true, false
		g.entryBytes, g.l2Bits, g.subBits = 16, g.clusterBits-4, g.clusterBits-5
	}
	g.l2Span = 1 << (g.clusterBits + g.l2Bits)
	g.l2PageBytes = min(g.clusterSize, maxPageBytes)
	return g
}

// l1Index is the L1 entry over a guest offset.
func (g *geometry) l1Index(guest int64) int64 { return guest >> (g.clusterBits + g.l2Bits) }

// l2Index is the entry of a guest offset in its L2 table.
func (g *geometry) l2Index(guest int64) int64 {
	return guest >> g.clusterBits & (1<<g.l2Bits - 1)
}

// l2Slot says where in an L2 table the entry with an index lies: the byte
// offset of its page from the start of the table, and its number within the
// page (of entries, not words).
func (g *geometry) l2Slot(index int64) (page int64, i int) {
	off := index * g.entryBytes
	page = off &^ (g.l2PageBytes - 1)
	return page, int((off - page) / g.entryBytes)
}

// l1Page returns the page that holds L1 entries [512*page, 512*page+512), the
// last page as many as there are. Its key in img.l1Pages is page.
func (img *Image) l1Page(page int64) (*tablePage, error) {
	if p := img.l1Pages.Get(page); p != nil {
		return p.Value.(*tablePage), nil
	}
	p, err := img.l1Pages.Load(page, func() (any, int64, error) { return img.readL1Page(page) })
	if err != nil {
		return nil, err
	}
	return p.Value.(*tablePage), nil
}

// pinL1Page is l1Page with the page pinned.
func (img *Image) pinL1Page(page int64) (*layers.Page, *tablePage, error) {
	p, err := img.l1Pages.Pin(page, func() (any, int64, error) { return img.readL1Page(page) })
	if err != nil {
		return nil, nil, err
	}
	return p, p.Value.(*tablePage), nil
}

func (img *Image) readL1Page(page int64) (any, int64, error) {
	off := page * maxPageBytes
	n := img.l1Entries * 8
	if img.l1Off >= img.refreshEnd(img.f) {
		return nil, 0, img.corrupt(img.l1Off, "L1 table", nil, "it lies behind the end of the file")
	}
	return img.readTable(img.l1Off+off, min(n-off, maxPageBytes), img.l1Off+n, "L1 table")
}

// l2Page returns the page of an L2 table that lies at off in the image file,
// which is also its key in img.l2Pages: the table's offset plus what
// geometry.l2Slot says. The caller has validated the table's offset.
func (img *Image) l2Page(off int64) (*tablePage, error) {
	if p := img.l2Pages.Get(off); p != nil {
		return p.Value.(*tablePage), nil
	}
	p, err := img.l2Pages.Load(off, func() (any, int64, error) { return img.readL2Page(off) })
	if err != nil {
		return nil, err
	}
	return p.Value.(*tablePage), nil
}

// pinL2Page is l2Page with the page pinned.
func (img *Image) pinL2Page(off int64) (*layers.Page, *tablePage, error) {
	p, err := img.l2Pages.Pin(off, func() (any, int64, error) { return img.readL2Page(off) })
	if err != nil {
		return nil, nil, err
	}
	return p, p.Value.(*tablePage), nil
}

func (img *Image) readL2Page(off int64) (any, int64, error) {
	img.noteHole(off)
	return img.readTable(off, img.l2PageBytes, off&^(img.clusterSize-1)+img.clusterSize, "L2 table")
}

// readTable loads n bytes of a table that ends at end.
func (img *Image) readTable(off, n, end int64, field string) (any, int64, error) {
	b := make([]byte, n)
	if err := img.readRegion(b, off, end, field); err != nil {
		return nil, 0, err
	}
	return decodeTablePage(b), n, nil
}

// readMeta reads all of b, the whole of a structure or its end.
func (img *Image) readMeta(b []byte, off int64, field string) error {
	return img.readRegion(b, off, off+int64(len(b)), field)
}

// readRegion reads all of b, a part of a structure that ends at end. The last
// cluster of an image need not be stored to its end: as long as less than a
// cluster of the structure is missing it reads as zeros there, which is what
// QEMU does and what its check calls clean. More is damage, which the error
// names with the field.
func (img *Image) readRegion(b []byte, off, end int64, field string) error {
	n, err := img.f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		if end-img.refreshEnd(img.f) < img.clusterSize {
			clear(b[n:])
			return nil
		}
		err = fmt.Errorf("%w: it reaches behind the end of the file", layers.ErrCorrupt)
	}
	return img.errorf(off, field, nil, err)
}
