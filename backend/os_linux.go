package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Options says how Open opens a path.
type Options struct {
	// Writable opens for reading and writing, else for reading only.
	Writable bool
	// Create makes an empty file when there is none (mode 0666 less the
	// umask). It needs Writable. A file that exists is not truncated: take
	// its lock first, then call Truncate. The directory is not synced.
	Create bool
	// Exclusive, with Create, fails with fs.ErrExist when the path exists.
	Exclusive bool
	// Direct bypasses the page cache (O_DIRECT). Requests of any offset,
	// length and memory alignment stay allowed; unaligned ones go through
	// aligned buffers and are slower. Fails with errors.ErrUnsupported when
	// the filesystem cannot.
	Direct bool
}

// Identified is a File that can tell which file of the system it is, so that
// the same image under two names is recognised.
type Identified interface {
	// ID returns device and inode number; for a block device the number of
	// the device itself, whatever node names it. ok is false when the file
	// lives in no filesystem.
	ID() (dev, ino uint64, ok bool)
}

// osFile is a File over a descriptor of a regular file or block device.
type osFile struct {
	f      *os.File
	raw    syscall.RawConn
	name   string
	dev    uint64
	ino    uint64
	block  bool
	sector int64 // logical sector of a block device, else 1

	direct *direct // nil unless opened with O_DIRECT

	untold atomic.Bool // it cannot tell what is in the page cache

	// transient is whether reads leave nothing in the page cache.
	transient atomic.Bool

	// writing lets one long buffered write at a time into the kernel. A
	// filesystem takes them one after the other anyway, and those who wait
	// for the inode's lock there spin.
	writing sync.Mutex

	length length

	lockMu sync.Mutex
	use    Perm // bytes 100+n that we hold
	unsh   Perm // bytes 200+n that we hold
}

// longWrite is from how many bytes on waiting for a mutex is cheaper than
// spinning for the inode.
const longWrite = 128 << 10

// Open opens a regular file or a block device. Anything else (a FIFO, a
// socket, a character device, a directory) is an error, and opening it does
// not wait. A block device opened Writable is claimed, so one that is mounted
// or otherwise claimed is ErrInUse. No lock is taken: see Locker.
//
// The File also implements Locker and Identified.
func Open(path string, o Options) (File, error) {
	flags := unix.O_CLOEXEC | unix.O_NOCTTY
	switch {
	case o.Create && !o.Writable, o.Exclusive && !o.Create:
		return nil, pathErr("open", path, unix.EINVAL)
	case o.Writable:
		flags |= unix.O_RDWR
	default:
		flags |= unix.O_RDONLY
	}
	if o.Create {
		flags |= unix.O_CREAT
	}
	if o.Exclusive {
		flags |= unix.O_EXCL
	}
	if o.Direct {
		flags |= unix.O_DIRECT
	}
	// O_NONBLOCK: open of a FIFO must not wait for its other end.
	fd, err := openRetry(path, flags|unix.O_NONBLOCK)
	if err != nil {
		if o.Direct && errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("no direct I/O here: %w (%w)", errors.ErrUnsupported, err)
		}
		return nil, pathErr("open", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, pathErr("stat", path, err)
	}
	if o.Writable && st.Mode&unix.S_IFMT == unix.S_IFBLK {
		if err := claim(&fd, path, flags, &st); err != nil {
			unix.Close(fd)
			return nil, pathErr("open", path, err)
		}
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, pathErr("open", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	of, err := newOSFile(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return of, nil
}

// claim opens the block device again with O_EXCL, which the kernel grants to
// one holder and never beside a mount. It is a second open because O_EXCL has
// another meaning, or none, for everything that is not a block device.
func claim(fd *int, path string, flags int, st *unix.Stat_t) error {
	flags &^= unix.O_CREAT
	fd2, err := openRetry(path, flags|unix.O_EXCL|unix.O_NONBLOCK)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: mounted or claimed by another program (%w)", ErrInUse, err)
	} else if err != nil {
		return err
	}
	unix.Close(*fd)
	*fd = fd2
	var again unix.Stat_t
	if err := unix.Fstat(fd2, &again); err != nil {
		return err
	}
	if again.Mode&unix.S_IFMT != unix.S_IFBLK || again.Rdev != st.Rdev {
		return errors.New("replaced while it was being opened")
	}
	return nil
}

// NewFile adopts f, which must be a regular file or a block device and not
// open for appending. The File closes it; on error it stays the caller's.
func NewFile(f *os.File) (File, error) {
	of, err := newOSFile(f)
	if err != nil {
		return nil, err
	}
	return of, nil
}

func newOSFile(f *os.File) (*osFile, error) {
	name := f.Name()
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, pathErr("open", name, err)
	}
	o := &osFile{f: f, raw: raw, name: name, sector: 1}
	var st unix.Stat_t
	var flags int
	err = o.control(func(fd int) error {
		var err error
		if flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil {
			return err
		}
		return unix.Fstat(fd, &st)
	})
	if err != nil {
		return nil, pathErr("stat", name, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		o.dev, o.ino = st.Dev, st.Ino
		if flags&unix.O_ACCMODE != unix.O_RDONLY {
			o.length.least = st.Size
		}
	case unix.S_IFBLK:
		o.dev, o.block = st.Rdev, true
		err := o.control(func(fd int) error {
			n, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
			if err == nil && n > 0 {
				o.sector = int64(n)
			}
			return err
		})
		if err != nil {
			return nil, pathErr("sector size", name, err)
		}
	default:
		return nil, pathErr("open", name, fmt.Errorf("%s, neither a file nor a block device (%w)",
			typeName(st.Mode), unix.EINVAL))
	}
	if flags&unix.O_APPEND != 0 {
		return nil, pathErr("open", name, fmt.Errorf("open for appending (%w)", unix.EINVAL))
	}
	if flags&unix.O_DIRECT != 0 {
		if err := o.initDirect(); err != nil {
			return nil, pathErr("open", name, err)
		}
	}
	return o, nil
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFCHR:
		return "a character device"
	}
	return "of unknown type"
}

func openRetry(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags, 0o666)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// control runs fn with the descriptor, which cannot be closed (and its number
// not be reused) meanwhile. It retries while fn returns EINTR. Calls run
// concurrently.
func (o *osFile) control(fn func(fd int) error) error {
	var err error
	cerr := o.raw.Control(func(fd uintptr) {
		for {
			if err = fn(int(fd)); err != unix.EINTR {
				return
			}
		}
	})
	if cerr != nil {
		return fs.ErrClosed
	}
	return err
}

func (o *osFile) Name() string { return o.name }

// Close is File. It gives up the locks by itself: a child that another thread
// has forked and that has not come to its exec yet has the description as
// well, and would hold them for as long.
func (o *osFile) Close() error {
	_ = o.Unlock() // Close does it, too, as soon as nobody else has the description
	return o.f.Close()
}

// ID is Identified.
func (o *osFile) ID() (dev, ino uint64, ok bool) { return o.dev, o.ino, true }

// ReadAt is File. It allocates nothing unless the file is opened Direct.
func (o *osFile) ReadAt(p []byte, off int64) (int, error) {
	if o.direct != nil {
		return o.directReadAt(p, off)
	}
	if o.transient.Load() {
		return o.transientReadAt(p, off)
	}
	return o.f.ReadAt(p, off) // loops over short reads and EINTR
}

// WriteAt is File.
func (o *osFile) WriteAt(p []byte, off int64) (int, error) {
	if o.direct != nil {
		return o.directWriteAt(p, off)
	}
	if !o.block && len(p) >= longWrite {
		o.writing.Lock()
		defer o.writing.Unlock()
	}
	if err := o.whole("write"); err != nil {
		return 0, err
	}
	n, err := o.f.WriteAt(p, off)
	o.reached(off, int64(n))
	return n, err
}

func (o *osFile) Size() (int64, error) {
	if o.direct != nil {
		// An unaligned write behind the end is longer for a moment.
		o.direct.mu.RLock()
		defer o.direct.mu.RUnlock()
	}
	return o.size()
}

// Allocated is File; a block device counts as fully allocated.
func (o *osFile) Allocated() (int64, error) {
	if o.block {
		return o.size()
	}
	var st unix.Stat_t
	err := o.control(func(fd int) error { return unix.Fstat(fd, &st) })
	return st.Blocks * 512, pathErr("stat", o.name, err)
}

// Truncate is File. The length of a block device cannot change: any size but
// the present one is EINVAL.
func (o *osFile) Truncate(size int64) error {
	if o.block {
		now, err := o.size()
		if err == nil && now != size {
			err = pathErr("truncate", o.name, fmt.Errorf("a block device of %d bytes (%w)", now, unix.EINVAL))
		}
		return err
	}
	if o.direct != nil {
		o.direct.mu.Lock()
		defer o.direct.mu.Unlock()
	}
	return o.truncate(size)
}

func (o *osFile) truncate(size int64) error {
	o.length.mu.Lock()
	defer o.length.mu.Unlock()
	err := o.control(func(fd int) error { return unix.Ftruncate(fd, size) })
	if err == nil {
		o.length.least = size
	}
	return pathErr("truncate", o.name, err)
}

// Sync is File, by fdatasync(2).
func (o *osFile) Sync() error {
	if err := o.whole("sync"); err != nil {
		return err
	}
	return pathErr("sync", o.name, o.control(unix.Fdatasync))
}

// checkRange refuses a negative or overflowing range.
func checkRange(off, n int64) error {
	if off < 0 || n < 0 || n > math.MaxInt64-off {
		return unix.EINVAL
	}
	return nil
}
