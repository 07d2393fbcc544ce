package layertest

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// rules are the checks without randomness.
var rules = []struct {
	name  string
	check func(Factory) error
}{
	{"ranges", checkRanges},
	{"contexts", checkContexts},
	{"read only", checkReadOnlyOpen},
	{"edges", checkEdges},
	{"discard frees", checkDiscardFrees},
	{"parallel owners", checkOwners},
	{"parallel clashes", checkClashes},
}

// checkRanges: ranges outside [0, Size) are errors and change nothing, empty
// ones inside are fine.
func checkRanges(f Factory) error {
	s, err := newSession(f, sizeFor(f, 5), zeroBelow())
	if err != nil {
		return err
	}
	if err := s.write(0, s.size, 1); err != nil {
		return s.errorf("%w", err)
	}
	ctx := context.Background()
	for _, r := range []struct{ off, n int64 }{
		{-1, 1}, {-1, 0}, {-512, 1024}, {s.size, 1}, {s.size - 1, 2}, {s.size + 1, 1}, {0, s.size + 1},
		{math.MaxInt64 - 1, 2}, {math.MaxInt64, 1}, {math.MinInt64, 1}, {s.size + f.Granule, 512},
	} {
		if err := s.e.WriteAt(ctx, make([]byte, r.n), r.off, s.below); err == nil {
			return s.errorf("WriteAt(%d, +%d) outside the disk succeeds", r.off, r.n)
		}
	}
	for _, r := range []struct{ off, n int64 }{
		{-1, 1}, {0, -1}, {s.size, 1}, {0, s.size + 1}, {1, math.MaxInt64}, {math.MaxInt64, math.MaxInt64},
		{math.MinInt64, math.MinInt64}, {0, math.MinInt64}, {s.size - 1, 2},
	} {
		for _, punch := range []bool{false, true} {
			if err := s.e.ZeroAt(ctx, r.off, r.n, punch, s.below); err == nil {
				return s.errorf("ZeroAt(%d, +%d) outside the disk succeeds", r.off, r.n)
			}
		}
	}
	for _, off := range []int64{0, 1, s.size - 1} {
		if err := s.e.WriteAt(ctx, nil, off, s.below); err != nil {
			return s.errorf("WriteAt of nothing at %d: %w", off, err)
		}
		if err := s.e.ZeroAt(ctx, off, 0, true, s.below); err != nil {
			return s.errorf("ZeroAt of nothing at %d: %w", off, err)
		}
	}
	return s.finish()
}

// checkContexts: a cancelled context gives its error or success, and the
// editor stays usable.
func checkContexts(f Factory) error {
	size := sizeFor(f, 6)
	below := zeroBelow()
	if !f.Opaque {
		below = NewBelow(make([]byte, size), 0)
		for i := range below.content {
			below.content[i] = 3
		}
		copy(below.before, below.content)
	}
	s, err := newSession(f, size, below)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	n := min(f.Granule, size/2)
	allowed := func(what string, err error) error {
		if err != nil && !errors.Is(err, context.Canceled) {
			return s.errorf("%s with a cancelled context: %w", what, err)
		}
		return nil
	}
	for round := range int64(2) {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(7 + round)
		}
		err := s.e.WriteAt(ctx, p, 1, below)
		if err := allowed("WriteAt", err); err != nil {
			return err
		}
		if err == nil {
			copy(s.model[1:], p)
		} else if got, rerr := s.read(1, n); rerr != nil {
			return rerr
		} else {
			for i, c := range got { // old or new
				if c == p[i] {
					s.model[1+i] = c
				}
			}
		}
		err = s.e.ZeroAt(ctx, size-n, n, true, below)
		if err := allowed("ZeroAt", err); err != nil {
			return err
		}
		if err == nil {
			clear(s.model[size-n:])
		} else if got, rerr := s.read(size-n, n); rerr != nil {
			return rerr
		} else {
			for i, c := range got {
				if c == 0 {
					s.model[size-n+int64(i)] = 0
				}
			}
		}
		if err := allowed("Sync", s.e.Sync(ctx)); err != nil {
			return err
		}
		if err := s.check(); err != nil {
			return err
		}
		// Cancelling is no failed sync.
		if err := s.write(0, n, uint64(round+1)); err != nil {
			return s.errorf("write after a cancelled one: %w", err)
		}
		if err := s.sync(); err != nil {
			return s.errorf("sync after a cancelled one: %w", err)
		}
	}
	return s.finish()
}

func (s *session) read(off, n int64) ([]byte, error) {
	p := make([]byte, n)
	if err := ReadLayer(context.Background(), s.e, s.below, p, off); err != nil {
		return nil, s.errorf("read %d +%d: %w", off, n, err)
	}
	return p, nil
}

// checkReadOnlyOpen: opened for reading, changes are ErrReadOnly and no byte
// is written. (Writes through a handle for reading are recorded by Dir.)
func checkReadOnlyOpen(f Factory) error {
	s, err := newSession(f, sizeFor(f, 5), zeroBelow())
	if err != nil {
		return err
	}
	if err := s.write(f.Granule/2, f.Granule, 5); err != nil {
		return s.errorf("%w", err)
	}
	if err := s.close(); err != nil {
		return err
	}
	ctx := context.Background()
	l, err := f.Open(ctx, s.dir, false)
	if err != nil {
		return s.errorf("open for reading: %w", err)
	}
	if e, ok := l.(layers.Editor); ok {
		for what, err := range map[string]error{
			"WriteAt": e.WriteAt(ctx, make([]byte, 10), 0, s.below),
			"ZeroAt":  e.ZeroAt(ctx, 0, 10, true, s.below),
		} {
			if !errors.Is(err, layers.ErrReadOnly) {
				return s.errorf("%s, opened for reading: %w, want ErrReadOnly", what, orNil(err))
			}
		}
		if err := e.Sync(ctx); err != nil && !errors.Is(err, layers.ErrReadOnly) {
			return s.errorf("Sync, opened for reading: %w", err)
		}
	}
	if _, err := l.Describe(ctx); err != nil {
		return s.errorf("Describe: %w", err)
	}
	if err := l.WalkHost(ctx, func(layers.HostRange) error { return nil }); err != nil {
		return s.errorf("WalkHost: %w", err)
	}
	if err := l.Close(); err != nil {
		return s.errorf("close, opened for reading: %w", err)
	}
	return s.checkReadOnly(s.dir)
}

func orNil(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}

// checkEdges: zeroing is exact at every kind of edge, over mapped and unmapped
// clusters, over data, zeros and nothing below.
func checkEdges(f Factory) error {
	g := f.Granule
	size := 4 * g / f.unit() * f.unit()
	offs := []int64{0, 1, g - 1, g, g + 1, g + 512, 2*g - 512}
	lens := []int64{1, 511, 512, g - 1, g, g + 1, 2 * g, 2*g + 3}
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i%250 + 1)
	}
	belows := map[string]*Below{"nothing": zeroBelow()}
	if !f.Opaque {
		belows["data"] = NewBelow(data, 512)
		belows["data up to the middle"] = NewBelow(data[:size/2+g/4], 1)
		belows["zeros not known"] = NewBelow(make([]byte, size), 0)
	}
	for name, below := range belows {
		for _, mapped := range []bool{false, true} {
			for _, punch := range []bool{false, true} {
				s, err := newSession(f, size, below)
				if err != nil {
					return err
				}
				for i, off := range offs {
					for _, n := range lens {
						if off+n > size {
							continue
						}
						s.log = nil
						if mapped {
							if err := s.write(0, size, uint64(i+1)); err != nil {
								return s.errorf("over %s: %w", name, err)
							}
						}
						if err := s.zero(off, n, punch); err != nil {
							return s.errorf("over %s: %w", name, err)
						}
						if err := s.check(); err != nil {
							return fmt.Errorf("over %s, mapped %v: %w", name, mapped, err)
						}
					}
				}
				if err := s.finish(); err != nil {
					return fmt.Errorf("over %s, mapped %v: %w", name, mapped, err)
				}
			}
		}
	}
	return nil
}

// checkDiscardFrees: after a discard and a Sync whole clusters over zeros hold
// no data, and their space serves the next writes.
func checkDiscardFrees(f Factory) error {
	if f.KeepsPlace {
		return nil
	}
	clusters := min(max(16, 64<<10/f.Granule), 1024)
	size := 3 * clusters * f.Granule
	s, err := newSession(f, size, zeroBelow())
	if err != nil {
		return err
	}
	var first int64
	for round := range int64(6) {
		at := round % 3 * clusters * f.Granule
		n := clusters * f.Granule
		if err := s.write(at, n, uint64(round+1)); err != nil {
			return s.errorf("%w", err)
		}
		if err := s.sync(); err != nil {
			return s.errorf("sync: %w", err)
		}
		used, err := s.dir.Allocated()
		if err != nil {
			return err
		}
		// Tables may differ by what was touched; data may not.
		if slack := n/2 + 64<<10; round == 0 {
			first = used
		} else if used > first+slack {
			return s.errorf("space that was discarded and synced is not used again: %d bytes allocated, %d at first, for the same amount of data", used, first)
		}
		if err := s.zero(at, n, true); err != nil {
			return s.errorf("%w", err)
		}
		list, err := s.e.Lookup(context.Background(), at, n, nil)
		if err != nil {
			return s.errorf("lookup: %w", err)
		}
		if x := list[0]; x.Kind == blockmap.Data || x.Kind == blockmap.Packed || x.Len != n {
			return s.errorf("discarded clusters over zeros are %+v", x)
		}
		if err := s.sync(); err != nil {
			return s.errorf("sync: %w", err)
		}
	}
	return s.finish()
}
