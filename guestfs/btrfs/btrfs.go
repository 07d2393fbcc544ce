// Package btrfs proves ranges of a btrfs filesystem on one device free.
//
// Design note. Btrfs has two levels of space. The device is cut into device
// extents, which belong to chunks of the logical address space; what no device
// extent covers is free. A chunk is a block group, and in it the extent tree
// says what is used: what no extent covers is free in each copy that the chunk
// has on the device. Where the filesystem keeps a free-space tree as well, and
// says that it is valid, both must agree to the byte; without one the extent
// tree must still agree with what each block group and the superblock count.
//
// Every block of a tree is checked: checksum, place, filesystem, owner, level,
// generation and the keys that its parent promised. Chunks, device extents and
// block groups must match one to one. One contradiction anywhere, and nothing
// is free.
//
// Nothing is replayed. The committed trees are whole at any moment, since
// blocks in use are never overwritten. A log tree, as fsync leaves it, has
// blocks and extents that only it knows (log.go); they are used as well.
//
// Never free, because no tree mentions them, are the first MiB of the device
// and the places of the superblock's copies. Old tree roots, which a mount
// with rescue=usebackuproot would look for, lie in free space and go with it.
//
// Sources: the kernel's documentation of the on-disk format of btrfs and its
// user-space header btrfs_tree.h, and the behaviour of the kernel where those
// are silent.
package btrfs

import (
	"context"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Detect reports whether head has the magic of a superblock.
func Detect(head []byte) bool {
	const at = superOffset + magicAt
	return len(head) >= at+len(superMagic) && string(head[at:at+len(superMagic)]) == superMagic
}

// Free is the freespace.Reader of btrfs.
func Free(ctx context.Context, r io.ReaderAt, size int64, emit freespace.Emit) (freespace.Info, error) {
	var info freespace.Info
	s, err := readSuper(r, size)
	if s != nil {
		info.UUID, info.Label, info.BlockSize = uuidString(s.fsid), s.label, s.sector
	}
	if err != nil {
		return info, err
	}
	if err := s.checkMirrors(r, size); err != nil {
		return info, err
	}
	v := &volume{super: s, r: r, ctx: ctx}
	if err := v.readChunks(); err != nil {
		return info, err
	}
	if err := v.findTrees(); err != nil {
		return info, err
	}
	if err := v.readLog(); err != nil {
		return info, err
	}
	return info, v.judge(newKeeper(emit))
}

// volume is a filesystem while it is judged.
type volume struct {
	*super
	r   io.ReaderAt
	ctx context.Context

	chunks  []chunk // by logical address
	extents *tree
	groups  *tree        // where the block group items are: may be extents
	space   *tree        // nil: there is no valid free-space tree
	logged  blockmap.Set // logical addresses that only the log trees know
	devices *tree
}

func damaged(format string, args ...any) error {
	return freespace.Refuse(freespace.Damaged, "btrfs: %s", fmt.Sprintf(format, args...))
}

func uuidString(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// reserved are the places that are never free: the first MiB, which the
// kernel's allocator leaves alone, and the stripes with the copies of the
// superblock at 64 MiB and 256 GiB.
var reserved = [...]struct{ start, end int64 }{
	{0, 1 << 20},
	{64 << 20, 64<<20 + superStripe},
	{256 << 30, 256<<30 + superStripe},
}

// keeper hands ranges of the device over, without what is reserved.
type keeper struct{ emit freespace.Emit }

func newKeeper(emit freespace.Emit) keeper { return keeper{emit} }

func (k keeper) free(off, n int64) error {
	end := off + n
	for _, r := range reserved {
		if r.end <= off || end <= r.start {
			continue
		}
		if off < r.start {
			if err := k.emit(off, r.start-off); err != nil {
				return err
			}
		}
		if off = r.end; off >= end {
			return nil
		}
	}
	if off >= end {
		return nil
	}
	return k.emit(off, end-off)
}
