package btrfs

import (
	"encoding/binary"
	"io"
	"strings"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// The superblock (kernel documentation, btrfs on-disk format: superblock):
// 4,096 bytes, little-endian, at 64 KiB and in copies further back.
const (
	superOffset = 64 << 10
	superSize   = 4096
	superStripe = 64 << 10 // what the kernel keeps free of extents around it
	superMagic  = "_BHRfS_M"
	magicAt     = 64

	sysChunksAt  = 811
	sysChunksMax = 2048
	deviceAt     = 201

	// Flags: written, relocated. All others tell of errors, of seed devices, of
	// dumps without data, or of a conversion that was interrupted.
	superFlagsKnown = 0x3
	superFlagError  = 0x4
	superFlagSeed   = 1 << 32

	roFreeSpaceTree  = 0x1
	roFreeSpaceValid = 0x2
	roGroupTree      = 0x8
	roKnown          = 0xf // verity is the fourth

	incompatMetadataUUID = 0x400
	incompatZoned        = 0x1000
	incompatTreeV2       = 0x2000
	incompatStripeTree   = 0x4000
	incompatSimpleQuota  = 0x10000
	incompatUnsupported  = incompatZoned | incompatTreeV2 | incompatStripeTree
	// mixed_backref, default_subvol, mixed_groups, compression, big_metadata,
	// extended_iref, raid56, skinny_metadata, no_holes, metadata_uuid, raid1c34.
	incompatKnown = 0xfff | incompatSimpleQuota

	maxLevel = 7
)

// super is the superblock.
type super struct {
	fsid, metadataUUID, deviceUUID  [16]byte
	label                           string
	generation                      uint64
	root, chunkRoot, logRoot        uint64 // logical addresses
	chunkGeneration                 uint64
	rootLevel, chunkLevel, logLevel uint8
	used                            uint64
	devices                         uint64
	sector, node                    int64 // bytes
	sum                             uint16
	compat, ro, incompat, flags     uint64
	deviceID, deviceBytes           uint64
	sysChunks                       []byte
}

func decodeSuper(b []byte) *super {
	le := binary.LittleEndian
	d := b[deviceAt:]
	s := &super{
		flags: le.Uint64(b[56:]), generation: le.Uint64(b[72:]),
		root: le.Uint64(b[80:]), chunkRoot: le.Uint64(b[88:]), logRoot: le.Uint64(b[96:]),
		used: le.Uint64(b[120:]), devices: le.Uint64(b[136:]),
		sector: int64(le.Uint32(b[144:])), node: int64(le.Uint32(b[148:])),
		chunkGeneration: le.Uint64(b[164:]),
		compat:          le.Uint64(b[172:]), ro: le.Uint64(b[180:]), incompat: le.Uint64(b[188:]),
		sum: le.Uint16(b[196:]), rootLevel: b[198], chunkLevel: b[199], logLevel: b[200],
		deviceID: le.Uint64(d), deviceBytes: le.Uint64(d[8:]),
		label: strings.ToValidUTF8(strings.TrimRight(string(b[299:299+256]), "\x00"), "?"),
	}
	copy(s.fsid[:], b[32:])
	copy(s.deviceUUID[:], d[66:])
	s.metadataUUID = s.fsid
	if s.incompat&incompatMetadataUUID != 0 {
		copy(s.metadataUUID[:], b[571:])
	}
	if n := le.Uint32(b[160:]); n <= sysChunksMax {
		s.sysChunks = b[sysChunksAt:][:n]
	}
	return s
}

// readSuper reads and checks the superblock; size is the room in bytes. With
// an error the superblock may still serve to describe the filesystem.
func readSuper(r io.ReaderAt, size int64) (*super, error) {
	b := make([]byte, superSize)
	if err := freespace.ReadAt(r, b, superOffset); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if string(b[magicAt:][:len(superMagic)]) != superMagic {
		return nil, damaged("superblock: magic %x", b[magicAt:][:len(superMagic)])
	}
	if err := checkSum(le.Uint16(b[196:]), b, "superblock", superOffset); err != nil {
		return nil, err
	}
	s := decodeSuper(b)
	if at := le.Uint64(b[48:]); at != superOffset {
		return s, damaged("the superblock says that it is at byte %d", at)
	}
	if err := s.checkFeatures(); err != nil {
		return s, err
	}
	if [16]byte(b[deviceAt+82:][:16]) != s.metadataUUID {
		return s, damaged("the device belongs to filesystem %x", b[deviceAt+82:][:16])
	}
	return s, s.checkGeometry(size)
}

func (s *super) checkFeatures() error {
	switch {
	case s.flags&superFlagError != 0:
		return freespace.Refuse(freespace.ErrorState, "btrfs: the filesystem records errors: run btrfs check")
	case s.flags&superFlagSeed != 0:
		return freespace.Refuse(freespace.Unsupported, "btrfs: a seed device")
	case s.flags&^superFlagsKnown != 0:
		return freespace.Refuse(freespace.Unsupported, "btrfs: superblock flags %#x", s.flags)
	case s.compat != 0 || s.ro&^roKnown != 0 || s.incompat&^(incompatKnown|incompatUnsupported) != 0:
		return freespace.Refuse(freespace.UnknownFeature, "btrfs: features compat %#x, compat_ro %#x, incompat %#x", s.compat, s.ro, s.incompat)
	case s.incompat&incompatUnsupported != 0:
		return freespace.Refuse(freespace.Unsupported, "btrfs: incompat features %#x (zoned, extent tree v2 or stripe tree)", s.incompat&incompatUnsupported)
	case s.devices != 1:
		return freespace.Refuse(freespace.Unsupported, "btrfs: a filesystem on %d devices", s.devices)
	}
	return nil
}

func powerOfTwo(n, low, high int64) bool { return n >= low && n <= high && n&(n-1) == 0 }

func (s *super) checkGeometry(size int64) error {
	switch {
	case !powerOfTwo(s.sector, 4096, 65536) || !powerOfTwo(s.node, 4096, 65536) || s.node < s.sector:
		return damaged("sectors of %d bytes, nodes of %d", s.sector, s.node)
	case s.rootLevel > maxLevel || s.chunkLevel > maxLevel || s.logLevel > maxLevel:
		return damaged("trees of %d, %d and %d levels", s.rootLevel, s.chunkLevel, s.logLevel)
	case s.deviceBytes > uint64(size):
		return freespace.Refuse(freespace.Truncated, "btrfs: a device of %d bytes does not fit into %d bytes", s.deviceBytes, size)
	case s.chunkGeneration > s.generation:
		return damaged("generation %d of the chunk tree, %d of the filesystem", s.chunkGeneration, s.generation)
	case s.sysChunks == nil:
		return damaged("no chunks of the chunk tree")
	}
	return nil
}

// checkMirrors looks at the copies of the superblock. A power cut may leave
// them older than the first, or torn; a newer one contradicts it.
func (s *super) checkMirrors(r io.ReaderAt, size int64) error {
	b := make([]byte, superSize)
	for _, m := range reserved[1:] {
		if m.end > int64(s.deviceBytes) || m.end > size {
			break
		}
		if err := freespace.ReadAt(r, b, m.start); err != nil {
			return err
		}
		if string(b[magicAt:][:len(superMagic)]) != superMagic || checkSum(s.sum, b, "superblock", uint64(m.start)) != nil {
			continue
		}
		if c := decodeSuper(b); c.fsid == s.fsid && c.generation > s.generation {
			return damaged("the superblock is of generation %d, its copy at byte %d of %d", s.generation, m.start, c.generation)
		}
	}
	return nil
}
