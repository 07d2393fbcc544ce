package uring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The part of io_uring(7) that is needed: one ring whose submissions are 128
// bytes long, filled and drained by one thread. golang.org/x/sys has the
// numbers of the system calls and nothing else, so this file, and only this
// file, deals in addresses.

const (
	setupRDisabled   = 1 << 6
	setupCoopTaskrun = 1 << 8
	setupSQE128      = 1 << 10
	featSingleMmap   = 1 << 0
	offSQEs          = 0x10000000
	enterGetEvents   = 1 << 0

	registerRestrictions = 11
	registerEnableRings  = 12
	restrictionSQEOp     = 1

	opPollAdd   = 6
	opURingCmd  = 46
	pollAddMult = 1 << 0

	cqeMore = 1 << 1

	paramsSize = 120
	sqeSize    = 128
	cqeSize    = 16
)

// ring is an io_uring of which one thread is the only user.
type ring struct {
	fd      int
	mem     []byte // both rings
	sqes    []byte
	sqTail  *atomic.Uint32
	sqHead  *atomic.Uint32
	cqTail  *atomic.Uint32
	cqHead  *atomic.Uint32
	sqMask  uint32
	cqMask  uint32
	cqes    []byte
	pending uint32 // submissions that were filled and not handed over
}

// newRing makes a ring for n submissions at a time, which can do nothing but
// commands to a file and waiting for one to become readable: no file can be
// opened, read or written through it.
func newRing(n uint32) (r *ring, err error) {
	var p [paramsSize]byte
	binary.NativeEndian.PutUint32(p[8:], setupSQE128|setupCoopTaskrun|setupRDisabled)
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(n), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	r = &ring{fd: int(fd)}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(p[at:]) }
	if u32(20)&featSingleMmap == 0 {
		return r, fmt.Errorf("io_uring of this kernel: %w", errors.ErrUnsupported)
	}
	sqEntries, cqEntries := u32(0), u32(4)
	// Offsets in the shared memory: of the submission ring from byte 40 of the
	// parameters on, of the completion ring from 80 on.
	size := max(u32(64)+4*sqEntries, u32(100)+cqeSize*cqEntries)
	const protection, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.mem, err = unix.Mmap(r.fd, 0, int(size), protection, flags); err != nil {
		return r, fmt.Errorf("io_uring: %w", err)
	}
	if r.sqes, err = unix.Mmap(r.fd, offSQEs, int(sqEntries*sqeSize), protection, flags); err != nil {
		return r, fmt.Errorf("io_uring: %w", err)
	}
	word := func(at int) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&r.mem[u32(at)])) }
	r.sqHead, r.sqTail, r.sqMask = word(40), word(44), word(48).Load()
	r.cqHead, r.cqTail, r.cqMask = word(80), word(84), word(88).Load()
	r.cqes = r.mem[u32(100):][:cqeSize*cqEntries]
	for i := range sqEntries { // the n-th place always holds the n-th submission
		binary.NativeEndian.PutUint32(r.mem[u32(64)+4*i:], i)
	}
	return r, r.restrict()
}

// restrict allows what is needed, for ever, and starts the ring.
func (r *ring) restrict() error {
	var list [2][16]byte
	for i, op := range []byte{opURingCmd, opPollAdd} {
		binary.NativeEndian.PutUint16(list[i][:], restrictionSQEOp)
		list[i][2] = op
	}
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerRestrictions,
		uintptr(unsafe.Pointer(&list)), uintptr(len(list)), 0, 0); errno != 0 {
		return fmt.Errorf("restricting io_uring: %w", errno)
	}
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerEnableRings, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("starting io_uring: %w", errno)
	}
	return nil
}

func (r *ring) close() error {
	var errs []error
	for _, m := range [][]byte{r.mem, r.sqes} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	return errors.Join(append(errs, unix.Close(r.fd))...)
}

// submission is one of the ring, cleared.
type submission []byte

func (s submission) op(code byte, fd int, data uint64) {
	s[0] = code
	binary.NativeEndian.PutUint32(s[4:], uint32(fd))
	binary.NativeEndian.PutUint64(s[32:], data)
}

// next returns the next submission to fill; there is always one, since a ring
// has as many as can be under way.
func (r *ring) next() (submission, error) {
	at := r.sqTail.Load() + r.pending
	if at-r.sqHead.Load() > r.sqMask {
		return nil, errors.New("io_uring: no submission is free")
	}
	s := r.sqes[(at&r.sqMask)*sqeSize:][:sqeSize]
	clear(s)
	r.pending++
	return s, nil
}

// submit hands over what was filled, and returns the error of the first
// completion that failed at once, leaving all completions where they are.
func (r *ring) submit() error {
	n := r.pending
	r.sqTail.Add(n)
	r.pending = 0
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("io_uring_enter: %w", errno)
	}
	for at := r.cqHead.Load(); at != r.cqTail.Load(); at++ {
		if result := int32(binary.NativeEndian.Uint32(r.cqes[(at&r.cqMask)*cqeSize+8:])); result < 0 {
			return unix.Errno(-result)
		}
	}
	return nil
}

// wait hands over what was filled and waits for a completion.
func (r *ring) wait() error {
	r.sqTail.Add(r.pending)
	r.pending = 0
	for {
		fresh := r.sqTail.Load() - r.sqHead.Load()
		if fresh == 0 && r.cqTail.Load() != r.cqHead.Load() {
			return nil
		}
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(fresh), 1, enterGetEvents, 0, 0)
		switch errno {
		case 0, unix.EINTR:
			if r.cqTail.Load() != r.cqHead.Load() {
				return nil
			}
		case unix.EAGAIN, unix.EBUSY:
		default:
			return fmt.Errorf("io_uring_enter: %w", errno)
		}
	}
}

// completion takes the next completion, if there is one.
func (r *ring) completion() (data uint64, result int32, flags uint32, ok bool) {
	head := r.cqHead.Load()
	if head == r.cqTail.Load() {
		return 0, 0, 0, false
	}
	c := r.cqes[(head&r.cqMask)*cqeSize:]
	data = binary.NativeEndian.Uint64(c)
	result = int32(binary.NativeEndian.Uint32(c[8:]))
	flags = binary.NativeEndian.Uint32(c[12:])
	r.cqHead.Store(head + 1)
	return data, result, flags, true
}

// putAddress stores the address and the length of b, which must not be memory
// that the garbage collector owns, as a struct iovec.
func putAddress(at, b []byte) {
	binary.NativeEndian.PutUint64(at, uint64(uintptr(unsafe.Pointer(&b[0]))))
	binary.NativeEndian.PutUint64(at[8:], uint64(len(b)))
}

// setAddress stores the address of b and n in a submission.
func (s submission) setAddress(b []byte, n uint32) {
	binary.NativeEndian.PutUint64(s[16:], uint64(uintptr(unsafe.Pointer(&b[0]))))
	binary.NativeEndian.PutUint32(s[24:], n)
}

// aligned is the part of b from the first address on that is a multiple of n.
func aligned(b []byte, n uintptr) []byte {
	return b[-uintptr(unsafe.Pointer(&b[0]))&(n-1):]
}
