package xfs

import (
	"context"
	"encoding/binary"
	"io"
	"slices"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// The headers of an allocation group (XFS Algorithms and Data Structures,
// Allocation Groups): the first four sectors are superblock, AGF, AGI and AGFL.
const (
	agfCRCAt  = 216
	agflCRCAt = 32
	agflHead  = 36 // version 5 only
	// maxTreeBlocks bounds the block numbers held for one group: a group has
	// at most 2^31 blocks of 512 bytes, but never so many free extents.
	maxTreeBlocks = 1 << 20
	inodeChunk    = 64 // inodes
)

// group is an allocation group while it is judged.
type group struct {
	s      *super
	r      io.ReaderAt
	number uint64
	blocks uint64

	byStart, bySize tree
	freeBlocks      uint64 // as the AGF says, without the AGFL
	longest         uint64
	listBlocks      uint64
	treeBlocks      uint64
	first, last     uint64   // of the AGFL, both in use
	used            []record // metadata, sorted
}

// readGroup reads and checks the AGF.
func readGroup(r io.ReaderAt, s *super, number uint64) (*group, error) {
	g := &group{s: s, r: r, number: number, blocks: s.groupBlocks(number)}
	b := make([]byte, s.sector)
	if err := freespace.ReadAt(r, b, s.groupStart(number)+s.sector); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	if string(b[:4]) != "XAGF" || be.Uint32(b[4:]) != 1 {
		return nil, damaged("group %d: AGF with magic %x, version %d", number, b[:4], be.Uint32(b[4:]))
	}
	if s.v5 {
		if err := checkSum(b, agfCRCAt, "AGF"); err != nil {
			return nil, err
		}
		if [16]byte(b[64:80]) != s.metaUUID {
			return nil, damaged("group %d: the AGF is that of another filesystem", number)
		}
	}
	if n, length := uint64(be.Uint32(b[8:])), uint64(be.Uint32(b[12:])); n != number || length != g.blocks {
		return nil, damaged("group %d: the AGF says group %d of %d blocks, want %d", number, n, length, g.blocks)
	}
	g.byStart = tree{g, "free-space", [2]string{"ABTB", "AB3B"}, uint64(be.Uint32(b[16:])), int(be.Uint32(b[28:]) & 0xffff),
		func(a, b record) bool { return b.start > a.start+a.n }} // neighbours would be one
	g.bySize = tree{g, "free-size", [2]string{"ABTC", "AB3C"}, uint64(be.Uint32(b[20:])), int(be.Uint32(b[32:]) & 0xffff),
		func(a, b record) bool { return a.n < b.n || a.n == b.n && a.start < b.start }}
	if be.Uint32(b[28:]) > maxLevels || be.Uint32(b[32:]) > maxLevels {
		return nil, damaged("group %d: trees of %d and %d levels", number, be.Uint32(b[28:]), be.Uint32(b[32:]))
	}
	g.first, g.last, g.listBlocks = uint64(be.Uint32(b[40:])), uint64(be.Uint32(b[44:])), uint64(be.Uint32(b[48:]))
	g.freeBlocks, g.longest, g.treeBlocks = uint64(be.Uint32(b[52:])), uint64(be.Uint32(b[56:])), uint64(be.Uint32(b[60:]))
	if g.freeBlocks > g.blocks || g.listBlocks > g.blocks || g.treeBlocks > g.blocks {
		return nil, damaged("group %d: %d free, %d listed, %d tree blocks of %d", number, g.freeBlocks, g.listBlocks, g.treeBlocks, g.blocks)
	}
	return g, nil
}

func (g *group) use(start, n uint64) { g.used = append(g.used, record{start, n}) }

// fixed collects what is known to be used: headers, the blocks kept for the
// trees themselves, the log, the root directory's inodes.
func (g *group) fixed() error {
	s := g.s
	g.use(0, uint64((4*s.sector+s.blockSize-1)/s.blockSize))
	if ag, at := s.split(s.logStart); ag == g.number {
		g.use(at, s.logBlocks)
	}
	if ag, at := s.split(s.rootInode >> s.inodeShift); ag == g.number {
		g.use(at, max(1, min(inodeChunk/s.inodesPerBlock, g.blocks-at)))
	}
	return g.list()
}

// list reads the AGFL: a ring of block numbers.
func (g *group) list() error {
	s := g.s
	b := make([]byte, s.sector)
	if err := freespace.ReadAt(g.r, b, s.groupStart(g.number)+3*s.sector); err != nil {
		return err
	}
	be := binary.BigEndian
	head := 0
	if s.v5 {
		head = agflHead
		if string(b[:4]) != "XAFL" || uint64(be.Uint32(b[4:])) != g.number || [16]byte(b[8:24]) != s.metaUUID {
			return damaged("group %d: AGFL with magic %x of group %d", g.number, b[:4], be.Uint32(b[4:]))
		}
		if err := checkSum(b, agflCRCAt, "AGFL"); err != nil {
			return err
		}
	}
	room := uint64((len(b) - head) / 4)
	if g.first >= room || g.last >= room || g.listBlocks > room || (g.first+g.listBlocks+room-1)%room != g.last {
		return damaged("group %d: AGFL entries %d to %d of %d, %d in use", g.number, g.first, g.last, room, g.listBlocks)
	}
	for i := range g.listBlocks {
		n := uint64(be.Uint32(b[uint64(head)+(g.first+i)%room*4:]))
		if n == 0 || n >= g.blocks {
			return damaged("group %d: AGFL names block %d of %d", g.number, n, g.blocks)
		}
		g.use(n, 1)
	}
	return nil
}

// prove checks both trees against each other and against the counts, and
// collects the used blocks.
func (g *group) prove(ctx context.Context) error {
	if err := g.fixed(); err != nil {
		return err
	}
	count := 0
	block := func(at uint64) error {
		if count++; count > maxTreeBlocks {
			return freespace.Refuse(freespace.TooLarge, "xfs: group %d: more than %d blocks of free-space trees", g.number, maxTreeBlocks)
		}
		g.use(at, 1)
		return nil
	}
	var total, records, longest, mixed [2]uint64
	for i, t := range []*tree{&g.byStart, &g.bySize} {
		if err := t.walk(ctx, block, func(r record) error {
			total[i] += r.n
			records[i]++
			longest[i] = max(longest[i], r.n)
			mixed[i] += freespace.Mix(r.start<<32 | r.n)
			return nil
		}); err != nil {
			return err
		}
	}
	if total[0] != g.freeBlocks || longest[0] != g.longest {
		return freespace.Refuse(freespace.CountMismatch, "xfs: group %d: %d blocks are free in the tree, at most %d in a row; the AGF says %d and %d",
			g.number, total[0], longest[0], g.freeBlocks, g.longest)
	}
	if total[0] != total[1] || records[0] != records[1] || mixed[0] != mixed[1] {
		return damaged("group %d: the two free-space trees disagree", g.number)
	}
	slices.SortFunc(g.used, func(a, b record) int {
		if a.start != b.start {
			if a.start < b.start {
				return -1
			}
			return 1
		}
		return 0
	})
	for i := 1; i < len(g.used); i++ {
		if a, b := g.used[i-1], g.used[i]; b.start < a.start+a.n {
			return damaged("group %d: two structures share block %d", g.number, b.start)
		}
	}
	return nil
}

// emit hands over the free extents, which prove has seen before.
func (g *group) emit(ctx context.Context, emit freespace.Emit) error {
	s, used := g.s, g.used
	return g.byStart.walk(ctx, func(uint64) error { return nil }, func(r record) error {
		for len(used) > 0 && used[0].start+used[0].n <= r.start {
			used = used[1:]
		}
		if len(used) > 0 && used[0].start < r.start+r.n {
			return damaged("group %d: block %d holds metadata and is in the free-space tree", g.number, max(used[0].start, r.start))
		}
		return emit(s.groupStart(g.number)+int64(r.start)*s.blockSize, int64(r.n)*s.blockSize)
	})
}
