package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync/atomic"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// Image is an open qcow2 image: a layers.Layer, and a layers.Editor when it
// was opened writable. It owns its files from a successful Open on.
type Image struct {
	geometry
	f    backend.File // the image file
	data backend.File // where Data extents lie: f, or the external data file
	// hdr is as read at open. The editor, the only one to change it, does so
	// in its own order; the read side takes from it what does not change, and
	// else calls header.
	hdr  Header
	o    layers.OpenOptions
	size int64 // bytes of the virtual disk, of the snapshot when one was selected

	// The L1 table that Lookup uses: the active one, or the snapshot's.
	l1Off     int64
	l1Entries int64
	snapshot  string // id of the selected snapshot, "" for the active state

	// The lengths of f and data when last looked at. A file that has grown
	// since is noticed when an entry points behind its end; whoever shrinks
	// one lowers the number first.
	imageEnd, dataEnd atomic.Int64

	cache   *layers.Cache
	l1Pages layers.Owner // key: page number, 512 entries each
	l2Pages layers.Owner // key: offset of the page in the image file

	hole atomic.Pointer[fileHole] // the last one in which an L2 table was met

	readers layers.Readers
	ed      *editor // nil when opened read-only
}

// Open opens an image for reading or, with o.Writable, for changing. After an
// error f still belongs to the caller; otherwise Close closes it.
//
// Not one byte is written here without o.Writable.
func Open(ctx context.Context, f backend.File, o layers.OpenOptions) (*Image, error) {
	if o.Path == "" {
		o.Path = f.Name()
	}
	if o.Cache == nil {
		o.Cache = layers.NewCache(layers.DefaultCacheSize)
	}
	img := &Image{f: f, data: f, o: o, cache: o.Cache}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h, err := readHeader(f)
	if err != nil {
		return nil, img.located(err)
	}
	img.hdr = *h
	if err := img.open(ctx); err != nil {
		img.l1Pages.DropAll()
		img.l2Pages.DropAll()
		if img.data != f {
			img.data.Close()
		}
		return nil, err
	}
	return img, nil
}

// readHeader reads as much of the first cluster as the file has.
func readHeader(f backend.File) (*Header, error) {
	b := make([]byte, 4096)
	n, err := readUpTo(f, b)
	if err != nil {
		return nil, err
	}
	b = b[:n]
	// The rest of a larger cluster is needed only when the header says that
	// something lies there.
	if n == 4096 && Probe(b) {
		bits := be32(b[offClusterBits:])
		if bits > 12 && bits <= maxClusterBits {
			b = make([]byte, 1<<bits)
			if n, err = readUpTo(f, b); err != nil {
				return nil, err
			}
			b = b[:n]
		}
	}
	return parseHeader(b)
}

// readUpTo fills b from the start of the file as far as the file goes.
func readUpTo(f backend.File, b []byte) (int, error) {
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	return n, nil
}

// open validates what the header says and sets img up.
func (img *Image) open(ctx context.Context) error {
	h := &img.hdr
	img.l1Pages, img.l2Pages = img.cache.NewOwner(), img.cache.NewOwner()
	if err := h.checkFeatures(img.o.Writable); err != nil {
		return img.located(err)
	}
	img.geometry = newGeometry(h)
	if err := h.checkTables(&img.geometry); err != nil {
		return img.located(err)
	}
	img.size = int64(h.Size)
	img.l1Off, img.l1Entries = int64(h.L1Offset), int64(h.L1Size)
	if err := img.openDataFile(); err != nil {
		return err
	}
	for _, f := range []backend.File{img.f, img.data} {
		if _, err := f.Size(); err != nil {
			return img.errorf(-1, "", nil, err)
		}
		img.refreshEnd(f)
	}
	if img.o.Snapshot != "" {
		if img.o.Writable {
			return img.errorf(-1, "snapshot", img.o.Snapshot, fmt.Errorf("%w: writing to an internal snapshot", layers.ErrUnsupported))
		}
		if err := img.selectSnapshot(ctx, img.o.Snapshot); err != nil {
			return err
		}
	}
	if img.o.Writable {
		if err := img.checkCounts(); err != nil {
			return err
		}
		return img.openEditor(ctx)
	}
	return nil
}

// checkCounts refuses an image to which nothing could ever be written, before
// anybody relies on that: one without a refcount table, or with one that the
// file does not hold. For reading it does not matter.
func (img *Image) checkCounts() error {
	off, n := int64(img.hdr.RefcountTableOffset), int64(img.hdr.RefcountTableClusters)<<img.clusterBits
	if off == 0 || n == 0 {
		return img.corrupt(offRefcountTableOffset, "refcount_table_offset", off, "there is no refcount table")
	}
	// The last cluster may be cut short, see readRegion.
	if off+n-img.imageEnd.Load() >= img.clusterSize && off+n-img.refreshEnd(img.f) >= img.clusterSize {
		return img.corrupt(offRefcountTableOffset, "refcount_table_offset", off, "the refcount table reaches behind the end of the file")
	}
	return nil
}

// Size is the length of the virtual disk in bytes.
func (img *Image) Size() int64 { return img.size }

// Granule is the cluster size in bytes.
func (img *Image) Granule() int64 { return img.clusterSize }

// Data is the file that the Host offset of Data extents refers to.
func (img *Image) Data() backend.File { return img.data }

// header is the header as it is now. That of an image under an editor, whose
// fields change, is read again.
func (img *Image) header() (*Header, error) {
	if img.ed == nil {
		return &img.hdr, nil
	}
	h, err := readHeader(img.f)
	return h, img.located(err)
}

// Close makes an editor's changes durable and releases the files.
func (img *Image) Close() error {
	var err error
	if img.ed != nil {
		err = img.closeEditor()
	}
	img.l1Pages.DropAll()
	img.l2Pages.DropAll()
	if img.data != img.f {
		err = errors.Join(err, img.data.Close())
	}
	return errors.Join(err, img.f.Close())
}

// errorf is an ImageError about this image.
func (img *Image) errorf(off int64, field string, value any, err error) error {
	return &layers.ImageError{Path: img.o.Path, Layer: -1, Offset: off, Field: field, Value: value, Err: err}
}

// corrupt is an ImageError of class ErrCorrupt; why says what is wrong.
func (img *Image) corrupt(off int64, field string, value any, why string) error {
	return img.errorf(off, field, value, fmt.Errorf("%w: %s", layers.ErrCorrupt, why))
}

// located fills the path into an ImageError that lacks it.
func (img *Image) located(err error) error {
	var ie *layers.ImageError
	if errors.As(err, &ie) && ie.Path == "" {
		ie.Path = img.o.Path
	}
	return err
}

// inFile reports whether [off, off+n) can be a range of a file at all.
func inFile(off uint64, n uint64) bool {
	return off <= math.MaxInt64 && n <= math.MaxInt64-off
}

// refreshEnd looks how long a file of the image is now.
func (img *Image) refreshEnd(f backend.File) int64 {
	n, err := f.Size()
	if err != nil {
		n = 0 // nothing lies inside a file that cannot be looked at
	}
	if f == img.f {
		img.imageEnd.Store(n)
	}
	if f == img.data {
		img.dataEnd.Store(n)
	}
	return n
}
