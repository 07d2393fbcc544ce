package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// CreateOptions say what image Create makes. The zero value of each field but
// Size is the default.
type CreateOptions struct {
	Size            int64 // bytes of the virtual disk
	ClusterSize     int64 // 512 B to 2 MiB, a power of two; default 64 KiB
	Version         int   // 2 or 3; default 3
	RefcountBits    int   // 1, 2, 4 … 64; default 16, the only one in version 2
	ExtendedL2      bool  // version 3, clusters of 16 KiB or more
	LazyRefcounts   bool  // version 3
	CompressionType CompressionType
	BackingFile     string // as it is written in the image
	BackingFormat   string // needed with BackingFile
	// DataFile is the name of the external data file as it is written in the
	// image. The file itself is the caller's: empty, or with DataFileRaw of
	// Size bytes that read as zeros.
	DataFile    string
	DataFileRaw bool
}

// header checks the options and returns the header they describe, still
// without the places of its tables.
func (o *CreateOptions) header() (*Header, error) {
	if o.ClusterSize == 0 {
		o.ClusterSize = 64 << 10
	}
	if o.Version == 0 {
		o.Version = 3
	}
	if o.RefcountBits == 0 {
		o.RefcountBits = 16
	}
	bad := func(option string, value any, why string) error {
		return fmt.Errorf("%w: %s %v: %s", layers.ErrUnsupported, option, value, why)
	}
	v2 := o.Version == 2
	switch {
	case o.Version != 2 && o.Version != 3:
		return nil, bad("version", o.Version, "must be 2 or 3")
	case o.ClusterSize < 1<<minClusterBits || o.ClusterSize > 1<<maxClusterBits || o.ClusterSize&(o.ClusterSize-1) != 0:
		return nil, bad("cluster size", o.ClusterSize, "must be a power of two from 512 to 2 MiB")
	case o.RefcountBits < 1 || o.RefcountBits > 64 || o.RefcountBits&(o.RefcountBits-1) != 0:
		return nil, bad("refcount bits", o.RefcountBits, "must be a power of two from 1 to 64")
	case v2 && o.RefcountBits != 16:
		return nil, bad("refcount bits", o.RefcountBits, "version 2 has 16")
	case v2 && o.ExtendedL2, v2 && o.LazyRefcounts, v2 && o.CompressionType != Deflate, v2 && o.DataFile != "":
		return nil, bad("version", o.Version, "extended L2 entries, lazy refcounts, zstd and external data files need version 3")
	case o.ExtendedL2 && o.ClusterSize < 1<<minExtendedL2Bits:
		return nil, bad("cluster size", o.ClusterSize, "extended L2 entries need clusters of 16 KiB")
	case o.CompressionType > Zstd:
		return nil, bad("compression type", o.CompressionType, "unknown")
	case o.DataFileRaw && (o.DataFile == "" || o.BackingFile != ""):
		return nil, bad("raw external data file", o.DataFile, "needs a data file and excludes a backing file")
	case o.BackingFormat != "" && o.BackingFile == "":
		return nil, bad("backing format", o.BackingFormat, "there is no backing file")
	case o.BackingFile != "" && o.BackingFormat == "":
		return nil, bad("backing file", o.BackingFile, "its format must be stated")
	case len(o.BackingFile) > maxBackingName:
		return nil, bad("backing file", o.BackingFile, "the name is longer than 1023 bytes")
	case o.Size < 0:
		return nil, bad("size", o.Size, "is negative")
	}
	h := &Header{
		Version: uint32(o.Version), ClusterBits: uint32(bits.TrailingZeros64(uint64(o.ClusterSize))),
		Size: uint64(o.Size), RefcountOrder: uint32(bits.TrailingZeros(uint(o.RefcountBits))),
		HeaderLength: headerLengthV2, BackingName: o.BackingFile,
	}
	if !v2 {
		h.HeaderLength = headerLengthV3 + 8
		h.Tail = []byte{byte(o.CompressionType), 0, 0, 0, 0, 0, 0, 0}
	}
	set := func(on bool, field *uint64, bit uint64) {
		if on {
			*field |= bit
		}
	}
	set(o.ExtendedL2, &h.Incompatible, incompatExtendedL2)
	set(o.CompressionType != Deflate, &h.Incompatible, incompatCompression)
	set(o.DataFile != "", &h.Incompatible, incompatDataFile)
	set(o.DataFileRaw, &h.Autoclear, autoclearRawDataFile)
	set(o.LazyRefcounts, &h.Compatible, compatLazyRefcounts)
	if o.BackingFormat != "" {
		h.Extensions = append(h.Extensions, Extension{Type: extBackingFormat, Data: []byte(o.BackingFormat)})
	}
	if o.DataFile != "" {
		h.Extensions = append(h.Extensions, Extension{Type: extDataFile, Data: []byte(o.DataFile)})
	}
	if o.BackingFile != "" {
		h.BackingOffset = uint64(h.HeaderLength) // marshal moves it behind the extensions
	}
	return h, nil
}

// featureNames is the feature name table of what this package knows.
func featureNames() Extension {
	var data []byte
	for _, f := range []struct {
		bitmap, bit byte
		name        string
	}{
		{0, 0, "dirty bit"}, {0, 1, "corrupt bit"}, {0, 2, "external data file"}, {0, 3, "compression type"},
		{0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"}, {2, 0, "bitmaps"}, {2, 1, "raw external data"},
	} {
		entry := make([]byte, 48)
		entry[0], entry[1] = f.bitmap, f.bit
		copy(entry[2:], f.name)
		data = append(data, entry...)
	}
	return Extension{Type: extFeatureNames, Data: data}
}

// layout places the refcount table, the refcount blocks and the L1 table, in
// this order, behind the header, and fills in the header's fields. It returns
// the number of refcount blocks and of clusters.
func (h *Header) layout(g *geometry) (blocks, total int64, err error) {
	need, ok := g.l1Need(h.Size)
	if !ok {
		return 0, 0, fmt.Errorf("%w: size %d is too large for clusters of %d bytes", layers.ErrUnsupported, h.Size, g.clusterSize)
	}
	need = max(need, 1)
	ceil := func(n, unit int64) int64 { return (n + unit - 1) / unit }
	l1 := ceil(int64(need)*8, g.clusterSize)
	perBlock := g.clusterSize * 8 >> h.RefcountOrder
	// Table and blocks count themselves; they only grow, so this ends.
	var table int64
	for {
		table = max(ceil(blocks*8, g.clusterSize), 1)
		total = 1 + table + blocks + l1
		n := ceil(total, perBlock)
		if n <= blocks {
			break
		}
		blocks = n
	}
	h.RefcountTableOffset, h.RefcountTableClusters = uint64(g.clusterSize), uint32(table)
	h.L1Offset, h.L1Size = uint64((1+table+blocks)<<g.clusterBits), uint32(need)
	return blocks, total, nil
}

// Create makes f an empty image: whatever f held is lost. f may be a block
// device that is large enough. When Create returns nil the image is durable.
//
// What f held is durably gone before anything is written, and the first sector
// of the header is written last, after everything else is durable: a crash
// leaves the old content, or nothing that could be taken for an image, or the
// whole new image.
func Create(ctx context.Context, f backend.File, o CreateOptions) error {
	h, err := o.header()
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	g := newGeometry(h)
	blocks, total, err := h.layout(&g)
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	head, err := h.marshalForCreate()
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	if err := clearFile(ctx, f, total<<g.clusterBits); err != nil {
		return err
	}
	if err := writeRefcounts(ctx, f, h, &g, blocks, total); err != nil {
		return err
	}
	const sector = 512
	if len(head) > sector {
		if _, err := f.WriteAt(head[sector:], sector); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.WriteAt(head[:min(len(head), sector)], 0); err != nil {
		return err
	}
	return f.Sync()
}

// marshalForCreate adds the feature name table where there is room for it.
func (h *Header) marshalForCreate() ([]byte, error) {
	if h.Version >= 3 {
		with := *h
		with.Extensions = append([]Extension{}, h.Extensions...)
		with.Extensions = append(with.Extensions, featureNames())
		if b, err := with.marshal(); err == nil {
			*h = with
			return b, nil
		}
	}
	return h.marshal()
}

// clearFile makes f read as zeros for n bytes; what it held before is durably
// gone.
func clearFile(ctx context.Context, f backend.File, n int64) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	if size == 0 {
		return f.Truncate(n)
	}
	err = f.Truncate(0)
	if err == nil {
		if err = f.Sync(); err == nil {
			err = f.Truncate(n)
		}
		return err
	}
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	// A block device keeps its length and its content.
	if size < n {
		return fmt.Errorf("%s: %w: the image needs at least %d bytes", f.Name(), layers.ErrUnsupported, n)
	}
	const step = 8 << 20
	for off := int64(0); off < n; off += step {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := backend.WriteZeros(f, off, min(step, n-off)); err != nil {
			return err
		}
		if off == 0 {
			if err := f.Sync(); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeRefcounts writes the table and the blocks in which the first total
// clusters have a reference count of one. The file reads as zeros there.
func writeRefcounts(ctx context.Context, f backend.File, h *Header, g *geometry, blocks, total int64) error {
	first := int64(h.RefcountTableOffset) + int64(h.RefcountTableClusters)<<g.clusterBits
	table := make([]byte, blocks*8) // a few KiB: it counts only metadata
	for i := range blocks {
		binary.BigEndian.PutUint64(table[i*8:], uint64(first+i<<g.clusterBits))
	}
	if _, err := f.WriteAt(table, int64(h.RefcountTableOffset)); err != nil {
		return err
	}
	perBlock := g.clusterSize * 8 >> h.RefcountOrder
	block := make([]byte, g.clusterSize)
	for i := range blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		clear(block)
		n := min(perBlock, total-i*perBlock)
		putOnes(block, n, h.RefcountOrder)
		if _, err := f.WriteAt(block, first+i<<g.clusterBits); err != nil {
			return err
		}
	}
	return nil
}

// putOnes sets the first n entries of a refcount block to one (section
// Refcount block entry: sub-byte entries begin at the least significant bit).
func putOnes(block []byte, n int64, order uint32) {
	for i := range n {
		bit := i << order
		if order < 3 {
			block[bit>>3] |= 1 << (bit & 7)
		} else {
			// Big-endian: the one stands in the entry's last byte.
			block[bit>>3+int64(1)<<(order-3)-1] = 1
		}
	}
}
