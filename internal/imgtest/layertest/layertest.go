// Package layertest is the conformance kit of layers.Editor: every format that
// can be written passes Run, every pile of formats passes RunStacks.
//
// Design note. A format gives a Factory: how an image is made in a Dir, opened
// and checked. The kit knows nothing else about it. What an editor promises is
// checked against three judges:
//
//   - a plain byte array that sees the same changes (model.go, stack.go),
//   - sets of bytes that are allowed, where the outcome is not determined:
//     after a power cut (crash.go), a failed operation (fault.go) or a race
//     (parallel.go) a byte must hold a value that it was given at some time,
//     and not one older than the last completed Sync,
//   - single rules (conform.go): arguments, contexts, exact edges, errors.
//
// Every check is a function that returns an error, so that the tests of this
// package can prove two things: a simple reference editor passes them all, and
// for each promise an editor that breaks it is found out.
//
// Randomness comes from rapid in Run, so a failing script is shrunk and can be
// repeated with the flags rapid prints.
package layertest

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/maptest"
	"github.com/imagestack/imagestack/layers"
)

// Factory is a format under test. All fields without a remark are needed.
type Factory struct {
	Name string
	// Granule is the cluster size of the images made, in bytes.
	Granule int64
	// Create makes an empty image of size bytes in dir, durable and closed.
	// size is a multiple of SizeUnit.
	Create func(ctx context.Context, dir *Dir, size int64) error
	// Open opens it: for writing the result is a layers.Editor. The layer
	// closes what it got from dir.
	Open func(ctx context.Context, dir *Dir, writable bool) (layers.Layer, error)

	// SizeUnit is what sizes are multiples of (default 512, at most 4 Granules).
	SizeUnit int64
	// Initial makes of the bytes below, size of them, what a new image shows.
	// Its own bytes are from 56 to 63. Optional; without it a new image shows
	// what lies below.
	Initial func(content []byte)
	// Opaque is set for formats that never say Unmapped (raw): there is no
	// layer below them.
	Opaque bool
	// KeepsPlace is set for formats that do not give back space on a discard
	// of whole clusters over zeros (a fully mapped external data file).
	KeepsPlace bool
	// Check is the opinion of another program on the files of dir, which lies
	// on disk (Dir.Path). After a simulated power cut leaks are allowed, and
	// marks of an image that was not closed. Optional.
	Check func(t testing.TB, dir *Dir, crashed bool)
	// Read writes what another program reads to the raw file out. The layer
	// below is the raw file below, or nothing where that is "". Optional.
	Read func(t testing.TB, dir *Dir, below, out string)
	// Inspect is a checker that needs no path and no other program (the
	// project's own fsck); it is asked after every simulated power cut.
	// Optional.
	Inspect func(ctx context.Context, dir *Dir) error
	// Scripts is the number of random scripts of each kind (default 40).
	Scripts int
}

func (f Factory) unit() int64 {
	if f.SizeUnit > 0 {
		return f.SizeUnit
	}
	return 512
}

// times makes long runs: -layertest.times 50.
var times = flag.Int("layertest.times", 1, "multiply the number of random scripts by this")

// init sets other defaults for rapid: a script that failed once is shrunk for
// a while and printed, not kept in a file.
func init() {
	for name, value := range map[string]string{"rapid.shrinktime": "8s", "rapid.nofailfile": "true"} {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
}

// initial reports whether a byte may be one that a new image shows.
func (f Factory) initial(c byte) bool { return f.Initial != nil && c >= 56 && c < 64 }

// shows is what a new image shows over below.
func (f Factory) shows(size int64, below *Below) []byte {
	content := make([]byte, size)
	copy(content, below.content)
	if f.Initial != nil {
		f.Initial(content)
	}
	return content
}

// draw picks a number in [lo, hi].
type draw func(label string, lo, hi int64) int64

// seeded is a draw without rapid.
func seeded(seed uint64) draw {
	r := rand.New(rand.NewPCG(seed, 0x6c61796572746573))
	return func(_ string, lo, hi int64) int64 { return lo + r.Int64N(hi-lo+1) }
}

// property is a random check.
type property func(f Factory, d draw) error

var properties = []struct {
	name  string
	check property
	share int // of Factory.Scripts, in percent
}{
	{"model", checkModel, 100},
	{"grace", checkGrace, 25},
	{"full disk", checkFullDisk, 50},
	{"failed sync", checkFailedSync, 50},
	{"faults", checkFaults, 15},
	{"power cut", checkCrash, 50},
	{"below fails", checkBelowFails, 50},
}

// Run checks a format against everything that layers.Editor promises.
func Run(t *testing.T, f Factory) {
	t.Helper()
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			if err := guard(func() error { return r.check(f) }); err != nil {
				t.Error(err)
			}
		})
	}
	for _, p := range properties {
		t.Run(p.name, func(t *testing.T) { Property(t, f, p.check, p.share) })
	}
	t.Run("map", func(t *testing.T) { runMap(t, f) })
	if f.Check != nil || f.Read != nil {
		t.Run("other tools", func(t *testing.T) { runTools(t, f) })
	}
}

// Property runs one random check share percent of Factory.Scripts times.
func Property(t *testing.T, f Factory, check property, share int) {
	t.Helper()
	left := f.Scripts
	if left <= 0 {
		left = 40
	}
	left = max(left**times*share/100, 2)
	if testing.Short() || imgtest.RaceEnabled {
		left = max(left/4, 2)
	}
	failed := false
	rapid.Check(t, func(rt *rapid.T) {
		// rapid has one number of runs for everything; formats are many and
		// scripts long. Once something failed rapid has to be able to repeat
		// and shrink it.
		if left--; left < 0 && !failed {
			return
		}
		var drawn any // rapid ends an attempt by panicking in Draw
		err := guard(func() error {
			return check(f, func(label string, lo, hi int64) int64 {
				defer func() {
					if drawn = recover(); drawn != nil {
						panic(drawn)
					}
				}()
				return rapid.Int64Range(lo, hi).Draw(rt, label)
			})
		})
		if drawn != nil {
			panic(drawn)
		}
		if err != nil {
			failed = true
			rt.Fatal(err)
		}
	})
}

// guard runs a check with a time limit and turns a panic of the editor into an
// error. A check that hangs is left behind.
func guard(check func() error) error {
	done := make(chan error, 1)
	go func() {
		// A check that ends its goroutine (t.FailNow in a Factory) has already
		// said why.
		defer close(done)
		done <- func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("panic: %v\n%s", p, stack())
				}
			}()
			return check()
		}()
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(2 * time.Minute):
		return fmt.Errorf("hangs for two minutes:\n%s", allStacks())
	}
}

// runMap runs the suite of blockmap.Map over an image with all sorts of
// extents.
func runMap(t *testing.T, f Factory) {
	maptest.Run(t, func(t *testing.T) (blockMap, maptest.Truth) {
		s, err := newSession(f, sizeFor(f, 30), zeroBelow())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.close(); err != nil {
				t.Error(err)
			}
		})
		d := seeded(11)
		for range 40 {
			if err := s.randomChange(d); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.sync(); err != nil {
			t.Fatal(err)
		}
		return s.e, nil
	})
}
