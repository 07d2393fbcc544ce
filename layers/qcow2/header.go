package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// Magic is the first four bytes of every qcow2 image, "QFI\xfb".
const Magic = 0x514649fb

// Offsets of the header fields (section Header). Whoever changes one field of
// an existing image writes just that field here, never the whole header.
const (
	offMagic                 = 0
	offVersion               = 4
	offBackingOffset         = 8
	offBackingSize           = 16
	offClusterBits           = 20
	offSize                  = 24
	offCryptMethod           = 32
	offL1Size                = 36
	offL1Offset              = 40
	offRefcountTableOffset   = 48
	offRefcountTableClusters = 56
	offNbSnapshots           = 60
	offSnapshotsOffset       = 64
	headerLengthV2           = 72
	offIncompatible          = 72
	offCompatible            = 80
	offAutoclear             = 88
	offRefcountOrder         = 96
	offHeaderLength          = 100
	headerLengthV3           = 104
	offCompressionType       = 104
)

// Incompatible feature bits.
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	incompatKnown       = incompatDirty | incompatCorrupt | incompatDataFile | incompatCompression | incompatExtendedL2
)

// Compatible feature bits.
const compatLazyRefcounts = 1 << 0

// Autoclear feature bits.
const (
	autoclearBitmaps     = 1 << 0
	autoclearRawDataFile = 1 << 1
	autoclearKnown       = autoclearBitmaps | autoclearRawDataFile
)

// Limits: those of the format, and where it has none those of QEMU.
const (
	minClusterBits        = 9
	maxClusterBits        = 21
	minExtendedL2Bits     = 14
	maxRefcountOrder      = 6
	maxL1Bytes            = 32 << 20
	maxRefcountTableBytes = 8 << 20
	maxBackingName        = 1023
)

// CompressionType is how packed clusters are compressed.
type CompressionType uint8

const (
	Deflate CompressionType = 0 // raw deflate; the format calls it zlib
	Zstd    CompressionType = 1
)

func (c CompressionType) String() string {
	switch c {
	case Deflate:
		return "zlib"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("compression type %d", uint8(c))
}

// Header is the header of an image with its extensions. Nothing that it holds
// is lost in a round trip through parseHeader and marshal, whether this
// package knows it or not.
type Header struct {
	Version               uint32 // 2 or 3
	BackingOffset         uint64
	BackingSize           uint32
	ClusterBits           uint32
	Size                  uint64 // bytes of the virtual disk
	CryptMethod           uint32
	L1Size                uint32 // entries
	L1Offset              uint64
	RefcountTableOffset   uint64
	RefcountTableClusters uint32
	NbSnapshots           uint32
	SnapshotsOffset       uint64
	Incompatible          uint64 // 0 in version 2, as the next two
	Compatible            uint64
	Autoclear             uint64
	RefcountOrder         uint32 // 4 in version 2
	HeaderLength          uint32 // 72 in version 2
	Tail                  []byte // bytes [104, HeaderLength) as found: compression type and unknown fields
	Extensions            []Extension
	BackingName           string // the bytes that BackingOffset and BackingSize name
}

// Compression is the compression type field; absent means Deflate.
func (h *Header) Compression() CompressionType {
	if len(h.Tail) > 0 {
		return CompressionType(h.Tail[0])
	}
	return Deflate
}

// Dirty reports that the reference counts may be wrong.
func (h *Header) Dirty() bool { return h.Incompatible&incompatDirty != 0 }

// Corrupt reports that the image may only be read.
func (h *Header) Corrupt() bool { return h.Incompatible&incompatCorrupt != 0 }

// HasDataFile reports that guest data lies in an external data file.
func (h *Header) HasDataFile() bool { return h.Incompatible&incompatDataFile != 0 }

// ExtendedL2 reports that L2 entries carry a subcluster bitmap.
func (h *Header) ExtendedL2() bool { return h.Incompatible&incompatExtendedL2 != 0 }

// LazyRefs reports that reference counts may be updated lazily.
func (h *Header) LazyRefs() bool { return h.Compatible&compatLazyRefcounts != 0 }

// RawDataFile reports that the external data file is a raw image by itself.
func (h *Header) RawDataFile() bool { return h.Autoclear&autoclearRawDataFile != 0 }

// ClusterSize is in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// Probe reports whether head, the first bytes of a file (at least 8), are
// those of a qcow2 image of a version that this package knows.
func Probe(head []byte) bool {
	if len(head) < 8 || binary.BigEndian.Uint32(head[offMagic:]) != Magic {
		return false
	}
	v := binary.BigEndian.Uint32(head[offVersion:])
	return v == 2 || v == 3
}

// parseHeader decodes and validates the header in b, the first cluster of the
// image (or the whole image when that is shorter). Errors are ImageErrors
// without a path; the caller fills that in. Features are not judged here: see
// checkFeatures.
func parseHeader(b []byte) (*Header, error) {
	if len(b) < 8 || binary.BigEndian.Uint32(b[offMagic:]) != Magic {
		var found any
		if len(b) >= 4 {
			found = binary.BigEndian.Uint32(b)
		}
		return nil, fieldError(offMagic, "magic", found, layers.ErrFormat)
	}
	h := &Header{Version: binary.BigEndian.Uint32(b[offVersion:])}
	if h.Version != 2 && h.Version != 3 {
		return nil, fieldError(offVersion, "version", h.Version, fmt.Errorf("%w: version", layers.ErrUnsupported))
	}
	need := headerLengthV2
	if h.Version >= 3 {
		need = headerLengthV3
	}
	if len(b) < need {
		return nil, fieldError(int64(len(b)), "header", len(b), fmt.Errorf("%w: the header is cut off", layers.ErrFormat))
	}
	u32 := binary.BigEndian.Uint32
	u64 := binary.BigEndian.Uint64
	h.BackingOffset = u64(b[offBackingOffset:])
	h.BackingSize = u32(b[offBackingSize:])
	h.ClusterBits = u32(b[offClusterBits:])
	h.Size = u64(b[offSize:])
	h.CryptMethod = u32(b[offCryptMethod:])
	h.L1Size = u32(b[offL1Size:])
	h.L1Offset = u64(b[offL1Offset:])
	h.RefcountTableOffset = u64(b[offRefcountTableOffset:])
	h.RefcountTableClusters = u32(b[offRefcountTableClusters:])
	h.NbSnapshots = u32(b[offNbSnapshots:])
	h.SnapshotsOffset = u64(b[offSnapshotsOffset:])
	h.RefcountOrder = 4
	h.HeaderLength = headerLengthV2
	if h.Version >= 3 {
		h.Incompatible = u64(b[offIncompatible:])
		h.Compatible = u64(b[offCompatible:])
		h.Autoclear = u64(b[offAutoclear:])
		h.RefcountOrder = u32(b[offRefcountOrder:])
		h.HeaderLength = u32(b[offHeaderLength:])
	}
	if h.ClusterBits < minClusterBits || h.ClusterBits > maxClusterBits {
		return nil, fieldError(offClusterBits, "cluster_bits", h.ClusterBits, layers.ErrFormat)
	}
	if cs := h.ClusterSize(); int64(len(b)) > cs {
		b = b[:cs]
	}
	if h.HeaderLength < uint32(need) || h.HeaderLength%8 != 0 || int64(h.HeaderLength) > h.ClusterSize() {
		return nil, fieldError(offHeaderLength, "header_length", h.HeaderLength, layers.ErrFormat)
	}
	if int64(h.HeaderLength) > int64(len(b)) {
		return nil, fieldError(offHeaderLength, "header_length", h.HeaderLength,
			fmt.Errorf("%w: the header is cut off", layers.ErrFormat))
	}
	if h.Version >= 3 && h.HeaderLength > headerLengthV3 {
		h.Tail = append([]byte(nil), b[headerLengthV3:h.HeaderLength]...)
	}
	if err := h.parseBackingName(b); err != nil {
		return nil, err
	}
	return h, h.parseExtensions(b)
}

// marshal returns the header, its extensions and the backing file name as
// they stand at the start of the image. The name goes to BackingOffset when
// that lies behind the extensions, else directly behind them, and
// BackingOffset and BackingSize of h are set to what was written. What does
// not fit into a cluster is an error.
func (h *Header) marshal() ([]byte, error) {
	want := uint32(headerLengthV2)
	if h.Version >= 3 {
		want = uint32(headerLengthV3 + len(h.Tail))
	}
	if h.HeaderLength != want || want%8 != 0 {
		return nil, fieldError(offHeaderLength, "header_length", h.HeaderLength, layers.ErrFormat)
	}
	if len(h.BackingName) > maxBackingName {
		return nil, fieldError(offBackingSize, "backing_file_size", len(h.BackingName), layers.ErrFormat)
	}
	b := make([]byte, min(want, headerLengthV3), 512)
	b = append(b, h.Tail...)
	b = appendExtensions(b, h.Extensions)
	if h.BackingName == "" && h.BackingOffset == 0 {
		h.BackingSize = 0
	} else {
		if h.BackingOffset < uint64(len(b)) {
			h.BackingOffset = uint64(len(b))
		}
		h.BackingSize = uint32(len(h.BackingName))
		if h.BackingOffset > uint64(h.ClusterSize()) {
			return nil, fieldError(offBackingOffset, "backing_file_offset", h.BackingOffset, layers.ErrFormat)
		}
		b = append(b, make([]byte, h.BackingOffset-uint64(len(b)))...)
		b = append(b, h.BackingName...)
	}
	if int64(len(b)) > h.ClusterSize() {
		return nil, fieldError(-1, "header", len(b), fmt.Errorf("%w: header, extensions and backing file name do not fit into a cluster", layers.ErrUnsupported))
	}
	p32 := binary.BigEndian.PutUint32
	p64 := binary.BigEndian.PutUint64
	p32(b[offMagic:], Magic)
	p32(b[offVersion:], h.Version)
	p64(b[offBackingOffset:], h.BackingOffset)
	p32(b[offBackingSize:], h.BackingSize)
	p32(b[offClusterBits:], h.ClusterBits)
	p64(b[offSize:], h.Size)
	p32(b[offCryptMethod:], h.CryptMethod)
	p32(b[offL1Size:], h.L1Size)
	p64(b[offL1Offset:], h.L1Offset)
	p64(b[offRefcountTableOffset:], h.RefcountTableOffset)
	p32(b[offRefcountTableClusters:], h.RefcountTableClusters)
	p32(b[offNbSnapshots:], h.NbSnapshots)
	p64(b[offSnapshotsOffset:], h.SnapshotsOffset)
	if h.Version >= 3 {
		p64(b[offIncompatible:], h.Incompatible)
		p64(b[offCompatible:], h.Compatible)
		p64(b[offAutoclear:], h.Autoclear)
		p32(b[offRefcountOrder:], h.RefcountOrder)
		p32(b[offHeaderLength:], h.HeaderLength)
	}
	return b, nil
}

// putHeader64 writes one field of the header in place. It does not sync.
func putHeader64(f backend.File, off int64, v uint64) error {
	_, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, v), off)
	return err
}

// putTableRef writes the offset of the refcount table and the number of its
// clusters, which stand side by side, in one write. It does not sync.
func putTableRef(f backend.File, table uint64, clusters uint32) error {
	b := binary.BigEndian.AppendUint64(nil, table)
	_, err := f.WriteAt(binary.BigEndian.AppendUint32(b, clusters), offRefcountTableOffset)
	return err
}

// fieldError is an ImageError whose path the caller still has to fill in.
func fieldError(off int64, field string, value any, err error) error {
	return &layers.ImageError{Layer: -1, Offset: off, Field: field, Value: value, Err: err}
}
