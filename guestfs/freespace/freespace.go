// Package freespace is what the readers of filesystems and their caller have
// in common: how proven free ranges are handed over, and how a reader says
// that it cannot judge.
//
// Design note. A reader proves a filesystem as a whole: it hands over ranges as
// it finds them and may still refuse afterwards, and then everything that it
// handed over is void. So a Collector belongs to one filesystem. Its memory is
// bounded whatever the filesystem looks like: when there are too many ranges
// the shortest are forgotten, which only loses space, never data.
package freespace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/imagestack/imagestack/blockmap"
)

// Code is the reason of a refusal for programs. The values are an interface.
type Code string

// Reasons why nothing of an area is called free.
const (
	Unreadable     Code = "unreadable"      // reading the image failed
	Truncated      Code = "truncated"       // the filesystem is larger than its partition
	Damaged        Code = "damaged"         // a structure contradicts its format or another one
	BadChecksum    Code = "bad-checksum"    // a checksum does not match
	CountMismatch  Code = "count-mismatch"  // a free count is not what the map says
	ErrorState     Code = "error-state"     // the filesystem knows of errors: it needs its fsck
	NotClean       Code = "not-clean"       // it was not unmounted, and its log is not replayed here
	InUse          Code = "in-use"          // something marks it as mounted at present
	UnknownFeature Code = "unknown-feature" // a feature flag without a known meaning
	Unsupported    Code = "unsupported"     // a known feature that is not handled
	TooLarge       Code = "too-large"       // more metadata than the memory bound admits
	Ambiguous      Code = "ambiguous"       // more than one signature
	NotJudged      Code = "not-judged"      // a known type that no reader handles
	UnknownType    Code = "unknown-type"    // no signature of any known type
	NotAsked       Code = "not-asked"       // only judged when an option says so
)

// Refusal says why nothing is called free.
type Refusal struct {
	Code Code
	Text string // for people: what is wrong where, and what to do
}

func (r *Refusal) Error() string { return string(r.Code) + ": " + r.Text }

// Refuse makes a *Refusal.
func Refuse(code Code, format string, args ...any) error {
	return &Refusal{code, fmt.Sprintf(format, args...)}
}

// AsRefusal turns any error but that of a context into a Refusal: what could
// not be read is not free. It is nil for the error of a context.
func AsRefusal(err error) *Refusal {
	var r *Refusal
	switch {
	case errors.As(err, &r):
		return r
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return nil
	}
	return &Refusal{Unreadable, err.Error()}
}

// Info describes a filesystem for people.
type Info struct {
	UUID, Label string
	BlockSize   int64 // bytes; the unit of allocation
	// Replayed is the number of journal blocks that were read in place of
	// their targets, when the journal was not empty.
	Replayed int64
}

// Emit takes a proven free range of a filesystem, in bytes from its start.
// Ranges come in ascending order and do not overlap.
type Emit func(off, n int64) error

// Reader judges the filesystem in [0, size) of r. An error voids everything
// that was emitted; it is a *Refusal, or that of r or ctx.
type Reader func(ctx context.Context, r io.ReaderAt, size int64, emit Emit) (Info, error)

// ReadAt fills p from off; the end of r is an error.
func ReadAt(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at offset %#x: %w", len(p), off, err)
}

// Mix is the finaliser of SplitMix64: a sum of mixed numbers tells two sets of
// them apart without holding either.
func Mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Collector gathers ascending ranges. The zero value is not usable.
type Collector struct {
	ranges  []blockmap.Range
	limit   int
	minimum int64
	last    int64 // end of the last range added, kept or not
	open    blockmap.Range
	dropped int64
}

// NewCollector makes a collector that keeps at most limit ranges (at least
// two), and none shorter than minimum bytes.
func NewCollector(limit int, minimum int64) *Collector {
	return &Collector{limit: max(limit, 2), minimum: max(minimum, 1)}
}

// Add is an Emit. Neighbouring ranges are joined.
func (c *Collector) Add(off, n int64) error {
	if off < c.last || n <= 0 || off+n < off {
		return Refuse(Damaged, "free range %d+%d does not lie behind the one before, which ends at %d", off, n, c.last)
	}
	c.last = off + n
	if c.open.Len > 0 && c.open.End() == off {
		c.open.Len += n
		return nil
	}
	c.flush()
	c.open = blockmap.Range{Off: off, Len: n}
	return nil
}

// flush stores the open range and makes room when there is none.
func (c *Collector) flush() {
	o := c.open
	c.open = blockmap.Range{}
	if o.Len == 0 {
		return
	}
	if o.Len < c.minimum {
		c.dropped += o.Len
		return
	}
	c.ranges = append(c.ranges, o)
	if len(c.ranges) > c.limit {
		c.ranges, c.minimum = Longest(c.ranges, c.limit/2, func(r blockmap.Range) { c.dropped += r.Len })
	}
}

// Longest keeps the limit longest of the ranges, in their order, and calls
// dropped for the others. It returns also the length of the shortest that was
// kept. The slice is used again.
func Longest(ranges []blockmap.Range, limit int, dropped func(blockmap.Range)) ([]blockmap.Range, int64) {
	if limit < 1 || len(ranges) <= limit {
		return ranges, 1
	}
	lengths := make([]int64, len(ranges))
	for i, r := range ranges {
		lengths[i] = r.Len
	}
	slices.Sort(lengths)
	shortest := lengths[len(lengths)-limit]
	longer, _ := slices.BinarySearch(lengths, shortest+1)
	ties := limit - (len(lengths) - longer) // of the shortest length
	kept := slices.DeleteFunc(ranges, func(r blockmap.Range) bool {
		keep := r.Len > shortest
		if r.Len == shortest && ties > 0 {
			ties--
			keep = true
		}
		if !keep {
			dropped(r)
		}
		return !keep
	})
	return kept, shortest
}

// Ranges returns what was kept, in order; the collector takes no more.
func (c *Collector) Ranges() []blockmap.Range {
	c.flush()
	return c.ranges
}

// Dropped is the number of free bytes in ranges that were not kept because
// they are too short. It is complete after Ranges.
func (c *Collector) Dropped() int64 { return c.dropped }
