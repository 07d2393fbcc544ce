package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/imagestack/imagestack/layers"
)

func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
func be64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }

// checkFeatures refuses by name what cannot be read or, when writable, not be
// written.
func (h *Header) checkFeatures(writable bool) error {
	if unknown := h.Incompatible &^ incompatKnown; unknown != 0 {
		bit := uint8(bits.TrailingZeros64(unknown))
		name := h.featureName(0, bit)
		if name == "" {
			name = fmt.Sprintf("incompatible feature bit %d", bit)
		}
		return fieldError(offIncompatible, "incompatible_features", h.Incompatible,
			fmt.Errorf("%w: %s", layers.ErrUnsupported, name))
	}
	switch {
	case h.CryptMethod == 1:
		return fieldError(offCryptMethod, "crypt_method", h.CryptMethod, fmt.Errorf("%w: AES encryption", layers.ErrUnsupported))
	case h.CryptMethod == 2:
		return fieldError(offCryptMethod, "crypt_method", h.CryptMethod, fmt.Errorf("%w: LUKS encryption", layers.ErrUnsupported))
	case h.CryptMethod != 0:
		return fieldError(offCryptMethod, "crypt_method", h.CryptMethod, fmt.Errorf("%w: encryption", layers.ErrUnsupported))
	}
	if e := h.extension(extCrypto); e != nil {
		return fieldError(e.Off, "full disk encryption header", nil, fmt.Errorf("%w: encryption", layers.ErrUnsupported))
	}
	if c := h.Compression(); h.Incompatible&incompatCompression != 0 {
		if len(h.Tail) == 0 || c == Deflate {
			return fieldError(offCompressionType, "compression_type", uint8(c),
				fmt.Errorf("%w: the compression type bit is set and the field names none", layers.ErrFormat))
		}
		if c != Zstd {
			return fieldError(offCompressionType, "compression_type", uint8(c), fmt.Errorf("%w: %v", layers.ErrUnsupported, c))
		}
	} else if c != Deflate {
		return fieldError(offCompressionType, "compression_type", uint8(c),
			fmt.Errorf("%w: set without the compression type bit", layers.ErrFormat))
	}
	if h.ExtendedL2() && h.ClusterBits < minExtendedL2Bits {
		return fieldError(offClusterBits, "cluster_bits", h.ClusterBits,
			fmt.Errorf("%w: extended L2 entries need clusters of 16 KiB", layers.ErrFormat))
	}
	if h.RefcountOrder > maxRefcountOrder {
		return fieldError(offRefcountOrder, "refcount_order", h.RefcountOrder, layers.ErrFormat)
	}
	if h.RawDataFile() && h.HasDataFile() && h.BackingOffset != 0 {
		return fieldError(offBackingOffset, "backing_file_offset", h.BackingOffset,
			fmt.Errorf("%w: a raw external data file excludes a backing file", layers.ErrFormat))
	}
	if writable && h.Corrupt() {
		return fieldError(offIncompatible, "incompatible_features", h.Incompatible,
			fmt.Errorf("%w: the corrupt bit is set, the image can only be read", layers.ErrCorrupt))
	}
	return nil
}

// checkTables checks the places and sizes of the tables in the header. That
// they lie inside the file is checked when they are read.
func (h *Header) checkTables(g *geometry) error {
	need, ok := g.l1Need(h.Size)
	switch {
	case !ok:
		return fieldError(offSize, "size", h.Size, fmt.Errorf("%w: too large for its cluster size", layers.ErrFormat))
	case uint64(h.L1Size)*8 > maxL1Bytes:
		return fieldError(offL1Size, "l1_size", h.L1Size, fmt.Errorf("%w: the L1 table is too large", layers.ErrFormat))
	case uint64(h.L1Size) < need:
		return fieldError(offL1Size, "l1_size", h.L1Size, fmt.Errorf("%w: the L1 table is too small for the virtual size", layers.ErrFormat))
	case h.L1Size > 0 && !g.tableAt(h.L1Offset, uint64(h.L1Size)*8):
		return fieldError(offL1Offset, "l1_table_offset", h.L1Offset, layers.ErrFormat)
	case uint64(h.RefcountTableClusters)<<g.clusterBits > maxRefcountTableBytes:
		return fieldError(offRefcountTableClusters, "refcount_table_clusters", h.RefcountTableClusters,
			fmt.Errorf("%w: the refcount table is too large", layers.ErrFormat))
	case !g.tableAt(h.RefcountTableOffset, uint64(h.RefcountTableClusters)<<g.clusterBits):
		return fieldError(offRefcountTableOffset, "refcount_table_offset", h.RefcountTableOffset, layers.ErrFormat)
	case h.NbSnapshots > maxSnapshots:
		return fieldError(offNbSnapshots, "nb_snapshots", h.NbSnapshots, layers.ErrFormat)
	case h.NbSnapshots > 0 && !g.tableAt(h.SnapshotsOffset, 0):
		return fieldError(offSnapshotsOffset, "snapshots_offset", h.SnapshotsOffset, layers.ErrFormat)
	}
	return nil
}

// tableAt reports whether a table of n bytes can stand at off: on a cluster
// boundary and within the range of file offsets.
func (g *geometry) tableAt(off, n uint64) bool {
	return off&uint64(g.clusterSize-1) == 0 && inFile(off, n)
}

// l1Need is the number of L1 entries that a disk of size bytes needs; it
// reports false when no L1 table can be that large.
func (g *geometry) l1Need(size uint64) (uint64, bool) {
	need := size >> (g.clusterBits + g.l2Bits)
	if size&uint64(g.l2Span-1) != 0 {
		need++
	}
	return need, size < 1<<63 && need*8 <= maxL1Bytes
}
