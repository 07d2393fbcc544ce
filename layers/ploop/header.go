package ploop

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"

	"github.com/imagestack/imagestack/layers"
)

// Sizes and limits of the format. All offsets below are bytes from the start
// of the file unless a name says sectors or clusters.
const (
	headerSize = 64  // the header; the BAT follows without a gap
	sectorSize = 512 // the format's unit

	// MinCluster and MaxCluster bound the cluster size of images that are
	// written: what ploop and its kernel driver accept.
	MinCluster = 32 << 10
	MaxCluster = 64 << 20
	// DefaultCluster is what ploop uses when not told otherwise.
	DefaultCluster = 1 << 20
	// MaxSize is the largest virtual disk that ploop creates: 50 TiB.
	MaxSize = 50 << 40
	// maxSizeV1 is what the 32-bit sector count of version 1 can say.
	maxSizeV1 = math.MaxUint32 * sectorSize
)

// Field offsets of struct ploop_pvd_header (OpenVZ include/ploop1_image.h;
// QEMU docs/interop/parallels.txt), all little-endian.
const (
	offSig        = 0  // [16] signature, tells the version
	offType       = 16 // u32, always 2
	offHeads      = 20 // u32 geometry, not used for I/O
	offCylinders  = 24 // u32 geometry, not used for I/O
	offSectors    = 28 // u32 cluster size in sectors
	offBATEntries = 32 // u32 m_Size: BAT entries
	offSize       = 36 // u64 m_SizeInSectors; version 1: its low u32
	offInUse      = 44 // u32 m_DiskInUse
	offFirstBlock = 48 // u32 m_FirstBlockOffset in sectors
	offFlags      = 52 // u32 m_Flags
	offExtension  = 56 // u64 m_FormatExtensionOffset in sectors, 0 is none
)

const (
	sigV1 = "WithoutFreeSpace"
	sigV2 = "WithouFreSpacExt"

	diskType = 2

	inUseOpen   = 0x746f6e59 // open for writing, or crashed
	inUseClosed = 0
	inUseV21    = 0x312e3276 // closed by software that keeps the extension up to date

	flagEmpty      = 1 // CIF_Empty: nothing allocated yet
	flagConverting = 2 // CIF_FmtVersionConvert: BAT is being rewritten
)

// header is the decoded header. raw keeps every byte, so that fields which
// are not understood survive.
type header struct {
	raw       [headerSize]byte
	version   int   // 1 or 2
	cluster   int64 // bytes
	entries   int64 // BAT entries
	size      int64 // bytes of the virtual disk
	firstData int64 // first byte that a cluster may occupy
	// extensionRead is the extension that raw names, in bytes.
	extensionRead int64
	headerState
}

// headerState is the part of the header that changes during an image's life.
type headerState struct {
	inUse     uint32
	flags     uint32
	extension int64 // offset of the format extension in bytes, 0 for none
}

// batEnd is the first byte behind the BAT.
func (h *header) batEnd() int64 { return headerSize + 4*h.entries }

// shift is log2 of the cluster size.
func (h *header) shift() uint { return uint(bits.TrailingZeros64(uint64(h.cluster))) }

// clusters is the number of clusters that the disk has (the last one may be
// partial); entries is at least that.
func (h *header) clusters() int64 { return (h.size + h.cluster - 1) / h.cluster }

// Probe reports whether head, the first bytes of a file, begins with one of
// the two signatures.
func Probe(head []byte) bool {
	return bytes.HasPrefix(head, []byte(sigV1)) || bytes.HasPrefix(head, []byte(sigV2))
}

// parseHeader decodes and validates the header in b, which holds at least
// headerSize bytes. Nothing that is wrong but readable is refused because of
// the mode: the caller decides about in-use images.
func parseHeader(b []byte, path string) (*header, error) {
	le := binary.LittleEndian
	bad := func(off int64, field string, value any, class error, why string) error {
		return &layers.ImageError{Path: path, Layer: -1, Offset: off, Field: field, Value: value,
			Err: fmt.Errorf("%w: %s", class, why)}
	}
	if len(b) < headerSize {
		return nil, bad(0, "header", int64(len(b)), layers.ErrFormat, "file is shorter than a ploop header (64 bytes)")
	}
	h := &header{raw: [headerSize]byte(b[:headerSize])}
	switch string(b[offSig : offSig+16]) {
	case sigV1:
		h.version = 1
	case sigV2:
		h.version = 2
	default:
		return nil, bad(offSig, "m_Sig", string(b[offSig:offSig+16]), layers.ErrFormat, "not a ploop signature")
	}
	if t := le.Uint32(b[offType:]); t != diskType {
		return nil, bad(offType, "m_Type", t, layers.ErrFormat, "must be 2")
	}
	spc := le.Uint32(b[offSectors:])
	h.cluster = int64(spc) * sectorSize
	switch {
	case spc == 0:
		return nil, bad(offSectors, "m_Sectors", spc, layers.ErrFormat, "cluster size is zero")
	case spc&(spc-1) != 0:
		return nil, bad(offSectors, "m_Sectors", spc, layers.ErrUnsupported, "cluster size is not a power of two")
	case h.cluster > MaxCluster:
		return nil, bad(offSectors, "m_Sectors", spc, layers.ErrUnsupported, "cluster size is above 64 MiB")
	}
	sectors := le.Uint64(b[offSize:])
	if h.version == 1 {
		// Only the low half belongs to the field in version 1; every other
		// reader ignores the high half, old images have garbage there.
		sectors &= math.MaxUint32
	}
	// A BAT of 2^32 entries of the largest cluster ends at 2^58 bytes, so a
	// size that passes the second check below cannot overflow.
	if sectors > math.MaxInt64/sectorSize/2 {
		return nil, bad(offSize, "m_SizeInSectors", sectors, layers.ErrFormat, "disk size overflows")
	}
	h.size = int64(sectors) * sectorSize
	h.entries = int64(le.Uint32(b[offBATEntries:]))
	if h.entries < h.clusters() {
		return nil, bad(offBATEntries, "m_Size", uint32(h.entries), layers.ErrFormat,
			fmt.Sprintf("a disk of %d bytes needs %d BAT entries", h.size, h.clusters()))
	}
	h.inUse = le.Uint32(b[offInUse:])
	first := le.Uint32(b[offFirstBlock:])
	h.firstData = int64(first) * sectorSize
	switch {
	case h.firstData%h.cluster != 0:
		return nil, bad(offFirstBlock, "m_FirstBlockOffset", first, layers.ErrCorrupt, "is not a multiple of the cluster size")
	case h.firstData < h.batEnd():
		return nil, bad(offFirstBlock, "m_FirstBlockOffset", first, layers.ErrCorrupt,
			fmt.Sprintf("data would begin inside the BAT, which ends at byte %d", h.batEnd()))
	}
	h.flags = le.Uint32(b[offFlags:])
	if h.flags&flagConverting != 0 {
		return nil, bad(offFlags, "m_Flags", h.flags, layers.ErrCorrupt,
			"a conversion between version 1 and 2 was interrupted (CIF_FmtVersionConvert); the BAT is saved in "+path+".idx")
	}
	ext := le.Uint64(b[offExtension:])
	if ext > math.MaxInt64/sectorSize {
		// Kept as a place that no file has: only who follows it must fail.
		ext = math.MaxInt64 / sectorSize
	}
	h.extension = int64(ext) * sectorSize
	h.extensionRead = h.extension
	return h, nil
}

// encode returns the header's bytes with the fields of h that change during an
// image's life put back; everything else is as it was read.
func (h *header) encode() [headerSize]byte {
	le := binary.LittleEndian
	b := h.raw
	le.PutUint32(b[offInUse:], h.inUse)
	le.PutUint32(b[offFlags:], h.flags)
	if h.extension != h.extensionRead {
		le.PutUint64(b[offExtension:], uint64(h.extension/sectorSize))
	}
	return b
}

// newHeader makes the header of a fresh image. size is a multiple of 512.
func newHeader(version int, cluster, size int64) *header {
	le := binary.LittleEndian
	h := &header{version: version, cluster: cluster, size: size, headerState: headerState{flags: flagEmpty}}
	h.entries = h.clusters()
	h.firstData = (h.batEnd() + cluster - 1) / cluster * cluster
	b := h.raw[:]
	sig := sigV2
	if version == 1 {
		sig = sigV1
	}
	copy(b[offSig:], sig)
	// The geometry that ploop writes: 16 heads of 32 sectors.
	cylinders := size / sectorSize / (16 * 32)
	le.PutUint32(b[offType:], diskType)
	le.PutUint32(b[offHeads:], 16)
	le.PutUint32(b[offCylinders:], uint32(min(cylinders, math.MaxUint32)))
	le.PutUint32(b[offSectors:], uint32(cluster/sectorSize))
	le.PutUint32(b[offBATEntries:], uint32(h.entries))
	le.PutUint64(b[offSize:], uint64(size/sectorSize))
	le.PutUint32(b[offFirstBlock:], uint32(h.firstData/sectorSize))
	h.raw = h.encode()
	return h
}
