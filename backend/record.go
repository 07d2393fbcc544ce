package backend

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// Recorder logs everything that changes a set of files, and every Sync, in one
// order, so that States can rebuild what a power cut at any moment could have
// left. Several files belong to one Recorder when an operation works on all
// of them (an image, its data file, its descriptor): a Sync makes durable what
// was done to its own file only.
//
// Operations that change files run one at a time, so that their order is
// known; reading does not wait. The log holds a copy of all written data.
type Recorder struct {
	mu    sync.Mutex
	files []*recorded
	log   []event
	good  int // syncs that returned nil
}

type eventKind uint8

const (
	evWrite eventKind = iota
	evTruncate
	evPunch
	evZero
	evSync
	evNames
)

// event is one operation that had an effect. off is the length for evTruncate.
type event struct {
	kind eventKind
	file int
	off  int64
	n    int64
	data []byte
	ok   bool // of a sync
	// names is of evNames, one change or the two of a rename.
	names []nameChange
}

func (e event) String() string {
	switch e.kind {
	case evWrite:
		return fmt.Sprintf("write %d+%d", e.off, len(e.data))
	case evTruncate:
		return fmt.Sprintf("truncate %d", e.off)
	case evPunch:
		return fmt.Sprintf("punch %d+%d", e.off, e.n)
	case evZero:
		return fmt.Sprintf("zero %d+%d", e.off, e.n)
	case evSync:
		return fmt.Sprintf("sync (%t)", e.ok)
	case evNames:
		return fmt.Sprintf("names %v", e.names)
	}
	return "unknown"
}

// recorded is one file of a Recorder.
type recorded struct {
	f     File
	r     *Recorder
	index int
	base  *Mem           // the content when recording began
	names map[string]int // of a directory (see Names), instead of content
}

// NewRecorder returns a Recorder without files.
func NewRecorder() *Recorder { return &Recorder{} }

// Wrap adds f, whose present content counts as durable, and returns the File
// to use instead. The order of the calls is the order of State.Files.
func (r *Recorder) Wrap(f File) (File, error) {
	base, err := snapshot(f)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	w := &recorded{f: f, r: r, index: len(r.files), base: base}
	r.files = append(r.files, w)
	return w, nil
}

// Syncs returns how many Syncs, of all files together, have returned nil. A
// test notes it before and after each step; see State.Completed.
func (r *Recorder) Syncs() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.good
}

// SyncCalls returns how many Syncs were called, failed ones included: the
// values that StateOptions.IgnoreSync may have are 1 to SyncCalls.
func (r *Recorder) SyncCalls() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, e := range r.log {
		if e.kind == evSync {
			n++
		}
	}
	return n
}

// snapshot copies f into a Mem.
func snapshot(f File) (*Mem, error) {
	if m, ok := f.(*Mem); ok {
		return m.Clone(), nil
	}
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	m := NewMem(f.Name())
	if err := m.Truncate(size); err != nil {
		return nil, err
	}
	for at := int64(0); at < size; {
		data, err := f.SeekData(at)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		hole, err := f.SeekHole(data)
		if err != nil {
			return nil, err
		}
		if _, err := m.CopyRange(f, data, data, min(hole, size)-data); err != nil {
			return nil, err
		}
		at = hole
	}
	return m, nil
}

// add appends to the log, which is locked.
func (w *recorded) add(e event) {
	e.file = w.index
	w.r.log = append(w.r.log, e)
}

// Unwrap returns the file below.
func (w *recorded) Unwrap() File { return w.f }

func (w *recorded) ReadAt(p []byte, off int64) (int, error) { return w.f.ReadAt(p, off) }

func (w *recorded) ReadvAt(bufs [][]byte, off int64) (int, error) { return w.f.ReadvAt(bufs, off) }

func (w *recorded) WriteAt(p []byte, off int64) (int, error) {
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	n, err := w.f.WriteAt(p, off)
	if n > 0 { // also of a write that failed later on
		w.add(event{kind: evWrite, off: off, data: append([]byte(nil), p[:n]...)})
	}
	return n, err
}

func (w *recorded) WritevAt(bufs [][]byte, off int64) (int, error) {
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	n, err := w.f.WritevAt(bufs, off)
	if n > 0 {
		data := make([]byte, 0, n)
		for _, p := range cut(bufs, n) {
			data = append(data, p...)
		}
		w.add(event{kind: evWrite, off: off, data: data})
	}
	return n, err
}

func (w *recorded) Size() (int64, error)      { return w.f.Size() }
func (w *recorded) Allocated() (int64, error) { return w.f.Allocated() }

func (w *recorded) Truncate(size int64) error {
	return w.simple(event{kind: evTruncate, off: size}, func() error { return w.f.Truncate(size) })
}

func (w *recorded) PunchHole(off, n int64) error {
	return w.simple(event{kind: evPunch, off: off, n: n}, func() error { return w.f.PunchHole(off, n) })
}

func (w *recorded) ZeroRange(off, n int64) error {
	return w.simple(event{kind: evZero, off: off, n: n}, func() error { return w.f.ZeroRange(off, n) })
}

// simple does an operation that either happens whole or, on error, not.
func (w *recorded) simple(e event, do func() error) error {
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	err := do()
	if err == nil {
		w.add(e)
	}
	return err
}

// CopyRange is logged as a write of what was copied.
func (w *recorded) CopyRange(src File, srcOff, off, n int64) (int64, error) {
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	if s, ok := src.(*recorded); ok {
		src = s.f
	}
	done, err := w.f.CopyRange(src, srcOff, off, n)
	if done > 0 {
		data := make([]byte, done)
		if _, rerr := w.f.ReadAt(data, off); rerr != nil && rerr != io.EOF {
			return done, errors.Join(err, rerr)
		}
		w.add(event{kind: evWrite, off: off, data: data})
	}
	return done, err
}

func (w *recorded) Sync() error {
	w.r.mu.Lock()
	defer w.r.mu.Unlock()
	err := w.f.Sync()
	w.add(event{kind: evSync, ok: err == nil})
	if err == nil {
		w.r.good++
	}
	return err
}

func (w *recorded) SeekData(off int64) (int64, error) { return w.f.SeekData(off) }
func (w *recorded) SeekHole(off int64) (int64, error) { return w.f.SeekHole(off) }
func (w *recorded) Name() string                      { return w.f.Name() }
func (w *recorded) Close() error                      { return w.f.Close() }
