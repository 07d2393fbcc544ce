package btrfs

import (
	"cmp"
	"encoding/binary"
	"slices"
	"sort"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Kinds of chunks (btrfs_tree.h: BTRFS_BLOCK_GROUP_*).
const (
	kindData     = 0x1
	kindSystem   = 0x2
	kindMetadata = 0x4
	kindDup      = 0x20
	kindContents = kindData | kindSystem | kindMetadata

	firstChunkObject = 256
	devicesObject    = 1
	chunkHead        = 48
	stripeSize       = 32
	devExtentSize    = 48
	// maxChunks bounds the memory for chunks, 56 bytes each; chunks have 1 GiB
	// or more on large filesystems.
	maxChunks = 1 << 18
)

// chunk is a piece of the logical address space and where it lies on the
// device: once, or twice as DUP.
type chunk struct {
	start, n uint64
	kind     uint64
	stripes  []uint64 // bytes of the device
	counted  bool     // judge has added what it uses
}

func (c *chunk) end() uint64 { return c.start + c.n }

// find is the chunk with a logical address.
func (v *volume) find(at uint64) (*chunk, bool) {
	i := sort.Search(len(v.chunks), func(i int) bool { return v.chunks[i].end() > at })
	if i == len(v.chunks) || v.chunks[i].start > at {
		return nil, false
	}
	return &v.chunks[i], true
}

// decodeChunk decodes and checks a chunk item.
func (v *volume) decodeChunk(k key, b []byte) (chunk, error) {
	if len(b) < chunkHead+stripeSize {
		return chunk{}, damaged("chunk %d: an item of %d bytes", k.offset, len(b))
	}
	le := binary.LittleEndian
	c := chunk{start: k.offset, n: le.Uint64(b), kind: le.Uint64(b[24:])}
	stripes := int(le.Uint16(b[44:]))
	want := 0
	switch c.kind &^ kindContents {
	case 0:
		want = 1
	case kindDup:
		want = 2
	default:
		return c, freespace.Refuse(freespace.Unsupported, "btrfs: chunk %d has profile %#x", c.start, c.kind)
	}
	if stripes != want || len(b) != chunkHead+stripes*stripeSize || c.kind&kindContents == 0 {
		return c, damaged("chunk %d of kind %#x: %d stripes in %d bytes", c.start, c.kind, stripes, len(b))
	}
	sector := uint64(v.sector)
	if c.n == 0 || c.n > v.deviceBytes || c.start > 1<<62 || c.start%sector != 0 || c.n%sector != 0 {
		return c, damaged("chunk %d of %d bytes on a device of %d", c.start, c.n, v.deviceBytes)
	}
	for i := range stripes {
		e := b[chunkHead+i*stripeSize:][:stripeSize]
		at := le.Uint64(e[8:])
		if le.Uint64(e) != v.deviceID || [16]byte(e[16:]) != v.deviceUUID {
			return c, freespace.Refuse(freespace.Unsupported, "btrfs: chunk %d lies on another device", c.start)
		}
		if at%sector != 0 || at > v.deviceBytes || c.n > v.deviceBytes-at {
			return c, damaged("chunk %d: stripe %d+%d of a device of %d bytes", c.start, at, c.n, v.deviceBytes)
		}
		c.stripes = append(c.stripes, at)
	}
	return c, nil
}

// readChunks reads the chunks of the chunk tree from the superblock, and
// through these all others.
func (v *volume) readChunks() error {
	for b := v.sysChunks; len(b) > 0; {
		if len(b) < keySize+chunkHead {
			return damaged("superblock: the chunks end in the middle of one")
		}
		k := decodeKey(b)
		n := chunkHead + int(binary.LittleEndian.Uint16(b[keySize+44:]))*stripeSize
		if k.object != firstChunkObject || k.kind != itemChunk || len(b) < keySize+n {
			return damaged("superblock: chunk with key %v", k)
		}
		c, err := v.decodeChunk(k, b[keySize:][:n])
		if err != nil {
			return err
		}
		v.chunks = append(v.chunks, c)
		b = b[keySize+n:]
	}
	if err := v.sortChunks(); err != nil {
		return err
	}
	boot := v.chunks
	var all []chunk
	devices := 0
	t := &tree{v: v, id: treeChunk, root: v.chunkRoot, generation: v.chunkGeneration, level: int(v.chunkLevel)}
	err := t.walk(key{}, lastKey, func(k key, b []byte) error {
		switch {
		case k.kind == itemDevice && k.object == devicesObject:
			if devices++; k.offset != v.deviceID || len(b) < 98 || [16]byte(b[66:82]) != v.deviceUUID ||
				binary.LittleEndian.Uint64(b[8:]) != v.deviceBytes {
				return damaged("the chunk tree knows another device %d", k.offset)
			}
		case k.kind == itemChunk && k.object == firstChunkObject:
			c, err := v.decodeChunk(k, b)
			if err != nil {
				return err
			}
			if len(all) == maxChunks {
				return freespace.Refuse(freespace.TooLarge, "btrfs: more than %d chunks", maxChunks)
			}
			all = append(all, c)
		default:
			return freespace.Refuse(freespace.UnknownFeature, "btrfs: the chunk tree has an item %v", k)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if devices != 1 {
		return damaged("the chunk tree knows %d devices", devices)
	}
	v.chunks = all
	if err := v.sortChunks(); err != nil {
		return err
	}
	for _, c := range boot {
		if d, ok := v.find(c.start); !ok || d.start != c.start || d.n != c.n || d.kind != c.kind || !slices.Equal(d.stripes, c.stripes) {
			return damaged("the superblock and the chunk tree disagree about chunk %d", c.start)
		}
	}
	return nil
}

func (v *volume) sortChunks() error {
	slices.SortFunc(v.chunks, func(a, b chunk) int { return cmp.Compare(a.start, b.start) })
	for i := 1; i < len(v.chunks); i++ {
		if a, b := &v.chunks[i-1], &v.chunks[i]; b.start < a.end() {
			return damaged("chunks %d and %d overlap", a.start, b.start)
		}
	}
	return nil
}

// judge goes through the device extents in order: what lies between them is
// free, and so is what is free in the block group of each.
func (v *volume) judge(k keeper) error {
	at, pieces, used := uint64(0), 0, uint64(0)
	err := v.devices.walk(key{}, lastKey, func(ke key, b []byte) error {
		switch ke.kind {
		case itemDevExtent:
		case itemReplace:
			return v.checkReplace(b)
		case itemPersistent:
			return nil
		default:
			return freespace.Refuse(freespace.UnknownFeature, "btrfs: the device tree has an item %v", ke)
		}
		le := binary.LittleEndian
		if ke.object != v.deviceID || len(b) != devExtentSize {
			return damaged("device extent %v of %d bytes", ke, len(b))
		}
		start, n := ke.offset, le.Uint64(b[24:])
		c, ok := v.find(le.Uint64(b[16:]))
		if !ok || c.start != le.Uint64(b[16:]) || n != c.n || !slices.Contains(c.stripes, start) {
			return damaged("device extent %d+%d is no stripe of chunk %d", start, n, le.Uint64(b[16:]))
		}
		if start < at { // decodeChunk has compared it with the device
			return damaged("device extent %d overlaps the one before it", start)
		}
		if start > at {
			if err := k.free(int64(at), int64(start-at)); err != nil {
				return err
			}
		}
		at = start + n
		pieces++
		sum, err := v.judgeGroup(c, func(off, n uint64) error {
			return k.free(int64(start+off-c.start), int64(n))
		})
		if !c.counted {
			c.counted = true
			used += sum
		}
		return err
	})
	if err != nil {
		return err
	}
	want := 0
	for _, c := range v.chunks {
		want += len(c.stripes)
	}
	if pieces != want {
		return damaged("%d device extents for %d stripes", pieces, want)
	}
	if used != v.used {
		return freespace.Refuse(freespace.CountMismatch, "btrfs: the block groups use %d bytes, the superblock says %d", used, v.used)
	}
	if at < v.deviceBytes {
		return k.free(int64(at), int64(v.deviceBytes-at))
	}
	return nil
}

// checkReplace refuses while a device is being replaced.
func (v *volume) checkReplace(b []byte) error {
	const stateAt, never, finished, canceled = 32, 0, 2, 3
	if len(b) < stateAt+8 {
		return damaged("a device replacement of %d bytes", len(b))
	}
	switch s := binary.LittleEndian.Uint64(b[stateAt:]); s {
	case never, finished, canceled:
		return nil
	default:
		return freespace.Refuse(freespace.Unsupported, "btrfs: a device replacement is under way (state %d)", s)
	}
}
