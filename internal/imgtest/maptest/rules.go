package maptest

import (
	"context"
	"errors"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/imagestack/imagestack/blockmap"
)

// marker is an extent that no map answers: it fills what Lookup must not touch.
var marker = blockmap.Extent{Guest: -7, Len: -7, Host: -7, PackedLen: 7, Layer: 7777, Kind: 77}

func (c *checker) shape() {
	if c.size < 0 {
		c.fail(RuleShape, "size %d is negative", c.size)
	}
	if c.gran < 1 || c.gran&(c.gran-1) != 0 {
		c.fail(RuleShape, "granule %d is no power of two", c.gran)
	}
	if s, g := c.m.Size(), c.m.Granule(); s != c.size || g != c.gran {
		c.fail(RuleShape, "size and granule change without a cause: %d, %d; before %d, %d", s, g, c.size, c.gran)
	}
}

func (c *checker) arguments() {
	bad := []struct{ guest, n int64 }{
		{0, 0}, {0, -1}, {-1, 1}, {-1, 2}, {-1, 0}, {c.size, 0}, {c.size, -1},
		{0, math.MinInt64}, {math.MinInt64, 1}, {math.MinInt64, math.MinInt64},
		{1, math.MaxInt64}, {math.MaxInt64, 1}, {math.MaxInt64, math.MaxInt64},
		{c.size + 1, math.MaxInt64 - c.size},
	}
	for _, a := range bad {
		for _, room := range []int{0, 1, 8} {
			_, err, ok := c.ask(context.Background(), a.guest, a.n, make([]blockmap.Extent, 0, room))
			if ok && !isRange(err) {
				c.fail(RuleArgs, "Lookup(%d, %d): %v, want ErrRange", a.guest, a.n, err)
			}
		}
	}
	for _, a := range []struct{ guest, n int64 }{
		{0, 1}, {0, math.MaxInt64}, {c.size, 1}, {c.size, math.MaxInt64 - c.size},
		{math.MaxInt64 - 1, 1}, {max(c.size-1, 0), math.MaxInt64 - c.size},
	} {
		c.lookup(a.guest, a.n, 4)
	}
	// A nil dst is a full one.
	got, err, ok := c.ask(context.Background(), 0, 1, nil)
	if ok && (err != nil || len(got) != 1) {
		c.fail(RuleCap, "Lookup(0, 1, nil): %s, %v; want one extent", brief(got), err)
	}
}

// wholeTruth compares every cluster's ends with the truth, up to 1 Mi clusters.
func (c *checker) wholeTruth() {
	if c.truth == nil || !c.walk() {
		return
	}
	for _, e := range c.ref {
		for at, i := e.Guest, 0; at < min(e.End(), c.size) && i < 1<<16; i++ {
			last := min(at/c.gran*c.gran+c.gran, e.End(), c.size) - 1
			for _, p := range []int64{at, last} {
				if want := c.truth(p); want != e.Kind {
					c.fail(RuleTruth, "byte %d is %s, want %s", p, e.Kind, want)
					return
				}
			}
			at = last + 1
		}
	}
}

func (c *checker) behind() {
	for _, a := range []struct{ guest, n int64 }{
		{c.size, 1}, {c.size, c.gran}, {c.size + 1, 1}, {c.size + c.gran, 1 << 40},
		{c.size, math.MaxInt64 - c.size}, {math.MaxInt64 - 1, 1},
	} {
		got, ok := c.lookup(a.guest, a.n, 4)
		if ok && (len(got) != 1 || got[0].Kind != blockmap.Zero || got[0].Len != a.n) {
			c.fail(RuleBehind, "Lookup(%d, %d) behind the size %d: %s, want one Zero", a.guest, a.n, c.size, brief(got))
		}
	}
	for _, back := range []int64{1, c.gran - 1, c.gran, c.gran + 1} {
		if back < 1 || back > c.size {
			continue
		}
		got, ok := c.lookup(c.size-back, back+c.gran, 1<<12)
		if !ok || len(got) == 1<<12 {
			continue
		}
		if last := got[len(got)-1]; last.Kind != blockmap.Zero || last.Guest > c.size {
			c.fail(RuleBehind, "Lookup(%d, %d) across the size %d ends with %+v", c.size-back, back+c.gran, c.size, last)
		}
	}
}

func (c *checker) compare(rule Rule, guest, n int64, got, want []blockmap.Extent) {
	if !same(got, want) {
		c.fail(rule, "Lookup(%d, %d): %s; the walk says %s", guest, n, brief(got), brief(want))
	}
}

// randomRange: the answer for a range is the walk, clipped to it.
func (c *checker) randomRange(d draw) {
	guest, n := c.span(d)
	room := int(d("room", 1, 300))
	if got, ok := c.lookup(guest, n, room); ok {
		c.compare(RuleSplit, guest, n, got, c.want(guest, n, room))
	}
}

// randomSplit: two halves, joined, are the whole.
func (c *checker) randomSplit(d draw) {
	guest, n := c.span(d)
	if n < 2 {
		return
	}
	const room = 4096
	cut := d("cut", 1, n-1)
	whole, ok := c.lookup(guest, n, room)
	left, ok1 := c.lookup(guest, cut, room)
	right, ok2 := c.lookup(guest+cut, n-cut, room)
	if !ok || !ok1 || !ok2 || len(left) == room {
		return
	}
	joined := append([]blockmap.Extent(nil), left...)
	if last := &joined[len(joined)-1]; last.Joins(right[0]) {
		last.Len += right[0].Len
		right = right[1:]
	}
	joined = append(joined, right...)
	joined = joined[:min(len(joined), room)]
	if len(whole) == room || len(joined) == room {
		return // cut off at the capacity: randomRange compares prefixes
	}
	c.compare(RuleSplit, guest, n, whole, joined)
}

// randomCapacity: what was in dst stays, what does not fit is left for the
// next call, and asking on from the end of each answer gives the whole.
func (c *checker) randomCapacity(d draw) {
	guest, n := c.span(d)
	held := int(d("extents already in dst", 0, 3))
	room := int(d("room", 0, 3))
	want := c.want(guest, n, 64)
	end := guest + n
	if len(want) == 64 {
		end = want[63].End()
	}
	var all []blockmap.Extent
	for at := guest; at < end; {
		// An extent that would join with the answer must not: it is not
		// part of it.
		first := want[len(all)]
		pre := blockmap.Extent{Guest: at - 1, Len: 1, Kind: first.Kind, Layer: first.Layer, PackedLen: first.PackedLen, Host: first.Host}
		if first.Kind == blockmap.Data {
			pre.Host--
		}
		backing := make([]blockmap.Extent, held+room+2)
		for i := range backing {
			backing[i] = marker
		}
		if held > 0 {
			backing[held-1] = pre
		}
		dst := backing[: held : held+room]
		got, err, ok := c.ask(context.Background(), at, end-at, dst)
		if !ok {
			return
		}
		if err != nil {
			c.fail(RuleCap, "Lookup(%d, %d) with len %d cap %d: %v", at, end-at, held, held+room, err)
			return
		}
		if len(got) < held {
			c.fail(RuleKeep, "Lookup(%d, %d): dst had %d extents, now %d", at, end-at, held, len(got))
			return
		}
		for i := range held {
			if w := marker; got[i] != w && !(i == held-1 && got[i] == pre) {
				c.fail(RuleKeep, "Lookup(%d, %d): extent %d of dst changed to %+v", at, end-at, i, got[i])
				return
			}
		}
		for i := held + room; i < len(backing); i++ {
			if backing[i] != marker {
				c.fail(RuleCap, "Lookup(%d, %d): wrote behind cap(dst)", at, end-at)
				return
			}
		}
		got = got[held:]
		if !c.answer(at, end-at, room, got) {
			return
		}
		if rest := want[len(all):]; !same(got, rest[:min(len(rest), max(room, 1))]) {
			c.fail(RulePrefix, "Lookup(%d, %d) with room for %d: %s; the walk says %s", at, end-at, room, brief(got), brief(rest))
			return
		}
		all = append(all, got...)
		at = got[len(got)-1].End()
	}
}

// references: overwriting dst after the answer changes no later answer, and a
// later answer changes no earlier one.
func (c *checker) references(d draw) {
	guest, n := c.span(d)
	const room = 32
	want := c.want(guest, n, room)
	dst := make([]blockmap.Extent, 0, room)
	first, err, ok := c.ask(context.Background(), guest, n, dst)
	if !ok || err != nil {
		return
	}
	kept := append([]blockmap.Extent(nil), first...)
	for i := range first {
		first[i] = marker
	}
	whole := dst[:room]
	for i := range whole {
		whole[i] = marker
	}
	other := make([]blockmap.Extent, 0, room)
	second, err, ok := c.ask(context.Background(), guest, n, other)
	if !ok || err != nil {
		return
	}
	if !same(kept, second) || !same(second, want) {
		c.fail(RuleRef, "Lookup(%d, %d) after its dst was overwritten: %s, before %s", guest, n, brief(second), brief(kept))
	}
	for i := range whole {
		if whole[i] != marker {
			c.fail(RuleRef, "Lookup(%d, %d) wrote to the dst of an earlier call", guest, n)
			return
		}
	}
	g2, n2 := c.span(d)
	if _, _, ok := c.ask(context.Background(), g2, n2, make([]blockmap.Extent, 0, room)); !ok {
		return
	}
	if !same(second, want) {
		c.fail(RuleRef, "Lookup(%d, %d) changed the answer of an earlier call", g2, n2)
	}
}

// cancelled: a context that is over gives its error or, where no waiting was
// needed, the right answer.
func (c *checker) cancelled(d draw) {
	guest, n := c.span(d)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	got, err, ok := c.ask(ctx, guest, n, make([]blockmap.Extent, 0, 8))
	if !ok {
		return
	}
	if err != nil {
		if !errors.Is(err, context.Canceled) {
			c.fail(RuleContext, "Lookup(%d, %d) with a cancelled context: %v", guest, n, err)
		}
	} else if want := c.want(guest, n, 8); !same(got, want) {
		c.fail(RuleContext, "Lookup(%d, %d) with a cancelled context: %s, want %s", guest, n, brief(got), brief(want))
	}
	// Nothing of the cancelled call sticks.
	if got, ok := c.lookup(guest, n, 8); ok {
		c.compare(RuleContext, guest, n, got, c.want(guest, n, 8))
	}
}

// parallel asks from eight goroutines at once; the race detector watches.
func (c *checker) parallel() {
	if !c.walk() {
		return
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			own := &checker{m: c.m, truth: c.truth, o: c.o, size: c.size, gran: c.gran, ref: c.ref, end: c.end}
			rnd := newRandom(c.o.seed + uint64(g) + 100)
			for i := 0; i < 60 && len(own.found) == 0; i++ {
				guest, n := own.span(rnd)
				room := int(rnd("room", 1, 64))
				got, err, ok := own.ask(context.Background(), guest, n, make([]blockmap.Extent, 0, room))
				if ok && (err != nil || !same(got, own.want(guest, n, room))) {
					own.fail(RuleParallel, "Lookup(%d, %d) beside others: %s, %v; alone %s", guest, n, brief(got), err, brief(own.want(guest, n, room)))
				}
			}
			mu.Lock()
			defer mu.Unlock()
			for _, v := range own.found {
				c.fail(RuleParallel, "%s", v)
			}
		}()
	}
	wg.Wait()
}

// cost: one extent is one step, in a cold map as in a warm one.
func (c *checker) cost() {
	for _, a := range []struct{ guest, n int64 }{
		{0, max(c.size, 1)}, {0, math.MaxInt64}, {c.size / 2, math.MaxInt64 - c.size/2}, {c.size, math.MaxInt64 - c.size},
	} {
		dst := make([]blockmap.Extent, 0, 1)
		start := time.Now()
		_, err, ok := c.ask(context.Background(), a.guest, a.n, dst)
		if took := time.Since(start); ok && took > c.o.bound {
			c.fail(RuleCost, "Lookup(%d, %d) of one extent took %v (error %v), more than %v", a.guest, a.n, took, err, c.o.bound)
			return
		}
	}
}

func (c *checker) allocations() {
	if !c.walk() {
		return
	}
	rnd := newRandom(c.o.seed)
	ctx := context.Background()
	for range 8 {
		guest, n := c.span(rnd)
		dst := make([]blockmap.Extent, 0, 64)
		var err error
		allocs := testing.AllocsPerRun(100, func() { _, err = c.m.Lookup(ctx, guest, n, dst) })
		if err != nil || allocs != 0 {
			c.fail(RuleAllocs, "Lookup(%d, %d) on a warm map: %v allocations, error %v", guest, n, allocs, err)
			return
		}
	}
}
