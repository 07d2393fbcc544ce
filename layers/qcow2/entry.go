package qcow2

// Bits of L1 and L2 entries (section Cluster mapping).
const (
	entryCopied     = 1 << 63 // refcount is exactly one
	entryCompressed = 1 << 62 // L2 only
	entryZero       = 1 << 0  // L2 only, version 3 without extended entries
	entryOffset     = 0x00fffffffffffe00
	l1Reserved      = 0x7f00000000000000 | 0x1ff
	l2Reserved      = 0x3f00000000000000 | 0x1fe // entryZero is judged apart
	descriptorBits  = entryCompressed - 1
)

// subclusters is the number of parts an extended L2 entry tells apart.
const subclusters = 32

// allSubclusters is the mask of all of them.
const allSubclusters = 1<<subclusters - 1

// l2Entry is a decoded L2 entry. Entries without a subcluster bitmap are given
// one in which all bits are alike, so that both formats are handled as one.
type l2Entry struct {
	host    uint64     // of the cluster, when hasHost
	packed  packedDesc // when isPacked
	alloc   uint32     // subclusters that read from host
	zero    uint32     // subclusters that read as zeros; disjoint from alloc
	hasHost bool       // a host cluster belongs to the entry, even if nothing is read from it
	isPacked,
	copied bool
}

// mapped reports whether any guest byte of the cluster is stored here.
func (e *l2Entry) mapped() bool { return e.isPacked || e.alloc != 0 }

// l1Target is the offset of the L2 table that an L1 entry names, 0 when it
// names none; bad says what is wrong with the entry.
func (g *geometry) l1Target(entry uint64) (off uint64, bad string) {
	if entry&l1Reserved != 0 {
		return 0, "reserved bits are set"
	}
	off = entry & entryOffset
	if off&uint64(g.clusterSize-1) != 0 {
		return 0, "the L2 table is not on a cluster boundary"
	}
	return off, ""
}

// parseL2 decodes the L2 entry for the guest cluster at guest; bits is the
// second word of an extended entry. bad says what is wrong with the entry in
// itself; whether its place exists is not looked at.
func (g *geometry) parseL2(guest int64, entry, bits uint64) (e l2Entry, bad string) {
	if entry&entryCompressed != 0 {
		return g.parsePacked(entry)
	}
	e.copied = entry&entryCopied != 0
	e.host = entry & entryOffset
	switch {
	case entry&l2Reserved != 0:
		return e, "reserved bits are set"
	case entry&entryZero != 0 && g.extended:
		return e, "bit 0 is set in an extended entry"
	case entry&entryZero != 0 && !g.zeroFlag:
		return e, "the zero flag is set in a version 2 image"
	case e.host&uint64(g.clusterSize-1) != 0:
		return e, "the cluster is not on a cluster boundary"
	}
	e.hasHost = e.host != 0 || e.copied && g.external
	switch {
	case g.extended:
		e.alloc, e.zero = uint32(bits), uint32(bits>>32)
	case entry&entryZero != 0:
		e.zero = allSubclusters
	case e.hasHost:
		e.alloc = allSubclusters
	}
	switch {
	case e.alloc&e.zero != 0:
		return e, "a subcluster is both allocated and zero"
	case e.alloc != 0 && !e.hasHost:
		return e, "subclusters are allocated without a cluster"
	case e.copied && !e.hasHost && e.zero == 0:
		return e, "the COPIED flag is set without a cluster"
	case g.external && e.hasHost && e.host != uint64(guest):
		return e, "the offset in the external data file is not the guest offset"
	}
	return e, ""
}

func (g *geometry) parsePacked(entry uint64) (e l2Entry, bad string) {
	e.isPacked = true
	e.packed = decodePacked(entry, g.clusterBits)
	switch {
	case g.external:
		return e, "a compressed cluster in an image with an external data file"
	case entry&entryCopied != 0:
		return e, "the COPIED flag is set on a compressed cluster"
	case e.packed.off>>56 != 0:
		return e, "reserved bits are set in a compressed cluster descriptor"
	case e.packed.off == 0:
		return e, "a compressed cluster at offset 0"
	}
	return e, ""
}

// encodeStandard is the entry of a cluster at host, which is 0 for none.
func encodeStandard(host uint64, copied, zero bool) uint64 {
	if copied {
		host |= entryCopied
	}
	if zero {
		host |= entryZero
	}
	return host
}

// packedDesc is a decoded compressed cluster descriptor.
type packedDesc struct {
	off uint64 // of the first compressed byte, unaligned
	len uint32 // upper bound in bytes: up to the end of the last sector
}

// decodePacked decodes the compressed cluster descriptor of an L2 entry
// (section Compressed Clusters Descriptor). The sector count is that of the
// sectors behind the one that holds the first byte.
func decodePacked(entry uint64, clusterBits uint) packedDesc {
	x := 62 - (clusterBits - 8)
	off := entry & (1<<x - 1)
	sectors := entry&descriptorBits>>x + 1
	return packedDesc{off: off, len: uint32(sectors*512 - off&511)}
}

// encodePacked is the L2 entry for n compressed bytes at off. It reports
// false when the descriptor cannot express them.
func encodePacked(off uint64, n uint32, clusterBits uint) (uint64, bool) {
	x := 62 - (clusterBits - 8)
	if n == 0 || off == 0 || off >= 1<<min(x, 56) {
		return 0, false
	}
	more := (off+uint64(n)-1)>>9 - off>>9
	if more >= 1<<(62-x) {
		return 0, false
	}
	return entryCompressed | more<<x | off, true
}
