// Package xfs proves blocks of an XFS filesystem free.
//
// Design note. XFS keeps its free extents twice in every allocation group: in a
// btree by place and in one by size. Both are read whole; they must agree with
// each other, with the counts of the group and of the superblock, and with the
// places of the metadata that are known without reading any file. In version 5
// every block that is read has a checksum. One contradiction anywhere, and
// nothing is free.
//
// Nothing is replayed: the log must end with an unmount record (log.go), which
// is the only sign that the trees are what the filesystem last knew.
//
// Sources: XFS Algorithms and Data Structures, and the behaviour of the kernel
// where that is silent.
package xfs

import (
	"context"
	"io"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Free is the freespace.Reader of XFS.
func Free(ctx context.Context, r io.ReaderAt, size int64, emit freespace.Emit) (freespace.Info, error) {
	var info freespace.Info
	s, err := readSuper(r, 0, size)
	if err != nil {
		return info, err
	}
	info.UUID, info.Label, info.BlockSize = uuidString(s.uuid), s.label, s.blockSize
	if err := s.checkCopy(r, size); err != nil {
		return info, err
	}
	if err := s.checkLog(ctx, r); err != nil {
		return info, err
	}
	free := uint64(0)
	for n := range s.agents {
		g, err := readGroup(r, s, n)
		if err != nil {
			return info, err
		}
		if err := g.prove(ctx); err != nil {
			return info, err
		}
		if err := g.emit(ctx, emit); err != nil {
			return info, err
		}
		free += g.freeBlocks + g.listBlocks + g.treeBlocks
	}
	if s.lazy && free != s.freeBlocks {
		return info, freespace.Refuse(freespace.CountMismatch, "xfs: the groups have %d free blocks, the superblock says %d", free, s.freeBlocks)
	}
	return info, nil
}
