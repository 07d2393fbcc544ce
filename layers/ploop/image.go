// Package ploop reads and writes the image format of ploop and Parallels
// (versions 1 and 2) and the DiskDescriptor.xml of a bundle of such images.
//
// Design note. An image is a 64-byte header, a flat table (BAT) with one
// 32-bit entry for each cluster of the disk, and clusters. An entry of 0 means
// that the layer below answers; the format has no other way to say anything
// about a cluster, so what must read as zeros over a parent that does not is
// written as zeros. References: OpenVZ include/ploop1_image.h, QEMU
// docs/interop/parallels.txt and prl-xml.rst.
//
// The parts: header.go the header, bat.go cached pages of the BAT and Lookup,
// extension.go the format extension, image.go the Layer, edit.go and zero.go
// the Editor, alloc.go who owns which cluster of the file, commit.go the order
// of durability, verify.go the scan of a whole BAT, relocate.go and keep.go
// what makes the file smaller, descriptor*.go the XML.
//
// Reading. Pages of the BAT live in the shared cache; a hit takes no lock and
// allocates nothing. Pages that are holes of the file are passed without
// reading, so that an empty disk of 50 TiB costs one step.
//
// Writing. A mapped cluster is written in place. A missing one gets a slot at
// the end of the file (or a free one inside), is written whole, so that no
// host hole and no unwritten extent lies inside a mapped cluster, and only
// then entered in the cached BAT. Sync then does: sync data, write the pages
// as they were before that sync, sync, free what was unlinked. A crash at any
// point leaves clusters that nothing refers to, nothing worse.
//
// Locks, outermost first: commit -> stripe of a cluster -> alloc.mu ->
// table.dirtyMu -> the stripes of the cache.
package ploop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// Image is one ploop image. It implements layers.Editor; without Writable its
// changing methods return layers.ErrReadOnly.
type Image struct {
	f    backend.File
	path string
	h    *header // as at Open; what changes since is in state
	bat  *table
	edit *editor // nil when opened read-only

	maxTables int64 // OpenOptions.MaxTables

	readers layers.Readers
	hmu     sync.Mutex // guards state
	state   headerState
}

// header returns the header as it is in the file now.
func (i *Image) header() header {
	i.hmu.Lock()
	defer i.hmu.Unlock()
	h := *i.h
	h.headerState = i.state
	return h
}

// Open returns the image in f, which it owns from now on unless it fails.
//
// A read-only open writes nothing and accepts an image that is marked as in
// use. A writable one needs a cluster size of 32 KiB to 64 MiB; when the image
// is marked as in use (the caller has its lock, so whoever marked it has
// crashed) the whole BAT is verified first.
func Open(ctx context.Context, f backend.File, o layers.OpenOptions) (*Image, error) {
	path := o.Path
	if path == "" {
		path = f.Name()
	}
	if o.Snapshot != "" {
		return nil, &layers.ImageError{Path: path, Layer: -1, Offset: -1, Field: "snapshot", Value: o.Snapshot,
			Err: fmt.Errorf("%w: a ploop image has no internal snapshots (a DiskDescriptor.xml does)", layers.ErrUnsupported)}
	}
	head := make([]byte, headerSize)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: read of the header: %w", path, err)
	}
	h, err := parseHeader(head[:n], path)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if size < h.firstData {
		return nil, &layers.ImageError{Path: path, Layer: -1, Offset: offFirstBlock, Field: "m_FirstBlockOffset",
			Value: uint32(h.firstData / sectorSize),
			Err:   fmt.Errorf("%w: the file ends at byte %d, inside the header and BAT area", layers.ErrCorrupt, size)}
	}
	cache := o.Cache
	if cache == nil {
		cache = layers.NewCache(layers.DefaultCacheSize)
	}
	i := &Image{f: f, path: path, h: h, bat: newTable(f, path, h, cache, size), state: h.headerState, maxTables: o.MaxTables}
	if o.Writable {
		if err := i.openEditor(ctx, size, cache); err != nil {
			i.bat.owner.DropAll()
			return nil, err
		}
	}
	return i, nil
}

// Size is the length of the virtual disk in bytes, a multiple of 512 (and not
// always of the cluster).
func (i *Image) Size() int64 { return i.h.size }

// Granule is the cluster size in bytes.
func (i *Image) Granule() int64 { return i.h.cluster }

// Version is the version of the format, 1 or 2.
func (i *Image) Version() int { return i.h.version }

// Data is the image file itself.
func (i *Image) Data() backend.File { return i.f }

// Parent is empty: the parents of a delta are named by its DiskDescriptor.xml.
func (i *Image) Parent() layers.Parent { return layers.Parent{} }

// Unpack fails: no extent of a ploop image is Packed (the Compressed of a
// descriptor means "not raw").
func (i *Image) Unpack(context.Context, blockmap.Extent, int64, []byte) error {
	return fmt.Errorf("%s: %w: a ploop image has no compressed clusters", i.path, layers.ErrUnsupported)
}

// Lookup answers from the BAT, see blockmap.Map. A damaged entry inside the
// range (unaligned, into the BAT, behind the end of the file) is an ErrCorrupt
// that names it.
func (i *Image) Lookup(ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return i.bat.lookup(guest, n, dst)
}

// walk visits the runs of the whole BAT, also of the entries behind the end of
// the disk, which have to be 0.
func (i *Image) walk(ctx context.Context, visit func(run) error) error {
	for idx := int64(0); idx < i.h.entries; {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := i.bat.next(idx, i.h.entries)
		if err != nil {
			return err
		}
		if r.host != 0 {
			if over := r.idx + r.count - i.h.clusters(); over > 0 {
				bad := max(r.idx, i.h.clusters())
				return i.bat.badEntry(bad, i.bat.entry(r.host+(bad-r.idx)*i.h.cluster),
					fmt.Sprintf("lies behind the end of the disk (%d clusters)", i.h.clusters()))
			}
			if err := visit(r); err != nil {
				return err
			}
		}
		idx = r.idx + r.count
	}
	return nil
}

// Describe reads the BAT to count the mapped clusters.
func (i *Image) Describe(ctx context.Context) (layers.Info, error) {
	info := layers.Info{
		Path: i.path, Format: "ploop", Version: i.h.version,
		VirtualSize: i.h.size, ClusterSize: i.h.cluster,
	}
	var err error
	if info.FileSize, err = i.f.Size(); err != nil {
		return info, fmt.Errorf("%s: %w", i.path, err)
	}
	if info.AllocatedSize, err = i.f.Allocated(); err != nil {
		return info, fmt.Errorf("%s: %w", i.path, err)
	}
	h := i.header()
	if h.inUse == inUseOpen && i.edit == nil {
		info.Flags = append(info.Flags, "in-use")
	}
	if h.flags&flagEmpty != 0 {
		info.Flags = append(info.Flags, "empty")
	}
	info.Details = map[string]string{
		"first-data-offset": strconv.FormatInt(i.h.firstData, 10),
		"bat-entries":       strconv.FormatInt(i.h.entries, 10),
	}
	if i.maxTables > 0 && i.h.entries*4 > i.maxTables {
		info.Uncounted = true
	} else if err := i.walk(ctx, func(r run) error {
		info.UsedClusters += r.count
		return nil
	}); err != nil {
		return info, err
	}
	if h.extension != 0 {
		ext, err := i.readExtension(h.extension)
		if err != nil {
			info.Flags = append(info.Flags, "extension-damaged")
			return info, nil
		}
		if h.inUse != inUseV21 {
			info.Flags = append(info.Flags, "extension-stale")
		}
		for _, b := range ext.bitmaps {
			info.Bitmaps = append(info.Bitmaps, layers.Bitmap{Name: b.id, Granularity: b.granularity})
		}
	}
	return info, nil
}

// WalkHost visits the header, the BAT with its padding, one RoleData range for
// every run of neighbouring clusters, and what the format extension names if it
// is valid: that of an image that older software has written to is a leak.
func (i *Image) WalkHost(ctx context.Context, visit func(layers.HostRange) error) error {
	if err := visit(layers.HostRange{Len: headerSize, Role: layers.RoleHeader, Guest: -1}); err != nil {
		return err
	}
	if err := visit(layers.HostRange{Off: headerSize, Len: i.h.firstData - headerSize, Role: layers.RoleMap, Guest: -1}); err != nil {
		return err
	}
	if err := i.walk(ctx, func(r run) error {
		return visit(layers.HostRange{Off: r.host, Len: r.count << i.bat.shift, Role: layers.RoleData, Guest: r.idx << i.bat.shift})
	}); err != nil {
		return err
	}
	h := i.header()
	at := h.extension
	if at == 0 || h.inUse != inUseV21 && (i.edit == nil || i.edit.keep == nil) {
		return nil
	}
	ext, err := i.readExtension(at)
	if err != nil {
		return err
	}
	if err := visit(layers.HostRange{Off: at, Len: i.h.cluster, Role: layers.RoleExtension, Guest: -1}); err != nil {
		return err
	}
	for _, b := range ext.bitmaps {
		for _, off := range b.clusters {
			if err := visit(layers.HostRange{Off: off, Len: i.h.cluster, Role: layers.RoleBitmap, Guest: -1}); err != nil {
				return err
			}
		}
	}
	return nil
}
