package fsck

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
)

// Phase orders the changes of a Plan: everything of one is durable before the
// next begins.
type Phase uint8

const (
	// PhaseNew: copies of clusters and new tables, in places that nothing
	// refers to yet; the file grows to its new length first.
	PhaseNew Phase = iota
	// PhaseCounts: reference counts that go up, new count tables.
	PhaseCounts
	// PhaseMap: map entries (BAT, L1, L2, snapshot and bitmap tables).
	PhaseMap
	// PhaseHeader: the header, which makes new tables the valid ones.
	PhaseHeader
	// PhaseFree: counts that go down, holes, the end of the file.
	PhaseFree
	// PhaseFlags: marks that say that all is well again (dirty, in use).
	PhaseFlags

	numPhases
)

func (p Phase) String() string {
	if p < numPhases {
		return [...]string{"new", "counts", "map", "header", "free", "flags"}[p]
	}
	return fmt.Sprintf("phase(%d)", uint8(p))
}

// Errors of a Plan.
var (
	// ErrNoRoom: the plan would need the file to be longer than it can be.
	ErrNoRoom = errors.New("no room at the end of the file")
	// ErrPlan: changes that contradict each other; a defect of the checker.
	ErrPlan = errors.New("contradicting changes")
)

// PlanOptions bound a Plan.
type PlanOptions struct {
	// Memory is for changed bytes, 0 for 64 MiB. What is more goes to an
	// unnamed temporary file.
	Memory int64
	// Spill makes that file; nil makes one in os.TempDir().
	Spill func() (backend.File, error)
	// MaxSize is the largest length the file may get; 0 is no limit. (A block
	// device cannot grow.)
	MaxSize int64
}

// Plan is a set of changes of one file that have not been made. Its methods
// may be called concurrently; two changes of the same bytes in the same phase
// must not be, unless they are equal.
//
// Within a phase, zeros come before bytes; copies come before everything and
// copy what the file holds now.
type Plan struct {
	f   backend.File
	o   PlanOptions
	old int64 // length of f

	mu     sync.Mutex
	size   int64 // length in the end
	need   int64 // end of the last byte written
	pages  pageStore
	zeros  [numPhases]blockmap.Set // real zeros
	punch  blockmap.Set            // holes, in PhaseFree
	copies []copyOp                // sorted by dst
	whole  bool                    // Replace was called
	lost   []Lost
	// lostOnce has all of lost, lostBytes are their lengths together, lostRest
	// the places in the file of what came when that was enough.
	lostOnce  map[Lost]bool
	lostBytes int64
	lostRest  blockmap.Set
}

type copyOp struct{ dst, src, n int64 }

// Lost is content that has no place in the repaired image.
type Lost struct {
	// Guest is the offset at which it was, or may have been, seen; -1 when it
	// is not known.
	Guest int64
	// Host and Len are where it is in the file.
	Host, Len int64
}

// Name is the name of the file in the lost+found directory.
func (l Lost) Name() string {
	if l.Guest < 0 {
		return fmt.Sprintf("guest-unknown.host-%#012x", l.Host)
	}
	return fmt.Sprintf("guest-%#012x.host-%#012x", l.Guest, l.Host)
}

// NewPlan returns an empty plan for f, which must not change before the plan
// is executed or dropped. Close it in the end.
func NewPlan(f backend.File, o PlanOptions) (*Plan, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if o.Memory <= 0 {
		o.Memory = 64 << 20
	}
	p := &Plan{f: f, o: o, old: size, size: size}
	p.pages = newPageStore(o.Memory, o.Spill)
	return p, nil
}

// Close gives back the plan's memory and temporary file, not f.
func (p *Plan) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pages.close()
}

// Empty reports whether the plan changes nothing.
func (p *Plan) Empty() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.size != p.old || len(p.copies) > 0 || !p.pages.empty() || p.punch.Len() > 0 || len(p.lost) > 0 || p.lostRest.Len() > 0 {
		return false
	}
	for i := range p.zeros {
		if p.zeros[i].Len() > 0 {
			return false
		}
	}
	return true
}

// Size implements ReadSizer: the length of the file in the end.
func (p *Plan) Size() (int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.size, nil
}

// room makes sure that the file may reach to end. p.mu is held.
func (p *Plan) room(off, n int64) error {
	if off < 0 || n < 0 || n > math.MaxInt64-off {
		return fmt.Errorf("%w: %d bytes at %d", ErrPlan, n, off)
	}
	end := off + n
	if end > p.size {
		if p.size < p.old {
			return fmt.Errorf("%w: a change at %#x behind the new end %#x", ErrPlan, end, p.size)
		}
		if p.o.MaxSize > 0 && end > p.o.MaxSize {
			return fmt.Errorf("%w: %#x is needed, %#x is the limit", ErrNoRoom, end, p.o.MaxSize)
		}
		p.size = end
	}
	p.need = max(p.need, end)
	return nil
}

// Write changes the bytes at off. The file grows where they reach behind its
// end.
func (p *Plan) Write(ph Phase, off int64, b []byte) error {
	if ph >= numPhases {
		return fmt.Errorf("%w: %v", ErrPlan, ph)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.room(off, int64(len(b))); err != nil {
		return err
	}
	return p.pages.write(ph, off, b)
}

// Zero makes [off, off+n) zeros that have storage. It suits whole clusters.
func (p *Plan) Zero(ph Phase, off, n int64) error {
	if ph >= numPhases {
		return fmt.Errorf("%w: %v", ErrPlan, ph)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.room(off, n); err != nil {
		return err
	}
	p.zeros[ph].Add(off, n)
	return nil
}

// Punch makes [off, off+n) a hole, in PhaseFree. Nothing may be written there
// in that phase or later.
func (p *Plan) Punch(off, n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if off < 0 || n < 0 || off > p.size || n > p.size-off {
		return fmt.Errorf("%w: a hole of %d bytes at %#x", ErrPlan, n, off)
	}
	p.punch.Add(off, n)
	return nil
}

// Copy copies n bytes, as they are now, from src to dst, in PhaseNew. No byte
// may be the destination of two copies, and none may be both a source and the
// destination of a copy.
func (p *Plan) Copy(dst, src, n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if src < 0 || n <= 0 || n > math.MaxInt64-src {
		return fmt.Errorf("%w: copy of %d bytes at %d", ErrPlan, n, src)
	}
	i, _ := slices.BinarySearchFunc(p.copies, dst, func(c copyOp, dst int64) int { return cmp.Compare(c.dst, dst) })
	if i < len(p.copies) && p.copies[i].dst < dst+n || i > 0 && p.copies[i-1].dst+p.copies[i-1].n > dst {
		return fmt.Errorf("%w: two copies to %#x", ErrPlan, dst)
	}
	if err := p.room(dst, n); err != nil {
		return err
	}
	if i > 0 {
		if c := &p.copies[i-1]; c.dst+c.n == dst && c.src+c.n == src {
			c.n += n
			return nil
		}
	}
	p.copies = slices.Insert(p.copies, i, copyOp{dst, src, n})
	return nil
}

// SetSize makes the file n bytes long: longer in PhaseNew, shorter in
// PhaseFree. Nothing may be changed behind n.
func (p *Plan) SetSize(n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case n < p.need:
		return fmt.Errorf("%w: length %#x, but something is changed up to %#x", ErrPlan, n, p.need)
	case p.o.MaxSize > 0 && n > p.o.MaxSize:
		return fmt.Errorf("%w: %#x is needed, %#x is the limit", ErrNoRoom, n, p.o.MaxSize)
	}
	p.size = n
	return nil
}

// Replace replaces the whole content (of a descriptor), at once where the
// filesystem can. No other change may be in the plan.
func (p *Plan) Replace(b []byte) error {
	if !p.Empty() {
		return fmt.Errorf("%w: replace", ErrPlan)
	}
	if err := p.Write(PhaseMap, 0, b); err != nil {
		return err
	}
	p.mu.Lock()
	p.whole = true
	p.mu.Unlock()
	return p.SetSize(int64(len(b)))
}

// Quarantine keeps content for the lost+found directory, from where it is now.
// The same piece is kept once. Of very many pieces, or pieces that are longer
// together than makes sense, the rest come into one file (LostRest).
func (p *Plan) Quarantine(l Lost) error {
	if l.Host < 0 || l.Len <= 0 || l.Len > math.MaxInt64-l.Host {
		return fmt.Errorf("%w: quarantine of %d bytes at %d", ErrPlan, l.Len, l.Host)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.lostOnce[l]:
	case len(p.lost) >= maxLostFiles || p.lostBytes > 0 && l.Len > min(p.old, math.MaxInt64/maxLostTimes)*maxLostTimes-p.lostBytes:
		p.lostRest.Add(l.Host, l.Len)
	default:
		if p.lostOnce == nil {
			p.lostOnce = map[Lost]bool{}
		}
		p.lostOnce[l] = true
		p.lost = append(p.lost, l)
		p.lostBytes += l.Len
	}
	return nil
}

// ReadAt reads as io.ReaderAt from the file as it will be in the end.
func (p *Plan) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%w: read at %d", ErrPlan, off)
	}
	p.mu.Lock()
	size := p.size
	p.mu.Unlock()
	if off >= size {
		return 0, io.EOF
	}
	var eof error
	if int64(len(b)) > size-off {
		b, eof = b[:size-off], io.EOF
	}
	if err := p.readOld(b, off); err != nil {
		return 0, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for ph := range numPhases {
		if err := p.apply(ph, b, off); err != nil {
			return 0, err
		}
	}
	return len(b), eof
}

// readOld reads the file as it is, zeros behind its end.
func (p *Plan) readOld(b []byte, off int64) error {
	if off >= p.old {
		clear(b)
		return nil
	}
	in := b
	if int64(len(b)) > p.old-off {
		in = b[:p.old-off]
		clear(b[len(in):])
	}
	n, err := p.f.ReadAt(in, off)
	if n == len(in) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: shorter than it was: %w", p.f.Name(), io.ErrUnexpectedEOF)
	}
	return err
}

// apply does to b, the content at off after the earlier phases, what phase ph
// does. p.mu is held.
func (p *Plan) apply(ph Phase, b []byte, off int64) error {
	end := off + int64(len(b))
	if ph == PhaseNew {
		i, _ := slices.BinarySearchFunc(p.copies, off, func(c copyOp, off int64) int { return cmp.Compare(c.dst+c.n, off+1) })
		for ; i < len(p.copies) && p.copies[i].dst < end; i++ {
			c := p.copies[i]
			from, to := max(off, c.dst), min(end, c.dst+c.n)
			if err := p.readOld(b[from-off:to-off], c.src+from-c.dst); err != nil {
				return err
			}
		}
	}
	clearIn(&p.zeros[ph], b, off)
	if ph == PhaseFree {
		clearIn(&p.punch, b, off)
	}
	return p.pages.read(ph, b, off)
}

// clearIn zeroes what of b, the content at off, is in the set.
func clearIn(s *blockmap.Set, b []byte, off int64) {
	end := off + int64(len(b))
	if !s.Overlaps(off, int64(len(b))) {
		return
	}
	at := off
	for gap := range s.Gaps(off, int64(len(b))) {
		clear(b[at-off : gap.Off-off])
		at = gap.End()
	}
	clear(b[at-off : end-off])
}
