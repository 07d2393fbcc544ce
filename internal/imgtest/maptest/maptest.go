// Package maptest pins the contract of blockmap.Map: every format's map and
// every combinator of maps passes the one suite of this package.
//
// Design note. The contract (blockmap.Map, Extent, CheckRange) is cut into
// rules with names. Every rule is a function that looks at a map and returns
// Violations; Run executes them as subtests of a real test, Check executes
// them and returns what was found, which is how the tests of this package
// prove, with one deliberately wrong map per rule, that each rule can fail.
//
// Most rules compare an answer with the reference walk of the same map: the
// whole disk asked for piece by piece. Since the contract fixes the answer for
// a range completely (clipped, joined, as long as it can be), the answer for
// any range, any capacity and any history has to be the walk, clipped. What
// the walk itself says is compared with the truth that the caller gives.
package maptest

import (
	"context"
	"flag"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// init lets rapid print a range that failed instead of keeping it in a file.
func init() {
	if err := flag.Set("rapid.nofailfile", "true"); err != nil {
		panic(err)
	}
}

// Truth is what the test knows about the map: the kind of the byte at a guest
// offset inside [0, Size). nil means nothing is known.
type Truth func(guest int64) blockmap.Kind

// Violation is a broken rule.
type Violation struct {
	Rule Rule
	Text string
}

func (v Violation) String() string { return fmt.Sprintf("%s: %s", v.Rule, v.Text) }

// Rule names a part of the contract.
type Rule string

const (
	RuleShape    Rule = "shape"    // Size and Granule are sane and do not change
	RuleArgs     Rule = "args"     // ErrRange for an impossible range, never for a possible one
	RuleTile     Rule = "tile"     // starts at guest, no gap, no overlap, inside the range
	RuleProgress Rule = "progress" // at least one extent per answer
	RulePrefix   Rule = "prefix"   // whole range unless cap(dst) was reached; the last extent as long as it can be
	RuleCap      Rule = "cap"      // never past cap(dst); a full dst grows by exactly one
	RuleKeep     Rule = "keep"     // what was in dst stays as it was
	RuleCoalesce Rule = "coalesce" // no two neighbours join
	RuleFields   Rule = "fields"   // Kind, Host, PackedLen are what their comments say
	RuleBehind   Rule = "behind"   // Zero behind Size
	RuleTruth    Rule = "truth"    // the kinds are those the test knows of
	RuleSplit    Rule = "split"    // an answer does not depend on how the range was cut
	RuleRef      Rule = "ref"      // no reference to dst is kept
	RuleContext  Rule = "context"  // a cancelled context ends in its error or in the right answer
	RuleParallel Rule = "parallel" // concurrent calls answer as single ones do
	RuleCost     Rule = "cost"     // one extent costs bounded time however long it is
	RuleAllocs   Rule = "allocs"   // no allocation on a warm map with room in dst
	RulePanic    Rule = "panic"    // Lookup never panics
)

// Option adapts the suite to a map.
type Option func(*options)

type options struct {
	allocFree bool
	mixed     bool
	bound     time.Duration
	seed      uint64
	rounds    int
}

// AllocFree adds the rule that Lookup on a warmed map does not allocate when
// dst has room.
func AllocFree() Option { return func(o *options) { o.allocFree = true } }

// MixedGranules is for piles of layers: a Packed extent may belong to a layer
// whose clusters are larger than the Granule of the pile.
func MixedGranules() Option { return func(o *options) { o.mixed = true } }

// CostBound sets how long one Lookup of one extent may take; the default is
// two seconds, which is generous for slow machines and far below what a walk
// over the clusters of a large image would need.
func CostBound(d time.Duration) Option { return func(o *options) { o.bound = d } }

// Rounds sets the number of random ranges that Check tries (default 200).
func Rounds(n int) Option { return func(o *options) { o.rounds = n } }

func defaults(opts []Option) options {
	o := options{bound: 2 * time.Second, seed: 1, rounds: 200}
	for _, f := range opts {
		f(&o)
	}
	return o
}

// Run checks the map that newMap makes against the whole contract. newMap is
// called once for every subtest; it cleans up with t.Cleanup. A map with more
// than 65,536 extents is checked on the part that its first 65,536 cover and
// on random ranges.
func Run(t *testing.T, newMap func(t *testing.T) (blockmap.Map, Truth), opts ...Option) {
	t.Helper()
	o := defaults(opts)
	for _, step := range steps {
		if step.skip != nil && step.skip(o) {
			continue
		}
		t.Run(step.name, func(t *testing.T) {
			m, truth := newMap(t)
			c := newChecker(m, truth, o)
			if step.random == nil {
				step.once(c)
				report(t, c.found)
				return
			}
			if !c.walk() {
				report(t, c.found)
				return
			}
			rapid.Check(t, func(rt *rapid.T) {
				c.found = nil
				step.random(c, func(label string, lo, hi int64) int64 {
					return rapid.Int64Range(lo, hi).Draw(rt, label)
				})
				for _, v := range c.found {
					rt.Errorf("%s", v)
				}
			})
		})
	}
}

func report(t *testing.T, found []Violation) {
	t.Helper()
	for i, v := range found {
		if i == 10 {
			t.Errorf("and %d violations more", len(found)-i)
			return
		}
		t.Errorf("%s", v)
	}
}

// Check runs the same rules and returns what they found (nil is the answer for
// a correct map). The random ranges come from a fixed seed.
func Check(m blockmap.Map, truth Truth, opts ...Option) []Violation {
	o := defaults(opts)
	rnd := newRandom(o.seed)
	var found []Violation
	for _, step := range steps {
		if step.skip != nil && step.skip(o) {
			continue
		}
		c := newChecker(m, truth, o)
		if step.random == nil {
			step.once(c)
		} else if c.walk() {
			for i := 0; i < o.rounds && len(c.found) == 0; i++ {
				step.random(c, rnd)
			}
		}
		found = append(found, c.found...)
	}
	return found
}

// draw picks a number in [lo, hi].
type draw func(label string, lo, hi int64) int64

// step is a group of rules that runs as one subtest: once, or many times with
// random ranges on a map that was walked before.
type step struct {
	name   string
	once   func(*checker)
	random func(*checker, draw)
	skip   func(options) bool
}

var steps = []step{
	{name: "shape", once: (*checker).shape},
	{name: "arguments", once: (*checker).arguments},
	{name: "walk", once: func(c *checker) { c.walk() }},
	{name: "truth", once: (*checker).wholeTruth},
	{name: "behind", once: (*checker).behind},
	{name: "ranges", random: (*checker).randomRange},
	{name: "split", random: (*checker).randomSplit},
	{name: "capacity", random: (*checker).randomCapacity},
	{name: "references", random: (*checker).references},
	{name: "context", random: (*checker).cancelled},
	{name: "parallel", once: (*checker).parallel},
	{name: "cost", once: (*checker).cost},
	{name: "allocations", once: (*checker).allocations, skip: func(o options) bool { return !o.allocFree || imgtest.RaceEnabled }},
}

// ask calls Lookup and turns a panic into a violation.
func (c *checker) ask(ctx context.Context, guest, n int64, dst []blockmap.Extent) (got []blockmap.Extent, err error, ok bool) {
	defer func() {
		if p := recover(); p != nil {
			c.fail(RulePanic, "Lookup(%d, %d, len %d cap %d) panics: %v", guest, n, len(dst), cap(dst), p)
			got, err, ok = nil, nil, false
		}
	}()
	got, err = c.m.Lookup(ctx, guest, n, dst)
	return got, err, true
}
