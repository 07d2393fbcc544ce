package ploop

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"
)

// The format extension (QEMU docs/interop/parallels.txt, "Format Extension"):
// one cluster that begins with a magic and the MD5 of its rest, then elements
// of a 24-byte head and data padded to 8 bytes, ended by a magic of 0.
const (
	extMagic    = 0xab234cef23dcea87
	extHead     = 8 + md5.Size // magic and checksum
	featureHead = 24           // magic u64, flags u64, size u32, unused u32

	bitmapMagic = 0x20385fae252cb34a
	bitmapHead  = 8 + 16 + 4 + 4 // size u64, id, granularity u32, L1 count u32
)

// extension is what needs to be known of it.
type extension struct {
	bitmaps []dirtyBitmap
	unknown []uint64       // magics of features that are not understood
	refs    []extensionRef // every place where it names a cluster of bits
}

// extensionRef is one name of a cluster in the extension.
type extensionRef struct {
	at   int   // byte of the extension's cluster, a u64 of sectors
	host int64 // byte of the file
}

type dirtyBitmap struct {
	id          string
	granularity int64   // bytes of the disk for one bit
	clusters    []int64 // file offsets of the clusters that hold bits
}

// readExtension decodes the extension cluster. It is not called for reading the
// disk: an image with a damaged extension still reads.
func (i *Image) readExtension(at int64) (*extension, error) {
	ext, _, err := i.loadExtension(at)
	return ext, err
}

// loadExtension is readExtension that also returns the cluster's bytes.
func (i *Image) loadExtension(at int64) (*extension, []byte, error) {
	field := "m_FormatExtensionOffset"
	bad := func(why string) error { return i.bat.bad(offExtension, field, uint64(at/sectorSize), why) }
	size, err := i.f.Size()
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", i.path, err)
	}
	switch {
	case at%i.h.cluster != 0:
		return nil, nil, bad("is not a multiple of the cluster size")
	case at < i.h.firstData:
		return nil, nil, bad("points into the header or the BAT")
	case at > size-i.h.cluster:
		return nil, nil, bad("points behind the end of the file")
	}
	b := make([]byte, i.h.cluster) // at most 64 MiB, and the file is that long
	if _, err := i.f.ReadAt(b, at); err != nil {
		return nil, nil, fmt.Errorf("%s: read of the format extension: %w", i.path, err)
	}
	ext, err := i.parseExtension(b, at, size)
	return ext, b, err
}

// parseExtension decodes b, the extension's cluster, which lies at byte place
// of a file of size bytes.
func (i *Image) parseExtension(b []byte, place, size int64) (*extension, error) {
	le := binary.LittleEndian
	bad := func(at int, field string, value any, why string) error {
		return i.bat.bad(place+int64(at), field, value, why)
	}
	if len(b) < extHead {
		return nil, bad(0, "format extension", nil, "cluster is too small")
	}
	if m := le.Uint64(b); m != extMagic {
		return nil, bad(0, "format extension magic", m, "is wrong")
	}
	if sum := md5.Sum(b[extHead:]); !bytes.Equal(sum[:], b[8:extHead]) {
		return nil, bad(8, "format extension checksum", nil, "does not match")
	}
	ext := new(extension)
	for at := extHead; at+featureHead <= len(b); {
		magic, n := le.Uint64(b[at:]), int64(le.Uint32(b[at+16:]))
		if magic == 0 {
			return ext, nil
		}
		data := at + featureHead
		if n > int64(len(b)-data) {
			return nil, bad(at+16, "feature size", uint32(n), "reaches behind the extension")
		}
		if magic == bitmapMagic {
			bm, refs, err := i.parseBitmap(b[data:data+int(n)], place+int64(data), size)
			if err != nil {
				return nil, err
			}
			ext.bitmaps = append(ext.bitmaps, bm)
			for _, r := range refs {
				ext.refs = append(ext.refs, extensionRef{data + r.at, r.host})
			}
		} else {
			ext.unknown = append(ext.unknown, magic)
		}
		at = data + int(n+7)&^7
	}
	return ext, nil
}

// parseBitmap decodes the data of a dirty-bitmap feature, which lies at byte
// place of the file. The refs count from the start of b.
func (i *Image) parseBitmap(b []byte, place, size int64) (bm dirtyBitmap, refs []extensionRef, err error) {
	le := binary.LittleEndian
	bad := func(off int, field string, value any, why string) (dirtyBitmap, []extensionRef, error) {
		return bm, nil, i.bat.bad(place+int64(off), field, value, why)
	}
	if len(b) < bitmapHead {
		return bad(0, "dirty bitmap", int64(len(b)), "feature is too short")
	}
	id, _ := uuid.FromBytes(b[8:24]) // of 16 bytes, which is all it checks
	bm.id = id.String()
	bm.granularity = int64(le.Uint32(b[24:])) * sectorSize
	count := int64(le.Uint32(b[28:]))
	if bm.granularity == 0 {
		return bad(24, "dirty bitmap granularity", uint32(0), "is zero")
	}
	if count > int64(len(b)-bitmapHead)/8 {
		return bad(28, "dirty bitmap l1_size", uint32(count), "table reaches behind the feature")
	}
	for k := range int(count) {
		off := bitmapHead + 8*k
		sector := le.Uint64(b[off:])
		if sector <= 1 {
			continue // all bits clear, all bits set
		}
		switch {
		case sector > uint64(size/sectorSize):
			return bad(off, "dirty bitmap l1", sector, "points behind the end of the file")
		case int64(sector)*sectorSize%i.h.cluster != 0:
			return bad(off, "dirty bitmap l1", sector, "is not a multiple of the cluster size")
		case int64(sector)*sectorSize < i.h.firstData:
			return bad(off, "dirty bitmap l1", sector, "points into the header or the BAT")
		case int64(sector)*sectorSize > size-i.h.cluster:
			return bad(off, "dirty bitmap l1", sector, "points behind the end of the file")
		}
		bm.clusters = append(bm.clusters, int64(sector)*sectorSize)
		refs = append(refs, extensionRef{off, int64(sector) * sectorSize})
	}
	return bm, refs, nil
}
