package backend

import "strings"

// Perm is a set of permissions on an image as QEMU's block layer names them.
// Bit n stands for byte 100+n (in use) and byte 200+n (not shared) of QEMU's
// lock protocol (block/file-posix.c, raw_apply_lock_bytes).
type Perm uint8

// The permissions; the values are QEMU's BLK_PERM_*.
const (
	PermConsistentRead Perm = 1 << iota // read, and see a consistent image
	PermWrite                           // change content
	PermWriteUnchanged                  // write what was there already
	PermResize                          // change the length

	permAll = PermConsistentRead | PermWrite | PermWriteUnchanged | PermResize
)

// What QEMU's tools ask for, so that we refuse each other exactly as they do
// among themselves.
const (
	ReaderUse     = PermConsistentRead
	ReaderUnshare = PermWrite | PermResize
	WriterUse     = PermConsistentRead | PermWrite | PermResize
	WriterUnshare = PermWrite | PermResize
)

// String lists the permissions by QEMU's names.
func (p Perm) String() string {
	var s []string
	for n, name := range [...]string{"consistent read", "write", "write unchanged", "resize"} {
		if p&(1<<n) != 0 {
			s = append(s, name)
		}
	}
	if p&^permAll != 0 {
		s = append(s, "unknown")
	}
	if s == nil {
		return "none"
	}
	return strings.Join(s, ", ")
}

// Locker is implemented by files that other programs can open as well.
type Locker interface {
	// Lock announces that we use the permissions in use and that nobody else
	// may use those in unshare. It replaces what an earlier Lock announced
	// (upgrade and downgrade). It never waits.
	//
	// An error for which errors.Is(err, ErrInUse) holds names the permission
	// in conflict; what was held before is then still held and nothing more.
	// errors.ErrUnsupported: the filesystem or kernel has no such locks.
	Lock(use, unshare Perm) error
	// Unlock gives everything back. Close does so too, unless the descriptor
	// was duplicated.
	Unlock() error
}
