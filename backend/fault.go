package backend

import (
	"errors"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// Op is a set of classes of operations.
type Op uint16

// The classes. A vectored operation is one operation.
const (
	OpRead     Op = 1 << iota
	OpWrite       // WriteAt, WritevAt
	OpSync        //
	OpTruncate    //
	OpPunch       // PunchHole
	OpZero        // ZeroRange
	OpCopy        // CopyRange into this file
	OpQuery       // Size, Allocated, SeekData, SeekHole

	// OpChange is everything that changes the file.
	OpChange = OpWrite | OpTruncate | OpPunch | OpZero | OpCopy
	// OpAny is every operation.
	OpAny = OpRead | OpSync | OpChange | OpQuery
)

// Rule says which operation of a Fault fails, and how.
type Rule struct {
	// On is the classes that are counted and fail.
	On Op
	// Nth is the operation that fails, counted from Inject on: 1 (or 0) is
	// the next one.
	Nth int
	// Err is the error; nil means unix.EIO.
	Err error
	// Short is how many bytes a failing read, write or copy does before it
	// fails. The other operations fail without effect.
	Short int
	// Sticky makes all operations in On fail from the Nth on, else one does.
	Sticky bool
	// DropUnsynced makes a failing Sync lose everything that was changed
	// since the last good Sync (but not what was changed before Inject), as
	// Linux does: it reports a failed write-back once and marks the pages
	// clean, so the old bytes come back from the disk when the page cache
	// lets go of them.
	DropUnsynced bool
}

type armed struct {
	Rule
	seen int
}

// Fault is a File that fails when it is told to. Without rules it is the file
// below. It counts, so that a test can run once to learn how many operations
// there are and then fail every single one.
type Fault struct {
	f File

	mu     sync.Mutex
	rules  []*armed
	counts map[Op]int
	fired  int

	// track makes every change remember how to undo it; changes then happen
	// one at a time, under order.
	order sync.Mutex
	track bool
	undo  []func() error
}

// NewFault wraps f.
func NewFault(f File) *Fault { return &Fault{f: f, counts: map[Op]int{}} }

// Unwrap returns the file below.
func (f *Fault) Unwrap() File { return f.f }

// Inject adds a rule. When several rules hit one operation the first counts.
func (f *Fault) Inject(r Rule) {
	f.order.Lock()
	defer f.order.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Err == nil {
		r.Err = unix.EIO
	}
	r.Nth = max(r.Nth, 1)
	f.rules = append(f.rules, &armed{Rule: r})
	f.track = f.track || r.DropUnsynced
}

// Clear removes all rules. Counters go on.
func (f *Fault) Clear() {
	f.order.Lock()
	defer f.order.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules, f.track, f.undo = nil, false, nil
}

// Count returns how many operations of these classes were begun.
func (f *Fault) Count(on Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for op, c := range f.counts {
		if op&on != 0 {
			n += c
		}
	}
	return n
}

// Fired returns how many operations were made to fail.
func (f *Fault) Fired() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fired
}

// begin counts one operation and returns the rule that it breaks, or nil.
func (f *Fault) begin(op Op) *armed {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counts[op]++
	var hit *armed
	for _, r := range f.rules {
		if r.On&op == 0 {
			continue
		}
		r.seen++
		if hit == nil && (r.seen == r.Nth || r.Sticky && r.seen > r.Nth) {
			hit = r
		}
	}
	if hit != nil {
		f.fired++
	}
	return hit
}

func (f *Fault) fail(op string, r *armed) error { return pathErr(op, f.f.Name(), r.Err) }

// change runs an operation that changes [off, off+n), n < 0 meaning up to the
// end, keeping the old bytes where that is asked for.
func (f *Fault) change(off, n int64, do func() error) error {
	f.order.Lock()
	if !f.track {
		f.order.Unlock()
		return do()
	}
	defer f.order.Unlock()
	back, err := restorer(f.f, off, n)
	if err != nil {
		return err
	}
	f.undo = append(f.undo, back)
	return do()
}

// restorer returns a function that brings back the present length and the
// present bytes of [off, off+n).
func restorer(f File, off, n int64) (func() error, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	end := size
	if n >= 0 {
		end = min(size, off+n)
	}
	type part struct {
		off int64
		p   []byte
	}
	var parts []part
	for at := off; at < end; {
		data, err := f.SeekData(at)
		if err == io.EOF || err == nil && data >= end {
			break
		}
		hole, err2 := f.SeekHole(data)
		if err := errors.Join(err, err2); err != nil {
			return nil, err
		}
		p := make([]byte, min(hole, end)-data)
		if _, err := f.ReadAt(p, data); err != nil && err != io.EOF {
			return nil, err
		}
		parts = append(parts, part{data, p})
		at = hole
	}
	return func() error {
		if end > off {
			if err := f.PunchHole(off, end-off); err != nil {
				return err
			}
		}
		for _, p := range parts {
			if _, err := f.WriteAt(p.p, p.off); err != nil {
				return err
			}
		}
		return f.Truncate(size)
	}, nil
}

// ReadAt is File.
func (f *Fault) ReadAt(p []byte, off int64) (int, error) {
	if r := f.begin(OpRead); r != nil {
		n, _ := f.f.ReadAt(p[:min(len(p), r.Short)], off)
		return n, f.fail("read", r)
	}
	return f.f.ReadAt(p, off)
}

// ReadvAt is File.
func (f *Fault) ReadvAt(bufs [][]byte, off int64) (int, error) {
	if r := f.begin(OpRead); r != nil {
		n, _ := f.f.ReadvAt(cut(bufs, r.Short), off)
		return n, f.fail("read", r)
	}
	return f.f.ReadvAt(bufs, off)
}

// WriteAt is File.
func (f *Fault) WriteAt(p []byte, off int64) (n int, err error) {
	r := f.begin(OpWrite)
	if r != nil {
		p = p[:min(len(p), r.Short)]
	}
	err = f.change(off, int64(len(p)), func() (err error) {
		n, err = f.f.WriteAt(p, off)
		return err
	})
	if r != nil {
		err = f.fail("write", r)
	}
	return n, err
}

// WritevAt is File.
func (f *Fault) WritevAt(bufs [][]byte, off int64) (n int, err error) {
	r := f.begin(OpWrite)
	if r != nil {
		bufs = cut(bufs, r.Short)
	}
	err = f.change(off, total(bufs), func() (err error) {
		n, err = f.f.WritevAt(bufs, off)
		return err
	})
	if r != nil {
		err = f.fail("write", r)
	}
	return n, err
}

func total(bufs [][]byte) (n int64) {
	for _, p := range bufs {
		n += int64(len(p))
	}
	return n
}

// cut returns the first n bytes of bufs.
func cut(bufs [][]byte, n int) [][]byte {
	var out [][]byte
	for _, p := range bufs {
		if n <= 0 {
			break
		}
		p = p[:min(len(p), n)]
		out = append(out, p)
		n -= len(p)
	}
	return out
}

// Size is File.
func (f *Fault) Size() (int64, error) {
	if r := f.begin(OpQuery); r != nil {
		return 0, f.fail("size", r)
	}
	return f.f.Size()
}

// Allocated is File.
func (f *Fault) Allocated() (int64, error) {
	if r := f.begin(OpQuery); r != nil {
		return 0, f.fail("stat", r)
	}
	return f.f.Allocated()
}

// SeekData is File.
func (f *Fault) SeekData(off int64) (int64, error) {
	if r := f.begin(OpQuery); r != nil {
		return 0, f.fail("seek", r)
	}
	return f.f.SeekData(off)
}

// SeekHole is File.
func (f *Fault) SeekHole(off int64) (int64, error) {
	if r := f.begin(OpQuery); r != nil {
		return 0, f.fail("seek", r)
	}
	return f.f.SeekHole(off)
}

// Truncate is File.
func (f *Fault) Truncate(size int64) error {
	if r := f.begin(OpTruncate); r != nil {
		return f.fail("truncate", r)
	}
	return f.change(max(size, 0), -1, func() error { return f.f.Truncate(size) })
}

// PunchHole is File.
func (f *Fault) PunchHole(off, n int64) error {
	if r := f.begin(OpPunch); r != nil {
		return f.fail("punch hole", r)
	}
	return f.change(off, max(n, 0), func() error { return f.f.PunchHole(off, n) })
}

// ZeroRange is File.
func (f *Fault) ZeroRange(off, n int64) error {
	if r := f.begin(OpZero); r != nil {
		return f.fail("zero range", r)
	}
	return f.change(off, max(n, 0), func() error { return f.f.ZeroRange(off, n) })
}

// CopyRange is File. It reads src as src is: where src is a Fault, its reads
// count and may fail.
func (f *Fault) CopyRange(src File, srcOff, off, n int64) (done int64, err error) {
	if src == File(f) {
		src = f.f
	}
	r := f.begin(OpCopy)
	if r != nil {
		n = min(n, int64(r.Short))
	}
	err = f.change(off, max(n, 0), func() (err error) {
		done, err = f.f.CopyRange(src, srcOff, off, n)
		return err
	})
	if r != nil {
		err = f.fail("copy", r)
	}
	return done, err
}

// Sync is File.
func (f *Fault) Sync() error {
	r := f.begin(OpSync)
	f.order.Lock()
	defer f.order.Unlock()
	if r == nil {
		err := f.f.Sync()
		if err == nil {
			f.undo = nil
		}
		return err
	}
	err := f.fail("sync", r)
	if r.DropUnsynced {
		for i := len(f.undo) - 1; i >= 0; i-- {
			if uerr := f.undo[i](); uerr != nil {
				return errors.Join(err, uerr)
			}
		}
		f.undo = nil
	}
	return err
}

// Name is File.
func (f *Fault) Name() string { return f.f.Name() }

// Close is File; it never fails by a rule.
func (f *Fault) Close() error { return f.f.Close() }
