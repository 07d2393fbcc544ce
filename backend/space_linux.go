package backend

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// PunchHole is File, by fallocate(2). On a block device whole logical sectors
// are discarded and the unaligned edges are written with zeros.
func (o *osFile) PunchHole(off, n int64) error {
	return o.zero("punch hole", off, n, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE)
}

// ZeroRange is File, by fallocate(2). A filesystem that cannot (tmpfs, ext3)
// gives errors.ErrUnsupported: writing zeros instead is the caller's decision,
// because it may take the space and the time of the whole range.
func (o *osFile) ZeroRange(off, n int64) error {
	if err := checkRange(off, n); err != nil {
		return pathErr("zero range", o.name, err)
	}
	size, err := o.Size()
	if err != nil {
		return err
	}
	if off+n > size {
		return pathErr("zero range", o.name, fmt.Errorf("%d+%d is behind the end %d (%w)", off, n, size, unix.EINVAL))
	}
	return o.zero("zero range", off, n, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE)
}

func (o *osFile) zero(op string, off, n int64, mode uint32) error {
	if err := checkRange(off, n); err != nil {
		return pathErr(op, o.name, err)
	}
	if o.block {
		size, err := o.size()
		if err != nil {
			return err
		}
		n = min(n, max(size-off, 0)) // behind the end there is nothing to punch
		head := min(n, (o.sector-off%o.sector)%o.sector)
		tail := (n - head) % o.sector
		if err := WriteZeros(o, off, head); err != nil {
			return err
		}
		if err := WriteZeros(o, off+n-tail, tail); err != nil {
			return err
		}
		off, n = off+head, n-head-tail
	}
	if n == 0 {
		return nil
	}
	if o.direct != nil {
		// A read-modify-write beside us would put the old bytes back.
		o.direct.mu.RLock()
		defer o.direct.mu.RUnlock()
	}
	return pathErr(op, o.name, o.control(func(fd int) error { return unix.Fallocate(fd, mode, off, n) }))
}

// SeekData is File. Where the filesystem (or a block device) cannot tell,
// everything is data.
func (o *osFile) SeekData(off int64) (int64, error) {
	return o.seek(off, unix.SEEK_DATA)
}

// SeekHole is File.
func (o *osFile) SeekHole(off int64) (int64, error) {
	return o.seek(off, unix.SEEK_HOLE)
}

func (o *osFile) seek(off int64, whence int) (int64, error) {
	if off < 0 {
		return 0, pathErr("seek", o.name, unix.EINVAL)
	}
	if !o.block {
		var pos int64
		err := o.control(func(fd int) (err error) {
			pos, err = unix.Seek(fd, off, whence)
			return err
		})
		switch {
		case err == nil:
			return pos, nil
		case errors.Is(err, unix.ENXIO):
			return 0, io.EOF
		case !errors.Is(err, unix.EINVAL) && !errors.Is(err, errors.ErrUnsupported):
			return 0, pathErr("seek", o.name, err)
		}
	}
	size, err := o.Size()
	switch {
	case err != nil:
		return 0, err
	case off >= size:
		return 0, io.EOF
	case whence == unix.SEEK_DATA:
		return off, nil
	}
	return size, nil
}

// CopyRange is File, by copy_file_range(2) where both are files of the system
// and the kernel can, else by reading and writing. Overlapping ranges of the
// same file are EINVAL.
func (o *osFile) CopyRange(src File, srcOff, off, n int64) (int64, error) {
	if err := checkCopy(src, srcOff, off, n); err != nil {
		return 0, pathErr("copy", o.name, err)
	}
	s, ok := src.(*osFile)
	if !ok || s.block || o.block {
		return copyLoop(o, src, srcOff, off, n)
	}
	if s.dev == o.dev && s.ino == o.ino && overlap(srcOff, off, n) {
		return 0, pathErr("copy", o.name, fmt.Errorf("ranges overlap (%w)", unix.EINVAL))
	}
	if err := o.whole("copy"); err != nil {
		return 0, err
	}
	var done int64
	defer func() { o.reached(off, done) }()
	for done < n {
		c, err := o.copyFileRange(s, srcOff+done, off+done, min(n-done, 1<<30))
		switch {
		case err == nil && c > 0:
			done += int64(c)
		case err == nil:
			return done, io.ErrUnexpectedEOF
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPERM),
			errors.Is(err, unix.ETXTBSY), errors.Is(err, errors.ErrUnsupported):
			c, err := copyLoop(o, src, srcOff+done, off+done, n-done)
			return done + c, err
		default:
			return done, pathErr("copy", o.name, err)
		}
	}
	return done, nil
}

func (o *osFile) copyFileRange(s *osFile, srcOff, off, n int64) (c int, err error) {
	if o.direct != nil {
		o.direct.mu.RLock()
		defer o.direct.mu.RUnlock()
	}
	err = o.control(func(fd int) error {
		return s.control(func(sfd int) (err error) {
			so, do := srcOff, off
			c, err = unix.CopyFileRange(sfd, &so, fd, &do, int(n), 0)
			return err
		})
	})
	return c, err
}
