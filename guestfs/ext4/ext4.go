// Package ext4 proves blocks of an ext2, ext3 or ext4 filesystem free.
//
// Design note. The block bitmaps say what is free, and everything that can be
// held against them is: checksums where the filesystem has them, the count of
// each group descriptor, the places of the fixed metadata and of the journal,
// the copy of the superblock. (The free count of the superblock is not: it is
// stale after a replay.) One contradiction anywhere, and nothing is free.
//
// A filesystem that was in use when its image was taken keeps its truth partly
// in the journal. It is read through an overlay (replay.go) that shows every
// block as a replay would leave it; nothing is written. What the journal's
// replay does not settle, such as inodes that wait for their deletion, stays
// used.
//
// All numbers of the image are uint64 and checked against the size of the
// filesystem, which is checked against the room that it has; only then they
// become byte offsets. Sources: the kernel's documentation of ext4 and jbd2,
// and the behaviour of the kernel where that is silent.
package ext4

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Free is the freespace.Reader of ext2, ext3 and ext4.
func Free(ctx context.Context, r io.ReaderAt, size int64, emit freespace.Emit) (freespace.Info, error) {
	var info freespace.Info
	s, err := readSuper(r, superOffset)
	if err != nil {
		return info, err
	}
	info.UUID, info.Label = s.uuidString(), s.label
	if err := s.check(size); err != nil {
		return info, err
	}
	info.BlockSize = s.blockSize * int64(s.ratio)
	if err := s.checkMMP(r); err != nil {
		return info, err
	}
	var fixed spans
	if s.com(compatHasJournal) {
		var over *overlay
		if s, over, err = replay(ctx, r, s, size, &fixed); err != nil {
			return info, err
		}
		if over != nil {
			r, info.Replayed = over, int64(len(over.blocks))
		}
	}
	if err := s.checkBackup(r); err != nil {
		return info, err
	}
	table := newDescs(s, r)
	if err := s.fixedBlocks(ctx, table, &fixed); err != nil {
		return info, err
	}
	used, err := fixed.sorted()
	if err != nil {
		return info, err
	}
	w := walker{s: s, r: r, used: used, emit: emit, buf: make([]byte, s.blockSize)}
	for g := range s.groups {
		if err := ctx.Err(); err != nil {
			return info, err
		}
		d, err := table.get(g)
		if err != nil {
			return info, err
		}
		if err := w.group(g, d); err != nil {
			return info, err
		}
	}
	return info, nil
}

// fixedBlocks adds the places of the metadata that every group has.
func (s *super) fixedBlocks(ctx context.Context, table *descs, fixed *spans) error {
	var bitmaps, inodes, tables spans
	for g := range s.groups {
		if err := ctx.Err(); err != nil {
			return err
		}
		d, err := table.get(g)
		if err != nil {
			return err
		}
		b := s.base(g)
		if b.n > s.groupBlocks(g) {
			return damaged("group %d has %d blocks, and its descriptors alone need %d", g, s.groupBlocks(g), b.n)
		}
		for _, a := range []struct {
			list *spans
			span
		}{
			{fixed, b},
			{&bitmaps, span{d.blockBitmap, 1}},
			{&inodes, span{d.inodeBitmap, 1}},
			{&tables, span{d.inodeTable, s.inodeTable}},
		} {
			if err := a.list.add(a.start, a.n); err != nil {
				return err
			}
		}
	}
	if s.inc(incompatMMP) {
		if err := fixed.add(s.mmpBlock, 1); err != nil {
			return err
		}
	}
	for _, l := range []spans{bitmaps, inodes, tables} {
		for _, e := range l.list {
			if err := fixed.add(e.start, e.n); err != nil {
				return err
			}
		}
	}
	return nil
}

// Multiple mount protection (kernel documentation, ext4: mmp).
const (
	mmpMagic = 0x004d4d50
	mmpClean = 0xff4d4d50
)

// checkMMP refuses a filesystem that a system claims to have mounted.
func (s *super) checkMMP(r io.ReaderAt) error {
	if !s.inc(incompatMMP) {
		return nil
	}
	if s.mmpBlock <= s.firstBlock {
		return damaged("mount protection in block %d", s.mmpBlock)
	}
	b := make([]byte, s.blockSize)
	if err := s.readBlock(r, b, s.mmpBlock); err != nil {
		return err
	}
	le := binary.LittleEndian
	if m := le.Uint32(b); m != mmpMagic {
		return damaged("mount protection in block %d: magic %#x", s.mmpBlock, m)
	}
	if s.ro(roMetadataCsum) {
		if got, want := crc32c(s.seed, b[:superCsumAt]), le.Uint32(b[superCsumAt:]); got != want {
			return badSum("mount protection", got, want)
		}
	}
	if seq := le.Uint32(b[4:]); seq != mmpClean {
		return freespace.Refuse(freespace.InUse, "ext: mount protection says that the filesystem is in use (sequence %#x)", seq)
	}
	return nil
}

// checkBitmapSum compares the checksum of a block bitmap.
func (s *super) checkBitmapSum(b []byte, d desc, g uint64) error {
	if !s.ro(roMetadataCsum) {
		return nil
	}
	got := crc32c(s.seed, b[:s.clustersPerGroup/8])
	if s.desc < bitmapCsumHiEnd {
		got &= 0xffff
	}
	if got != d.bitmapCsum {
		return badSum(fmt.Sprintf("block bitmap of group %d", g), got, d.bitmapCsum)
	}
	return nil
}
