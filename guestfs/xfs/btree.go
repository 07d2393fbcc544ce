package xfs

import (
	"context"
	"encoding/binary"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Free-space btrees (XFS Algorithms and Data Structures, AG Free Space
// B+trees): a header, then records (first block, length), or in the nodes keys
// of that form and behind the room for all of them pointers of 4 bytes.
const (
	headerV4  = 16
	headerV5  = 56
	blockCRC  = 52
	recordLen = 8
	noBlock   = 0xffffffff
	maxLevels = 9
)

// record is a free extent of a group, in blocks.
type record struct{ start, n uint64 }

// tree is one of the two free-space btrees of a group.
type tree struct {
	g      *group
	name   string
	magic  [2]string // of version 4 and 5
	root   uint64
	levels int
	// less is the order of the tree.
	less func(a, b record) bool
}

// walk visits the records of a tree in order. It checks every block of it:
// place, checksum, owner, level, siblings, keys and order. No block can be
// visited twice, because its records would be out of order.
type walk struct {
	t      *tree
	ctx    context.Context
	visit  func(record) error
	block  func(at uint64) error // gets the number of every block of the tree
	last   record
	any    bool
	levels []sibling
	bufs   [][]byte
}

// sibling is the block last visited on a level, and the one that it names as
// the next.
type sibling struct{ at, right uint64 }

func (t *tree) walk(ctx context.Context, block func(uint64) error, visit func(record) error) error {
	if t.levels < 1 || t.levels > maxLevels {
		return damaged("group %d: %s tree of %d levels", t.g.number, t.name, t.levels)
	}
	w := &walk{t: t, ctx: ctx, visit: visit, block: block, levels: make([]sibling, t.levels), bufs: make([][]byte, t.levels)}
	for i := range w.levels {
		w.levels[i] = sibling{noBlock, noBlock}
		w.bufs[i] = make([]byte, t.g.s.blockSize)
	}
	if err := w.node(t.root, t.levels-1, nil); err != nil {
		return err
	}
	for _, l := range w.levels {
		if l.right != noBlock {
			return damaged("group %d: the %s tree does not end at block %d", t.g.number, t.name, l.at)
		}
	}
	return nil
}

// node visits a block. key is what its parent calls its first record; the root
// has none.
func (w *walk) node(at uint64, level int, key *record) error {
	t, s := w.t, w.t.g.s
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if at == 0 || at >= t.g.blocks {
		return damaged("group %d: %s tree block %d of %d", t.g.number, t.name, at, t.g.blocks)
	}
	b := w.bufs[level]
	if err := freespace.ReadAt(t.g.r, b, s.groupStart(t.g.number)+int64(at)*s.blockSize); err != nil {
		return err
	}
	n, err := w.header(b, at, level)
	if err != nil {
		return err
	}
	if err := w.block(at); err != nil {
		return err
	}
	head := int64(headerV4)
	if s.v5 {
		head = headerV5
	}
	size := int64(recordLen)
	if level > 0 {
		size += 4
	}
	room := (s.blockSize - head) / size
	if n > room || n == 0 && key != nil || n == 0 && level > 0 {
		return damaged("group %d: %s tree block %d has %d records, there is room for %d", t.g.number, t.name, at, n, room)
	}
	be := binary.BigEndian
	for i := range n {
		e := b[head+i*recordLen:]
		rec := record{uint64(be.Uint32(e)), uint64(be.Uint32(e[4:]))}
		if i == 0 && key != nil && *key != rec {
			return damaged("group %d: %s tree block %d begins with %v, its parent says %v", t.g.number, t.name, at, rec, *key)
		}
		if level > 0 {
			child := uint64(be.Uint32(b[head+room*recordLen+i*4:]))
			if err := w.node(child, level-1, &rec); err != nil {
				return err
			}
			continue
		}
		if err := w.record(rec); err != nil {
			return err
		}
	}
	return nil
}

// header checks the head of a block and returns the number of its records.
func (w *walk) header(b []byte, at uint64, level int) (int64, error) {
	t, s := w.t, w.t.g.s
	be := binary.BigEndian
	magic := t.magic[0]
	if s.v5 {
		magic = t.magic[1]
	}
	if string(b[:4]) != magic || int(be16(b[4:])) != level {
		return 0, damaged("group %d: %s tree block %d has magic %x, level %d; want level %d", t.g.number, t.name, at, b[:4], be16(b[4:]), level)
	}
	if s.v5 {
		if err := checkSum(b, blockCRC, t.name+" tree block"); err != nil {
			return 0, err
		}
		address := uint64(s.groupStart(t.g.number)+int64(at)*s.blockSize) / 512
		if be.Uint64(b[16:]) != address || be.Uint32(b[48:]) != uint32(t.g.number) || [16]byte(b[32:48]) != s.metaUUID {
			return 0, damaged("group %d: %s tree block %d belongs elsewhere", t.g.number, t.name, at)
		}
	}
	left, right := uint64(be.Uint32(b[8:])), uint64(be.Uint32(b[12:]))
	before := w.levels[level]
	if left != before.at || before.at != noBlock && before.right != at {
		return 0, damaged("group %d: %s tree block %d is not the neighbour of %d", t.g.number, t.name, at, before.at)
	}
	w.levels[level] = sibling{at, right}
	return int64(be16(b[6:])), nil
}

func (w *walk) record(rec record) error {
	g := w.t.g
	if rec.start == 0 || rec.n == 0 || rec.start >= g.blocks || rec.n > g.blocks-rec.start {
		return damaged("group %d: free extent %d+%d of %d blocks", g.number, rec.start, rec.n, g.blocks)
	}
	if w.any && !w.t.less(w.last, rec) {
		return damaged("group %d: %s tree: %v behind %v", g.number, w.t.name, rec, w.last)
	}
	w.last, w.any = rec, true
	return w.visit(rec)
}
