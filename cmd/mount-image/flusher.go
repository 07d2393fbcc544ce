package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// beFlusher tells the kernel that the server writes back what others have in
// the page cache, so that none of its threads ever waits, while it allocates
// memory, for pages that only it can write: with a loop device or a shared
// mapping on the disk, and little memory in the server's control group, that
// wait is for ever.
//
// The mark is a thread's, and passes on to the threads and processes that it
// makes. The runtime has other threads already; so a server in the background
// is started by a marked thread, and one in the foreground replaces itself.
// Without CAP_SYS_RESOURCE, or before Linux 5.6, there is no mark.
func beFlusher(foreground bool) error {
	runtime.LockOSThread()
	on, _, errno := unix.Syscall6(unix.SYS_PRCTL, unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0, 0)
	if errno != 0 || on == 1 {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil || !foreground {
		return nil // not permitted: it goes without
	}
	if err := syscall.Exec("/proc/self/exe", os.Args, os.Environ()); err != nil {
		return fmt.Errorf("cannot start again as an I/O flusher: %w", err)
	}
	return nil
}
