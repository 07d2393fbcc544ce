// Package backend is where image bytes live: the File interface and its
// implementations over the operating system, over memory, with injected faults
// and with a recording from which every state after a power cut can be
// rebuilt; and the locks by which programs keep out of each other's images.
//
// Design note. Everything above does its I/O through File, so that a test can
// put any of these implementations under any format. A File knows nothing of
// formats. All I/O is positional and may run concurrently; File adds no
// ordering of its own: two operations are ordered only by the caller waiting
// for the first, and durable only once a Sync that began after them returned
// nil.
package backend

import "errors"

// ErrInUse reports that another program holds the image.
var ErrInUse = errors.New("image is in use")

// File is an image file, a block device or a stand-in for one.
//
// Errors are those of the operating system (errors.Is with unix.Errno works).
// An operation that the file or its filesystem cannot do at all returns an
// error for which errors.Is(err, errors.ErrUnsupported) holds.
type File interface {
	// ReadAt is io.ReaderAt: fewer than len(p) bytes come with io.EOF when
	// the file ends there.
	ReadAt(p []byte, off int64) (int, error)
	// ReadvAt fills bufs one after the other from the bytes at off on, in one
	// system call where possible. Short only with an error, as ReadAt.
	ReadvAt(bufs [][]byte, off int64) (int, error)
	// WriteAt is io.WriterAt: it writes all of p or returns an error and how
	// much was written. Behind the end the file grows.
	WriteAt(p []byte, off int64) (int, error)
	// WritevAt writes bufs one after the other at off, as WriteAt.
	WritevAt(bufs [][]byte, off int64) (int, error)

	// Size is the apparent length in bytes.
	Size() (int64, error)
	// Allocated is the number of bytes of storage in use (st_blocks*512).
	Allocated() (int64, error)
	// Truncate sets the length; growth is a hole that reads as zeros.
	Truncate(size int64) error
	// Sync makes everything that completed before it durable (fdatasync: data
	// and what is needed to read it back, the length included). After an
	// error the state of unsynced bytes is unknown for ever; a later Sync
	// that succeeds proves nothing about them.
	Sync() error

	// PunchHole makes [off, off+n) read as zeros and gives its storage back
	// where whole blocks are covered. The length does not change.
	PunchHole(off, n int64) error
	// ZeroRange makes [off, off+n) read as zeros and keeps its storage; it
	// may leave unwritten extents. The length does not change; the range must
	// lie inside it. Use WriteZeros where real blocks are demanded.
	ZeroRange(off, n int64) error
	// CopyRange copies n bytes from src at srcOff to off in this file,
	// sharing storage where the filesystem can. It returns the bytes copied,
	// fewer than n only with an error (io.ErrUnexpectedEOF when src ends).
	CopyRange(src File, srcOff, off, n int64) (int64, error)

	// SeekData returns the first offset at or behind off that holds data, or
	// io.EOF when only a hole follows. SeekHole returns the first offset at
	// or behind off that is a hole; the end of the file counts as one; off at
	// or behind the end is io.EOF.
	SeekData(off int64) (int64, error)
	SeekHole(off int64) (int64, error)

	// Name is the path, for messages.
	Name() string
	Close() error
}

// zeros is what WriteZeros writes from.
var zeros [1 << 20]byte

// WriteZeros writes zero bytes over [off, off+n), so that the range is backed
// by real, written blocks: no hole and no unwritten extent, as the old ploop
// tools demand of mapped clusters.
func WriteZeros(f File, off, n int64) error {
	for n > 0 {
		c := min(n, int64(len(zeros)))
		w, err := f.WriteAt(zeros[:c], off)
		if err != nil {
			return err
		}
		off += int64(w)
		n -= int64(w)
	}
	return nil
}
