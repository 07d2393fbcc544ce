package fusefs

import (
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FUSE passthrough (Linux 6.9): the kernel itself reads and writes a backing
// file in place of disk.raw, and the server sees only what is neither a read
// nor a write. It is for a disk that is, byte for byte, one file.
//
// Whoever registers the backing file needs CAP_SYS_ADMIN and the connection;
// that can be another process than the server (RegisterBacking). Opens of
// disk.raw wait until the question is settled (Settle), because the kernel
// refuses an inode that is open in both ways.

// iocBackingOpen is FUSE_DEV_IOC_BACKING_OPEN: _IOW(229, 1, 16 bytes).
const iocBackingOpen = 0x4010e501

// RegisterBacking makes the open file fd known to the kernel as a backing file
// for the mount behind the connection conn, which the server must have begun
// to serve. It returns the number for Settle. It fails with EPERM without
// CAP_SYS_ADMIN, with EOPNOTSUPP or ENOTTY where the kernel has no
// passthrough, and with ELOOP when the file lies on a stacked filesystem.
func RegisterBacking(conn, fd int) (int32, error) {
	request := struct {
		fd      int32
		flags   uint32
		padding uint64
	}{fd: int32(fd)}
	// The one ioctl for which golang.org/x/sys has no wrapper.
	id, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(conn), iocBackingOpen, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		return 0, fmt.Errorf("passthrough: %w", errno)
	}
	return int32(id), nil
}

// passthrough is what opens of disk.raw wait for.
type passthrough struct {
	settled chan struct{} // nil when nobody will settle it
	once    sync.Once
	id      int32 // 0: no
}

// Settle ends the wait of those who open disk.raw, when Options.Passthrough
// was set: from now on the backing file of that number serves it, or with 0
// the device does.
func (fs *FS) Settle(id int32) {
	if fs.through.settled == nil {
		return
	}
	fs.through.once.Do(func() {
		fs.through.id = id
		close(fs.through.settled)
	})
}

// backing returns the number of the backing file of disk.raw, 0 for none.
func (p *passthrough) backing(cancel <-chan struct{}) (int32, error) {
	if p.settled == nil {
		return 0, nil
	}
	select {
	case <-p.settled:
		return p.id, nil
	case <-cancel:
		return 0, unix.EINTR
	}
}
