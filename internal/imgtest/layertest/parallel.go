package layertest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imagestack/imagestack/blockmap"
)

// team runs functions at once until one fails, and returns the first error.
type team struct {
	wg   sync.WaitGroup
	once sync.Once
	err  error
	stop atomic.Bool
}

func (t *team) do(f func() error) {
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		err := func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("panic: %v\n%s", p, stack())
				}
			}()
			return f()
		}()
		if err != nil {
			t.once.Do(func() { t.err = err })
			t.stop.Store(true)
		}
	}()
}

func (t *team) wait() error {
	t.wg.Wait()
	return t.err
}

// jitter is a hook that makes accesses slow now and then, so that the steps
// of concurrent operations meet in many orders.
func jitter() Hook {
	var n atomic.Uint64
	return func(Access) Verdict {
		switch x := n.Add(1) * 0x9e3779b97f4a7c15 >> 60; {
		case x < 3:
			time.Sleep(time.Duration(x) * 20 * time.Microsecond)
		case x < 8:
			runtime.Gosched()
		}
		return Verdict{}
	}
}

// checkOwners: goroutines own parts of the disk whose borders lie inside
// clusters; each changes its part and must read its own bytes at once, whatever
// the neighbours in the same cluster, readers and syncs do. Old bytes after a
// discard, a neighbour's update lost in a copy-on-write and a place used twice
// are found here. Every few changes the whole disk is discarded, so that
// clusters are allocated, and by two at a time, again and again.
func checkOwners(f Factory) error {
	const owners = 6
	part := f.Granule + f.Granule/2 - 100
	size := (owners*part/f.unit() + 1) * f.unit()
	below := zeroBelow()
	if !f.Opaque {
		below = NewBelow(filled(size/2, 0xee), 512)
	}
	s, err := newSession(f, size, below)
	if err != nil {
		return err
	}
	s.dir.SetHook(jitter())
	var helpers team
	for r := range uint64(2) {
		helpers.do(func() error { return s.watch(&helpers, seeded(r+2000), part, owners) })
	}
	epochs := 25
	if f.Granule > 128<<10 {
		epochs = 8
	}
	for epoch := 0; epoch < epochs && err == nil && !helpers.stop.Load(); epoch++ {
		var workers team
		for g := range int64(owners) {
			workers.do(func() error { return s.own(&workers, seeded(uint64(epoch)*100+uint64(g)), g, part) })
		}
		if err = workers.wait(); err == nil {
			err = s.check()
		}
		if err == nil && epoch < epochs-1 {
			err = s.zero(0, size, epoch%3 > 0)
		}
	}
	helpers.stop.Store(true)
	if err = errors.Join(err, helpers.wait()); err != nil {
		return s.errorf("%w", err)
	}
	if err := s.sync(); err != nil {
		return s.errorf("sync: %w", err)
	}
	s.dir.SetHook(nil)
	return s.finish()
}

// own changes the part of owner g a few times and reads it back each time.
func (s *session) own(workers *team, d draw, g, part int64) error {
	ctx := context.Background()
	base := g * part
	own := s.model[base : base+part]
	for i := 0; i < 6 && !workers.stop.Load(); i++ {
		off, n := span(d, part, s.f.Granule)
		var err error
		what := "write"
		if d("zero", 0, 2) == 0 {
			what = "zero"
			err = s.e.ZeroAt(ctx, base+off, n, d("punch", 0, 1) == 0, s.below)
			clear(own[off : off+n])
		} else {
			p := own[off : off+n]
			for j := range p {
				p[j] = byte(g+1)<<4 | byte(i+1)
			}
			err = s.e.WriteAt(ctx, p, base+off, s.below)
		}
		if err != nil {
			return fmt.Errorf("%s %d +%d: %w", what, base+off, n, err)
		}
		if err := compare(s.e, s.below, own, base); err != nil {
			return fmt.Errorf("owner %d of [%d, +%d) after its change %d (%s %d +%d): %w", g, base, part, i, what, base+off, n, err)
		}
		if d("sync", 0, 9) == 0 {
			if err := s.e.Sync(ctx); err != nil {
				return fmt.Errorf("sync: %w", err)
			}
		}
	}
	return nil
}

// watch reads anywhere: a byte is zero, from below or from its owner.
func (s *session) watch(helpers *team, d draw, part, owners int64) error {
	for !helpers.stop.Load() {
		off, n := s.span(d)
		got := make([]byte, n)
		if err := ReadLayer(context.Background(), s.e, s.below, got, off); err != nil {
			return fmt.Errorf("reader: %w", err)
		}
		for i, c := range got {
			at := off + int64(i)
			owner := min(at/part, owners-1)
			if c != 0 && c>>4 != byte(owner+1) && !(c == 0xee && at < int64(len(s.below.content))) && !s.f.initial(c) {
				return fmt.Errorf("reader sees %#02x at byte %d, which nobody wrote there", c, at)
			}
		}
	}
	return nil
}

// checkClashes: goroutines change the same bytes at once. Afterwards each byte
// holds one of the values it was given, and the closed image shows what the
// open one did.
func checkClashes(f Factory) error {
	size := sizeFor(f, 5)
	s, err := newSession(f, size, zeroBelow())
	if err != nil {
		return err
	}
	s.dir.SetHook(jitter())
	ctx := context.Background()
	rounds := 40
	if f.Granule > 128<<10 {
		rounds = 10
	}
	var workers team
	for g := range int64(4) {
		workers.do(func() error {
			d := seeded(uint64(g) + 3000)
			for i := 0; i < rounds && !workers.stop.Load(); i++ {
				off, n := span(d, size, f.Granule)
				var err error
				switch d("what", 0, 6) {
				case 0:
					err = s.e.Sync(ctx)
				case 1, 2:
					err = s.e.ZeroAt(ctx, off, n, i%2 == 0, s.below)
				default:
					p := make([]byte, n)
					for j := range p {
						p[j] = 0xa0 + byte(g)
					}
					err = s.e.WriteAt(ctx, p, off, s.below)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := workers.wait(); err != nil {
		return s.errorf("%w", err)
	}
	got, err := s.read(0, size)
	if err != nil {
		return err
	}
	for i, c := range got {
		if c != 0 && (c < 0xa0 || c > 0xa3) && !f.initial(c) {
			return s.errorf("byte %d is %#02x, which nobody wrote", i, c)
		}
	}
	s.model = got
	s.dir.SetHook(nil)
	return s.finish()
}

// checkGrace: whoever looked up under Readers and reads later sees bytes that
// were at that guest place before or after, never those of another place,
// though everything is discarded, synced and written elsewhere meanwhile.
func checkGrace(f Factory, d draw) error {
	clusters := int64(8)
	size := 2 * clusters * f.Granule
	s, err := newSession(f, size, zeroBelow())
	if err != nil {
		return err
	}
	ctx := context.Background()
	half := clusters * f.Granule
	if err := s.writeBytes(filled(half, 0x11), 0); err != nil {
		return s.errorf("%w", err)
	}
	if d("synced before", 0, 1) == 0 {
		if err := s.sync(); err != nil {
			return s.errorf("sync: %w", err)
		}
	}
	token := s.e.Readers().Enter(0)
	list, err := s.e.Lookup(ctx, 0, half, make([]blockmap.Extent, 0, 64))
	if err != nil {
		s.e.Readers().Exit(token)
		return s.errorf("lookup: %w", err)
	}
	var changes team
	off, n := span(d, half, f.Granule)
	if d("all", 0, 1) == 0 {
		off, n = 0, half
	}
	punch := d("punch", 0, 1) == 0
	changes.do(func() error {
		if err := s.e.ZeroAt(ctx, off, n, punch, s.below); err != nil {
			return err
		}
		if err := s.e.Sync(ctx); err != nil { // waits for the reader, or leaves its space alone
			return err
		}
		if err := s.e.WriteAt(ctx, filled(half, 0x22), half, s.below); err != nil {
			return err
		}
		return s.e.Sync(ctx)
	})
	changes.do(func() error {
		if err := s.e.WriteAt(ctx, filled(f.Granule, 0x22), size-f.Granule, s.below); err != nil {
			return err
		}
		return s.e.Sync(ctx)
	})
	time.Sleep(time.Duration(d("pause", 0, 3)) * time.Millisecond)
	p := make([]byte, half)
	var bad error
	at := int64(0)
	for _, x := range list {
		if err := readExtent(ctx, s.e, s.below, x, p[at:at+x.Len]); err != nil {
			bad = errors.Join(bad, err)
		}
		at += x.Len
	}
	s.e.Readers().Exit(token)
	for i, c := range p[:at] {
		if bad == nil && c != 0x11 && c != 0 {
			bad = fmt.Errorf("byte %d is %#02x, want 0x11 or 0", i, c)
		}
	}
	if bad != nil {
		bad = fmt.Errorf("reader in the grace period, while [%d, +%d) is discarded: %w", off, n, bad)
	}
	if err := errors.Join(bad, changes.wait()); err != nil {
		return s.errorf("%w", err)
	}
	clear(s.model[off : off+n])
	copy(s.model[half:], filled(half, 0x22))
	return s.finish()
}

//go:norace
func filled(n int64, c byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = c
	}
	return p
}
