package layertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/maptest"
	"github.com/imagestack/imagestack/layers"
)

// pile is a pile of images of any formats, lowest first, and the bytes that
// its top shows. What a layer shows is what the one below shows, cut or
// continued with zeros at its own size, and then changed.
type pile struct {
	images []*session // closed; the model of each is what it shows
}

// add puts an image of size bytes on top, changed a few times.
func (p *pile) add(f Factory, d draw, size int64, changes int64) error {
	below := zeroBelow()
	if k := len(p.images); k > 0 {
		below = NewBelow(p.images[k-1].model, 512)
	}
	s, err := newSession(f, size, below)
	if err != nil {
		return err
	}
	s.tag = uint64(len(p.images)) << 32
	for range changes {
		if err := s.randomChange(d); err != nil {
			return err
		}
	}
	if err := s.close(); err != nil {
		return err
	}
	p.images = append(p.images, s)
	return nil
}

func (p *pile) top() *session { return p.images[len(p.images)-1] }

// model is what the top shows.
func (p *pile) model() []byte { return p.top().model }

func (p *pile) errorf(format string, args ...any) error {
	var names []string
	for i := len(p.images) - 1; i >= 0 && len(names) < 10; i-- {
		names = append(names, fmt.Sprintf("%s %d bytes", p.images[i].f.Name, p.images[i].size))
	}
	return fmt.Errorf("%d layers, top first: %s: %w\nchanges of the top:\n%s", len(p.images), strings.Join(names, "; "), fmt.Errorf(format, args...), p.top().trace())
}

// open opens the pile as a Stack.
func (p *pile) open(writable bool) (*layers.Stack, error) {
	var list []layers.Layer
	fail := func(err error) (*layers.Stack, error) {
		for _, l := range list {
			err = errors.Join(err, l.Close())
		}
		return nil, err
	}
	for i := len(p.images) - 1; i >= 0; i-- {
		l, err := p.images[i].f.Open(context.Background(), p.images[i].dir, writable && i == len(p.images)-1)
		if err != nil {
			return fail(p.errorf("open layer %d: %w", len(list), err))
		}
		list = append(list, l)
	}
	s, err := layers.NewStack(list, layers.StackOptions{Writable: writable})
	if err != nil {
		return fail(p.errorf("stack: %w", err))
	}
	return s, nil
}

// drawPile makes a random pile. Only the lowest image may be Opaque.
func drawPile(factories []Factory, d draw, most int64) (*pile, error) {
	p := &pile{}
	for range d("layers", 1, most) {
		f := factories[d("format", 0, int64(len(factories)-1))]
		for f.Opaque && len(p.images) > 0 {
			f = factories[d("format", 0, int64(len(factories)-1))]
		}
		size := max(d("size", 1, 400<<10)/4096*4096+512*d("odd sectors", 0, 3), 512)
		if err := p.add(f, d, size, d("changes", 0, 6)); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// checkStack compares everything that a Stack answers with the model.
func (p *pile) checkStack(s *layers.Stack, d draw) error {
	ctx := context.Background()
	want := p.model()
	size := int64(len(want))
	if s.Size() != size {
		return p.errorf("the stack has %d bytes, want %d", s.Size(), size)
	}
	got := make([]byte, size)
	if n, err := s.ReadAt(ctx, got, 0); int64(n) != size || err != nil {
		return p.errorf("ReadAt of everything: %d, %w", n, orNil(err))
	}
	if err := firstDifference(got, want, 0); err != nil {
		return p.errorf("content: %w", err)
	}
	for range 5 {
		off, n := span(d, size, 4096)
		got := make([]byte, n+100)
		k, err := s.ReadAt(ctx, got, off)
		have := min(n+100, size-off)
		if int64(k) != have || (err != nil) != (have < n+100) || err != nil && !errors.Is(err, io.EOF) {
			return p.errorf("ReadAt(%d, +%d) of %d: %d, %v", off, n+100, size, k, err)
		}
		if err := firstDifference(got[:k], want[off:off+have], off); err != nil {
			return p.errorf("ReadAt(%d, +%d): %w", off, n+100, err)
		}
		if err := p.checkSeek(s, off); err != nil {
			return err
		}
	}
	for e, err := range blockmap.All(ctx, s, 0, size+1) {
		switch {
		case err != nil:
			return p.errorf("lookup: %w", err)
		case e.Kind == blockmap.Unmapped:
			return p.errorf("resolved extent %+v", e)
		case int(e.Layer) >= len(p.images):
			return p.errorf("extent %+v of no layer", e)
		case e.Kind == blockmap.Zero && !backend.IsZero(want[min(e.Guest, size):min(e.End(), size)]):
			return p.errorf("extent %+v holds data", e)
		}
	}
	if found := maptest.Check(s, nil, maptest.MixedGranules(), maptest.Rounds(10)); len(found) > 0 {
		return p.errorf("block map: %v", found[0])
	}
	return nil
}

// checkSeek: between off and the next data everything is zeros, and a hole is
// a place where the map stores nothing.
func (p *pile) checkSeek(s *layers.Stack, off int64) error {
	ctx := context.Background()
	want := p.model()
	data, err := s.SeekData(ctx, off)
	if errors.Is(err, io.EOF) {
		data, err = int64(len(want)), nil
	}
	if err != nil || data < off || data > int64(len(want)) {
		return p.errorf("SeekData(%d): %d, %w", off, data, orNil(err))
	}
	if !backend.IsZero(want[off:data]) {
		return p.errorf("SeekData(%d) = %d passes over data", off, data)
	}
	hole, err := s.SeekHole(ctx, off)
	if err != nil || hole < off || hole > int64(len(want)) || hole != off && data != off {
		return p.errorf("SeekHole(%d): %d, %w; SeekData says %d", off, hole, orNil(err), data)
	}
	if hole < int64(len(want)) && want[hole] != 0 {
		return p.errorf("SeekHole(%d) = %d is data", off, hole)
	}
	return nil
}

// change does one random change through a writable Stack.
func (p *pile) change(s *layers.Stack, d draw) error {
	top := p.top()
	off, n := top.span(d)
	ctx := context.Background()
	var err error
	switch d("change", 0, 3) {
	case 0:
		punch := d("punch", 0, 1) == 0
		top.note("stack: zero %d +%d punch %v", off, n, punch)
		err = s.ZeroAt(ctx, off, n, punch)
		clear(top.model[off : off+n])
	default:
		top.tag++
		top.note("stack: write %d +%d", off, n)
		b := imgtest.PatternBytes(top.tag, off, int(n))
		copy(top.model[off:], b)
		var k int
		if k, err = s.WriteAt(ctx, b, off); err == nil && int64(k) != n {
			err = fmt.Errorf("wrote %d of %d bytes", k, n)
		}
	}
	if err != nil {
		return p.errorf("%w", err)
	}
	return nil
}

// checkStacks builds a random pile, checks it, changes it through the Stack,
// and checks it again, open and reopened, with all layers below unchanged.
func checkStacks(factories []Factory, d draw) error {
	p, err := drawPile(factories, d, 6)
	if err != nil {
		return err
	}
	s, err := p.open(false)
	if err != nil {
		return err
	}
	if err := errors.Join(p.checkStack(s, d), s.Close()); err != nil {
		return fmt.Errorf("read-only: %w", err)
	}
	if s, err = p.open(true); err != nil {
		return err
	}
	for range d("changes", 1, 8) {
		if err := p.change(s, d); err != nil {
			return errors.Join(err, s.Close())
		}
		if d("look", 0, 3) == 0 {
			if err := p.checkStack(s, d); err != nil {
				return errors.Join(err, s.Close())
			}
		}
		if d("sync", 0, 4) == 0 {
			if err := s.Sync(context.Background()); err != nil {
				return errors.Join(p.errorf("sync: %w", err), s.Close())
			}
		}
	}
	if err := errors.Join(p.checkStack(s, d), s.Close()); err != nil {
		return fmt.Errorf("writable: %w", err)
	}
	if s, err = p.open(false); err != nil {
		return err
	}
	if err := errors.Join(p.checkStack(s, d), s.Close()); err != nil {
		return fmt.Errorf("reopened: %w", err)
	}
	return p.lowerUnchanged()
}

// lowerUnchanged: each layer below still shows what it did when it was built,
// and nobody misused a file.
func (p *pile) lowerUnchanged() error {
	for _, s := range p.images {
		if err := s.dir.misuse(true); err != nil {
			return p.errorf("%w", err)
		}
	}
	for _, s := range p.images[:len(p.images)-1] {
		if err := s.checkReadOnly(s.dir); err != nil {
			return fmt.Errorf("a layer below the top: %w", err)
		}
		if err := s.dir.misuse(true); err != nil {
			return p.errorf("%w", err)
		}
	}
	return nil
}

// RunStacks checks piles of images of mixed formats: random ones against
// plain byte arrays, one of the largest depth, and changes from many
// goroutines.
func RunStacks(t *testing.T, factories []Factory, scripts int) {
	t.Helper()
	t.Run("model", func(t *testing.T) {
		f := Factory{Name: "stacks", Scripts: scripts}
		Property(t, f, func(_ Factory, d draw) error { return checkStacks(factories, d) }, 100)
	})
	t.Run("deep", func(t *testing.T) {
		if err := checkDeep(factories, layers.MaxDepth); err != nil {
			t.Error(err)
		}
	})
	t.Run("parallel", func(t *testing.T) {
		for _, f := range factories {
			if f.Opaque {
				continue
			}
			if err := guard(func() error { return checkParallelStack(f) }); err != nil {
				t.Error(err)
			}
		}
	})
}

// checkDeep: a pile of that depth reads and writes as any other.
func checkDeep(factories []Factory, depth int) error {
	d := seeded(77)
	p := &pile{}
	for i := range depth {
		f := factories[d("format", 0, int64(len(factories)-1))]
		for f.Opaque != (i == 0) { // the lowest is Opaque when there is one
			f = factories[d("format", 0, int64(len(factories)-1))]
		}
		if err := p.add(f, d, 128<<10+512*d("odd sectors", 0, 3), 1); err != nil {
			return err
		}
	}
	s, err := p.open(true)
	if err != nil {
		return err
	}
	for range 10 {
		if err := p.change(s, d); err != nil {
			return errors.Join(err, s.Close())
		}
	}
	if err := errors.Join(p.checkStack(s, d), s.Close()); err != nil {
		return err
	}
	if s, err = p.open(false); err != nil {
		return err
	}
	if err := errors.Join(p.checkStack(s, d), s.Close()); err != nil {
		return err
	}
	for _, i := range p.images {
		if err := i.dir.misuse(true); err != nil {
			return p.errorf("%w", err)
		}
	}
	return nil
}

// checkParallelStack: goroutines own parts of a two-layer stack, change them
// and read them back at once, while others sync.
func checkParallelStack(f Factory) error {
	const owners = 5
	part := f.Granule + f.Granule/2 + 200
	size := (owners*part/f.unit() + 1) * f.unit()
	p := &pile{}
	d := seeded(5)
	for range 2 {
		if err := p.add(f, d, size, 6); err != nil {
			return err
		}
	}
	p.top().dir.SetHook(jitter())
	s, err := p.open(true)
	if err != nil {
		return err
	}
	ctx := context.Background()
	var all team
	for g := range int64(owners) {
		all.do(func() error {
			d := seeded(uint64(g) + 40)
			own := p.model()[g*part : (g+1)*part]
			for i := 0; i < 25 && !all.stop.Load(); i++ {
				off, n := span(d, part, f.Granule)
				at := g*part + off
				var err error
				switch d("change", 0, 3) {
				case 0:
					clear(own[off : off+n])
					err = s.ZeroAt(ctx, at, n, i%2 == 0)
				default:
					copy(own[off:], filled(n, byte(g+1)<<4|byte(i&15)))
					_, err = s.WriteAt(ctx, own[off:off+n], at)
				}
				if err == nil && d("sync", 0, 5) == 0 {
					err = s.Sync(ctx)
				}
				if err != nil {
					return err
				}
				got := make([]byte, part)
				if _, err := s.ReadAt(ctx, got, g*part); err != nil {
					return err
				}
				if err := firstDifference(got, own, g*part); err != nil {
					return fmt.Errorf("owner %d after its change %d (%d +%d): %w", g, i, at, n, err)
				}
			}
			return nil
		})
	}
	if err := all.wait(); err != nil {
		return p.errorf("%w", errors.Join(err, s.Close()))
	}
	if err := errors.Join(p.checkStack(s, d), s.Close()); err != nil {
		return err
	}
	p.top().dir.SetHook(nil)
	if s, err = p.open(false); err != nil {
		return err
	}
	if err := errors.Join(p.checkStack(s, d), s.Close()); err != nil {
		return err
	}
	return p.lowerUnchanged()
}
