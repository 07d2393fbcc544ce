package scavenge

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// Bits of L1 and L2 entries (QEMU docs/interop/qcow2.txt, Cluster mapping).
const (
	entryCopied     = uint64(1) << 63
	entryCompressed = uint64(1) << 62
	entryZero       = uint64(1)
	entryOffset     = uint64(0x00fffffffffffe00)
	l1Reserved      = uint64(0x7f00000000000000 | 0x1ff)
	l2Reserved      = uint64(0x3f00000000000000 | 0x1fe)
	qcow2MaxL1      = 32 << 20
	qcow2MaxTable   = 8 << 20
)

// qcow2Image is what is known of the damaged image.
type qcow2Image struct {
	src *source
	rep *Report

	header   bool // survives
	version  int
	bits     uint
	cluster  int64
	size     int64 // of the disk; 0 is not known
	extended bool
	packing  qcow2.CompressionType
	l1Off    int64
	l1Size   int64
	rtOff    int64
	rtBytes  int64
	order    uint
	snapOff  int64
	snaps    int64
	backing  string
	backFmt  string
	dirty    bool
	features uint64

	clusters int64  // of the file
	meta     bitset // clusters that hold known metadata
	refs     refcounts
}

func (q *qcow2Image) entryBytes() int64 {
	if q.extended {
		return 16
	}
	return 8
}

// entries is the number of entries of an L2 table.
func (q *qcow2Image) entries() int64 { return q.cluster / q.entryBytes() }

// span is what an L2 table covers, in bytes of the disk.
func (q *qcow2Image) span() int64 { return q.entries() << q.bits }

// geometry reads the header, as far as it can be believed, and asks the flags
// and the content for the rest.
func (q *qcow2Image) geometry(o *Options) error {
	from := q.rep.Geometry
	q.readHeader()
	if q.header {
		from["cluster-size"], from["virtual-size"] = "header", "header"
		if q.features&^0x1f != 0 {
			return fmt.Errorf("%w: incompatible features %#x", layers.ErrUnsupported, q.features)
		}
		if q.features&4 != 0 {
			return fmt.Errorf("%w: the data is in an external data file, at the same offsets as on the disk", layers.ErrUnsupported)
		}
	} else {
		q.rep.note("the header is lost")
		q.version, q.order = 3, 4
	}
	if o.ClusterSize > 0 {
		if !powerOfTwo(o.ClusterSize) || o.ClusterSize < 512 || o.ClusterSize > 2<<20 {
			return fmt.Errorf("%w: clusters of %d bytes", layers.ErrUnsupported, o.ClusterSize)
		}
		q.bits, from["cluster-size"] = uint(bits.TrailingZeros64(uint64(o.ClusterSize))), "flag"
	}
	if o.Size > 0 {
		q.size, from["virtual-size"] = o.Size, "flag"
	}
	if q.bits == 0 {
		if q.bits = q.inferBits(); q.bits == 0 {
			return fmt.Errorf("%w: the header is lost, and nothing tells the cluster size (see --cluster-size)", layers.ErrFormat)
		}
		from["cluster-size"] = "content (inferred)"
	}
	q.cluster = 1 << q.bits
	if !q.header {
		q.findRefcounts()
	}
	q.clusters = (q.src.size + q.cluster - 1) >> q.bits
	if q.clusters >= 1<<32 {
		return fmt.Errorf("%w: %d clusters", ErrMemory, q.clusters)
	}
	if q.size > 0 && (q.size > anySize || (q.size+q.span()-1)/q.span() >= 1<<30) {
		return fmt.Errorf("%w: a disk of %d bytes", layers.ErrUnsupported, q.size)
	}
	if err := q.src.take(4*bitsetBytes(q.clusters), "the clusters of the file"); err != nil {
		return err
	}
	q.meta = newBitset(q.clusters)
	q.mark(0, q.cluster)
	q.mark(q.rtOff, q.rtBytes)
	if q.header {
		q.mark(q.l1Off, q.l1Size*8)
	}
	q.refs.open(q)
	return nil
}

// mark enters a range of known metadata.
func (q *qcow2Image) mark(off, n int64) {
	if off < 0 || n <= 0 || off >= q.src.size {
		return
	}
	for c := off >> q.bits; c <= (min(off+n, q.src.size)-1)>>q.bits; c++ {
		q.meta.set(c)
	}
}

// readHeader takes a header in which nothing is impossible.
func (q *qcow2Image) readHeader() {
	be := binary.BigEndian
	b := make([]byte, 64<<10)
	q.src.read(b, 0)
	if !qcow2.Probe(b) {
		return
	}
	version, cb := be.Uint32(b[4:]), be.Uint32(b[20:])
	size := be.Uint64(b[24:])
	if cb < 9 || cb > 21 || size > uint64(anySize) {
		return
	}
	q.version, q.bits, q.size, q.order = int(version), uint(cb), int64(size), 4
	if be.Uint32(b[32:]) != 0 {
		q.features = 1 << 63 // encrypted: there is no evidence in the content
	}
	headerEnd := int64(72)
	if version >= 3 {
		order, n := be.Uint32(b[96:]), be.Uint32(b[100:])
		if order > 6 || n < 104 || n > 4096 {
			return
		}
		q.order, headerEnd = uint(order), int64(n)
		q.features |= be.Uint64(b[72:])
		q.extended = q.features&16 != 0
		q.dirty = q.features&1 != 0
		if n > 104 {
			q.packing = qcow2.CompressionType(b[104])
		}
	}
	if q.extended && cb < 14 {
		return
	}
	q.cluster = 1 << cb
	q.header = true
	fits := func(off uint64, n int64) bool {
		return off > 0 && off%uint64(q.cluster) == 0 && off < uint64(q.src.size) && n > 0
	}
	if off, n := be.Uint64(b[40:]), int64(be.Uint32(b[36:]))*8; fits(off, n) && n <= qcow2MaxL1 {
		q.l1Off, q.l1Size = int64(off), n/8
	} else {
		q.rep.note("the header names no possible L1 table")
	}
	if off, n := be.Uint64(b[48:]), int64(be.Uint32(b[56:]))<<cb; fits(off, n) && n <= qcow2MaxTable {
		q.rtOff, q.rtBytes = int64(off), n
	}
	if off, n := be.Uint64(b[64:]), int64(be.Uint32(b[60:])); fits(off, n) && n <= 65536 {
		q.snapOff, q.snaps = int64(off), n
	}
	q.readBacking(b, headerEnd)
}

// readBacking takes the name of the backing file and its format.
func (q *qcow2Image) readBacking(b []byte, ext int64) {
	be := binary.BigEndian
	off, n := be.Uint64(b[8:]), be.Uint32(b[16:])
	if off == 0 || n == 0 || n > 1023 || off > uint64(len(b))-uint64(n) {
		return
	}
	q.backing = string(b[off : off+uint64(n)])
	for ext+8 <= int64(off) {
		kind, l := be.Uint32(b[ext:]), int64(be.Uint32(b[ext+4:]))
		if kind == 0 || l > int64(off)-ext-8 {
			break
		}
		if kind == 0xe2792aca {
			q.backFmt = string(b[ext+8 : ext+8+l])
		}
		ext += 8 + (l+7)&^7
	}
}

// inferBits finds the cluster size of an image whose header is lost: every
// tool puts the refcount table into cluster 1, and its first entry names a
// block that counts at least header, table and itself.
func (q *qcow2Image) inferBits() uint {
	found := uint(0)
	for b := uint(9); b <= 21; b++ {
		q.bits, q.cluster = b, 1<<b
		if q.findRefcounts() {
			if found != 0 {
				return 0
			}
			found = b
		}
	}
	q.rtOff, q.rtBytes = 0, 0
	return found
}

// findRefcounts looks for the refcount table where tools put it.
func (q *qcow2Image) findRefcounts() bool {
	var w [8]byte
	if !q.src.read(w[:], q.cluster) {
		return false
	}
	off := binary.BigEndian.Uint64(w[:])
	if off == 0 || off%uint64(q.cluster) != 0 || off >= uint64(q.src.size) || int64(off) < 2*q.cluster {
		return false
	}
	block := make([]byte, q.cluster)
	if !q.src.read(block, int64(off)) {
		return false
	}
	self := int(int64(off) >> q.bits)
	for _, order := range []uint{4, 3, 5, 6, 2, 1, 0} {
		if self >= len(block)*8>>order {
			continue
		}
		one := func(i int) bool { return qcow2.Refcount(block, order, i) == 1 }
		if one(0) && one(1) && one(self) {
			q.order = order
			// The table reaches up to the first cluster that one of its
			// entries names.
			q.rtOff, q.rtBytes = q.cluster, min(int64(off)-q.cluster, qcow2MaxTable)
			return true
		}
	}
	return false
}

// refcounts reads reference counts of a damaged image.
type refcounts struct {
	q       *qcow2Image
	trusted bool
	table   []uint64
	block   []byte
	loaded  int64
	empty   bool // the loaded block is all zeros
}

// open decides whether the counts can be believed: they count what is known.
func (r *refcounts) open(q *qcow2Image) {
	*r = refcounts{q: q, loaded: -1}
	if q.rtOff == 0 || q.dirty {
		if q.dirty {
			q.rep.note("the reference counts are marked as stale and are not used")
		}
		return
	}
	n := min(q.rtBytes, (q.clusters<<q.order>>3/q.cluster+2)*8)
	if q.src.take(n, "the refcount table") != nil {
		return
	}
	b := make([]byte, n)
	if !q.src.read(b, q.rtOff) {
		return
	}
	for i := 0; i+8 <= len(b); i += 8 {
		off := binary.BigEndian.Uint64(b[i:])
		if off%uint64(q.cluster) != 0 || off >= uint64(q.src.size) {
			off = 0
		}
		r.table = append(r.table, off)
		if off != 0 {
			q.mark(int64(off), q.cluster)
		}
	}
	r.block = make([]byte, q.cluster)
	r.trusted = true
	r.trusted = r.count(0) == 1 && r.count(q.rtOff>>q.bits) == 1
	if !r.trusted {
		q.rep.note("the reference counts are damaged and are not used")
	}
}

// counted tells whether the counts around a cluster can be believed: a block
// of them that is all zeros, or missing, was lost, for the file goes on there.
func (r *refcounts) counted(c int64) bool {
	r.count(c)
	return r.loaded == c/(r.q.cluster<<3>>r.q.order) && !r.empty
}

// count is the reference count of a cluster of the file.
func (r *refcounts) count(c int64) uint64 {
	per := r.q.cluster << 3 >> r.q.order
	i := c / per
	if i >= int64(len(r.table)) || r.table[i] == 0 {
		return 0
	}
	if r.loaded != i {
		r.loaded = i
		if !r.q.src.read(r.block, int64(r.table[i])) {
			clear(r.block)
			r.trusted = false
		}
		r.empty = backend.IsZero(r.block)
	}
	return qcow2.Refcount(r.block, r.q.order, int(c%per))
}
