package btrfs

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
)

// A log tree has what was synced since the last commit; the next mount puts it
// into the trees. Its blocks and the extents of the files in it are in no
// extent tree yet. (A new chunk forces a commit, so they are in known chunks.)
const (
	treeLog      = ^uint64(5) // -6: the tree of log trees, and each of these
	itemFileData = 108
	fileDataHead = 21
	fileDataSize = 53
	maxLogged    = 1 << 20 // ranges, of 16 bytes
)

// readLog collects what only the log trees know, by logical address.
func (v *volume) readLog() error {
	if v.logRoot == 0 {
		return nil
	}
	var all []blockmap.Range
	add := func(at, n uint64) error {
		c, ok := v.find(at)
		if !ok || n == 0 || n > c.end()-at {
			return damaged("the log tree has blocks %d+%d, which are in no chunk", at, n)
		}
		if len(all) == maxLogged {
			return freespace.Refuse(freespace.TooLarge, "btrfs: more than %d extents in the log tree", maxLogged)
		}
		all = append(all, blockmap.Range{Off: int64(at), Len: int64(n)})
		return nil
	}
	block := func(at uint64) error { return add(at, uint64(v.node)) }
	roots := &tree{v: v, id: treeLog, root: v.logRoot, generation: v.generation + 1, level: int(v.logLevel), block: block}
	err := roots.walk(key{}, lastKey, func(k key, b []byte) error {
		if k.object != treeLog || k.kind != itemRoot {
			return freespace.Refuse(freespace.UnknownFeature, "btrfs: the tree of log trees has an item %v", k)
		}
		t, err := v.decodeRoot(treeLog, b)
		if err != nil {
			return err
		}
		t.block = block
		return t.walk(key{}, lastKey, func(k key, b []byte) error {
			if k.kind != itemFileData {
				return nil
			}
			if len(b) < fileDataHead {
				return damaged("log tree: file extent of %d bytes", len(b))
			}
			const inline, regular, preallocated = 0, 1, 2
			switch kind := b[20]; {
			case kind == inline:
				return nil
			case kind != regular && kind != preallocated || len(b) != fileDataSize:
				return damaged("log tree: file extent of type %d, %d bytes", kind, len(b))
			}
			le := binary.LittleEndian
			at, n := le.Uint64(b[21:]), le.Uint64(b[29:])
			if at == 0 {
				return nil // a hole
			}
			return add(at, n)
		})
	})
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b blockmap.Range) int { return cmp.Compare(a.Off, b.Off) })
	for _, r := range all {
		v.logged.Add(r.Off, r.Len)
	}
	return nil
}
