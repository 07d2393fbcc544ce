package ext4

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"strings"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// The superblock (kernel documentation, ext4: super block): 1,024 bytes,
// little-endian, at byte 1,024.
const (
	superOffset = 1024
	superSize   = 1024
	superMagic  = 0xef53

	stateValid = 1
	stateError = 2

	superCsumAt    = 0x3fc
	snapshotFlags  = 0x70 // is, fix, fix_exclude
	checksumCRC32C = 1
)

// super is the superblock, with what follows from it.
type super struct {
	inodes, blocks              uint64
	firstBlock                  uint64
	logBlock, logCluster        uint32
	perGroup, clustersPerGroup  uint64 // blocks, clusters
	inodesPerGroup              uint64
	state                       uint16
	rev                         uint32
	creator                     uint32
	inodeSize                   uint16
	groupNumber                 uint16
	compat, incompat, roCompat  uint32
	uuid                        [16]byte
	label                       string
	reservedGDT                 uint64
	journalInode, journalDevice uint32
	descSize                    uint16
	firstMetaBG                 uint64
	flags                       uint32
	mmpBlock                    uint64
	checksumType                uint8
	checksumSeed                uint32
	snapshotInode, snapshotList uint32
	errorCount                  uint32
	backupGroups                [2]uint32
	checksum, computed          uint32
	blockSize                   int64  // bytes
	ratio                       uint64 // blocks per cluster
	groups                      uint64
	desc                        int64 // bytes of a group descriptor
	descPerBlock, descBlocks    uint64
	inodeTable                  uint64 // blocks per group
	seed                        uint32 // of all checksums of metadata_csum
	inodesPerBlock              uint64
}

// Detect reports whether head, the first 2,048 bytes or more, has the magic of
// a superblock.
func Detect(head []byte) bool {
	return len(head) >= superOffset+superSize && binary.LittleEndian.Uint16(head[superOffset+56:]) == superMagic
}

// readSuper reads the superblock at byte at and decodes it; nothing is checked
// but the magic.
func readSuper(r io.ReaderAt, at int64) (*super, error) {
	b := make([]byte, superSize)
	if err := freespace.ReadAt(r, b, at); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if m := le.Uint16(b[56:]); m != superMagic {
		return nil, damaged("superblock at byte %d: magic %#x", at, m)
	}
	s := &super{
		inodes: uint64(le.Uint32(b)), blocks: uint64(le.Uint32(b[4:])),
		firstBlock: uint64(le.Uint32(b[20:])), logBlock: le.Uint32(b[24:]), logCluster: le.Uint32(b[28:]),
		perGroup: uint64(le.Uint32(b[32:])), clustersPerGroup: uint64(le.Uint32(b[36:])),
		inodesPerGroup: uint64(le.Uint32(b[40:])),
		state:          le.Uint16(b[58:]), creator: le.Uint32(b[72:]), rev: le.Uint32(b[76:]),
		inodeSize: le.Uint16(b[88:]), groupNumber: le.Uint16(b[90:]),
		compat: le.Uint32(b[92:]), incompat: le.Uint32(b[96:]), roCompat: le.Uint32(b[100:]),
		label:       strings.ToValidUTF8(strings.TrimRight(string(b[120:136]), "\x00"), "?"),
		reservedGDT: uint64(le.Uint16(b[0xce:])), journalInode: le.Uint32(b[0xe0:]), journalDevice: le.Uint32(b[0xe4:]),
		descSize: le.Uint16(b[0xfe:]), firstMetaBG: uint64(le.Uint32(b[0x104:])),
		flags: le.Uint32(b[0x160:]), mmpBlock: le.Uint64(b[0x168:]), checksumType: b[0x175],
		snapshotInode: le.Uint32(b[0x180:]), snapshotList: le.Uint32(b[0x190:]), errorCount: le.Uint32(b[0x194:]),
		backupGroups: [2]uint32{le.Uint32(b[0x24c:]), le.Uint32(b[0x250:])},
		checksumSeed: le.Uint32(b[0x270:]),
		checksum:     le.Uint32(b[superCsumAt:]), computed: crc32c(^uint32(0), b[:superCsumAt]),
	}
	copy(s.uuid[:], b[104:])
	if s.inc(incompat64Bit) {
		s.blocks |= uint64(le.Uint32(b[0x150:])) << 32
	}
	if s.rev == 0 {
		s.compat, s.incompat, s.roCompat, s.inodeSize = 0, 0, 0, 128
	}
	return s, nil
}

// uuidString prints the filesystem's UUID.
func (s *super) uuidString() string {
	u := s.uuid
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// check refuses what is not understood, not healthy or impossible, and fills
// in what follows from the fields. size is the room in bytes.
func (s *super) check(size int64) error {
	if s.rev > 1 {
		return freespace.Refuse(freespace.UnknownFeature, "ext: revision %d", s.rev)
	}
	if err := s.checkFeatures(); err != nil {
		return err
	}
	if s.ro(roMetadataCsum) {
		if s.checksumType != checksumCRC32C {
			return freespace.Refuse(freespace.UnknownFeature, "ext: checksum type %d", s.checksumType)
		}
		if s.checksum != s.computed {
			return badSum("superblock", s.computed, s.checksum)
		}
	}
	if err := s.checkState(); err != nil {
		return err
	}
	if err := s.checkGeometry(); err != nil {
		return err
	}
	if s.blocks > uint64(size/s.blockSize) {
		return freespace.Refuse(freespace.Truncated, "ext: %d blocks of %d bytes do not fit into %d bytes", s.blocks, s.blockSize, size)
	}
	s.seed = s.checksumSeed
	if !s.inc(incompatCsumSeed) {
		s.seed = crc32c(^uint32(0), s.uuid[:])
	}
	return nil
}

func (s *super) checkState() error {
	switch {
	case s.state&stateError != 0 || s.errorCount != 0:
		return freespace.Refuse(freespace.ErrorState, "ext: the filesystem records errors (state %#x, %d errors): run e2fsck", s.state, s.errorCount)
	case s.state != stateValid:
		return freespace.Refuse(freespace.NotClean, "ext: not cleanly unmounted (state %#x): run e2fsck", s.state)
	case s.journalDevice != 0:
		return freespace.Refuse(freespace.Unsupported, "ext: the journal is on another device")
	case s.snapshotInode != 0 || s.snapshotList != 0 || s.flags&snapshotFlags != 0:
		return freespace.Refuse(freespace.Unsupported, "ext: snapshots")
	case s.creator > 4 || s.creator == 1:
		return freespace.Refuse(freespace.Unsupported, "ext: made for another system (creator %d)", s.creator)
	}
	return nil
}

// checkGeometry follows the kernel's checks at mount, and is stricter where
// no tool makes what the kernel would take.
func (s *super) checkGeometry() error {
	if s.logBlock > 6 {
		return damaged("block size 2^%d", 10+uint64(s.logBlock))
	}
	s.blockSize = 1024 << s.logBlock
	bs := uint64(s.blockSize)
	s.ratio = 1
	if s.ro(roBigalloc) {
		if s.logCluster < s.logBlock || s.logCluster > 20 {
			return damaged("cluster size 2^%d", 10+uint64(s.logCluster))
		}
		s.ratio = 1 << (s.logCluster - s.logBlock)
	} else if s.rev > 0 && s.clustersPerGroup != s.perGroup {
		return damaged("%d clusters and %d blocks per group without bigalloc", s.clustersPerGroup, s.perGroup)
	}
	if s.rev == 0 {
		s.clustersPerGroup = s.perGroup
	}
	wantFirst := uint64(0)
	if bs == 1024 && s.ratio == 1 {
		wantFirst = 1
	}
	if s.firstBlock != wantFirst {
		return damaged("first data block %d, want %d", s.firstBlock, wantFirst)
	}
	if c := s.clustersPerGroup; c == 0 || c%8 != 0 || c > 8*bs || c*s.ratio != s.perGroup {
		return damaged("%d clusters and %d blocks per group", s.clustersPerGroup, s.perGroup)
	}
	if s.blocks <= s.firstBlock || s.blocks > 1<<48 {
		return damaged("%d blocks", s.blocks)
	}
	s.groups = (s.blocks - s.firstBlock + s.perGroup - 1) / s.perGroup
	if s.groups >= 1<<32 {
		return damaged("%d groups", s.groups)
	}
	if err := s.checkInodes(bs); err != nil {
		return err
	}
	s.desc = 32
	if s.inc(incompat64Bit) {
		s.desc = int64(s.descSize)
		if s.desc < 64 || s.desc > 1024 || bits.OnesCount16(s.descSize) != 1 {
			return damaged("group descriptors of %d bytes", s.desc)
		}
	} else if s.descSize != 0 && s.descSize != 32 {
		return damaged("group descriptors of %d bytes without 64bit", s.descSize)
	}
	s.descPerBlock = bs / uint64(s.desc)
	s.descBlocks = (s.groups + s.descPerBlock - 1) / s.descPerBlock
	if s.inc(incompatMetaBG) && s.firstMetaBG > s.descBlocks {
		return damaged("first meta block group %d of %d", s.firstMetaBG, s.descBlocks)
	}
	if s.reservedGDT > bs/4 {
		return damaged("%d reserved descriptor blocks", s.reservedGDT)
	}
	return nil
}

func (s *super) checkInodes(bs uint64) error {
	n := uint64(s.inodeSize)
	if n < 128 || n > bs || bits.OnesCount64(n) != 1 {
		return damaged("inodes of %d bytes", n)
	}
	s.inodesPerBlock = bs / n
	if s.inodesPerGroup < s.inodesPerBlock || s.inodesPerGroup > 8*bs {
		return damaged("%d inodes per group", s.inodesPerGroup)
	}
	if s.inodes != s.inodesPerGroup*s.groups {
		return damaged("%d inodes in %d groups of %d", s.inodes, s.groups, s.inodesPerGroup)
	}
	s.inodeTable = (s.inodesPerGroup + s.inodesPerBlock - 1) / s.inodesPerBlock
	return nil
}

// sameLayout compares what must be the same in every copy of the superblock
// and cannot change by replaying the journal. (Other fields of the copies are
// left behind by every kernel.)
func (s *super) sameLayout(o *super) error {
	const incompat = incompatMetaBG | incompat64Bit | incompatFlexBG | incompatCsumSeed
	const ro = roSparseSuper | roGDTCsum | roBigalloc | roMetadataCsum
	for _, f := range []struct {
		name string
		a, b uint64
	}{
		{"blocks", s.blocks, o.blocks}, {"first data block", s.firstBlock, o.firstBlock},
		{"block size", uint64(s.logBlock), uint64(o.logBlock)}, {"cluster size", uint64(s.logCluster), uint64(o.logCluster)},
		{"blocks per group", s.perGroup, o.perGroup}, {"inodes per group", s.inodesPerGroup, o.inodesPerGroup},
		{"inode size", uint64(s.inodeSize), uint64(o.inodeSize)}, {"descriptor size", uint64(s.descSize), uint64(o.descSize)},
		{"reserved descriptor blocks", s.reservedGDT, o.reservedGDT}, {"first meta block group", s.firstMetaBG, o.firstMetaBG},
		{"backup group", uint64(s.backupGroups[0]), uint64(o.backupGroups[0])}, {"backup group", uint64(s.backupGroups[1]), uint64(o.backupGroups[1])},
		{"compat features", uint64(s.compat & compatSparseSuper2), uint64(o.compat & compatSparseSuper2)},
		{"incompat features", uint64(s.incompat & incompat), uint64(o.incompat & incompat)},
		{"ro_compat features", uint64(s.roCompat & ro), uint64(o.roCompat & ro)},
		{"UUID", uint64(crc32c(0, s.uuid[:])), uint64(crc32c(0, o.uuid[:]))},
	} {
		if f.a != f.b {
			return damaged("two superblocks disagree: %s %#x and %#x", f.name, f.a, f.b)
		}
	}
	return nil
}
