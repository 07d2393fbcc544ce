package btrfs

import (
	"cmp"
	"encoding/binary"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Tree blocks (kernel documentation, btrfs on-disk format: header, leaf,
// node): a header, then in a leaf items whose data is filled in from the end,
// or in a node pointers.
const (
	headSize    = 101
	itemSize    = 25
	pointerSize = 33
	keySize     = 17
)

// Trees by number, and kinds of items.
const (
	treeRoot   = 1
	treeExtent = 2
	treeChunk  = 3
	treeDevice = 4
	treeSpace  = 10
	treeGroup  = 11

	itemRoot        = 132
	itemExtent      = 168
	itemMetadata    = 169
	itemGroup       = 192
	itemSpaceInfo   = 198
	itemSpaceExtent = 199
	itemSpaceBitmap = 200
	itemDevExtent   = 204
	itemDevice      = 216
	itemChunk       = 228
	itemPersistent  = 249 // statistics of errors
	itemReplace     = 250
)

// key orders the items of a tree.
type key struct {
	object uint64
	kind   uint8
	offset uint64
}

var lastKey = key{^uint64(0), ^uint8(0), ^uint64(0)}

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.object, o.object), cmp.Compare(k.kind, o.kind), cmp.Compare(k.offset, o.offset))
}

func decodeKey(b []byte) key {
	le := binary.LittleEndian
	return key{le.Uint64(b), b[8], le.Uint64(b[9:])}
}

// tree is one tree. The block last read on each level is kept, so that walks
// through neighbouring ranges read every block once.
type tree struct {
	v          *volume
	id         uint64
	root       uint64
	generation uint64
	level      int
	block      func(at uint64) error // gets every block that is walked, when set
	kept       [maxLevel + 1]block
}

// block is a tree block that passed all checks.
type block struct {
	at uint64 // logical address; 0 is none
	b  []byte
	n  int // entries
}

// promise is what a parent says of a block: its keys are in [first, limit).
// Of a root nothing is known of the first.
type promise struct {
	first      *key
	limit      key
	generation uint64
}

// walk visits the items with keys from from to to, both included, in order.
// The data is only valid during the visit, which must not walk the same tree.
//
// No block is visited twice, whatever a hostile tree looks like: its children
// have keys in ranges that do not overlap, and none is empty.
func (t *tree) walk(from, to key, visit func(k key, data []byte) error) error {
	return t.node(t.root, t.level, promise{nil, lastKey, t.generation}, from, to, visit)
}

func (t *tree) node(at uint64, level int, p promise, from, to key, visit func(key, []byte) error) error {
	bl, err := t.load(at, level, p)
	if err == nil && t.block != nil {
		err = t.block(at)
	}
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	if level == 0 {
		for i := range bl.n {
			e := bl.b[headSize+i*itemSize:]
			k := decodeKey(e)
			if k.compare(from) < 0 {
				continue
			}
			if k.compare(to) > 0 {
				break
			}
			off, n := int64(le.Uint32(e[keySize:])), int64(le.Uint32(e[keySize+4:]))
			if err := visit(k, bl.b[headSize+off:][:n]); err != nil {
				return err
			}
		}
		return nil
	}
	for i := range bl.n {
		k := decodeKey(bl.b[headSize+i*pointerSize:])
		if k.compare(to) > 0 {
			break
		}
		limit := p.limit
		if i+1 < bl.n {
			limit = decodeKey(bl.b[headSize+(i+1)*pointerSize:])
		}
		if limit.compare(from) <= 0 && limit != lastKey {
			continue
		}
		e := bl.b[headSize+i*pointerSize+keySize:]
		child := promise{&k, limit, le.Uint64(e[8:])}
		if err := t.node(le.Uint64(e), level-1, child, from, to, visit); err != nil {
			return err
		}
	}
	return nil
}

// load reads and checks a block.
func (t *tree) load(at uint64, level int, p promise) (*block, error) {
	bl := &t.kept[level]
	if bl.at != at || at == 0 {
		if err := t.v.ctx.Err(); err != nil {
			return nil, err
		}
		if bl.b == nil {
			bl.b = make([]byte, t.v.node)
		}
		bl.at = 0
		if err := t.v.readNode(bl.b, at); err != nil {
			return nil, err
		}
		n, err := t.header(bl.b, at, level)
		if err != nil {
			return nil, err
		}
		if bl.n = n; level == 0 {
			err = t.checkLeaf(bl)
		} else {
			err = t.checkNode(bl)
		}
		if err != nil {
			return nil, err
		}
		bl.at = at
	}
	return bl, t.checkPromise(bl, at, level, p)
}

func (t *tree) header(b []byte, at uint64, level int) (int, error) {
	le := binary.LittleEndian
	if err := checkSum(t.v.sum, b, "tree block", at); err != nil {
		return 0, err
	}
	switch {
	case [16]byte(b[32:48]) != t.v.metadataUUID || le.Uint64(b[48:]) != at:
		return 0, damaged("tree %d: the block at %d belongs to %d of filesystem %x", t.id, at, le.Uint64(b[48:]), b[32:48])
	case le.Uint64(b[56:])&1 == 0:
		return 0, damaged("tree %d: the block at %d was not finished", t.id, at)
	case le.Uint64(b[88:]) != t.id || int(b[100]) != level:
		return 0, damaged("tree %d: the block at %d is of tree %d, level %d; want level %d", t.id, at, le.Uint64(b[88:]), b[100], level)
	}
	n, size := int64(le.Uint32(b[96:])), int64(itemSize)
	if level > 0 {
		size = pointerSize
	}
	if room := (t.v.node - headSize) / size; n > room || n == 0 && level > 0 {
		return 0, damaged("tree %d: the block at %d has %d entries, there is room for %d", t.id, at, n, room)
	}
	return int(n), nil
}

// checkLeaf checks that keys ascend and that the data of the items fills the
// block from its end without a gap.
func (t *tree) checkLeaf(bl *block) error {
	le := binary.LittleEndian
	end := t.v.node - headSize
	var last key
	for i := range bl.n {
		e := bl.b[headSize+i*itemSize:]
		k := decodeKey(e)
		off, n := int64(le.Uint32(e[keySize:])), int64(le.Uint32(e[keySize+4:]))
		if i > 0 && last.compare(k) >= 0 || off+n != end || off < int64(bl.n*itemSize) {
			return damaged("tree %d: item %d of the leaf at %d: key %v behind %v, data %d+%d before %d", t.id, i, le.Uint64(bl.b[48:]), k, last, off, n, end)
		}
		last, end = k, off
	}
	return nil
}

func (t *tree) checkNode(bl *block) error {
	var last key
	for i := range bl.n {
		k := decodeKey(bl.b[headSize+i*pointerSize:])
		if i > 0 && last.compare(k) >= 0 {
			return damaged("tree %d: pointer %d of the node at %d: key %v behind %v", t.id, i, binary.LittleEndian.Uint64(bl.b[48:]), k, last)
		}
		last = k
	}
	return nil
}

// checkPromise compares a block with what its parent says.
func (t *tree) checkPromise(bl *block, at uint64, level int, p promise) error {
	if g := binary.LittleEndian.Uint64(bl.b[80:]); g != p.generation {
		return damaged("tree %d: the block at %d is of generation %d, want %d", t.id, at, g, p.generation)
	}
	if bl.n == 0 {
		if p.first != nil {
			return damaged("tree %d: the leaf at %d is empty", t.id, at)
		}
		return nil
	}
	size := itemSize
	if level > 0 {
		size = pointerSize
	}
	first, last := decodeKey(bl.b[headSize:]), decodeKey(bl.b[headSize+(bl.n-1)*size:])
	if p.first != nil && *p.first != first || p.limit != lastKey && last.compare(p.limit) >= 0 {
		return damaged("tree %d: the block at %d has keys %v to %v, its parent says otherwise", t.id, at, first, last)
	}
	return nil
}

// readNode fills b from a logical address, by the first copy.
func (v *volume) readNode(b []byte, at uint64) error {
	c, ok := v.find(at)
	if !ok || at%uint64(v.sector) != 0 || uint64(len(b)) > c.end()-at || c.kind&(kindSystem|kindMetadata) == 0 {
		return damaged("a tree block at %d, which is in no chunk for metadata", at)
	}
	return freespace.ReadAt(v.r, b, int64(c.stripes[0]+at-c.start))
}

// findTrees looks up the roots of the trees that are needed.
func (v *volume) findTrees() error {
	roots := &tree{v: v, id: treeRoot, root: v.root, generation: v.generation, level: int(v.rootLevel)}
	var err error
	open := func(id uint64) *tree {
		if err != nil {
			return nil
		}
		var t *tree
		t, err = roots.open(id)
		return t
	}
	v.devices, v.extents = open(treeDevice), open(treeExtent)
	v.groups = v.extents
	if v.ro&roGroupTree != 0 {
		v.groups = open(treeGroup)
	}
	if v.ro&roFreeSpaceTree != 0 && v.ro&roFreeSpaceValid != 0 {
		v.space = open(treeSpace)
	}
	return err
}

// open finds a tree by its root item in the tree of roots.
func (t *tree) open(id uint64) (*tree, error) {
	var found *tree
	from := key{id, itemRoot, 0}
	err := t.walk(from, key{id, itemRoot, ^uint64(0)}, func(_ key, b []byte) (err error) {
		if found != nil {
			return damaged("two root items of tree %d", id)
		}
		found, err = t.v.decodeRoot(id, b)
		return err
	})
	if err == nil && found == nil {
		err = damaged("no tree %d", id)
	}
	return found, err
}

// decodeRoot decodes a root item (btrfs_tree.h: btrfs_root_item). The trees of
// the log are a generation ahead.
func (v *volume) decodeRoot(id uint64, b []byte) (*tree, error) {
	if len(b) < 239 {
		return nil, damaged("root item of tree %d of %d bytes", id, len(b))
	}
	le := binary.LittleEndian
	t := &tree{v: v, id: id, generation: le.Uint64(b[160:]), root: le.Uint64(b[176:]), level: int(b[238])}
	if t.level > maxLevel || t.generation > v.generation && id != treeLog {
		return nil, damaged("tree %d of %d levels, generation %d", id, t.level, t.generation)
	}
	return t, nil
}
