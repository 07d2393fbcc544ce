package fusefs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// DiskName is the name of the file that is the whole disk.
const DiskName = "disk.raw"

// Extended attributes of the root directory, by which `mount-image -u` and
// scripts find the server of a mount.
const (
	XattrPID   = "user.imagestack.pid"   // process id of the server, decimal
	XattrImage = "user.imagestack.image" // absolute path of the image
)

// Inode numbers: the root, the disk, then the partitions.
const (
	inoRoot = fuse.FUSE_ROOT_ID
	inoDisk = inoRoot + 1
)

// Partition is a view of a part of the disk, shown as a file of its own.
type Partition struct {
	Name       string // file name, such as p1
	Start, Len int64  // bytes
}

// Options of the filesystem.
type Options struct {
	Image      string            // shown as XattrImage
	PID        int               // shown as XattrPID
	Partitions []Partition       // further files
	UID, GID   uint32            // owner of everything
	Umask      uint32            // bits taken from 0777 and 0666
	Report     func(error)       // gets every distinct error of the device once; may be nil
	FlushAfter time.Duration     // a change is synced at the latest this much later; 0 is 5 s, negative never
	Xattrs     map[string]string // further attributes of the root directory
	// Passthrough lets opens of disk.raw wait for Settle.
	Passthrough bool
}

// defaultFlushAfter is about what the kernel's writeback allows itself.
const defaultFlushAfter = 5 * time.Second

// FS is the filesystem over one Device. Create it with New, serve it with
// Mount, and end it with Shutdown.
type FS struct {
	fuse.RawFileSystem // ENOSYS for what is not implemented

	dev      Device
	files    []*file // index is the inode number minus inoDisk
	root     attrs
	xattrs   map[string]string
	reporter reporter
	writable bool
	uncached bool // every open bypasses the page cache
	ctx      context.Context
	results  sync.Pool // of *result

	// gate is held for reading by every change, so that Shutdown can wait for
	// those under way and refuse later ones.
	gate   sync.RWMutex
	closed bool

	through passthrough
	flusher flusher
	mtime   atomic.Int64 // of the last change, nanoseconds since 1970
}

// file is disk.raw or a partition.
type file struct {
	attrs
	name string
	dev  Device
	size int64
}

// attrs are the attributes that may be changed, in memory only.
type attrs struct {
	ino  uint64
	dir  bool
	mu   sync.Mutex
	mode uint32 // permission bits
	uid  uint32
	gid  uint32
}

// New returns a filesystem that shows dev.
func New(dev Device, o Options) (*FS, error) {
	fs := &FS{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		dev:           dev,
		writable:      dev.Writable(),
		uncached:      dev.Writable() && len(o.Partitions) > 0,
		ctx:           context.Background(),
		reporter:      reporter{report: o.Report},
		xattrs:        map[string]string{XattrImage: o.Image, XattrPID: fmt.Sprint(o.PID)},
	}
	for k, v := range o.Xattrs {
		fs.xattrs[k] = v
	}
	if o.Passthrough {
		fs.through.settled = make(chan struct{})
	}
	fs.results.New = func() any { return &result{pool: &fs.results} }
	fs.mtime.Store(time.Now().UnixNano())

	mode := uint32(0o666)
	if !fs.writable {
		mode = 0o444
	}
	mode &^= o.Umask
	fs.root = attrs{ino: inoRoot, dir: true, mode: 0o777 &^ o.Umask &^ 0o022, uid: o.UID, gid: o.GID}
	add := func(name string, d Device) {
		f := &file{name: name, dev: d, size: d.Size()}
		f.ino, f.mode, f.uid, f.gid = inoDisk+uint64(len(fs.files)), mode, o.UID, o.GID
		fs.files = append(fs.files, f)
	}
	add(DiskName, dev)
	for _, p := range o.Partitions {
		s, err := Section(dev, p.Start, p.Len)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.Name, err)
		}
		for _, f := range fs.files {
			if f.name == p.Name {
				return nil, fmt.Errorf("%s: a second file of that name", p.Name)
			}
		}
		add(p.Name, s)
	}
	after := o.FlushAfter
	if after == 0 {
		after = defaultFlushAfter
	}
	if fs.writable && after > 0 {
		fs.flusher.start(after, fs.syncDevice, fs.reporter.add)
	}
	return fs, nil
}

// errShutDown answers changes that come after Shutdown.
var errShutDown = fmt.Errorf("the server has ended: %w", unix.EIO)

// Shutdown waits for changes under way, refuses later ones with EIO, and syncs
// the device. It is idempotent; closing the device is the caller's.
func (fs *FS) Shutdown() error {
	fs.Settle(0)
	fs.flusher.stop()
	fs.gate.Lock()
	fs.closed = true
	fs.gate.Unlock()
	if !fs.writable {
		return nil
	}
	return errors.Join(fs.flusher.failure(), fs.syncDevice())
}

func (fs *FS) String() string { return "mount-image" }

// file returns the file with that inode number, nil when there is none.
func (fs *FS) file(ino uint64) *file {
	if i := ino - inoDisk; i < uint64(len(fs.files)) {
		return fs.files[i]
	}
	return nil
}

// attrTimeout is how long the kernel may keep attributes: they change only
// with st_blocks and with changes that the kernel itself passes on.
const (
	attrTimeout  = time.Second
	entryTimeout = time.Hour
)

// Lookup finds a file in the root directory.
func (fs *FS) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != inoRoot {
		return fuse.ENOTDIR
	}
	for _, f := range fs.files {
		if f.name == name {
			out.NodeId, out.Generation = f.ino, 1
			out.SetEntryTimeout(entryTimeout)
			out.SetAttrTimeout(attrTimeout)
			fs.fileAttr(f, &out.Attr)
			return fuse.OK
		}
	}
	return fuse.ENOENT
}

// GetAttr is stat(2).
func (fs *FS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.SetTimeout(attrTimeout)
	return fs.attr(in.NodeId, &out.Attr)
}

func (fs *FS) attr(ino uint64, out *fuse.Attr) fuse.Status {
	if ino == inoRoot {
		fs.common(&fs.root, out)
		out.Mode |= unix.S_IFDIR
		out.Nlink = 2
		return fuse.OK
	}
	f := fs.file(ino)
	if f == nil {
		return fuse.ENOENT
	}
	fs.fileAttr(f, out)
	return fuse.OK
}

func (fs *FS) common(a *attrs, out *fuse.Attr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := fs.mtime.Load()
	sec, nsec := uint64(t/1e9), uint32(t%1e9)
	out.Ino, out.Mode, out.Uid, out.Gid = a.ino, a.mode, a.uid, a.gid
	out.Atime, out.Mtime, out.Ctime = sec, sec, sec
	out.Atimensec, out.Mtimensec, out.Ctimensec = nsec, nsec, nsec
	out.Blksize = 4096
}

func (fs *FS) fileAttr(f *file, out *fuse.Attr) {
	fs.common(&f.attrs, out)
	out.Mode |= unix.S_IFREG
	out.Nlink = 1
	out.Size = uint64(f.size)
	used, err := f.dev.Allocated()
	if err != nil {
		// A file that cannot be stat'ed cannot be rescued either.
		fs.reporter.add(err)
		used = f.size
	}
	out.Blocks = uint64(used+511) / 512
}

// SetAttr changes mode and owner in memory and accepts times without keeping
// them. The size is fixed: truncating to it is fine, growing is EFBIG and
// shrinking EPERM; but truncation as a part of open (O_TRUNC, which dd and cp
// use for their target) is without effect, as on a block device.
func (fs *FS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	f := fs.file(in.NodeId)
	a := &fs.root
	if f != nil {
		a = &f.attrs
	} else if in.NodeId != inoRoot {
		return fuse.ENOENT
	}
	if size, ok := in.GetSize(); ok {
		_, byHandle := in.GetFh()
		switch {
		case f == nil:
			return fuse.Status(unix.EISDIR)
		case !fs.writable:
			return fuse.EROFS
		case size == uint64(f.size), size == 0 && !byHandle:
		case size > uint64(f.size):
			return fuse.Status(unix.EFBIG)
		default:
			return fuse.EPERM
		}
	}
	a.mu.Lock()
	if mode, ok := in.GetMode(); ok {
		a.mode = mode & 0o7777
	}
	if uid, ok := in.GetUID(); ok {
		a.uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		a.gid = gid
	}
	a.mu.Unlock()
	out.SetTimeout(attrTimeout)
	return fs.attr(in.NodeId, &out.Attr)
}

// Access is only asked for when the kernel does not check by itself, and
// Mount always lets it (default_permissions).
func (fs *FS) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

// Open chooses how the page cache is used; see the package comment.
func (fs *FS) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	f := fs.file(in.NodeId)
	if f == nil {
		return fuse.ENOENT
	}
	writes := in.Flags&unix.O_ACCMODE != unix.O_RDONLY
	if writes && !fs.writable {
		return fuse.EROFS
	}
	out.Fh = f.ino
	if f.ino == inoDisk {
		id, err := fs.through.backing(cancel)
		if err != nil {
			return fs.status(err)
		}
		if id != 0 {
			out.OpenFlags, out.BackingID = fuse.FOPEN_PASSTHROUGH, id
			return fuse.OK
		}
	}
	switch {
	case fs.uncached, writes && in.Flags&unix.O_DIRECT != 0:
		out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
	case !fs.writable:
		out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	}
	return fuse.OK
}

// Release has nothing to do: a handle has no state.
func (fs *FS) Release(<-chan struct{}, *fuse.ReleaseIn) {}

// Flush is close(2). Nothing is buffered per handle, and ENOSYS tells the
// kernel not to ask again: it waits for the answer where nothing can interrupt
// it, and a process that only forks and executes another program would hang
// with a server that hangs.
func (fs *FS) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// OpenDir lets the kernel cache the listing.
func (fs *FS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId != inoRoot {
		return fuse.ENOTDIR
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_CACHE_DIR
	return fuse.OK
}

// ReleaseDir has nothing to do.
func (fs *FS) ReleaseDir(*fuse.ReleaseIn) {}

// ReadDir lists the root directory; an offset is the number of entries before
// it.
func (fs *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for i := in.Offset; i < uint64(len(fs.files))+2; i++ {
		e := fuse.DirEntry{Ino: inoRoot, Mode: unix.S_IFDIR, Off: i + 1}
		switch i {
		case 0:
			e.Name = "."
		case 1:
			e.Name = ".."
		default:
			f := fs.files[i-2]
			e.Name, e.Ino, e.Mode = f.name, f.ino, unix.S_IFREG
		}
		if !out.AddDirEntry(e) {
			break
		}
	}
	return fuse.OK
}

// StatFs shows the disk as a filesystem: what is allocated is in use.
func (fs *FS) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	const block = 4096
	out.Bsize, out.Frsize, out.NameLen = block, block, 255
	out.Blocks = uint64(fs.dev.Size()+block-1) / block
	if used, err := fs.dev.Allocated(); err != nil {
		fs.reporter.add(err)
	} else if n := uint64(used+block-1) / block; n < out.Blocks {
		out.Bfree = out.Blocks - n
	}
	out.Bavail = out.Bfree
	out.Files = uint64(len(fs.files)) + 1
	return fuse.OK
}

// GetXAttr reads an attribute of the root directory.
func (fs *FS) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dst []byte) (uint32, fuse.Status) {
	v, ok := fs.xattrs[name]
	if !ok || h.NodeId != inoRoot {
		return 0, fuse.ENOATTR
	}
	return fill(dst, v)
}

// ListXAttr names the attributes of the root directory.
func (fs *FS) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dst []byte) (uint32, fuse.Status) {
	var names string
	if h.NodeId == inoRoot {
		for name := range fs.xattrs {
			names += name + "\x00"
		}
	}
	return fill(dst, names)
}

// SetXAttr and RemoveXAttr are refused: ENOSYS would end reading as well.
func (fs *FS) SetXAttr(<-chan struct{}, *fuse.SetXAttrIn, string, []byte) fuse.Status {
	return fuse.Status(unix.EOPNOTSUPP)
}

// RemoveXAttr is refused.
func (fs *FS) RemoveXAttr(<-chan struct{}, *fuse.InHeader, string) fuse.Status {
	return fuse.Status(unix.EOPNOTSUPP)
}

// fill copies v into dst, or tells how long dst must be.
func fill(dst []byte, v string) (uint32, fuse.Status) {
	if len(dst) < len(v) {
		return uint32(len(v)), fuse.ERANGE
	}
	return uint32(copy(dst, v)), fuse.OK
}
