//go:build linux && (amd64 || arm64)

package sandbox

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// install makes the kernel apply the rules to all threads. They add to those
// installed before.
func install(rules []rule) error {
	filter := compile(rules)
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// The only way to hand a filter over; x/sys has no function for it.
	tid, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("seccomp filter: %w", errno)
	}
	if tid != 0 {
		return fmt.Errorf("seccomp filter: thread %d has filters of its own", tid)
	}
	return nil
}
