package ext4

import (
	"fmt"
	"strings"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Feature flags that matter here (kernel documentation, ext4: super block).
const (
	compatHasJournal   = 0x4
	compatResizeInode  = 0x10
	compatSparseSuper2 = 0x200
	compatFastCommit   = 0x400

	incompatRecover    = 0x4
	incompatJournalDev = 0x8
	incompatMetaBG     = 0x10
	incompatExtents    = 0x40
	incompat64Bit      = 0x80
	incompatMMP        = 0x100
	incompatFlexBG     = 0x200
	incompatCsumSeed   = 0x2000

	roSparseSuper  = 0x1
	roGDTCsum      = 0x10
	roBigalloc     = 0x200
	roMetadataCsum = 0x400
)

// feature names a flag and tells whether it leaves the meaning of the block
// bitmaps alone or is handled here.
type feature struct {
	bit  uint32
	name string
	ok   bool
}

var compatFeatures = []feature{
	{0x1, "dir_prealloc", true},
	{0x2, "imagic_inodes", true},
	{compatHasJournal, "has_journal", true},
	{0x8, "ext_attr", true},
	{compatResizeInode, "resize_inode", true},
	{0x20, "dir_index", true},
	{0x40, "lazy_bg", false},
	{0x80, "exclude_inode", false},
	{0x100, "exclude_bitmap", false},
	{compatSparseSuper2, "sparse_super2", true},
	{compatFastCommit, "fast_commit", true}, // refused by the replay
	{0x800, "stable_inodes", true},
	{0x1000, "orphan_file", true}, // what it names stays used
}

var incompatFeatures = []feature{
	{0x1, "compression", false},
	{0x2, "filetype", true},
	{incompatRecover, "needs_recovery", true}, // replayed
	{incompatJournalDev, "journal_dev", false},
	{incompatMetaBG, "meta_bg", true},
	{incompatExtents, "extent", true},
	{incompat64Bit, "64bit", true},
	{incompatMMP, "mmp", true},
	{incompatFlexBG, "flex_bg", true},
	{0x400, "ea_inode", true},
	{0x1000, "dirdata", false},
	{incompatCsumSeed, "metadata_csum_seed", true},
	{0x4000, "large_dir", true},
	{0x8000, "inline_data", true},
	{0x10000, "encrypt", true},
	{0x20000, "casefold", true},
}

var roFeatures = []feature{
	{roSparseSuper, "sparse_super", true},
	{0x2, "large_file", true},
	{0x4, "btree_dir", false},
	{0x8, "huge_file", true},
	{roGDTCsum, "uninit_bg", true},
	{0x20, "dir_nlink", true},
	{0x40, "extra_isize", true},
	{0x80, "has_snapshot", false},
	{0x100, "quota", true},
	{roBigalloc, "bigalloc", true},
	{roMetadataCsum, "metadata_csum", true},
	{0x800, "replica", false},
	{0x1000, "read-only", false},
	{0x2000, "project", true},
	{0x4000, "shared_blocks", false},
	{0x8000, "verity", true},
	{0x10000, "orphan_present", true},
}

// checkFeatures refuses flags that are unknown or not handled. An unknown
// compatible flag would be harmless to a kernel that writes, but not to a
// judge of what nobody uses.
func (s *super) checkFeatures() error {
	for _, f := range []struct {
		set  string
		bits uint32
		list []feature
	}{
		{"compat", s.compat, compatFeatures},
		{"incompat", s.incompat, incompatFeatures},
		{"ro_compat", s.roCompat, roFeatures},
	} {
		rest := f.bits
		var bad []string
		for _, k := range f.list {
			if rest&k.bit != 0 && !k.ok {
				bad = append(bad, k.name)
			}
			rest &^= k.bit
		}
		if rest != 0 {
			return freespace.Refuse(freespace.UnknownFeature, "ext: unknown %s feature flags %#x", f.set, rest)
		}
		if bad != nil {
			return freespace.Refuse(freespace.Unsupported, "ext: %s feature %s", f.set, strings.Join(bad, ", "))
		}
	}
	switch {
	case s.ro(roGDTCsum) && s.ro(roMetadataCsum):
		return freespace.Refuse(freespace.Damaged, "ext: both uninit_bg and metadata_csum are set")
	case s.inc(incompatMetaBG) && s.com(compatResizeInode):
		return freespace.Refuse(freespace.Damaged, "ext: both meta_bg and resize_inode are set")
	case s.inc(incompatRecover) && !s.com(compatHasJournal):
		return freespace.Refuse(freespace.Damaged, "ext: needs_recovery is set, has_journal is not")
	case s.inc(incompatCsumSeed) && !s.ro(roMetadataCsum):
		return freespace.Refuse(freespace.Damaged, "ext: metadata_csum_seed is set, metadata_csum is not")
	}
	return nil
}

func (s *super) com(bit uint32) bool { return s.compat&bit != 0 }
func (s *super) inc(bit uint32) bool { return s.incompat&bit != 0 }
func (s *super) ro(bit uint32) bool  { return s.roCompat&bit != 0 }

// groupCsum reports whether group descriptors have checksums, and with them
// flags for groups that were never initialised.
func (s *super) groupCsum() bool { return s.ro(roGDTCsum | roMetadataCsum) }

func damaged(format string, args ...any) error {
	return freespace.Refuse(freespace.Damaged, "ext: %s", fmt.Sprintf(format, args...))
}

func badSum(what string, got, want uint32) error {
	return freespace.Refuse(freespace.BadChecksum, "ext: %s: checksum %#x, computed %#x", what, want, got)
}
