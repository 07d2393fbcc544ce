package scavenge

import (
	"cmp"
	"encoding/binary"
	"slices"
)

const (
	maxExtents   = 4096    // of one directory
	maxDirBlocks = 1 << 16 // of one directory that are candidates for a block
	maxNodes     = 1 << 14 // of one extent tree
	maxCopies    = 1 << 10 // of one node
	maxTreeSteps = 1 << 28 // of one filesystem; only an image made for it needs so many
	extentsFlag  = 0x80000
)

// trees is the third pass over an ext4: the blocks of directories and extent
// trees, whose checksums begin with the seed of their inode, get the places
// that the inode, or the node above, names. fits tells whether a place in the
// filesystem can be that of the block at a loc.
func (x *extFS) trees(e *evidence, g *guest, fits func(loc, off int64) bool) error {
	if !x.sums {
		return nil
	}
	found := len(e.hits) // what is added below needs no third pass
	x.log.sort()
	buf := make([]byte, x.block)
	t := treeWalk{x: x, e: e, g: g, fits: fits, node: make([]byte, x.block)}
	for i := range found {
		h := e.hits[i]
		if h.fs != g.index || h.kind != kindInodes {
			continue
		}
		for k := range int64(h.n) {
			if !e.readLoc(buf, h.loc+k*x.block) {
				continue
			}
			first := x.inodeBlock(buf)
			if first == 0 {
				continue
			}
			for s := range x.perBlock {
				raw := buf[int64(s)*x.inodeSize:][:x.inodeSize]
				if ino, ok := x.inode(raw); ok && ino == first+s {
					if err := t.inode(ino, raw); err != nil {
						return err
					}
				}
			}
		}
	}
	e.finish()
	return nil
}

type treeWalk struct {
	x    *extFS
	e    *evidence
	g    *guest
	fits func(loc, off int64) bool
	node []byte
	// steps bounds what many blocks with one seed and many copies of its
	// inode would cost.
	steps int64
}

// seeds are the blocks with this seed.
func (t *treeWalk) seeds(seed uint32) []seedHit {
	key := func(s seedHit, _ int) int { return cmp.Or(cmp.Compare(s.fs, t.g.index), cmp.Compare(s.seed, seed)) }
	from, found := slices.BinarySearchFunc(t.e.seeds, 0, key)
	if !found {
		return nil
	}
	to := from
	for to < len(t.e.seeds) && key(t.e.seeds[to], 0) == 0 {
		to++
	}
	return t.e.seeds[from:to]
}

func (t *treeWalk) inode(ino uint64, raw []byte) error {
	le := binary.LittleEndian
	if le.Uint32(raw[32:])&extentsFlag == 0 || le.Uint16(raw[26:]) == 0 {
		return nil
	}
	blocks := t.seeds(t.x.seed(ino, raw))
	depth, nodes := parseExtents(raw[40:100], nil)
	if depth < 0 || t.steps > maxTreeSteps {
		return nil
	}
	var leaves []extent
	if depth == 0 {
		leaves, nodes = nodes, nil
	}
	for visited := 0; depth > 0 && len(nodes) > 0; depth-- {
		var next []extent
		for _, n := range nodes {
			t.steps += int64(len(blocks))
			if visited++; visited > maxNodes || t.steps > maxTreeSteps {
				break
			}
			b, err := t.child(blocks, depth-1, n)
			if err != nil {
				return err
			}
			if b != nil && len(next) < maxExtents && len(leaves) < maxExtents && t.e.readLoc(t.node, b.loc) {
				d, more := parseExtents(t.node, nil)
				if d == depth-1 && d > 0 {
					next = append(next, more...)
				} else if d == 0 {
					leaves = append(leaves, more...)
				}
			}
		}
		nodes = next
	}
	switch le.Uint16(raw) >> 12 {
	case 4:
		return t.directory(blocks, leaves)
	case 8:
		t.x.log.file(leaves)
		return t.tail(raw, leaves)
	}
	return nil
}

// child finds the block of an extent tree that n, of the node above it, names.
// Copies of it, in a journal or in a file of the guest, are evidence for the
// same place as the block itself, or else what lies first in the image would
// get it. It returns the one to read, which fits there if any does.
func (t *treeWalk) child(blocks []seedHit, depth int, n extent) (one *seedHit, err error) {
	if !t.inside(n.phys, 1) {
		return nil, nil
	}
	off, fits, found := int64(n.phys)*t.x.block, false, 0
	for k := range blocks {
		b := &blocks[k]
		// The child begins with the block that the parent says.
		if int(b.depth) != depth || uint64(b.first) != n.logical {
			continue
		}
		if found++; found > maxCopies {
			break
		}
		if err := t.e.add(t.g, kindPlain, b.loc, off, t.x.block); err != nil {
			return nil, err
		}
		if one == nil || !fits {
			if f := t.fits(b.loc, off); f || one == nil {
				one, fits = b, f
			}
		}
	}
	return one, nil
}

func (t *treeWalk) inside(phys, n uint64) bool {
	return phys > 0 && phys < t.x.blocks && n <= t.x.blocks-phys
}

// directory places the blocks of a directory. The first one names itself; of
// the others only those are placed that fit at one of the directory's places.
func (t *treeWalk) directory(blocks []seedHit, leaves []extent) error {
	for _, b := range blocks {
		if b.depth >= 0 || t.steps > maxTreeSteps {
			continue
		}
		place, places, tried := int64(0), 0, uint64(0)
		for _, l := range leaves {
			if !t.inside(l.phys, l.n) {
				continue
			}
			for k := range l.n {
				t.steps++
				if tried++; tried > maxDirBlocks || places > 1 {
					break
				}
				if (l.logical+k == 0) != (b.first == 1) {
					continue
				}
				if off := int64(l.phys+k) * t.x.block; t.fits(b.loc, off) {
					place, places = off, places+1
				}
			}
		}
		if places == 0 && tried > 0 && tried <= maxDirBlocks {
			// A copy: the directory has no block here.
			if err := t.e.add(t.g, kindAgainst, b.loc, 0, t.x.block); err != nil {
				return err
			}
		}
		if places == 1 && tried <= maxDirBlocks {
			if err := t.e.add(t.g, kindPlain, b.loc, place, t.x.block); err != nil {
				return err
			}
		}
	}
	return nil
}
