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
	if n == 0 || off >= 1<<min(x, 56) {
		return 0, false
	}
	more := (off+uint64(n)-1)>>9 - off>>9
	if more >= 1<<(62-x) {
		return 0, false
	}
	return entryCompressed | more<<x | off, true
}
