package uring

import "golang.org/x/sys/unix"

// hugePage is how much one entry of the processor's page tables can map. Where
// it is another length, nothing is gained.
const hugePage = 2 << 20

// longRequest is the least length in bytes from which a request tells that the
// memory of its place will be used as a whole.
const longRequest = 256 << 10

// collapse has the memory from byte from to byte to of area, which begins at a
// huge page, mapped by huge pages: to copy a MiB takes a sixth less time then,
// since in a virtual machine each page costs a walk through two page tables. It
// is a hint, which the kernel follows since Linux 6.1 when it can, whatever the
// policy for huge pages is. What is left behind the last whole huge page stays as
// it is.
func collapse(area []byte, from, to int) {
	from = from / hugePage * hugePage
	to = min((to+hugePage-1)/hugePage*hugePage, len(area))
	_ = unix.Madvise(area[from:to], unix.MADV_COLLAPSE)
}
