package qcow2fsck

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/fsck"
)

// Layout of the bitmaps extension and of a directory entry (section Bitmaps).
const (
	bitmapsExtLen       = 24
	bmFixed             = 24
	maxBitmaps          = 65535
	maxBitmapName       = 1023
	maxBitmapDirBytes   = 64 << 20
	maxBitmapTableBytes = 128 << 20
	bitmapInUse         = 1
	bitmapFlags         = 7
)

// bitmaps judges the bitmaps and claims their directory, tables and clusters.
func (c *check) bitmaps() {
	h := &c.h
	e := h.extension(extBitmaps)
	valid := h.autoclear&autoclearBitmaps != 0
	switch {
	case e == nil && valid:
		c.found(codeBmNoExt, offAutoclear, "autoclear_features", h.autoclear, "there is no bitmaps extension", nil)
		return
	case e == nil:
		return
	case !valid:
		if c.found(codeBmStale, e.off, "bitmaps extension", nil, "the autoclear bit is off", preen("drop the bitmaps")) {
			c.dropExtension(extBitmaps)
		}
		return
	}
	place, text := c.bitmapDirectory(e)
	if text == "" {
		c.bitmapClusters()
		return
	}
	c.claims, c.bmRefs, c.bmDirs = c.claimsBefore, nil, nil
	if c.found(codeBmDir, place, "bitmap directory", nil, text, full("drop all bitmaps")) {
		c.dropExtension(extBitmaps)
		h.autoclear &^= autoclearBitmaps
		c.put64(fsck.PhaseHeader, offAutoclear, h.autoclear)
		return
	}
	c.blocks.unknown = true // their clusters would look like leaks
}

// bitmapDirectory walks the directory; text says what makes it unusable.
func (c *check) bitmapDirectory(e *extension) (place int64, text string) {
	c.claimsBefore = c.claims.clone()
	if len(e.data) < bitmapsExtLen {
		return e.off, "the extension is too short"
	}
	n, size, off := be32(e.data), be64(e.data[8:]), be64(e.data[16:])
	switch {
	case n == 0 || n > maxBitmaps:
		return e.off + 8, fmt.Sprintf("nb_bitmaps is %d", n)
	case be32(e.data[4:]) != 0:
		return e.off + 12, "the reserved field is not 0"
	case size > maxBitmapDirBytes || size < uint64(n)*bmFixed:
		return e.off + 16, fmt.Sprintf("bitmap_directory_size is %d", size)
	case !c.aligned(off, size):
		return e.off + 24, fmt.Sprintf("bitmap_directory_offset is %#x", off)
	}
	if what := c.claim(off, size, "the bitmap directory"); what != "" {
		return e.off + 24, "the directory lies in " + what
	}
	dir := make([]byte, size)
	c.read(dir, int64(off))
	at := uint64(0)
	for i := range n {
		place = int64(off + at)
		if size-at < bmFixed {
			return place, "it ends within an entry"
		}
		b := dir[at:]
		name, extra := uint64(be16(b[18:])), uint64(be32(b[20:]))
		table, entries, flags := be64(b), be32(b[8:]), be32(b[12:])
		length := (bmFixed + extra + name + 7) &^ 7
		switch {
		case name == 0 || name > maxBitmapName:
			return place, fmt.Sprintf("entry %d: the name has %d bytes", i, name)
		case length > size-at:
			return place, fmt.Sprintf("entry %d reaches behind the directory", i)
		case flags&^bitmapFlags != 0:
			return place, fmt.Sprintf("entry %d: reserved flags are set", i)
		case b[16] != 1:
			return place, fmt.Sprintf("entry %d: the type is %d", i, b[16])
		case b[17] < 9 || b[17] > 31:
			return place, fmt.Sprintf("entry %d: the granularity is 1 << %d", i, b[17])
		case extra != 0 && flags&4 == 0:
			return place, fmt.Sprintf("entry %d has extra data that is not known", i)
		case uint64(entries)*8 > maxBitmapTableBytes || entries == 0 && c.h.size > 0 && flags&bitmapInUse == 0:
			return place, fmt.Sprintf("entry %d: the table has %d entries", i, entries)
		case !c.aligned(table, uint64(entries)*8):
			return place, fmt.Sprintf("entry %d: the table is at %#x", i, table)
		}
		if need := c.bitmapNeed(b[17]); flags&bitmapInUse == 0 && uint64(entries) != need {
			return place, fmt.Sprintf("entry %d: the table has %d entries, %d are needed", i, entries, need)
		}
		if what := c.claim(table, max(uint64(entries)*8, 1), "a bitmap table"); what != "" {
			return place, fmt.Sprintf("entry %d: the table lies in %s", i, what)
		}
		c.bitmapTable(place, int64(table), int64(entries), flags)
		at += length
	}
	if at != size {
		return int64(off + at), "the directory is longer than its entries"
	}
	return 0, ""
}

// bitmapNeed is the number of table entries of a bitmap of that granularity.
func (c *check) bitmapNeed(granularity uint8) uint64 {
	bits := (c.h.size + 1<<granularity - 1) >> granularity
	bytes := (bits + 7) / 8
	return (bytes + uint64(c.cs) - 1) >> c.bits
}

// bmRef is an entry of a bitmap's table that names a cluster.
type bmRef struct {
	cluster int64
	at      int64 // of the entry
	bitmap  int32 // index in check.bmDirs
}

// bmDir is the place of a bitmap's directory entry, and its flags.
type bmDir struct {
	at    int64
	flags uint32
}

// maxBmRefs bounds the clusters of all bitmaps together: 1 GiB of bits with the
// smallest clusters.
const maxBmRefs = 2 << 20

// bitmapTable judges the entries of one table by themselves and collects those
// that name a cluster. dir is the place of its directory entry.
func (c *check) bitmapTable(dir, off, n int64, flags uint32) {
	c.bmDirs = append(c.bmDirs, bmDir{dir, flags})
	buf := make([]byte, min(n*8, 64<<10))
	for pos := int64(0); pos < n*8 && c.failed() == nil; {
		b := buf[:min(int64(len(buf)), n*8-pos)]
		c.read(b, off+pos)
		for i := 0; i < len(b); i += 8 {
			entry := be64(b[i:])
			if entry == 0 {
				continue
			}
			r := bmRef{at: off + pos + int64(i), bitmap: int32(len(c.bmDirs) - 1)}
			host := entry & entryOffset
			r.cluster = int64(host >> c.bits)
			switch {
			case entry&^(entryOffset|1) != 0 || host != 0 && entry&1 != 0:
				c.badBitmapEntry(&r, "reserved bits are set")
			case host == 0:
			case host&uint64(c.cs-1) != 0:
				c.badBitmapEntry(&r, "the cluster is not on a cluster boundary")
			case !c.aligned(host, 1):
				c.badBitmapEntry(&r, "the cluster lies behind the end of the file")
			case len(c.bmRefs) >= maxBmRefs:
				c.badBitmapEntry(&r, "the bitmaps have too many clusters")
			default:
				c.bmRefs = append(c.bmRefs, r)
			}
		}
		pos += int64(len(b))
	}
}

// bitmapClusters claims what the bitmaps' tables name.
func (c *check) bitmapClusters() {
	slices.SortFunc(c.bmRefs, func(a, b bmRef) int { return cmp.Or(cmp.Compare(a.cluster, b.cluster), cmp.Compare(a.at, b.at)) })
	last := int64(-1)
	var claimed []claim
	for i := range c.bmRefs {
		r := &c.bmRefs[i]
		what := c.claims.at(r.cluster, 1)
		switch {
		case what != nil:
			c.badBitmapEntry(r, "the cluster lies in "+what.what)
		case r.cluster == last:
			c.badBitmapEntry(r, "another entry names the cluster")
		default:
			last = r.cluster
			if n := len(claimed); n > 0 && claimed[n-1].first+claimed[n-1].n == last {
				claimed[n-1].n++
			} else {
				claimed = append(claimed, claim{last, 1, "a bitmap"})
			}
		}
	}
	c.bmRefs, c.bmDirs = nil, nil
	for _, r := range claimed {
		c.claims.insert(r.first, r.n, r.what)
	}
}

// badBitmapEntry reports an entry that cannot be.
func (c *check) badBitmapEntry(r *bmRef, text string) {
	var entry [8]byte
	c.read(entry[:], r.at)
	if c.found(codeBmEntry, r.at, "bitmap table entry", be64(entry[:]), text, full("clear it and mark the bitmap as inconsistent")) {
		c.put64(fsck.PhaseMap, r.at, 0)
		dir := c.bmDirs[r.bitmap]
		c.planned(c.plan.Write(fsck.PhaseMap, dir.at+12, binary.BigEndian.AppendUint32(nil, dir.flags|bitmapInUse)))
	}
}
