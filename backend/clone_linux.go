package backend

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNotShared says that two files cannot share storage: another filesystem,
// one without reflinks, or a range that is not whole blocks.
var ErrNotShared = fmt.Errorf("the files cannot share storage: %w", errors.ErrUnsupported)

// CloneRange makes n bytes of dst at off share the storage of src at srcOff
// (FICLONERANGE), copying nothing. Offsets and n must be multiples of the
// filesystem's block, except that n may end with src. What cannot be shared is
// an ErrNotShared and changes nothing.
func CloneRange(dst, src File, srcOff, off, n int64) error {
	if err := checkCopy(src, srcOff, off, n); err != nil {
		return pathErr("clone", dst.Name(), err)
	}
	if n == 0 {
		return nil // which the ioctl takes for "to the end"
	}
	err := WithDescriptor(dst, func(dfd int) error {
		return WithDescriptor(src, func(sfd int) error {
			r := unix.FileCloneRange{
				Src_fd: int64(sfd), Src_offset: uint64(srcOff), Src_length: uint64(n), Dest_offset: uint64(off),
			}
			for {
				if err := unix.IoctlFileCloneRange(dfd, &r); err != unix.EINTR {
					return err
				}
			}
		})
	})
	switch {
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY),
		errors.Is(err, errors.ErrUnsupported):
		return pathErr("clone", dst.Name(), fmt.Errorf("%w (%w)", ErrNotShared, err))
	}
	return pathErr("clone", dst.Name(), err)
}
