// Package faultfs is a directory whose files fail when they are told to: a
// FUSE filesystem over another directory. What backend.Fault does inside a
// process it does to any program, without a seam in it.
//
// Design note. Every request that can fail on a real disk is an Op, in one
// order, counted over all files; a Hook sees it before it is done and says
// what becomes of it. Files are opened past the page cache, so that one system
// call of the program is one Op. Looking up names and attributes, closing and
// locking always work: the locks of the kernel's own, as on any filesystem
// that has none. Whoever judges what is left looks at the directory below,
// never through the mount, which is served by this very process.
package faultfs

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Kind is what a request does.
type Kind string

// The kinds.
const (
	Open     Kind = "open"
	Create   Kind = "create"
	Mkdir    Kind = "mkdir"
	Rename   Kind = "rename"
	Remove   Kind = "remove"
	Read     Kind = "read"
	Write    Kind = "write"
	Sync     Kind = "sync" // of a file
	SyncDir  Kind = "sync of a directory"
	Truncate Kind = "truncate"
	Punch    Kind = "punch" // fallocate(2) that takes space away
	Allocate Kind = "allocate"
	Copy     Kind = "copy"
	Seek     Kind = "seek" // to data or a hole
)

// Op is one request.
type Op struct {
	Index  int // from 0, since the last Set
	Kind   Kind
	Name   string // relative to the directory
	Off, N int64  // for Truncate, Off is the new length
	Grows  bool   // it makes the file longer, or fills a hole: it may want space
	PID    int    // a thread of the program
}

func (o Op) String() string {
	return fmt.Sprintf("operation %d: %s %s %d+%d", o.Index, o.Kind, o.Name, o.Off, o.N)
}

// Verdict is what becomes of a request. The zero value lets it pass.
type Verdict struct {
	// Err is the answer, and nothing is done but what Short says.
	Err syscall.Errno
	// Short does a read or write of at least 2 bytes by half; without Err
	// that is the answer.
	Short bool
	// Kill kills the program; nothing is done.
	Kill bool
	// Hang keeps the request waiting until it is closed.
	Hang <-chan struct{}
	// Lose, of a Sync, takes the file back to what it was at the last good one,
	// as Linux does: it reports a failed write-back once, and the old bytes
	// come back from the disk. It needs Track.
	Lose bool
}

// Hook sees each request; calls may be concurrent.
type Hook func(Op) Verdict

// FS is a mounted filesystem.
type FS struct {
	below string
	srv   *fuse.Server

	mu    sync.Mutex
	hook  Hook
	count int

	// changing makes changes of files happen one at a time while they are
	// tracked.
	changing sync.Mutex
	track    bool
	durable  map[uint64][]byte // by inode, for files changed since their last sync
}

// Mount shows below at dir; needs root.
func Mount(below, dir string) (*FS, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(below, &st); err != nil {
		return nil, err
	}
	f := &FS{below: below}
	data := &fs.LoopbackRoot{Path: below, Dev: st.Dev}
	root := &node{LoopbackNode: fs.LoopbackNode{RootData: data}, f: f}
	data.RootNode = root
	o := &fs.Options{MountOptions: fuse.MountOptions{
		Name: "faultfs", FsName: below, DirectMountStrict: true, MaxWrite: 512 << 10, DisableXAttrs: true, AllowOther: true,
	}}
	srv, err := fs.Mount(dir, root, o)
	if err != nil {
		return nil, fmt.Errorf("mounting on %s: %w", dir, err)
	}
	f.srv = srv
	return f, nil
}

// Unmount ends it; it fails while somebody uses it.
func (f *FS) Unmount() error { return f.srv.Unmount() }

// Set makes h see every request from now on; nil ends that. Counting begins
// anew.
func (f *FS) Set(h Hook) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook, f.count = h, 0
	f.durable = nil
}

// Track makes the filesystem remember what files were at their last sync, for
// Verdict.Lose. Only small files should be changed then.
func (f *FS) Track(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.track, f.durable = on, nil
}

// Count is the number of requests since Set.
func (f *FS) Count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count
}

// before counts a request and does what the hook says, as far as that is
// the same for all.
func (f *FS) before(ctx context.Context, o Op) Verdict {
	if c, ok := fuse.FromContext(ctx); ok {
		o.PID = int(c.Pid)
	}
	f.mu.Lock()
	o.Index = f.count
	f.count++
	hook := f.hook
	f.mu.Unlock()
	if hook == nil {
		return Verdict{}
	}
	v := hook(o)
	if v.Hang != nil {
		<-v.Hang
	}
	if v.Kill {
		_ = unix.Kill(o.PID, unix.SIGKILL) // who asked is there, or has gone already
		v.Err = unix.EINTR
	}
	return v
}

// node is a file or directory.
type node struct {
	fs.LoopbackNode
	f *FS
}

var _ fs.NodeWrapChilder = (*node)(nil)

// WrapChild makes nodes of ours of all.
func (n *node) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	l, ok := ops.(*fs.LoopbackNode)
	if !ok {
		return ops
	}
	return &node{LoopbackNode: fs.LoopbackNode{RootData: l.RootData}, f: n.f}
}

func (n *node) rel() string { return n.Path(n.Root()) }

func (n *node) simple(ctx context.Context, k Kind, name string) syscall.Errno {
	return n.f.before(ctx, Op{Kind: k, Name: filepath.Join(n.rel(), name)}).Err
}

func (n *node) handle(fh fs.FileHandle, name string) fs.FileHandle {
	if l, ok := fh.(*fs.LoopbackFile); ok {
		return &file{LoopbackFile: l, f: n.f, name: name}
	}
	return fh
}

func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if errno := n.simple(ctx, Open, ""); errno != 0 {
		return nil, 0, errno
	}
	fh, _, errno := n.LoopbackNode.Open(ctx, flags&^unix.O_DIRECT)
	return n.handle(fh, n.rel()), fuse.FOPEN_DIRECT_IO, errno
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if errno := n.simple(ctx, Create, name); errno != 0 {
		return nil, nil, 0, errno
	}
	ch, fh, _, errno := n.LoopbackNode.Create(ctx, name, flags&^unix.O_DIRECT, mode, out)
	return ch, n.handle(fh, filepath.Join(n.rel(), name)), fuse.FOPEN_DIRECT_IO, errno
}

// Tmpfile is not offered: programs then take a file with a name, which has
// more operations that can fail.
func (n *node) Tmpfile(context.Context, uint32, uint32, *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, unix.EOPNOTSUPP
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if errno := n.simple(ctx, Mkdir, name); errno != 0 {
		return nil, errno
	}
	return n.LoopbackNode.Mkdir(ctx, name, mode, out)
}

func (n *node) Rename(ctx context.Context, name string, to fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	if errno := n.simple(ctx, Rename, name); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Rename(ctx, name, to, newName, flags)
}

func (n *node) Unlink(ctx context.Context, name string) syscall.Errno {
	if errno := n.simple(ctx, Remove, name); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Unlink(ctx, name)
}

func (n *node) Rmdir(ctx context.Context, name string) syscall.Errno {
	if errno := n.simple(ctx, Remove, name); errno != 0 {
		return errno
	}
	return n.LoopbackNode.Rmdir(ctx, name)
}

// Fsync is of a file.
func (n *node) Fsync(ctx context.Context, fh fs.FileHandle, _ uint32) syscall.Errno {
	v := n.f.before(ctx, Op{Kind: Sync, Name: n.rel()})
	if h, ok := fh.(*file); ok {
		if err := n.f.synced(h, v); err != nil {
			return unix.EIO
		}
	}
	// The tests do not cut the power: nothing need go to the disk.
	return v.Err
}

// OpendirHandle makes the handle one of ours, because syncing a directory is
// asked of that.
func (n *node) OpendirHandle(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	fh, opened, errno := n.LoopbackNode.OpendirHandle(ctx, flags)
	if h, ok := fh.(openDir); ok {
		return &directory{openDir: h, n: n}, opened, errno
	}
	return fh, opened, errno
}

// openDir is what the filesystem below has of an open directory.
type openDir interface {
	fs.FileReaddirenter
	fs.FileSeekdirer
	fs.FileReleasedirer
	fs.FileFsyncdirer
}

// directory is an open directory.
type directory struct {
	openDir
	n *node
}

func (d *directory) Fsyncdir(ctx context.Context, _ uint32) syscall.Errno {
	return d.n.f.before(ctx, Op{Kind: SyncDir, Name: d.n.rel()}).Err
}

func (n *node) Setattr(ctx context.Context, fh fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok {
		if errno := n.f.before(ctx, Op{Kind: Truncate, Name: n.rel(), Off: int64(size)}).Err; errno != 0 {
			return errno
		}
	}
	if h, ok := fh.(*file); ok {
		defer n.f.change(h)()
		fh = h.LoopbackFile
	}
	return n.LoopbackNode.Setattr(ctx, fh, in, out)
}

func (n *node) CopyFileRange(ctx context.Context, in fs.FileHandle, offIn uint64, out *fs.Inode, to fs.FileHandle, offOut, length, flags uint64) (uint32, syscall.Errno) {
	src, ok1 := in.(*file)
	dst, ok2 := to.(*file)
	if !ok1 || !ok2 {
		return 0, unix.EOPNOTSUPP
	}
	v := n.f.before(ctx, Op{Kind: Copy, Name: dst.name, Off: int64(offOut), N: int64(length), Grows: dst.grows(int64(offOut), int64(length))})
	if v.Err != 0 {
		return 0, v.Err
	}
	defer n.f.change(dst)()
	return n.LoopbackNode.CopyFileRange(ctx, src.LoopbackFile, offIn, out, dst.LoopbackFile, offOut, length, flags)
}
