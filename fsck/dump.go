package fsck

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"slices"

	"github.com/klauspost/compress/zstd"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// A dump holds all metadata of one image file: the header with its extensions,
// map tables, reference counts, snapshot tables, bitmaps. It holds no guest
// data.
//
//	0  8  magic "IMGSDUMP"
//	8  4  version, 1 (all numbers are little-endian)
//	12    a zstd stream:
//	      4   length of the identity
//	          the identity, a JSON object (DumpIdentity)
//	      records, ascending by offset:
//	      1   role (layers.Role); 0 is the end
//	      1   flags: 1 = at the top of its tree (header, L1, BAT, refcount table)
//	      2   0
//	      4   length, at most 1 MiB (end: 0)
//	      8   offset in the image (end: the number of records before it)
//	      4   CRC-32C of the 16 bytes before and of the bytes that follow
//	          the bytes
const (
	dumpMagic   = "IMGSDUMP"
	dumpVersion = 1
	dumpPiece   = 1 << 20
	dumpHead    = 16
	flagTop     = 1
	maxIdentity = 1 << 20
)

// ErrDump says that a file is not a dump, or a damaged one.
var ErrDump = errors.New("not a valid metadata dump")

// MayBeDump returns an error unless a new dump of image (DumpIdentity.Image) may
// take the place of what is at path: nothing, an empty file, or an earlier dump
// of an image of that name. Neither an image, nor a device, nor the only dump of
// another image may be lost by an argument too few.
func MayBeDump(path, image string) error {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().IsRegular() && st.Size() == 0 {
		return nil
	}
	if st.Mode().IsRegular() {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close() // opened for reading
		d, err := newDumpReader(f)
		switch {
		case err == nil:
			d.close()
			if d.id.Image == image {
				return nil
			}
			return fmt.Errorf("%s: a dump of %q, which one of %q does not replace: remove it first, or take another name", path, d.id.Image, image)
		case !errors.Is(err, ErrDump):
			return err
		}
	}
	return fmt.Errorf("%s: %w, and only that would be replaced by a new one", path, ErrDump)
}

// DumpIdentity says of which image a dump is.
type DumpIdentity struct {
	Image       string `json:"image"` // base name
	Format      string `json:"format"`
	FileSize    int64  `json:"file-size"`    // bytes
	VirtualSize int64  `json:"virtual-size"` // bytes
	ClusterSize int64  `json:"cluster-size"` // bytes
	// End is the first byte behind everything that is referenced.
	End int64 `json:"end"`
	// MTime is the modification time in nanoseconds since 1970.
	MTime int64 `json:"mtime"`
	// Shared tells that another program may have been writing to the image:
	// the dump is what a power cut would have left at that moment.
	Shared bool `json:"shared,omitempty"`
}

// metaRange is a range that goes into a dump.
type metaRange struct {
	off, n int64
	role   layers.Role
	top    bool
}

// Dumped is an image opened for dumping.
type Dumped struct {
	ID    DumpIdentity
	Info  layers.Info
	f     backend.File
	layer layers.Layer
	rel   *open.Related
	meta  []metaRange
	sum   []byte // of a shared image: of the metadata when nobody changed it
}

// OpenDump opens the image at path, alone and for reading, and finds its
// metadata. A damaged image cannot be dumped.
func OpenDump(ctx context.Context, path string, o open.Options) (*Dumped, error) {
	return openDump(ctx, path, o, false)
}

func openDump(ctx context.Context, path string, o open.Options, share bool) (_ *Dumped, err error) {
	t, err := open.Follow(ctx, path, o)
	if err != nil {
		return nil, err
	}
	if len(t.Images) == 0 {
		return nil, t.Err
	}
	img := t.Images[0]
	d := &Dumped{}
	if d.rel, err = open.NewRelated(img.Path, o); err != nil {
		return nil, err
	}
	lo := layers.OpenOptions{Path: img.Path, OpenFile: func(name string, _ bool) (backend.File, error) {
		f, _, err := d.rel.Open("data file", name)
		return f, err
	}}
	if share {
		d.f, err = backend.Open(img.Path, backend.Options{})
	} else {
		d.f, err = openLocked(img.Path, false)
	}
	if err == nil {
		switch img.Format {
		case "qcow2":
			var l *qcow2.Image
			if l, err = qcow2.Open(ctx, d.f, lo); err == nil {
				d.layer = l
			}
		case "ploop":
			var l *ploop.Image
			if l, err = ploop.Open(ctx, d.f, lo); err == nil {
				d.layer = l
			}
		default:
			err = fmt.Errorf("%s: %w: a %s image has no metadata", img.Path, layers.ErrUnsupported, img.Format)
		}
	}
	if err == nil {
		err = d.find(ctx, img)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// openLocked opens and locks a file.
func openLocked(path string, write bool) (backend.File, error) {
	f, err := backend.Open(path, backend.Options{Writable: write})
	if err != nil {
		return nil, err
	}
	use, unshare := backend.ReaderUse, backend.ReaderUnshare
	if write {
		use, unshare = backend.WriterUse, backend.WriterUnshare
	}
	if l := backend.LockerOf(f); l != nil {
		if err := l.Lock(use, unshare); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return nil, errors.Join(err, f.Close())
		}
	}
	return f, nil
}

// Close closes the image.
func (d *Dumped) Close() error {
	var errs []error
	switch {
	case d.layer != nil:
		errs = append(errs, d.layer.Close())
	case d.f != nil:
		errs = append(errs, d.f.Close())
	}
	return errors.Join(append(errs, d.rel.Close())...)
}

// find collects the ranges of the metadata.
func (d *Dumped) find(ctx context.Context, img open.Traced) error {
	size, err := d.f.Size()
	if err != nil {
		return err
	}
	if d.Info, err = d.layer.Describe(ctx); err != nil {
		return err
	}
	d.ID = DumpIdentity{Image: baseName(img.Path), Format: img.Format, FileSize: size,
		VirtualSize: d.layer.Size(), ClusterSize: d.layer.Granule(), MTime: mtimeOf(img.Path)}
	seen := map[layers.Role]bool{}
	err = d.layer.WalkHost(ctx, func(h layers.HostRange) error {
		end := min(h.Off+h.Len, size)
		d.ID.End = max(d.ID.End, end)
		if h.Role == layers.RoleData || h.Role == layers.RolePacked || end <= h.Off {
			return nil
		}
		// The first range of a tree is its root: walks begin there.
		top := !seen[h.Role] && h.Role != layers.RoleRefcountBlock
		seen[h.Role] = true
		d.meta = append(d.meta, metaRange{h.Off, end - h.Off, h.Role, top})
		return nil
	})
	if err != nil {
		return err
	}
	slices.SortStableFunc(d.meta, func(a, b metaRange) int { return cmp.Compare(a.off, b.off) })
	// A table that several snapshots share is visited more than once.
	var have blockmap.Set
	once := d.meta[:0]
	for _, m := range d.meta {
		if !have.Overlaps(m.off, m.n) {
			have.Add(m.off, m.n)
			once = append(once, m)
		}
	}
	d.meta = once
	return nil
}

// Write writes the dump.
func (d *Dumped) Write(ctx context.Context, w io.Writer) error {
	head := binary.LittleEndian.AppendUint32([]byte(dumpMagic), dumpVersion)
	if _, err := w.Write(head); err != nil {
		return err
	}
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	return errors.Join(d.stream(ctx, z), z.Close())
}

func (d *Dumped) stream(ctx context.Context, w io.Writer) error {
	id, err := json.Marshal(d.ID)
	if err != nil {
		return err
	}
	if _, err := w.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(id))), id...)); err != nil {
		return err
	}
	buf := make([]byte, dumpPiece)
	records := int64(0)
	for _, m := range d.meta {
		for at := m.off; at < m.off+m.n; {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			b := buf[:min(dumpPiece, m.off+m.n-at)]
			if err := readZero(d.f, b, at); err != nil {
				return err
			}
			if err := writeDumpRecord(w, m.role, m.top, at, b); err != nil {
				return err
			}
			records++
			at += int64(len(b))
		}
	}
	return writeDumpRecord(w, 0, false, records, nil)
}

func writeDumpRecord(w io.Writer, role layers.Role, top bool, off int64, b []byte) error {
	h := make([]byte, dumpHead, dumpHead+4)
	h[0] = byte(role)
	if top {
		h[1] = flagTop
	}
	binary.LittleEndian.PutUint32(h[4:], uint32(len(b)))
	binary.LittleEndian.PutUint64(h[8:], uint64(off))
	h = binary.LittleEndian.AppendUint32(h, crcOf(append(h, b...)))
	if _, err := w.Write(h); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}

// dumpRecord is one range of a dump.
type dumpRecord struct {
	role layers.Role
	top  bool
	off  int64
	data []byte // valid until the next one is read
}

// dumpReader reads a dump.
type dumpReader struct {
	id  DumpIdentity
	z   *zstd.Decoder
	r   *bufio.Reader
	n   int64
	end int64 // of the record before
	buf []byte
}

func newDumpReader(r io.Reader) (*dumpReader, error) {
	head := make([]byte, 12)
	if _, err := io.ReadFull(r, head); unread(err) {
		return nil, err
	} else if err != nil || string(head[:8]) != dumpMagic {
		return nil, fmt.Errorf("%w: wrong magic", ErrDump)
	}
	if v := binary.LittleEndian.Uint32(head[8:]); v != dumpVersion {
		return nil, fmt.Errorf("%w: version %d, only %d is known", ErrDump, v, dumpVersion)
	}
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, err
	}
	d := &dumpReader{z: z, r: bufio.NewReaderSize(z, 64<<10)}
	var n [4]byte
	_, err = io.ReadFull(d.r, n[:])
	size := binary.LittleEndian.Uint32(n[:])
	if err == nil && size <= maxIdentity {
		b := make([]byte, size)
		if _, err = io.ReadFull(d.r, b); err == nil {
			err = json.Unmarshal(b, &d.id)
		}
	}
	i := &d.id
	if err != nil || size > maxIdentity || i.FileSize < 0 || i.VirtualSize < 0 || i.End < 0 || i.End > i.FileSize || i.ClusterSize <= 0 {
		z.Close()
		if unread(err) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: its identity", ErrDump)
	}
	return d, nil
}

// next returns the next record, or nil at the end.
func (d *dumpReader) next() (*dumpRecord, error) {
	bad := func(why string) error { return fmt.Errorf("%w: record %d: %s", ErrDump, d.n, why) }
	h := make([]byte, dumpHead+4)
	if _, err := io.ReadFull(d.r, h); unread(err) {
		return nil, err
	} else if err != nil {
		return nil, bad("cut off")
	}
	le := binary.LittleEndian
	size, off := int64(le.Uint32(h[4:])), int64(le.Uint64(h[8:]))
	rec := &dumpRecord{role: layers.Role(h[0]), top: h[1]&flagTop != 0, off: off}
	if size > dumpPiece {
		return nil, bad("too long")
	}
	d.buf = append(d.buf[:0], h[:dumpHead]...)
	d.buf = append(d.buf, make([]byte, size)...)
	rec.data = d.buf[dumpHead:]
	if _, err := io.ReadFull(d.r, rec.data); unread(err) {
		return nil, err
	} else if err != nil {
		return nil, bad("cut off")
	}
	switch {
	case le.Uint32(h[dumpHead:]) != crcOf(d.buf):
		return nil, bad("wrong checksum")
	case rec.role == 0 && size == 0 && off == d.n:
		return nil, nil
	case rec.role == 0 || size == 0 || off < d.end || off > math.MaxInt64-size || off+size > d.id.FileSize:
		return nil, bad("impossible range")
	}
	d.n++
	d.end = off + size
	return rec, nil
}

func (d *dumpReader) close() { d.z.Close() }
