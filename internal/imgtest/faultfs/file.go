package faultfs

import (
	"context"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// file is an open file.
type file struct {
	*fs.LoopbackFile
	f    *FS
	name string
}

// grows tells whether writing there wants space: behind the end, or in a hole.
func (h *file) grows(off, n int64) bool {
	ctx := context.Background()
	var a fuse.AttrOut
	if h.Getattr(ctx, &a) != 0 || off+n > int64(a.Size) {
		return true
	}
	hole, errno := h.LoopbackFile.Lseek(ctx, uint64(off), unix.SEEK_HOLE)
	return errno != 0 || int64(hole) < off+n
}

func (h *file) Read(ctx context.Context, buf []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	v := h.f.before(ctx, Op{Kind: Read, Name: h.name, Off: off, N: int64(len(buf))})
	if v.Err != 0 {
		return nil, v.Err
	}
	if v.Short && len(buf) > 1 {
		buf = buf[:len(buf)/2]
	}
	return h.LoopbackFile.Read(ctx, buf, off)
}

func (h *file) Write(ctx context.Context, p []byte, off int64) (uint32, syscall.Errno) {
	v := h.f.before(ctx, Op{Kind: Write, Name: h.name, Off: off, N: int64(len(p)), Grows: h.grows(off, int64(len(p)))})
	defer h.f.change(h)()
	switch {
	case v.Short && len(p) > 1:
		n, errno := h.LoopbackFile.Write(ctx, p[:len(p)/2], off)
		if v.Err != 0 {
			return 0, v.Err
		}
		return n, errno
	case v.Err != 0:
		return 0, v.Err
	}
	return h.LoopbackFile.Write(ctx, p, off)
}

func (h *file) Allocate(ctx context.Context, off, n uint64, mode uint32) syscall.Errno {
	o := Op{Kind: Allocate, Name: h.name, Off: int64(off), N: int64(n), Grows: true}
	if mode&unix.FALLOC_FL_PUNCH_HOLE != 0 {
		o.Kind, o.Grows = Punch, false
	}
	if v := h.f.before(ctx, o); v.Err != 0 {
		return v.Err
	}
	defer h.f.change(h)()
	return h.LoopbackFile.Allocate(ctx, off, n, mode)
}

func (h *file) Lseek(ctx context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	if v := h.f.before(ctx, Op{Kind: Seek, Name: h.name, Off: int64(off)}); v.Err != 0 {
		return 0, v.Err
	}
	return h.LoopbackFile.Lseek(ctx, off, whence)
}
