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
	buf   []byte // compressed
	room  []byte // a cluster of which a part is wanted
	src   bytes.Reader
	fl    io.ReadCloser
	zs    *zstd.Decoder // of a stream
	whole *zstd.Decoder // of a frame in memory
}

var unpackers = sync.Pool{New: func() any { return new(unpacker) }}

// Unpack decompresses the cluster that e is a part of, see layers.Layer.
// Compressed data may reach behind the end of the file, because its last sector
// need not be padded; a stream that does not yield a whole cluster is ErrCorrupt, and what
// follows a whole cluster is ignored (section Compressed Clusters Descriptor).
func (img *Image) Unpack(ctx context.Context, e blockmap.Extent, within int64, dst []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.Kind != blockmap.Packed || within < 0 || within > img.clusterSize-int64(len(dst)) || e.Host < 0 ||
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
	if err := u.part(img.hdr.Compression(), buf[:n], int(img.clusterSize), int(within), dst); err != nil {
		return img.corrupt(e.Host, "compressed cluster", nil, err.Error())
	}
	return nil
}

// part fills dst with what follows the first bytes of a cluster of size bytes.
// Of a deflate stream no more is decompressed than that; a zstd frame is mostly
// one block, which is decompressed as a whole.
func (u *unpacker) part(c CompressionType, src []byte, size, within int, dst []byte) error {
	if len(dst) == size {
		return u.unpack(c, src, dst)
	}
	if len(u.room) < size {
		u.room = make([]byte, size)
	}
	end := size
	if c == Deflate {
		end = within + len(dst)
	}
	if err := u.unpack(c, src, u.room[:end]); err != nil {
		return err
	}
	copy(dst, u.room[within:])
	return nil
}

// unpack fills dst from the stream in src.
func (u *unpacker) unpack(c CompressionType, src, dst []byte) error {
	if c == Zstd && u.frame(src, dst) {
		return nil
	}
	return u.stream(c, src, dst)
}

// stream is unpack for whatever comes.
func (u *unpacker) stream(c CompressionType, src, dst []byte) error {
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

// frame fills dst from the zstd frame at the beginning of src if that is
// there completely and holds exactly one cluster, which is how all known
// programs write them, and reports whether it did. Decoding without a stream
// takes a third less time; whatever is wrong is left to the stream to say.
func (u *unpacker) frame(src, dst []byte) bool {
	n := frameLen(src)
	if n == 0 {
		return false
	}
	if u.whole == nil {
		var err error
		u.whole, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecodeAllCapLimit(true), zstd.IgnoreChecksum(false))
		if err != nil {
			return false
		}
	}
	out, err := u.whole.DecodeAll(src[:n], dst[:0:len(dst)])
	return err == nil && len(out) == len(dst)
}

// frameLen is the length of the zstd frame that b begins with, 0 if it does
// not begin with one or that is not all there (RFC 8878, section 3.1.1).
func frameLen(b []byte) int {
	var h zstd.Header
	if h.Decode(b) != nil || h.Skippable {
		return 0
	}
	n := h.HeaderSize
	for {
		if n+3 > len(b) {
			return 0
		}
		block := uint32(b[n]) | uint32(b[n+1])<<8 | uint32(b[n+2])<<16
		n += 3
		if block>>1&3 == 1 {
			n++ // one byte, to be repeated
		} else {
			n += int(block >> 3)
		}
		if block&1 != 0 {
			break
		}
	}
	if h.HasCheckSum {
		n += 4
	}
	if n > len(b) {
		return 0
	}
	return n
}

// Layer and blockmap.Map are what an Image is in every mode.
var (
	_ layers.Layer = (*Image)(nil)
)
