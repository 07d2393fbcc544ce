package btrfs

import (
	"encoding/binary"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// runs adds up ranges of a block group in ascending order, neighbours joined:
// how many there are, how long they are, and a number that tells two sets of
// them apart.
type runs struct {
	count, total, mixed uint64
	start, n            uint64 // the open one
}

func (r *runs) add(start, n uint64) {
	if r.n > 0 && r.start+r.n == start {
		r.n += n
		return
	}
	r.close()
	r.start, r.n = start, n
}

func (r *runs) close() {
	if r.n == 0 {
		return
	}
	r.count++
	r.total += r.n
	r.mixed += freespace.Mix(freespace.Mix(r.start) + r.n)
	r.n = 0
}

// judgeGroup calls free for every range of a chunk that no extent uses, by
// logical address, and returns how many bytes are used.
func (v *volume) judgeGroup(c *chunk, free func(off, n uint64) error) (used uint64, err error) {
	counted, err := v.groupUsed(c)
	if err != nil {
		return 0, err
	}
	var gaps runs
	gap := func(start, end uint64) error {
		if start == end {
			return nil
		}
		gaps.add(start, end-start)
		for r := range v.logged.Gaps(int64(start), int64(end-start)) {
			if err := free(uint64(r.Off), uint64(r.Len)); err != nil {
				return err
			}
		}
		return nil
	}
	at := c.start
	err = v.extents.walk(key{object: c.start}, key{c.end() - 1, ^uint8(0), ^uint64(0)}, func(k key, _ []byte) error {
		n, err := v.extentLen(k)
		if err != nil || n == 0 {
			return err
		}
		if k.object < at || n > c.end()-k.object || k.object%uint64(v.sector) != 0 || n%uint64(v.sector) != 0 {
			return damaged("extent %d+%d in the chunk %d+%d, the one before ends at %d", k.object, n, c.start, c.n, at)
		}
		if err := gap(at, k.object); err != nil {
			return err
		}
		at = k.object + n
		return nil
	})
	if err == nil {
		err = gap(at, c.end())
	}
	if err != nil {
		return 0, err
	}
	gaps.close()
	if counted > c.n || gaps.total != c.n-counted {
		return 0, freespace.Refuse(freespace.CountMismatch, "btrfs: block group %d: %d of %d bytes are in no extent, it says that %d are used", c.start, gaps.total, c.n, counted)
	}
	if v.space != nil {
		if err := v.checkSpace(c, gaps); err != nil {
			return 0, err
		}
	}
	return counted, nil
}

// groupUsed reads the block group item of a chunk.
func (v *volume) groupUsed(c *chunk) (used uint64, err error) {
	found := false
	err = v.groups.walk(key{c.start, itemGroup, 0}, key{c.start, itemGroup, ^uint64(0)}, func(k key, b []byte) error {
		if found || k.offset != c.n || len(b) != 24 {
			return damaged("block group %d+%d of the chunk of %d bytes", k.object, k.offset, c.n)
		}
		found = true
		le := binary.LittleEndian
		if used = le.Uint64(b); le.Uint64(b[16:]) != c.kind {
			return damaged("block group %d is of kind %#x, its chunk of %#x", c.start, le.Uint64(b[16:]), c.kind)
		}
		return nil
	})
	if err == nil && !found {
		err = damaged("chunk %d has no block group", c.start)
	}
	return used, err
}

// extentLen is the length of the extent that an item of the extent tree
// stands for, 0 when it stands for none.
func (v *volume) extentLen(k key) (uint64, error) {
	switch k.kind {
	case itemExtent:
		if k.offset == 0 {
			return 0, damaged("an empty extent at %d", k.object)
		}
		return k.offset, nil
	case itemMetadata:
		return uint64(v.node), nil
	// Block groups, and references to extents, which have the same addresses.
	case itemGroup, 176, 178, 182, 184:
		return 0, nil
	}
	return 0, freespace.Refuse(freespace.UnknownFeature, "btrfs: the extent tree has an item %v", k)
}

// checkSpace compares the free-space tree of a chunk with what the extent
// tree leaves free (kernel documentation, btrfs on-disk format: free space
// tree): one item with the number of runs, then runs or bitmaps.
func (v *volume) checkSpace(c *chunk, gaps runs) error {
	var r runs
	at, count := c.start, uint64(0)
	bitmaps, info := false, false
	sector := uint64(v.sector)
	err := v.space.walk(key{object: c.start}, key{c.end() - 1, ^uint8(0), ^uint64(0)}, func(k key, b []byte) error {
		if k.kind == itemSpaceInfo {
			le := binary.LittleEndian
			if info || k.object != c.start || k.offset != c.n || len(b) != 8 || le.Uint32(b[4:])&^1 != 0 {
				return damaged("free space of chunk %d: item %v of %d bytes", c.start, k, len(b))
			}
			info, count, bitmaps = true, uint64(le.Uint32(b)), le.Uint32(b[4:]) != 0
			return nil
		}
		if !info || k.object < at || k.offset == 0 || k.offset > c.end()-k.object || k.object%sector != 0 || k.offset%sector != 0 {
			return damaged("free space of chunk %d: item %v behind %d", c.start, k, at)
		}
		at = k.object + k.offset
		switch {
		case k.kind == itemSpaceExtent && !bitmaps && len(b) == 0:
			r.add(k.object, k.offset)
		case k.kind == itemSpaceBitmap && bitmaps && uint64(len(b)) == (k.offset/sector+7)/8:
			for i := range k.offset / sector {
				if b[i/8]>>(i%8)&1 != 0 {
					r.add(k.object+i*sector, sector)
				}
			}
		default:
			return damaged("free space of chunk %d: item %v of %d bytes", c.start, k, len(b))
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.close()
	if !info || r.count != count || r != gaps {
		return freespace.Refuse(freespace.CountMismatch, "btrfs: block group %d: the free-space tree has %d bytes in %d ranges (it says %d), the extent tree leaves %d in %d",
			c.start, r.total, r.count, count, gaps.total, gaps.count)
	}
	return nil
}
