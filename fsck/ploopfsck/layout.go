package ploopfsck

import (
	"encoding/binary"
	"math"
)

// Numbers of the format: struct ploop_pvd_header (OpenVZ
// include/ploop1_image.h; QEMU docs/interop/parallels.txt), little-endian.
const (
	headerSize = 64
	sectorSize = 512

	offSig        = 0  // [16]
	offType       = 16 // u32, 2
	offCylinders  = 24 // u32, of 16 heads and 32 sectors
	offSectors    = 28 // u32 sectors of a cluster
	offBATEntries = 32 // u32 m_Size
	offSize       = 36 // u64 sectors of the disk; version 1: low u32
	offInUse      = 44 // u32
	offFirstBlock = 48 // u32 sectors
	offFlags      = 52 // u32
	offExtension  = 56 // u64 sectors

	sigV1 = "WithoutFreeSpace"
	sigV2 = "WithouFreSpacExt"

	diskType = 2

	inUseOpen = 0x746f6e59
	inUseV21  = 0x312e3276 // closed, and the extension fits the image

	flagEmpty      = 1 // nothing is allocated
	flagConverting = 2 // the BAT is being rewritten

	maxClusterSectors = 64 << 20 / sectorSize
	geometryUnit      = 16 * 32 // sectors of a cylinder

	noEntry = math.MaxUint32 // invalid to the kernel driver
)

var le = binary.LittleEndian

// header is the raw header.
type header [headerSize]byte

func (h *header) u32(off int) uint32           { return le.Uint32(h[off:]) }
func (h *header) u64(off int) uint64           { return le.Uint64(h[off:]) }
func (h *header) put32(off int, v uint32)      { le.PutUint32(h[off:], v) }
func (h *header) put64(off int, v uint64)      { le.PutUint64(h[off:], v) }
func (h *header) isSet(off int, v uint32) bool { return h.u32(off)&v != 0 }

// geometry is what the header says once it is believed.
type geometry struct {
	version   int
	cluster   int64 // bytes, a multiple of 512 (not always a power of two)
	entries   int64 // m_Size
	size      int64 // bytes of the disk
	firstData int64 // bytes
	step      int64 // entry units of a cluster: sectors in version 1, else 1
}

// clusters is the number of clusters of the disk.
func (g *geometry) clusters() int64 { return ceil(g.size, g.cluster) }

// host is where the cluster of an entry begins. It cannot overflow: 2^32
// clusters of at most 2^26 bytes.
func (g *geometry) host(entry uint32) int64 {
	if g.version == 1 {
		return int64(entry) * sectorSize
	}
	return int64(entry) * g.cluster
}

// entry is the inverse of host for a multiple of the cluster size.
func (g *geometry) entry(host int64) uint32 { return uint32(host / g.cluster * g.step) }

// maxSlot is the last cluster of the file that an entry can name.
func (g *geometry) maxSlot() int64 { return (noEntry - 1) / g.step }

func (g *geometry) firstSlot() int64 { return g.firstData / g.cluster }

func (g *geometry) roundUp(n int64) int64 { return ceil(n, g.cluster) * g.cluster }

func ceil(n, unit int64) int64 {
	q := n / unit
	if n%unit != 0 {
		q++
	}
	return q
}

func entryOff(idx int64) int64 { return headerSize + 4*idx }
