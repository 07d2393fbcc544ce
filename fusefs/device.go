// Package fusefs shows a virtual disk as one raw file (and its partitions as
// further files) in a directory, through FUSE.
//
// Design note. The filesystem has a fixed set of inodes: the root directory,
// disk.raw, and one file per partition. It is written against the raw FUSE
// protocol of go-fuse, because there is no tree to manage and every lookup
// table between a request and the disk would only cost. It knows nothing of
// image formats: it serves a Device, and a *layers.Stack is one.
//
// The read path allocates nothing: the kernel's request names the inode, the
// device reads straight into the reply buffer, and the reply is that buffer.
//
// Interrupts. A disk is read and written by code that does not expect EINTR
// from a regular file (and signals such as the Go scheduler's would provoke
// it), and a half-done write must not be given up. So requests run to their
// end; each is bounded by the request size. Only a device that cancels by
// itself (context.Canceled) yields EINTR.
//
// Page cache. Pages of a file opened without O_DIRECT are cached by the kernel.
// On a read-only disk they stay valid for ever and survive close
// (FOPEN_KEEP_CACHE). On a writable disk without partitions there is one inode,
// so the kernel keeps O_DIRECT, fallocate and cached I/O coherent; pages are
// dropped at each open, so that a page which a reader cached while a direct
// write was under way does not live on. On a writable disk *with* partitions
// the same bytes have two inodes that the kernel knows nothing about, so every
// open bypasses the page cache (FOPEN_DIRECT_IO); shared writable mappings are
// then refused by the kernel (ENODEV), everything else works.
//
// Direct writers (O_DIRECT and writable) get FOPEN_DIRECT_IO together with
// FOPEN_PARALLEL_DIRECT_WRITES, since the Device takes concurrent changes.
package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// Device is a virtual disk of fixed size. All methods may be called
// concurrently. *layers.Stack is one.
type Device interface {
	// Size is the length in bytes; it does not change.
	Size() int64
	// Writable tells whether changes are accepted.
	Writable() bool
	// ReadAt fills p from off, as io.ReaderAt.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// WriteAt stores p at off, as io.WriterAt.
	WriteAt(ctx context.Context, p []byte, off int64) (int, error)
	// ZeroAt makes exactly [off, off+n) read as zeros; with punch its storage
	// is given back where possible.
	ZeroAt(ctx context.Context, off, n int64, punch bool) error
	// Sync makes every completed change durable.
	Sync(ctx context.Context) error
	// SeekData and SeekHole are lseek(2) with SEEK_DATA and SEEK_HOLE; io.EOF
	// stands for ENXIO.
	SeekData(ctx context.Context, off int64) (int64, error)
	SeekHole(ctx context.Context, off int64) (int64, error)
	// Allocated is the number of bytes of host storage in use.
	Allocated() (int64, error)
}

// Section returns the part [off, off+n) of dev as a Device: a partition. It is
// an error when the part does not lie inside dev.
func Section(dev Device, off, n int64) (Device, error) {
	if off < 0 || n < 0 || off > dev.Size() || n > dev.Size()-off {
		return nil, fmt.Errorf("section at %d of %d bytes is outside the disk of %d bytes", off, n, dev.Size())
	}
	return &section{dev: dev, off: off, n: n}, nil
}

type section struct {
	dev    Device
	off, n int64
}

func (s *section) Size() int64                    { return s.n }
func (s *section) Writable() bool                 { return s.dev.Writable() }
func (s *section) Sync(ctx context.Context) error { return s.dev.Sync(ctx) }

// holds tells whether [off, off+n) lies in the section.
func (s *section) holds(off, n int64) bool {
	return off >= 0 && n >= 0 && off <= s.n && n <= s.n-off
}

func (s *section) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 || off >= s.n {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > s.n-off {
		p, end = p[:s.n-off], io.EOF
	}
	n, err := s.dev.ReadAt(ctx, p, s.off+off)
	if err == nil {
		err = end
	}
	return n, err
}

// WriteInPlace implements InPlaceWriter, where the disk does.
func (s *section) WriteInPlace(p []byte, off int64) bool {
	w, ok := s.dev.(InPlaceWriter)
	return ok && s.holds(off, int64(len(p))) && w.WriteInPlace(p, s.off+off)
}

// ReadCached implements CachedReader, where the disk does.
func (s *section) ReadCached(p []byte, off int64) bool {
	c, ok := s.dev.(CachedReader)
	return ok && s.holds(off, int64(len(p))) && c.ReadCached(p, s.off+off)
}

func (s *section) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	if !s.holds(off, int64(len(p))) {
		return 0, unix.EFBIG
	}
	return s.dev.WriteAt(ctx, p, s.off+off)
}

func (s *section) ZeroAt(ctx context.Context, off, n int64, punch bool) error {
	if !s.holds(off, n) {
		return unix.EFBIG
	}
	return s.dev.ZeroAt(ctx, s.off+off, n, punch)
}

func (s *section) SeekData(ctx context.Context, off int64) (int64, error) {
	if off < 0 || off >= s.n {
		return 0, io.EOF
	}
	at, err := s.dev.SeekData(ctx, s.off+off)
	if err != nil {
		return 0, err
	}
	if at-s.off >= s.n {
		return 0, io.EOF
	}
	return at - s.off, nil
}

func (s *section) SeekHole(ctx context.Context, off int64) (int64, error) {
	if off < 0 || off >= s.n {
		return 0, io.EOF
	}
	at, err := s.dev.SeekHole(ctx, s.off+off)
	if errors.Is(err, io.EOF) {
		return s.n, nil
	}
	if err != nil {
		return 0, err
	}
	return min(at-s.off, s.n), nil
}

// maxAllocatedSteps bounds what one stat of a partition may cost.
const maxAllocatedSteps = 4096

// Allocated counts the data inside the section. After maxAllocatedSteps
// extents it settles for an upper bound: what the whole disk occupies.
func (s *section) Allocated() (int64, error) {
	ctx := context.Background()
	var sum int64
	for off, steps := int64(0), 0; off < s.n; steps++ {
		if steps == maxAllocatedSteps {
			whole, err := s.dev.Allocated()
			return min(whole, s.n), err
		}
		data, err := s.SeekData(ctx, off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
		hole, err := s.SeekHole(ctx, data)
		if err != nil {
			return 0, err
		}
		if hole <= data {
			return 0, fmt.Errorf("a hole at %d does not lie behind the data at %d", hole, data)
		}
		sum += hole - data
		off = hole
	}
	return sum, nil
}
