package xfs

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"strings"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// The superblock (XFS Algorithms and Data Structures, Superblocks): big-endian,
// the first sector of every allocation group.
const (
	superMagic  = "XFSB"
	superCRCAt  = 224
	minimumSize = 512

	versionLogV2 = 0x400
	// What a filesystem of version 4 may have: everything but shared_vn.
	versionKnown = 0xfdff
	// Counters only written at unmount, attr2, 32-bit project IDs, checksums,
	// file types in directories.
	features2Lazy  = 0x2
	features2Known = 0x2 | 0x8 | 0x80 | 0x100 | 0x200

	// finobt, rmapbt, reflink, inobtcount.
	roKnown = 0xf
	// ftype, sparse inodes, meta_uuid, bigtime, (needsrepair,) 64-bit extent
	// counts, exchange-range, parent pointers.
	incompatNeedsRepair = 0x10
	incompatMetaUUID    = 0x4
	incompatKnown       = 0xef
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sum is the checksum of p, whose own field at byte at is taken as zero.
func sum(p []byte, at int) uint32 {
	var zero [4]byte
	c := crc32.Update(0, castagnoli, p[:at])
	c = crc32.Update(c, castagnoli, zero[:])
	return crc32.Update(c, castagnoli, p[at+4:])
}

// checkSum compares the checksum of p, which is little-endian at byte at.
func checkSum(p []byte, at int, what string) error {
	if got, want := sum(p, at), binary.LittleEndian.Uint32(p[at:]); got != want {
		return freespace.Refuse(freespace.BadChecksum, "xfs: %s: checksum %#x, computed %#x", what, want, got)
	}
	return nil
}

func damaged(format string, args ...any) error {
	return freespace.Refuse(freespace.Damaged, "xfs: %s", fmt.Sprintf(format, args...))
}

type super struct {
	v5                       bool
	blockSize, sector        int64 // bytes
	blocks, agBlocks, agents uint64
	agLog                    uint // bits of a block number inside its group
	logStart, logBlocks      uint64
	rootInode                uint64
	inodesPerBlock           uint64
	inodeShift               uint
	uuid, metaUUID           [16]byte
	label                    string
	freeBlocks               uint64
	lazy, logV2              bool
}

// Detect reports whether head begins with a superblock.
func Detect(head []byte) bool { return len(head) >= minimumSize && string(head[:4]) == superMagic }

// readSuper reads and checks the superblock at byte at. (mkfs leaves the copies
// marked as being made, and without a root inode.)
func readSuper(r io.ReaderAt, at, size int64) (*super, error) {
	b := make([]byte, minimumSize)
	if err := freespace.ReadAt(r, b, at); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	if string(b[:4]) != superMagic {
		return nil, damaged("superblock at byte %d: magic %x", at, b[:4])
	}
	s := &super{
		blockSize: int64(be.Uint32(b[4:])), sector: int64(be.Uint16(b[102:])),
		blocks: be.Uint64(b[8:]), agBlocks: uint64(be.Uint32(b[84:])), agents: uint64(be.Uint32(b[88:])),
		agLog:    uint(b[124]),
		logStart: be.Uint64(b[48:]), logBlocks: uint64(be.Uint32(b[96:])),
		rootInode: be.Uint64(b[56:]), inodesPerBlock: uint64(be.Uint16(b[106:])), inodeShift: uint(b[123]),
		label:      strings.ToValidUTF8(strings.TrimRight(string(b[108:120]), "\x00"), "?"),
		freeBlocks: be.Uint64(b[144:]),
	}
	copy(s.uuid[:], b[32:])
	s.metaUUID = s.uuid
	version := be.Uint16(b[100:])
	switch version & 0xf {
	case 4:
	case 5:
		s.v5 = true
	default:
		return nil, freespace.Refuse(freespace.UnknownFeature, "xfs: version %d", version&0xf)
	}
	s.lazy = be.Uint32(b[200:])&features2Lazy != 0
	s.logV2 = version&versionLogV2 != 0
	if !powerOfTwo(s.sector, 512, 32768) || b[121] != byte(bits.TrailingZeros64(uint64(s.sector))) {
		return nil, damaged("sectors of %d bytes (2^%d)", s.sector, b[121])
	}
	if s.v5 {
		full := make([]byte, s.sector)
		if err := freespace.ReadAt(r, full, at); err != nil {
			return nil, err
		}
		if err := checkSum(full, superCRCAt, "superblock"); err != nil {
			return nil, err
		}
	}
	if err := s.checkFeatures(b, version, at == 0); err != nil {
		return nil, err
	}
	return s, s.checkGeometry(b, size, at == 0)
}

func (s *super) checkFeatures(b []byte, version uint16, primary bool) error {
	be := binary.BigEndian
	f2, bad2 := be.Uint32(b[200:]), be.Uint32(b[204:])
	if unknown := version &^ 0xf &^ versionKnown; unknown != 0 {
		return freespace.Refuse(freespace.UnknownFeature, "xfs: version flags %#x", unknown)
	}
	if unknown := f2 &^ features2Known; unknown != 0 {
		return freespace.Refuse(freespace.UnknownFeature, "xfs: features2 %#x", unknown)
	}
	if bad2 != 0 && bad2 != f2 {
		return damaged("features2 %#x, its copy %#x", f2, bad2)
	}
	if s.v5 {
		compat, ro, incompat, log := be.Uint32(b[208:]), be.Uint32(b[212:]), be.Uint32(b[216:]), be.Uint32(b[220:])
		switch {
		case incompat&incompatNeedsRepair != 0:
			return freespace.Refuse(freespace.ErrorState, "xfs: marked as needing xfs_repair")
		case compat != 0 || ro&^roKnown != 0 || incompat&^incompatKnown != 0:
			return freespace.Refuse(freespace.UnknownFeature, "xfs: features compat %#x, ro_compat %#x, incompat %#x", compat, ro, incompat)
		case log != 0:
			return freespace.Refuse(freespace.UnknownFeature, "xfs: log features %#x", log)
		}
		if incompat&incompatMetaUUID != 0 {
			copy(s.metaUUID[:], b[248:])
		}
	}
	switch {
	case b[126] != 0 && primary:
		return freespace.Refuse(freespace.NotClean, "xfs: mkfs did not finish")
	case b[178] != 0:
		return freespace.Refuse(freespace.Unsupported, "xfs: flags %#x", b[178])
	case be.Uint64(b[16:]) != 0 || be.Uint64(b[24:]) != 0:
		return freespace.Refuse(freespace.Unsupported, "xfs: a realtime section")
	case s.logStart == 0:
		return freespace.Refuse(freespace.Unsupported, "xfs: the log is on another device")
	}
	return nil
}

func powerOfTwo(n, low, high int64) bool { return n >= low && n <= high && n&(n-1) == 0 }

func (s *super) checkGeometry(b []byte, size int64, primary bool) error {
	if !powerOfTwo(s.blockSize, 512, 65536) || b[120] != byte(bits.TrailingZeros64(uint64(s.blockSize))) || s.sector > s.blockSize {
		return damaged("blocks of %d bytes (2^%d), sectors of %d", s.blockSize, b[120], s.sector)
	}
	if s.agBlocks < 64 || s.agBlocks >= 1<<31 || s.agLog != uint(bits.Len64(s.agBlocks-1)) {
		return damaged("groups of %d blocks (2^%d)", s.agBlocks, s.agLog)
	}
	if s.agents == 0 || s.blocks > s.agents*s.agBlocks || s.blocks <= (s.agents-1)*s.agBlocks {
		return damaged("%d blocks in %d groups of %d", s.blocks, s.agents, s.agBlocks)
	}
	if s.blocks > uint64(size/s.blockSize) {
		return freespace.Refuse(freespace.Truncated, "xfs: %d blocks of %d bytes do not fit into %d bytes", s.blocks, s.blockSize, size)
	}
	inode := int64(be16(b[104:]))
	if !powerOfTwo(inode, 256, 2048) || s.inodesPerBlock != uint64(s.blockSize/inode) || s.inodesPerBlock == 0 ||
		s.inodeShift != uint(bits.TrailingZeros64(s.inodesPerBlock)) {
		return damaged("inodes of %d bytes, %d in a block (2^%d)", inode, s.inodesPerBlock, s.inodeShift)
	}
	if ag, at := s.split(s.logStart); ag >= s.agents || s.logBlocks == 0 || at+s.logBlocks > s.groupBlocks(ag) {
		return damaged("log of %d blocks from block %d of group %d", s.logBlocks, at, ag)
	}
	if s.logBlocks*uint64(s.blockSize) > 1<<31 {
		return damaged("log of %d blocks", s.logBlocks)
	}
	if ag, at := s.split(s.rootInode >> s.inodeShift); primary && (ag >= s.agents || at >= s.groupBlocks(ag)) {
		return damaged("root inode %d", s.rootInode)
	}
	return nil
}

func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }

// split divides a block number into group and block of the group.
func (s *super) split(block uint64) (ag, at uint64) {
	return block >> s.agLog, block & (1<<s.agLog - 1)
}

// groupBlocks is the number of blocks of a group; the last may be short.
func (s *super) groupBlocks(ag uint64) uint64 { return min(s.agBlocks, s.blocks-ag*s.agBlocks) }

// groupStart is the first byte of a group.
func (s *super) groupStart(ag uint64) int64 { return int64(ag*s.agBlocks) * s.blockSize }

// checkCopy compares with the superblock of the second group what never
// changes.
func (s *super) checkCopy(r io.ReaderAt, size int64) error {
	if s.agents < 2 {
		return nil
	}
	c, err := readSuper(r, s.groupStart(1), size)
	if err != nil {
		return err
	}
	if c.v5 != s.v5 || c.blockSize != s.blockSize || c.sector != s.sector || c.agBlocks != s.agBlocks ||
		c.logStart != s.logStart || c.logBlocks != s.logBlocks || c.logV2 != s.logV2 {
		return damaged("the superblock and its copy in group 1 disagree")
	}
	return nil
}

func uuidString(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
