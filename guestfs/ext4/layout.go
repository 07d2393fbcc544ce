package ext4

import (
	"io"
	"slices"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// span is a run of blocks.
type span struct{ start, n uint64 }

func (s span) end() uint64 { return s.start + s.n }

// maxSpans bounds the runs of fixed metadata that are held in memory, 64 MiB.
// With flex_bg a run is that of up to 16 groups, without it there are up to
// three runs in every 128 MiB (blocks of 4,096 bytes).
const maxSpans = 4 << 20

// spans collects runs of blocks, joining each with the one before.
type spans struct{ list []span }

func (l *spans) add(start, n uint64) error {
	if n == 0 {
		return nil
	}
	if k := len(l.list); k > 0 && l.list[k-1].end() == start {
		l.list[k-1].n += n
		return nil
	}
	if len(l.list) == maxSpans {
		return freespace.Refuse(freespace.TooLarge, "ext: more than %d runs of metadata", maxSpans)
	}
	l.list = append(l.list, span{start, n})
	return nil
}

// sorted orders the runs and refuses two that overlap.
func (l *spans) sorted() ([]span, error) {
	slices.SortFunc(l.list, func(a, b span) int {
		switch {
		case a.start < b.start:
			return -1
		case a.start > b.start:
			return 1
		}
		return 0
	})
	for i := 1; i < len(l.list); i++ {
		if a, b := l.list[i-1], l.list[i]; b.start < a.end() {
			return nil, damaged("two structures share block %d", b.start)
		}
	}
	return l.list, nil
}

// groupFirst is the first block of group g.
func (s *super) groupFirst(g uint64) uint64 { return s.firstBlock + g*s.perGroup }

// groupBlocks is the number of blocks in group g; the last group may be short.
func (s *super) groupBlocks(g uint64) uint64 { return min(s.perGroup, s.blocks-s.groupFirst(g)) }

func powerOf(n, base uint64) bool {
	p := base
	for p < n {
		p *= base
	}
	return p == n
}

// hasSuper reports whether group g begins with a superblock.
func (s *super) hasSuper(g uint64) bool {
	switch {
	case g == 0:
		return true
	case s.com(compatSparseSuper2):
		return g == uint64(s.backupGroups[0]) || g == uint64(s.backupGroups[1])
	case g == 1 || !s.ro(roSparseSuper):
		return true
	}
	return powerOf(g, 3) || powerOf(g, 5) || powerOf(g, 7)
}

// shifted reports the one case in which the first superblock is not in the
// first block of group 0: bigalloc with blocks of 1,024 bytes.
func (s *super) shifted(g uint64) bool { return g == 0 && s.blockSize == 1024 && s.firstBlock == 0 }

// base is the run of superblock, descriptors and reserved descriptor blocks
// at the start of group g.
func (s *super) base(g uint64) span {
	b := span{start: s.groupFirst(g)}
	super := s.hasSuper(g)
	if super {
		b.n++
	}
	if s.shifted(g) {
		b.n++
	}
	if !s.inc(incompatMetaBG) || g/s.descPerBlock < s.firstMetaBG {
		if super {
			if s.inc(incompatMetaBG) {
				b.n += s.firstMetaBG
			} else {
				b.n += s.descBlocks + s.reservedGDT
			}
		}
	} else if k := g % s.descPerBlock; k <= 1 || k == s.descPerBlock-1 {
		b.n++
	}
	return b
}

// descBlock is the block that holds descriptors k*descPerBlock and following.
func (s *super) descBlock(k uint64) uint64 {
	if !s.inc(incompatMetaBG) || k < s.firstMetaBG {
		first := uint64(1)
		if s.blockSize == 1024 {
			first = 2 // the superblock is in block 1
		}
		return first + k
	}
	g := k * s.descPerBlock
	at := s.groupFirst(g)
	if s.hasSuper(g) {
		at++
	}
	if s.shifted(g) {
		at++
	}
	return at
}

// readBlock fills p, which is one block, from block n.
func (s *super) readBlock(r io.ReaderAt, p []byte, n uint64) error {
	if n >= s.blocks {
		return damaged("block %d of %d", n, s.blocks)
	}
	return freespace.ReadAt(r, p, int64(n)*s.blockSize)
}

// checkBackup compares the superblock with its first copy, if there is one:
// without metadata_csum nothing else would notice a wrong bit in it.
func (s *super) checkBackup(r io.ReaderAt) error {
	for g := uint64(1); g < s.groups; g++ {
		if !s.hasSuper(g) {
			if s.com(compatSparseSuper2) {
				if b := uint64(s.backupGroups[0]); g < b && b < s.groups {
					g = b - 1
					continue
				}
				return nil
			}
			continue
		}
		b, err := readSuper(r, int64(s.groupFirst(g))*s.blockSize)
		if err != nil {
			return err
		}
		// Kernels that grew a mounted filesystem left 0 in the copies.
		if uint64(b.groupNumber) != g&0xffff && b.groupNumber != 0 {
			return damaged("the superblock in group %d says that it is in group %d", g, b.groupNumber)
		}
		return s.sameLayout(b)
	}
	return nil
}
