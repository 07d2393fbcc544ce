package layertest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// bug is one promise that the reference editor breaks on demand.
type bug int

const (
	correct          bug = iota
	noFill               // partly written clusters are completed with zeros
	wideZero             // zeroing reaches one byte too far
	narrowZero           // zeroing of whole clusters forgets the edges
	staleFill            // a new cluster is not completed at all: what the place held shows
	freeAtOnce           // discarded space is used again before the commit
	noDataSync           // the map is published without a sync of the data before
	noMapSync            // Sync does not sync the map
	forgiveSync          // a failed sync is tried again
	hideSync             // the error of a sync is dropped
	hideWrite            // the error of a write is dropped
	noGrace              // released space is used again while readers look at it
	noLock               // two changes of one cluster at a time
	unmapAlways          // discards unmap though data lies below
	readOnlyWrites       // opening for reading writes
	keepsBuffer          // changes the caller's buffer
	noRange              // ranges are not checked
	shortSize            // writes at the end of the disk are lost
	noClose              // Close forgets the map
	leaksHandle          // Close does not close the file
	blocksAfterError     // an error that is no failed sync makes it refuse all
	otherError           // errors lose their cause
	splitExtents         // Lookup does not coalesce
	neverReuses          // discarded space is lost
	changesBelow         // writes into the layer below
	belowErrors          // ignores errors of the layer below
	numBugs
	thirdSync // no bug: one sync more than needed
)

// refEditor is an editor that is right by being simple: a header, a table of
// one 8-byte entry per cluster (0 unmapped, 1 zero, else the number of the
// place + 2), places of one cluster each. Everything happens under one lock.
type refEditor struct {
	bug      bug
	f        backend.File
	size     int64
	gran     int64
	n        int64 // clusters
	writable bool

	mu      sync.RWMutex
	cur     []uint64 // the map as seen
	disk    []uint64 // the map as last written
	free    []uint64 // places (as entries) that can be used
	pending []uint64 // places to be freed by the next Sync
	places  uint64   // places the file has
	failed  error
	readers layers.Readers
}

const refHeader = 512

func refFactory(gran int64, b bug) Factory {
	return Factory{
		Name: fmt.Sprintf("reference, %d, bug %d", gran, b), Granule: gran, Scripts: 12,
		Create: func(_ context.Context, dir *Dir, size int64) error {
			f, err := dir.Open("ref", true)
			if err != nil {
				return err
			}
			n := (size + gran - 1) / gran
			h := make([]byte, refHeader+8*n)
			binary.LittleEndian.PutUint64(h, uint64(size))
			binary.LittleEndian.PutUint64(h[8:], uint64(gran))
			_, err = f.WriteAt(h, 0)
			return errors.Join(err, f.Sync(), f.Close())
		},
		Open: func(_ context.Context, dir *Dir, writable bool) (layers.Layer, error) {
			f, err := dir.Open("ref", writable)
			if err != nil {
				return nil, err
			}
			e, err := openRef(f, writable, b)
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			return e, nil
		},
		Inspect: func(_ context.Context, dir *Dir) error {
			f, err := dir.Open("ref", false)
			if err != nil {
				return err
			}
			e, err := openRef(f, false, correct)
			if err != nil {
				return errors.Join(err, f.Close())
			}
			return errors.Join(e.duplicates(), f.Close())
		},
	}
}

func openRef(f backend.File, writable bool, b bug) (*refEditor, error) {
	var h [16]byte
	if _, err := f.ReadAt(h[:], 0); err != nil {
		return nil, err
	}
	e := &refEditor{bug: b, f: f, writable: writable,
		size: int64(binary.LittleEndian.Uint64(h[:])), gran: int64(binary.LittleEndian.Uint64(h[8:]))}
	e.n = (e.size + e.gran - 1) / e.gran
	table := make([]byte, 8*e.n)
	if _, err := f.ReadAt(table, refHeader); err != nil {
		return nil, err
	}
	used := map[uint64]bool{}
	for i := range e.n {
		v := binary.LittleEndian.Uint64(table[8*i:])
		e.cur = append(e.cur, v)
		used[v] = true
	}
	e.disk = append([]uint64(nil), e.cur...)
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if data := size - e.place(2); data > 0 {
		e.places = uint64((data + e.gran - 1) / e.gran)
	}
	for v := uint64(2); v < e.places+2; v++ {
		if !used[v] {
			e.free = append(e.free, v)
		}
	}
	if b == readOnlyWrites && !writable {
		_, _ = f.WriteAt(h[:1], 0)
	}
	return e, nil
}

func (e *refEditor) duplicates() error {
	seen := map[uint64]int64{}
	for i, v := range e.cur {
		if j, ok := seen[v]; ok && v > 1 {
			return fmt.Errorf("clusters %d and %d have the same place", j, i)
		}
		seen[v] = int64(i)
	}
	return nil
}

// place is the offset of an entry's cluster in the file.
func (e *refEditor) place(entry uint64) int64 {
	table := (refHeader + 8*e.n + e.gran - 1) / e.gran * e.gran
	return table + int64(entry-2)*e.gran
}

func (e *refEditor) Size() int64              { return e.size }
func (e *refEditor) Granule() int64           { return e.gran }
func (e *refEditor) Data() backend.File       { return e.f }
func (e *refEditor) Readers() *layers.Readers { return &e.readers }

func (e *refEditor) Unpack(context.Context, blockmap.Extent, int64, []byte) error {
	return layers.ErrUnsupported
}

func (e *refEditor) Describe(context.Context) (layers.Info, error) { return layers.Info{}, nil }

func (e *refEditor) WalkHost(context.Context, func(layers.HostRange) error) error { return nil }

func (e *refEditor) Lookup(_ context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return dst, err
	}
	e.mu.RLock()
	defer e.mu.RUnlock()
	t := blockmap.NewTiler(guest, n, dst)
	for !t.Done() {
		c := t.Next() / e.gran
		if t.Next() >= e.size {
			t.Add(blockmap.Extent{Guest: t.Next(), Len: guest + n - t.Next(), Kind: blockmap.Zero})
			break
		}
		x := blockmap.Extent{Guest: c * e.gran, Len: min(e.gran, e.size-c*e.gran)}
		switch v := e.cur[c]; v {
		case 0:
		case 1:
			x.Kind = blockmap.Zero
		default:
			x.Kind, x.Host = blockmap.Data, e.place(v)
		}
		if !t.Add(x) || e.bug == splitExtents && len(t.Extents()) > len(dst) {
			break
		}
	}
	return t.Extents(), nil
}

// may is the check before each change.
func (e *refEditor) may(off, n int64) error {
	if !e.writable {
		return layers.ErrReadOnly
	}
	if e.failed != nil {
		return e.failed
	}
	if e.bug != noRange && (off < 0 || n < 0 || off > e.size || n > e.size-off) {
		return blockmap.ErrRange
	}
	return nil
}

func (e *refEditor) WriteAt(ctx context.Context, p []byte, off int64, below layers.Below) error {
	if e.bug != noLock {
		e.mu.Lock()
		defer e.mu.Unlock()
	}
	if err := e.may(off, int64(len(p))); err != nil {
		return err
	}
	if e.bug == noRange && (off < 0 || off+int64(len(p)) > e.size) {
		return nil
	}
	if b, ok := below.(*Below); ok && e.bug == changesBelow && len(b.content) > 0 {
		b.content[0]++
	}
	err := e.write(ctx, p, off, below)
	if e.bug == keepsBuffer && len(p) > 0 {
		p[0]++
	}
	return e.spoil(err)
}

// spoil breaks the handling of an error.
func (e *refEditor) spoil(err error) error {
	switch {
	case err == nil:
	case e.bug == blocksAfterError:
		e.failed = err
	case e.bug == otherError:
		return errors.New("it failed")
	}
	return err
}

func (e *refEditor) write(ctx context.Context, p []byte, off int64, below layers.Below) error {
	for len(p) > 0 {
		c := off / e.gran
		n := min(int64(len(p)), (c+1)*e.gran-off)
		if err := e.writeCluster(ctx, c, p[:n], off-c*e.gran, below); err != nil {
			return err
		}
		p = p[n:]
		off += n
	}
	return nil
}

func (e *refEditor) writeCluster(ctx context.Context, c int64, p []byte, at int64, below layers.Below) error {
	if e.bug == shortSize && c == e.n-1 && e.size%e.gran != 0 {
		return nil
	}
	if v := e.cur[c]; v > 1 {
		_, err := e.f.WriteAt(p, e.place(v)+at)
		if e.bug == hideWrite {
			err = nil
		}
		return err
	}
	whole := make([]byte, e.gran)
	if int64(len(p)) < e.gran && e.cur[c] == 0 && e.bug != noFill {
		if err := below.ReadAt(ctx, whole[:min(e.gran, e.size-c*e.gran)], c*e.gran); err != nil && e.bug != belowErrors {
			return err
		}
	}
	copy(whole[at:], p)
	var v uint64
	if k := len(e.free); k > 0 {
		v = e.free[k-1]
		e.free = e.free[:k-1]
	} else {
		v = e.places + 2
		e.places++
	}
	var err error
	if e.bug == staleFill {
		_, err = e.f.WriteAt(p, e.place(v)+at)
	} else {
		_, err = e.f.WriteAt(whole, e.place(v))
	}
	if err != nil && e.bug != hideWrite {
		e.free = append(e.free, v)
		return err
	}
	e.cur[c] = v
	return nil
}

func (e *refEditor) ZeroAt(ctx context.Context, off, n int64, _ bool, below layers.Below) error {
	if e.bug != noLock {
		e.mu.Lock()
		defer e.mu.Unlock()
	}
	if err := e.may(off, n); err != nil {
		return err
	}
	if e.bug == wideZero && off+n < e.size && n > 0 {
		n++
	}
	return e.spoil(e.zero(ctx, off, n, below))
}

func (e *refEditor) zero(ctx context.Context, off, n int64, below layers.Below) error {
	for n > 0 {
		c := off / e.gran
		size := min(e.gran, e.size-c*e.gran)
		k := min(n, c*e.gran+size-off)
		switch {
		case k < size && e.bug == narrowZero && n > e.gran:
		case k < size:
			if e.cur[c] == 1 {
				break
			}
			if err := e.writeCluster(ctx, c, make([]byte, k), off-c*e.gran, below); err != nil {
				return err
			}
		default:
			z, err := below.IsZero(ctx, c*e.gran, size)
			if err != nil {
				return err
			}
			if v := e.cur[c]; v > 1 {
				e.release(v)
			}
			e.cur[c] = 1
			if z || e.bug == unmapAlways {
				e.cur[c] = 0
			}
		}
		off += k
		n -= k
	}
	return nil
}

func (e *refEditor) release(v uint64) {
	switch e.bug {
	case freeAtOnce:
		e.free = append(e.free, v)
	case neverReuses:
	default:
		e.pending = append(e.pending, v)
	}
}

func (e *refEditor) Sync(context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.may(0, 0); err != nil {
		return err
	}
	return e.commit()
}

func (e *refEditor) commit() error {
	fail := func(err error) error {
		if e.bug == hideSync {
			return nil
		}
		if e.bug != forgiveSync {
			e.failed = err
		}
		return err
	}
	if e.bug != noDataSync {
		if err := e.f.Sync(); err != nil {
			return fail(err)
		}
	}
	var b [8]byte
	for c, v := range e.cur {
		if v == e.disk[c] {
			continue
		}
		binary.LittleEndian.PutUint64(b[:], v)
		if _, err := e.f.WriteAt(b[:], refHeader+8*int64(c)); err != nil {
			return err
		}
		e.disk[c] = v
	}
	if e.bug != noMapSync {
		if err := e.f.Sync(); err != nil {
			return fail(err)
		}
	}
	if e.bug == thirdSync {
		if err := e.f.Sync(); err != nil {
			return fail(err)
		}
	}
	if e.bug == noGrace {
		e.punch()
		return nil
	}
	// The lock has to be given up: a reader needs it for Lookup.
	pending := e.pending
	e.pending = nil
	e.mu.Unlock()
	e.readers.Wait()
	e.mu.Lock()
	e.pending = append(pending, e.pending...)
	kept := e.pending[len(pending):]
	e.pending = e.pending[:len(pending)]
	e.punch()
	e.pending = append([]uint64(nil), kept...)
	return nil
}

// punch frees what is pending.
func (e *refEditor) punch() {
	for _, v := range e.pending {
		_ = e.f.PunchHole(e.place(v), e.gran) // only a wish
		e.free = append(e.free, v)
	}
	e.pending = nil
}

func (e *refEditor) Close() error {
	var err error
	if e.writable && e.bug != noClose {
		err = e.Sync(context.Background())
	}
	if e.bug == leaksHandle {
		return err
	}
	return errors.Join(err, e.f.Close())
}

var _ layers.Editor = (*refEditor)(nil)
var _ io.Closer = (*refEditor)(nil)
