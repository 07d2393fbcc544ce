package ploop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/beevik/etree"
	"github.com/google/renameio/v2"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// RootName is the file of the base image that ploop and CreateBundle make.
const RootName = "root.hds"

// NewDescriptor describes a fresh bundle: one ploop image in file, for a disk
// of size bytes in clusters of cluster bytes.
func NewDescriptor(size, cluster int64, file string) (*Descriptor, error) {
	doc := etree.NewDocument()
	doc.CreateProcInst("xml", `version="1.0"`)
	root := doc.CreateElement("Parallels_disk_image")
	add := func(e *etree.Element, pairs ...string) {
		for k := 0; k < len(pairs); k += 2 {
			e.CreateElement(pairs[k]).SetText(pairs[k+1])
		}
	}
	n := strconv.FormatInt(size/sectorSize, 10)
	add(root.CreateElement("Disk_Parameters"), "Disk_size", n,
		"Cylinders", strconv.FormatInt(size/sectorSize/(16*32), 10), "Heads", "16", "Sectors", "32", "Padding", "0")
	storage := root.CreateElement("StorageData").CreateElement("Storage")
	add(storage, "Start", "0", "End", n, "Blocksize", strconv.FormatInt(cluster/sectorSize, 10))
	add(storage.CreateElement("Image"), "GUID", defaultTop, "Type", "Compressed", "File", file)
	snapshots := root.CreateElement("Snapshots")
	add(snapshots, "TopGUID", defaultTop)
	add(snapshots.CreateElement("Shot"), "GUID", defaultTop, "ParentGUID", noParent)
	doc.Indent(2)
	b, err := doc.WriteToBytes()
	if err != nil {
		return nil, err
	}
	return ParseDescriptor(b)
}

// Marshal returns the document, with every node that it was read with.
func (d *Descriptor) Marshal() ([]byte, error) { return d.doc.WriteToBytes() }

// Store replaces the file at name by the document: after a crash it is the old
// one or the new one, and after a return without error the new one for good.
func (d *Descriptor) Store(name string) error {
	b, err := d.Marshal()
	if err != nil {
		return err
	}
	// Not by way of $TMPDIR, which belongs to others and may be full.
	dir := filepath.Dir(name)
	if err := renameio.WriteFile(name, b, 0o644, renameio.WithTempDir(dir)); err != nil {
		return err
	}
	return backend.SyncDir(dir)
}

// CreateBundle makes a bundle of one empty image in the existing directory
// dir, which must not have one yet. After an error nothing is left of it. What
// a creation that was cut short by a power cut or a kill has left, an image
// without data and without a descriptor, is used; any other root.hds is
// os.ErrExist.
func CreateBundle(ctx context.Context, dir string, o CreateOptions) (err error) {
	name, root := filepath.Join(dir, DescriptorName), filepath.Join(dir, RootName)
	o = o.defaults()
	d, err := NewDescriptor(o.Size, o.ClusterSize, RootName)
	if err != nil {
		return err
	}
	if err := absent(name); err != nil {
		return err
	}
	f, err := openRoot(root)
	if err != nil {
		return err
	}
	// The lock that f holds keeps another creation out until this is done.
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := absent(name); err != nil {
		return err
	}
	err = Create(ctx, f, o)
	if err == nil {
		// The image's name is durable before that of what names it.
		err = backend.SyncDir(dir)
	}
	if err == nil {
		err = d.Store(name)
	}
	if err == nil {
		return nil
	}
	// The descriptor may be there, when its directory could not be synced.
	if rerr := os.Remove(name); !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return errors.Join(err, os.Remove(root))
}

// absent is os.ErrExist for a name that is there.
func absent(name string) error {
	if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
		return errors.Join(fmt.Errorf("%s: %w", name, os.ErrExist), err)
	}
	return nil
}

// openRoot makes the file of a new image, or takes one that holds nothing, and
// locks it.
func openRoot(root string) (_ backend.File, err error) {
	st, err := os.Lstat(root)
	found := err == nil
	if found && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", root, os.ErrExist)
	}
	f, err := backend.Open(root, backend.Options{Writable: true, Create: true, Exclusive: !found})
	if err != nil {
		return nil, err
	}
	if l := backend.LockerOf(f); l != nil {
		if err := l.Lock(backend.WriterUse, backend.WriterUnshare); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return nil, errors.Join(err, f.Close())
		}
	}
	if found {
		blank, err := isBlank(f)
		if err == nil && !blank {
			err = fmt.Errorf("%s: %w, without a %s", root, os.ErrExist, DescriptorName)
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return f, nil
}

// isBlank tells whether a file is what Create can have left on its way: zeros,
// but for the header of an image.
func isBlank(f backend.File) (bool, error) {
	size, err := f.Size()
	if err != nil {
		return false, err
	}
	head := make([]byte, headerSize)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	if head = head[:n]; !backend.IsZero(head) && !Probe(head) {
		return false, nil
	}
	for at := int64(headerSize); at < size; {
		data, err := f.SeekData(at)
		if errors.Is(err, io.EOF) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		p := make([]byte, min(size-data, 64<<10))
		if _, err := f.ReadAt(p, data); err != nil {
			return false, err
		}
		if !backend.IsZero(p) {
			return false, nil
		}
		at = data + int64(len(p))
	}
	return true, nil
}

// CreateOptions say what Create makes.
type CreateOptions struct {
	Size        int64 // of the disk in bytes, a multiple of 512, at most MaxSize (version 1: 2 TiB less one sector)
	ClusterSize int64 // in bytes, a power of two from MinCluster to MaxCluster; 0 is DefaultCluster
	Version     int   // 1 or 2; 0 is 2
}

func (o CreateOptions) defaults() CreateOptions {
	if o.ClusterSize == 0 {
		o.ClusterSize = DefaultCluster
	}
	if o.Version == 0 {
		o.Version = 2
	}
	return o
}

// Create makes f an empty image that reads as zeros. The header and BAT area
// is really written, as the old tools demand: 4 bytes for each cluster.
//
// ploop itself makes only disks of whole clusters, and its snapshot and grow
// commands and the old kernel driver expect that; others are valid images
// otherwise.
func Create(_ context.Context, f backend.File, o CreateOptions) error {
	o = o.defaults()
	bad := func(what string, value any) error {
		return fmt.Errorf("%s: create: %w: %s %v", f.Name(), layers.ErrUnsupported, what, value)
	}
	limit := int64(MaxSize)
	if o.Version == 1 {
		limit = maxSizeV1
	}
	switch {
	case o.Version != 1 && o.Version != 2:
		return bad("version", o.Version)
	case o.ClusterSize < MinCluster || o.ClusterSize > MaxCluster || o.ClusterSize&(o.ClusterSize-1) != 0:
		return bad("cluster size", o.ClusterSize)
	case o.Size < 0 || o.Size%sectorSize != 0 || o.Size > limit:
		return bad("size", o.Size)
	}
	h := newHeader(o.Version, o.ClusterSize, o.Size)
	if err := f.Truncate(0); err != nil {
		return err
	}
	if err := backend.WriteZeros(f, 0, h.firstData); err != nil {
		return err
	}
	// The signature comes last: a file that was cut off is no image.
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.WriteAt(h.raw[:], 0); err != nil {
		return err
	}
	return f.Sync()
}
