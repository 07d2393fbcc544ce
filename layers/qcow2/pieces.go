package qcow2

// Pieces of the format for those who read an image without trusting it: the
// checker has a walk of its own and shares only what has one right answer.

// Refcount returns entry i of a refcount block; entries are 1<<order bits
// wide, order 0 to 6 (section Host cluster management).
func Refcount(block []byte, order uint, i int) uint64 { return getRefcount(block, order, i) }

// PutRefcount sets entry i of a refcount block to v, which must fit.
func PutRefcount(block []byte, order uint, i int, v uint64) { putRefcount(block, order, i, v) }

// DecodePacked splits the L2 entry of a compressed cluster: the file offset of
// its first byte, and the length up to the end of its last sector. Reserved
// bits are part of off, which therefore can be anything below 1<<62.
func DecodePacked(entry uint64, clusterBits uint) (off uint64, n uint32) {
	d := decodePacked(entry, clusterBits)
	return d.off, d.len
}

// EncodePacked is the L2 entry for n compressed bytes at off. It reports false
// when the descriptor cannot express them.
func EncodePacked(off uint64, n uint32, clusterBits uint) (uint64, bool) {
	return encodePacked(off, n, clusterBits)
}

// Decompress fills dst, one cluster, from the compressed stream in src; what
// follows the stream is ignored.
func Decompress(c CompressionType, src, dst []byte) error {
	u := unpackers.Get().(*unpacker)
	defer unpackers.Put(u)
	return u.unpack(c, src, dst)
}
