// Package raw is the layer without a format: a regular file or a block device
// in which guest byte n is file byte n.
//
// Design note. There is nothing to decode and nothing to allocate; the host's
// filesystem does both. The block map is what SEEK_DATA and SEEK_HOLE say: a
// hole is Zero and everything else is Data at the same offset. A raw image
// never says Unmapped, so nothing below it shows through (which is why it can
// only be the base of a stack, or alone). Where the file cannot tell its holes
// the whole of it is Data.
//
// Size is taken once at Open. The layer never grows its file: a raw image that
// changes its length changes the virtual disk.
//
// Locks: none. Durability: a write is durable after a Sync that began after
// it returned; there is no map to order it with.
package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync/atomic"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// granule is the block size at which host filesystems usually keep holes. It
// is a hint only: extents may begin and end at any byte.
const granule = 4096

// Image is a raw image. It implements layers.Editor; without Writable its
// changing methods return layers.ErrReadOnly.
type Image struct {
	f        backend.File
	path     string
	size     int64
	writable bool
	noSeek   atomic.Bool // the file cannot tell holes from data
	failed   atomic.Pointer[error]
	readers  layers.Readers
}

var (
	_ layers.Editor = (*Image)(nil)
	_ layers.Flat   = (*Image)(nil)
)

// Open returns the raw image in f, which it owns from now on. Every length is
// valid, 0 and those that are no multiple of 512 included.
func Open(_ context.Context, f backend.File, o layers.OpenOptions) (*Image, error) {
	path := o.Path
	if path == "" {
		path = f.Name()
	}
	if o.Snapshot != "" {
		return nil, &layers.ImageError{Path: path, Layer: -1, Offset: -1, Field: "snapshot", Value: o.Snapshot,
			Err: fmt.Errorf("%w: a raw image has no snapshots", layers.ErrUnsupported)}
	}
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &Image{f: f, path: path, size: size, writable: o.Writable}, nil
}

// Create makes f a raw image of size bytes (0 or more) that reads as zeros. A
// regular file is emptied first. A block device keeps its length, which must
// be size, and is zeroed.
func Create(_ context.Context, f backend.File, size int64) error {
	if size < 0 {
		return fmt.Errorf("%s: raw image of %d bytes: %w", f.Name(), size, errors.ErrUnsupported)
	}
	old, err := f.Size()
	if err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		if old != size {
			return fmt.Errorf("%s: length %d cannot become %d: %w", f.Name(), old, size, err)
		}
		if err := zero(f, 0, size, true); err != nil {
			return err
		}
		return f.Sync()
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	return f.Sync()
}

// Size is the length of the file at Open, in bytes.
func (i *Image) Size() int64 { return i.size }

// Granule is 4096, see the constant.
func (i *Image) Granule() int64 { return granule }

// Flat is always true.
func (i *Image) Flat() bool { return true }

// Data is the image file itself.
func (i *Image) Data() backend.File { return i.f }

// Parent is empty: a raw image names none.
func (i *Image) Parent() layers.Parent { return layers.Parent{} }

// Readers is never waited for, since a raw image releases nothing.
func (i *Image) Readers() *layers.Readers { return &i.readers }

// Unpack fails: no extent of a raw image is Packed.
func (i *Image) Unpack(context.Context, blockmap.Extent, int64, []byte) error {
	return fmt.Errorf("%s: %w: a raw image has no compressed clusters", i.path, layers.ErrUnsupported)
}

// Lookup tells holes (Zero) from data, see blockmap.Map.
func (i *Image) Lookup(ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return nil, err
	}
	t := blockmap.NewTiler(guest, n, dst)
	for !t.Done() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		pos := t.Next()
		if pos >= i.size {
			t.Add(blockmap.Extent{Guest: pos, Len: math.MaxInt64 - pos, Kind: blockmap.Zero})
			break
		}
		start, end, err := i.dataFrom(pos)
		if err != nil {
			return nil, fmt.Errorf("%s: seek from %d: %w", i.path, pos, err)
		}
		if start > pos && !t.Add(blockmap.Extent{Guest: pos, Len: start - pos, Kind: blockmap.Zero}) {
			break
		}
		if end > start {
			t.Add(blockmap.Extent{Guest: start, Len: end - start, Host: start, Kind: blockmap.Data})
		}
	}
	return t.Extents(), nil
}

// dataFrom finds the first data range at or behind pos, which lies inside the
// image, cut at the image's end. Without data left both ends are the image's.
// Somebody may punch or write meanwhile: then start may equal end, but pos
// itself is always passed.
func (i *Image) dataFrom(pos int64) (start, end int64, err error) {
	if i.noSeek.Load() {
		return pos, i.size, nil
	}
	for {
		start, err = i.f.SeekData(pos)
		switch {
		case errors.Is(err, io.EOF):
			return i.size, i.size, nil
		case errors.Is(err, errors.ErrUnsupported):
			i.noSeek.Store(true)
			return pos, i.size, nil
		case err != nil:
			return 0, 0, err
		case start >= i.size:
			return i.size, i.size, nil
		}
		end, err = i.f.SeekHole(start)
		if errors.Is(err, io.EOF) {
			// Truncated behind our back; what is gone reads as zeros.
			return i.size, i.size, nil
		}
		if err != nil {
			return 0, 0, err
		}
		if end > start || start > pos {
			return start, min(max(end, start), i.size), nil
		}
		// pos was data and is a hole by now: ask again.
	}
}

// Describe reports the whole file as used; AllocatedSize tells what it costs.
func (i *Image) Describe(ctx context.Context) (layers.Info, error) {
	info := layers.Info{Path: i.path, Format: "raw", VirtualSize: i.size, ClusterSize: granule}
	var err error
	if info.FileSize, err = i.f.Size(); err != nil {
		return info, err
	}
	if info.AllocatedSize, err = i.f.Allocated(); err != nil {
		return info, err
	}
	err = i.WalkHost(ctx, func(r layers.HostRange) error {
		info.UsedClusters += (r.Off+r.Len+granule-1)/granule - r.Off/granule
		return nil
	})
	return info, err
}

// WalkHost visits one range of RoleData for each data extent.
func (i *Image) WalkHost(ctx context.Context, visit func(layers.HostRange) error) error {
	buf := make([]blockmap.Extent, 0, 64)
	for pos := int64(0); pos < i.size; {
		ext, err := i.Lookup(ctx, pos, i.size-pos, buf)
		if err != nil {
			return err
		}
		for _, e := range ext {
			if e.Kind == blockmap.Data {
				if err := visit(layers.HostRange{Off: e.Host, Len: e.Len, Role: layers.RoleData, Guest: e.Guest}); err != nil {
					return err
				}
			}
			pos = e.End()
		}
	}
	return nil
}

// Close makes the changes durable and closes the file.
func (i *Image) Close() error {
	var err error
	if i.writable {
		err = i.Sync(context.Background())
	}
	return errors.Join(err, i.f.Close())
}
