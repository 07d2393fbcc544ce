package backend

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
)

// The rule by which a power cut is modelled. The log is cut into epochs, each
// ending at a Sync (of whatever file). A cut in an epoch leaves
//
//   - all that an earlier, successful Sync of the same file made durable, and
//   - any subset of everything else that was begun: the cache writes back in
//     any order and as little or as much as it likes. Writes are torn into
//     pieces, as a disk writes sectors and a cache pages. Truncate, PunchHole
//     and ZeroRange are one piece each and as unordered as writes are, and so
//     is each change of the names in a directory.
//
// Pieces that survive take effect in the order of the log. What a failed Sync
// left behind may be lost at any time, even after later Syncs that succeed.

// StateOptions says which states States builds.
type StateOptions struct {
	// Exhaustive is the number of uncertain pieces up to which all subsets
	// are built; 0 means 8. The largest is 20.
	Exhaustive int
	// Random is how many random subsets are built of more pieces, besides
	// all prefixes, all but one, and only one; 0 means 200, negative none.
	Random int
	// Seed makes the random subsets; the same seed, the same states.
	Seed uint64
	// MaxPerEpoch bounds the states of one epoch by choosing at random among
	// the above, besides "nothing" and "everything", which always stay; 0 is
	// no bound.
	MaxPerEpoch int
	// IgnoreSync is the negative control: the Sync of that number (1 is the
	// first called) reported what it did but made nothing durable. A test
	// that finds nothing wrong then does not need that Sync, or is too weak.
	IgnoreSync int
	// Piece returns how large a piece of a write at off may be: the piece
	// ends at the next multiple of it. nil means 512 bytes in the first 4096
	// bytes of a file (headers), else 4096.
	Piece func(file int, off int64) int64
}

// State is what a power cut may have left.
type State struct {
	// Files are the files in the order of Recorder.Wrap. They are the
	// receiver's own: opening and repairing them harms no other state.
	Files []*Mem
	// Names are the names in each directory of Recorder.Names, which lead to
	// indexes of Files; its place in Files is empty. nil for files.
	Names []map[string]int
	// Epoch is how many Syncs had been called before the cut.
	Epoch int
	// Completed is how many Syncs had returned nil before the cut (the
	// ignored one included, because the program believed it). With
	// Recorder.Syncs noted before and after a step: the step must be there
	// when the note after it is <= Completed, and must not be there when the
	// note before it is > Completed. In between, both are legal.
	Completed int

	pieces  []piece
	applied []bool
}

// String describes the cut, for the message of a failing test.
func (s *State) String() string {
	var kept, lost []string
	for i, p := range s.pieces {
		if p.certain {
			continue
		}
		if d := fmt.Sprintf("%d:%s", p.file, p.event); s.applied[i] {
			kept = append(kept, d)
		} else {
			lost = append(lost, d)
		}
	}
	return fmt.Sprintf("cut in epoch %d, %d syncs completed, kept %s, lost %s",
		s.Epoch, s.Completed, list(kept), list(lost))
}

func list(s []string) string {
	const most = 12
	if len(s) > most {
		s = append(s[:most:most], fmt.Sprintf("and %d more", len(s)-most))
	}
	return "[" + strings.Join(s, ", ") + "]"
}

// piece is a part of an event that is written whole or not at all.
type piece struct {
	event
	certain bool // made durable by a Sync
	doomed  bool // was there when a Sync failed: never certain
}

// States yields the states after a power cut during what has been recorded so
// far, and at its end. A state comes once per value of Completed.
func (r *Recorder) States(o StateOptions) iter.Seq[*State] {
	r.mu.Lock()
	log := r.log[:len(r.log):len(r.log)]
	files := r.files[:len(r.files):len(r.files)]
	r.mu.Unlock()
	if o.Exhaustive == 0 {
		o.Exhaustive = 8
	}
	o.Exhaustive = min(o.Exhaustive, 20)
	if o.Random == 0 {
		o.Random = 200
	}
	if o.Piece == nil {
		o.Piece = func(_ int, off int64) int64 {
			if off < 4096 {
				return 512
			}
			return 4096
		}
	}
	return func(yield func(*State) bool) {
		b := &builder{o: o, yield: yield, seen: map[uint64]bool{}}
		for _, f := range files {
			b.durable = append(b.durable, f.base.Clone())
			b.names = append(b.names, maps.Clone(f.names))
		}
		for _, e := range log {
			if e.kind != evSync {
				b.split(e)
				continue
			}
			if !b.cuts() {
				return
			}
			b.sync(e)
		}
		b.cuts()
	}
}

// builder walks through the log.
type builder struct {
	o         StateOptions
	yield     func(*State) bool
	durable   []*Mem // everything certain that nothing uncertain precedes
	names     []map[string]int
	pieces    []piece // the rest, in order
	epoch     int
	completed int
	seen      map[uint64]bool
}

// split appends the pieces of e.
func (b *builder) split(e event) {
	if e.kind != evWrite {
		b.pieces = append(b.pieces, piece{event: e})
		return
	}
	for len(e.data) > 0 {
		g := max(b.o.Piece(e.file, e.off), 1)
		n := min(g-e.off%g, int64(len(e.data)))
		p := e
		p.data = e.data[:n:n]
		b.pieces = append(b.pieces, piece{event: p})
		e.off += n
		e.data = e.data[n:]
	}
}

// sync ends an epoch.
func (b *builder) sync(e event) {
	b.epoch++
	if e.ok {
		b.completed++
		clear(b.seen)
	}
	if b.epoch == b.o.IgnoreSync {
		return
	}
	for i := range b.pieces {
		if p := &b.pieces[i]; p.file == e.file && !p.certain {
			p.certain = e.ok && !p.doomed
			p.doomed = !p.certain
		}
	}
	// What is certain joins the durable files, unless something uncertain
	// comes before it in the same file.
	blocked := make([]bool, len(b.durable))
	var rest []piece
	for _, p := range b.pieces {
		if p.certain && !blocked[p.file] {
			apply(b.durable[p.file], b.names[p.file], p.event)
		} else {
			blocked[p.file] = true
			rest = append(rest, p)
		}
	}
	b.pieces = rest
}

// apply does one piece. Mem cannot fail on what a file has done before.
func apply(m *Mem, names map[string]int, e event) {
	size := m.size
	switch e.kind {
	case evNames:
		applyNames(names, e)
	case evWrite:
		m.write(e.data, e.off)
	case evTruncate:
		_ = m.Truncate(e.off)
	case evPunch:
		_ = m.PunchHole(e.off, e.n)
	case evZero:
		// An earlier write that made the file longer may be lost.
		if e.off < size {
			_ = m.ZeroRange(e.off, min(e.n, size-e.off))
		}
	}
}

// cuts yields the states of the present epoch.
func (b *builder) cuts() bool {
	var unsure []int
	for i, p := range b.pieces {
		if !p.certain {
			unsure = append(unsure, i)
		}
	}
	pieces := slices.Clone(b.pieces) // sync will change them
	for pick := range b.subsets(len(unsure)) {
		s := &State{Epoch: b.epoch, Completed: b.completed, pieces: pieces, applied: make([]bool, len(pieces))}
		for k, i := range unsure {
			s.applied[i] = pick(k)
		}
		for _, f := range b.durable {
			s.Files = append(s.Files, f.Clone())
		}
		for _, n := range b.names {
			s.Names = append(s.Names, maps.Clone(n))
		}
		for i, p := range pieces {
			if p.certain || s.applied[i] {
				apply(s.Files[p.file], s.Names[p.file], p.event)
			}
		}
		sum := uint64(0)
		for _, f := range s.Files {
			sum = sum*0x9e3779b97f4a7c15 + f.Hash()
		}
		for _, n := range s.Names {
			sum = sum*0x9e3779b97f4a7c15 + hashNames(n)
		}
		if b.seen[sum] {
			continue
		}
		b.seen[sum] = true
		if !b.yield(s) {
			return false
		}
	}
	return true
}

// subsets yields which of n uncertain pieces survive: all subsets of few, of
// many all prefixes (nothing and everything among them), all but one, only
// one, and random ones, each piece with a likelihood that is random, too.
func (b *builder) subsets(n int) iter.Seq[func(k int) bool] {
	return func(yield func(func(k int) bool) bool) {
		if n <= b.o.Exhaustive && (b.o.MaxPerEpoch <= 0 || 1<<n <= b.o.MaxPerEpoch) {
			for set := range 1 << n {
				if !yield(func(k int) bool { return set>>k&1 != 0 }) {
					return
				}
			}
			return
		}
		rnd := rand.New(rand.NewPCG(b.o.Seed, uint64(b.epoch)))
		count := n + 1 + 2*n + max(b.o.Random, 0)
		chosen := make([]bool, count)
		for i := range chosen {
			chosen[i] = b.o.MaxPerEpoch <= 0 || i == 0 || i == n
		}
		if b.o.MaxPerEpoch > 0 {
			for _, i := range rnd.Perm(count)[:min(b.o.MaxPerEpoch, count)] {
				chosen[i] = true
			}
		}
		for i, c := range chosen {
			if !c {
				continue
			}
			var pick func(k int) bool
			switch {
			case i <= n: // prefix
				pick = func(k int) bool { return k < i }
			case i <= 2*n: // all but one
				pick = func(k int) bool { return k != i-n-1 }
			case i <= 3*n: // only one
				pick = func(k int) bool { return k == i-2*n-1 }
			default:
				r := rand.New(rand.NewPCG(b.o.Seed^uint64(i), uint64(b.epoch)))
				likely := r.Float64()
				bits := make([]bool, n)
				for k := range bits {
					bits[k] = r.Float64() < likely
				}
				pick = func(k int) bool { return bits[k] }
			}
			if !yield(pick) {
				return
			}
		}
	}
}
