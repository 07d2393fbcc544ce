package ploop

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

var _ layers.Editor = (*Image)(nil)

// chunk is how much is written from one buffer.
const chunk = 1 << 20

var zeroes [chunk]byte

// editor is the state of a writable image.
type editor struct {
	stripes layers.Stripes
	commit  layers.Commit
	alloc   allocator
	pinned  int64 // bytes of changed pages above which they are written

	startMu sync.Mutex
	started atomic.Bool // the header says in use
	// takeOver: the image was not closed by who used it last, and has a
	// format extension that nothing was decided about yet.
	takeOver bool
	// Of a relocation: see there.
	resumed bool                  // the mark of an image in use is ours
	refused bool                  // the mark is somebody else's, and stays
	leaked  int64                 // slots that were free when it began
	keep    *keptExtension        // the format extension that outlives the changes
	failed  atomic.Pointer[error] // a sync failed: nothing more is changed

	fills sync.Pool // *[]byte of at most chunk bytes, for filling up clusters
}

// openEditor makes i writable. Nothing is written yet, unless the image was
// not closed by who used it last: then it is verified and taken over.
func (i *Image) openEditor(ctx context.Context, size int64, cache *layers.Cache) error {
	if i.h.cluster < MinCluster {
		return &layers.ImageError{Path: i.path, Layer: -1, Offset: offSectors, Field: "m_Sectors",
			Value: uint32(i.h.cluster / sectorSize),
			Err:   fmt.Errorf("%w: clusters of less than 32 KiB are read only", layers.ErrUnsupported)}
	}
	e := &editor{pinned: cache.PinnedLimit()}
	e.alloc = allocator{i: i, eof: size &^ (i.h.cluster - 1)}
	e.fills.New = func() any {
		b := make([]byte, min(i.h.cluster, chunk))
		return &b
	}
	i.edit = e
	if i.h.inUse == inUseClosed || i.h.inUse == inUseV21 {
		return nil
	}
	e.alloc.crashed = true
	if err := e.alloc.ready(ctx); err != nil {
		return err
	}
	if i.h.extension != 0 {
		// Whoever relocates may know that it is still good; everybody else
		// drops it with the first change, or when the image is closed.
		e.takeOver = true
		return nil
	}
	return i.begin()
}

// change begins every changing method.
func (i *Image) change(off, n int64) (*editor, error) {
	e := i.edit
	if e == nil {
		return nil, fmt.Errorf("%s: %w", i.path, layers.ErrReadOnly)
	}
	if err := e.broken(); err != nil {
		return nil, err
	}
	if off < 0 || n < 0 || off > i.h.size || n > i.h.size-off {
		return nil, fmt.Errorf("%s: %w: start %d length %d of %d", i.path, blockmap.ErrRange, off, n, i.h.size)
	}
	return e, nil
}

func (e *editor) broken() error {
	if p := e.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// sync is File.Sync whose failure is final: what the host has lost then cannot
// be known.
func (i *Image) sync() error {
	err := i.f.Sync()
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: sync failed, nothing further is written: %w", i.path, err)
	i.edit.failed.CompareAndSwap(nil, &err)
	return *i.edit.failed.Load()
}

// begin marks the image as in use, durably, before its first change. The
// format extension, which describes the image as it was, is dropped, unless the
// changes are relocations, which it outlives: its clusters become free because
// nothing names them any more.
func (i *Image) begin() error {
	e := i.edit
	if e.started.Load() {
		return nil
	}
	e.startMu.Lock()
	defer e.startMu.Unlock()
	if e.started.Load() {
		return nil
	}
	if err := i.setHeader(func(h *header) {
		h.inUse = inUseOpen
		h.flags &^= flagEmpty
		if e.keep == nil {
			h.extension = 0
		}
	}); err != nil {
		return err
	}
	e.started.Store(true)
	return nil
}

// setHeader changes the header in the file, durably, and then in memory.
func (i *Image) setHeader(change func(*header)) error {
	h := i.header()
	change(&h)
	b := h.encode()
	if _, err := i.f.WriteAt(b[:], 0); err != nil {
		return fmt.Errorf("%s: write of the header: %w", i.path, err)
	}
	if err := i.sync(); err != nil {
		return err
	}
	i.hmu.Lock()
	i.state = h.headerState
	i.hmu.Unlock()
	return nil
}

// Readers is the grace-period counter of layers.Editor.
func (i *Image) Readers() *layers.Readers { return &i.readers }

// WriteAt implements layers.Editor.
func (i *Image) WriteAt(ctx context.Context, p []byte, off int64, below layers.Below) error {
	e, err := i.change(off, int64(len(p)))
	if err != nil || len(p) == 0 {
		return err
	}
	if err := i.begin(); err != nil {
		return err
	}
	for len(p) > 0 {
		n, err := i.writeSome(ctx, p, off, below)
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
		if err := e.relieve(i); err != nil {
			return err
		}
	}
	return nil
}

// WriteInPlace implements layers.InPlaceWriter.
func (i *Image) WriteInPlace(p []byte, off int64) bool {
	e := i.edit
	if e == nil || e.broken() != nil || !e.started.Load() {
		return false
	}
	n, _, err := i.writeMapped(p, off, (off+int64(len(p))+i.h.cluster-1)>>i.bat.shift)
	return err == nil && n == int64(len(p))
}

// relieve commits when more pages are changed than may be pinned.
func (e *editor) relieve(i *Image) error {
	if i.bat.dirtyPages.Load()*pageSize < e.pinned {
		return nil
	}
	return e.commit.Do(i.flush)
}

// writeSome writes a prefix of p and returns its length: a run of mapped
// clusters in place, or a run of missing whole ones, or one missing cluster
// that p covers in part.
func (i *Image) writeSome(ctx context.Context, p []byte, off int64, below layers.Below) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	size := i.h.cluster
	end := off + int64(len(p))
	n, r, err := i.writeMapped(p, off, (end+size-1)>>i.bat.shift)
	if err != nil || n > 0 {
		return n, err
	}
	if in := off & (size - 1); in != 0 || int64(len(p)) < size {
		n := min(size-in, int64(len(p)))
		return n, i.writePart(ctx, off>>i.bat.shift, p[:n], in, below)
	}
	return i.writeWhole(ctx, r.idx, p[:min(r.count, int64(len(p))>>i.bat.shift)<<i.bat.shift])
}

// writeMapped writes in place as much of p as the mapped run at off takes. It
// returns 0 and the run when that is not mapped. end is the entry behind p.
func (i *Image) writeMapped(p []byte, off, end int64) (int64, run, error) {
	tok := i.readers.Enter(off)
	defer i.readers.Exit(tok)
	r, err := i.bat.next(off>>i.bat.shift, end)
	if err != nil || r.host == 0 {
		return 0, r, err
	}
	start := r.idx << i.bat.shift
	n := min(int64(len(p)), r.count<<i.bat.shift-(off-start))
	_, err = i.f.WriteAt(p[:n], r.host+off-start)
	return n, r, err
}

// writeWhole writes clusters that p covers completely into new places and then
// publishes them. Somebody may have mapped one meanwhile; his write overlaps
// this one in every byte and in time, so replacing it is one of the two legal
// results.
func (i *Image) writeWhole(ctx context.Context, idx int64, p []byte) (int64, error) {
	a := &i.edit.alloc
	host, count, err := a.take(ctx, int64(len(p))>>i.bat.shift)
	if err != nil {
		return 0, err
	}
	n := count << i.bat.shift
	if _, err := i.f.WriteAt(p[:n], host); err != nil {
		return 0, errors.Join(err, a.giveBack(host, count))
	}
	for k := range count {
		if err := i.publish(idx+k, host+k<<i.bat.shift); err != nil {
			return 0, errors.Join(err, a.giveBack(host+k<<i.bat.shift, count-k))
		}
	}
	return n, nil
}

// publish enters a written cluster in the BAT, or 0.
func (i *Image) publish(idx, host int64) error {
	mu := i.edit.stripes.Lock(idx)
	defer mu.Unlock()
	return i.remap(idx, host)
}

// remap is publish under the stripe of idx.
func (i *Image) remap(idx, host int64) error {
	var entry uint32
	if host != 0 {
		entry = i.bat.entry(host)
	}
	old, err := i.bat.swap(idx, entry)
	if err == nil && old != 0 {
		i.edit.alloc.release(i.bat.host(old))
	}
	return err
}

// writePart writes p at byte in of cluster idx. A missing cluster is completed
// from below and written whole.
func (i *Image) writePart(ctx context.Context, idx int64, p []byte, in int64, below layers.Below) error {
	mu := i.edit.stripes.Lock(idx)
	defer mu.Unlock()
	n, _, err := i.writeMapped(p, idx<<i.bat.shift+in, idx+1)
	if err != nil || n > 0 {
		return err // mapped while the lock was waited for: p lies in one cluster
	}
	a := &i.edit.alloc
	host, _, err := a.take(ctx, 1)
	if err != nil {
		return err
	}
	err = i.fillCluster(ctx, host, idx, p, in, below)
	if err == nil {
		err = i.remap(idx, host)
	}
	if err != nil {
		return errors.Join(err, a.giveBack(host, 1))
	}
	return nil
}

// fillCluster writes the whole cluster at host: p at byte in, the rest from
// below.
func (i *Image) fillCluster(ctx context.Context, host, idx int64, p []byte, in int64, below layers.Below) error {
	start, end := idx<<i.bat.shift, in+int64(len(p))
	tail := i.h.cluster - end
	if i.h.cluster > chunk {
		if err := i.copyUp(ctx, host, start, in, below); err != nil {
			return err
		}
		if _, err := i.f.WriteAt(p, host+in); err != nil {
			return err
		}
		return i.copyUp(ctx, host+end, start+end, tail, below)
	}
	buf := i.edit.fills.Get().(*[]byte)
	defer i.edit.fills.Put(buf)
	head, err := i.fromBelow(ctx, (*buf)[:in], start, below)
	if err != nil {
		return err
	}
	rest, err := i.fromBelow(ctx, (*buf)[end:], start+end, below)
	if err != nil {
		return err
	}
	_, err = i.f.WritevAt([][]byte{head, p, rest}, host)
	return err
}

// copyUp copies n bytes of the disk at off from below to host.
func (i *Image) copyUp(ctx context.Context, host, off, n int64, below layers.Below) error {
	buf := i.edit.fills.Get().(*[]byte)
	defer i.edit.fills.Put(buf)
	for n > 0 {
		c := min(n, int64(len(*buf)))
		b, err := i.fromBelow(ctx, (*buf)[:c], off, below)
		if err != nil {
			return err
		}
		if _, err := i.f.WriteAt(b, host); err != nil {
			return err
		}
		host, off, n = host+c, off+c, n-c
	}
	return nil
}

// fromBelow returns the bytes that the lower layers show at off, in buf or, if
// they are zeros, elsewhere. Behind the end of the disk there are only zeros.
func (i *Image) fromBelow(ctx context.Context, buf []byte, off int64, below layers.Below) ([]byte, error) {
	n := min(int64(len(buf)), i.h.size-off)
	if n <= 0 {
		return zeroes[:len(buf)], nil
	}
	zero, err := below.IsZero(ctx, off, n)
	if err != nil {
		return nil, err
	}
	if zero {
		return zeroes[:len(buf)], nil
	}
	clear(buf[n:])
	return buf, below.ReadAt(ctx, buf[:n], off)
}

// writeZeros is backend.WriteZeros: real blocks, as mapped clusters need them.
func (i *Image) writeZeros(host, n int64) error { return backend.WriteZeros(i.f, host, n) }
