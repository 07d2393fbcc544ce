package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// maxZstdWindow bounds the memory of a zstd frame. A frame holds one cluster,
// at most 2 MiB, so no compressor has a reason to ask for more.
const maxZstdWindow = 8 << 20

// unpacker decompresses one cluster at a time. Both decoders are made when
// first needed and then used again.
type unpacker struct {
	buf []byte
	src bytes.Reader
	fl  io.ReadCloser
	zs  *zstd.Decoder
}

var unpackers = sync.Pool{New: func() any { return new(unpacker) }}

// Unpack decompresses the cluster that e is a part of. Compressed data may
// reach behind the end of the file, because its last sector need not be
// padded; a stream that does not yield a whole cluster is ErrCorrupt, and what
// follows a whole cluster is ignored (section Compressed Clusters Descriptor).
func (img *Image) Unpack(ctx context.Context, e blockmap.Extent, dst []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.Kind != blockmap.Packed || int64(len(dst)) != img.clusterSize || e.Host < 0 ||
		int64(e.PackedLen) > 2*img.clusterSize+1 || !inFile(uint64(e.Host), uint64(e.PackedLen)) {
		return img.errorf(-1, "", nil, fmt.Errorf("%w: not a compressed extent of this image: %+v", blockmap.ErrRange, e))
	}
	u := unpackers.Get().(*unpacker)
	defer unpackers.Put(u)
	if cap(u.buf) < int(e.PackedLen) {
		u.buf = make([]byte, e.PackedLen)
	}
	buf := u.buf[:e.PackedLen]
	n, err := img.f.ReadAt(buf, e.Host)
	if err != nil && !errors.Is(err, io.EOF) {
		return img.errorf(e.Host, "compressed cluster", nil, err)
	}
	if err := u.unpack(img.hdr.Compression(), buf[:n], dst); err != nil {
		return img.corrupt(e.Host, "compressed cluster", nil, err.Error())
	}
	return nil
}

// unpack fills dst from the stream in src.
func (u *unpacker) unpack(c CompressionType, src, dst []byte) error {
	u.src.Reset(src)
	defer u.src.Reset(nil)
	var r io.Reader
	var err error
	switch {
	case c == Zstd && u.zs == nil:
		u.zs, err = zstd.NewReader(&u.src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.IgnoreChecksum(false))
		r = u.zs
	case c == Zstd:
		r, err = u.zs, u.zs.Reset(&u.src)
	case u.fl == nil:
		u.fl = flate.NewReader(&u.src)
		r = u.fl
	default:
		r, err = u.fl, u.fl.(flate.Resetter).Reset(&u.src, nil)
	}
	if err == nil {
		_, err = io.ReadFull(r, dst)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the %v stream ends before the cluster does", c)
	}
	if err != nil {
		return fmt.Errorf("%v: %v", c, err)
	}
	return nil
}

// Layer and blockmap.Map are what an Image is in every mode.
var (
	_ layers.Layer = (*Image)(nil)
)
