package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

// Session is one run of an Op.
type Session struct {
	Image *Image
	Dir   *layertest.Dir
	// Rand gives the same numbers in every run of one seed.
	Rand *rand.Rand
	// Again is set when the operation is run on what a power cut left.
	Again bool

	syncs func() int
	steps []step
	now   []byte // what the guest sees
	saved map[string][]byte
	value uint64
}

// step is a moment in the life of the guest's bytes.
type step struct {
	content       []byte
	before, after int // completed syncs when it began and when it had returned
	durable       bool
}

// newSession begins with what the image in dir shows. An image that cannot be
// read has no content.
func newSession(ctx context.Context, img *Image, dir *layertest.Dir, seed uint64, syncs func() int) (*Session, error) {
	s := &Session{Image: img, Dir: dir, Rand: rand.New(rand.NewPCG(seed, 0x63726173)), syncs: syncs}
	if img.Format == "" {
		return s, nil
	}
	now, err := s.Content(ctx, "")
	if err != nil {
		return nil, err
	}
	s.now, s.saved = now, map[string][]byte{}
	for _, name := range img.Snapshots {
		if s.saved[name], err = s.Content(ctx, name); err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", name, err)
		}
	}
	s.steps = []step{{content: bytes.Clone(now), durable: true}}
	return s, nil
}

// newRerun is a session on a state, whose content may be anything.
func newRerun(img *Image, dir *layertest.Dir, seed uint64, size int) *Session {
	return &Session{Image: img, Dir: dir, Rand: rand.New(rand.NewPCG(seed, 0x63726173)), Again: true,
		syncs: func() int { return 0 }, now: make([]byte, size)}
}

// Open opens the image.
func (s *Session) Open(ctx context.Context, writable bool, snapshot string) (layers.Layer, error) {
	return openLayer(ctx, s.Image.Format, s.Dir, writable, snapshot)
}

func openLayer(ctx context.Context, format string, dir *layertest.Dir, writable bool, snapshot string) (layers.Layer, error) {
	f, err := dir.Open(ImageFile, writable)
	if err != nil {
		return nil, err
	}
	// The smallest cache: pages are written out of it at any time.
	o := layers.OpenOptions{Path: ImageFile, Writable: writable, Snapshot: snapshot, OpenFile: dir.Open, Cache: layers.NewCache(1)}
	l, err := opened(ctx, format, f, o)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return l, nil
}

func opened(ctx context.Context, format string, f backend.File, o layers.OpenOptions) (layers.Layer, error) {
	switch format {
	case "qcow2":
		l, err := qcow2.Open(ctx, f, o)
		if err != nil {
			return nil, err
		}
		return l, nil
	case "ploop":
		l, err := ploop.Open(ctx, f, o)
		if err != nil {
			return nil, err
		}
		return l, nil
	case "raw":
		l, err := raw.Open(ctx, f, o)
		if err != nil {
			return nil, err
		}
		return l, nil
	}
	return nil, fmt.Errorf("no format %q", format)
}

// below is what lies under the image.
func (s *Session) below() *layertest.Below { return layertest.NewBelow(s.Image.Below, 512) }

// Content is what the guest sees, or what it saw in a snapshot.
func (s *Session) Content(ctx context.Context, snapshot string) ([]byte, error) {
	l, err := s.Open(ctx, false, snapshot)
	if err != nil {
		return nil, err
	}
	p := make([]byte, l.Size())
	return p, errors.Join(layertest.ReadLayer(ctx, l, s.below(), p, 0), l.Close())
}

// Edit opens the image for writing, lets do change it, and closes it.
func (s *Session) Edit(ctx context.Context, do func(g *Guest) error) error {
	before := s.syncs()
	l, err := s.Open(ctx, true, "")
	if err != nil {
		return fmt.Errorf("open for writing: %w", err)
	}
	g := &Guest{ctx: ctx, s: s, e: l.(layers.Editor)}
	s.note(before, false)
	if err := do(g); err != nil {
		return errors.Join(err, l.Close())
	}
	before = s.syncs()
	if err := l.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	s.note(before, true)
	return nil
}

func (s *Session) note(before int, durable bool) {
	if !s.Again {
		s.steps = append(s.steps, step{bytes.Clone(s.now), before, s.syncs(), durable})
	}
}

// First is what the guest saw before.
func (s *Session) First() []byte { return s.steps[0].content }

// Allowed checks the bytes that a power cut left after that many syncs.
func (s *Session) Allowed(got []byte, completed int) error {
	from, to := 0, 0
	for i, p := range s.steps {
		if p.durable && p.after <= completed {
			from = i
		}
		if p.before <= completed {
			to = i
		}
	}
	if len(got) != len(s.now) {
		return fmt.Errorf("the disk has %d bytes, not %d", len(got), len(s.now))
	}
	const part = 512
	legal := s.steps[from : to+1]
parts:
	for at := 0; at < len(got); at += part {
		end := min(at+part, len(got))
		for i := range legal {
			if bytes.Equal(got[at:end], legal[i].content[at:end]) {
				continue parts
			}
		}
	bytes:
		for b := at; b < end; b++ {
			for i := range legal {
				if got[b] == legal[i].content[b] {
					continue bytes
				}
			}
			return fmt.Errorf("byte %#x of the guest is %#x, which it was at no time from step %d to step %d of %d", b, got[b], from, to, len(s.steps))
		}
	}
	return nil
}

// Guest changes an open image as a guest does.
type Guest struct {
	ctx context.Context
	s   *Session
	e   layers.Editor
}

// Size is the length of the disk in bytes.
func (g *Guest) Size() int64 { return g.e.Size() }

// Granule is the size of a cluster in bytes.
func (g *Guest) Granule() int64 { return g.e.Granule() }

// Write writes n bytes that were never written before at off.
func (g *Guest) Write(off, n int64) error {
	g.s.value++
	p := make([]byte, n)
	imgtest.Pattern(p, g.s.value<<20+uint64(off), off)
	before := g.s.syncs()
	if err := g.e.WriteAt(g.ctx, p, off, g.s.below()); err != nil {
		return fmt.Errorf("write %d+%d: %w", off, n, err)
	}
	copy(g.s.now[off:], p)
	g.s.note(before, false)
	return nil
}

// Zero makes a range zeros.
func (g *Guest) Zero(off, n int64, punch bool) error {
	before := g.s.syncs()
	if err := g.e.ZeroAt(g.ctx, off, n, punch, g.s.below()); err != nil {
		return fmt.Errorf("zero %d+%d: %w", off, n, err)
	}
	clear(g.s.now[off : off+n])
	g.s.note(before, false)
	return nil
}

// Sync makes it durable.
func (g *Guest) Sync() error {
	before := g.s.syncs()
	if err := g.e.Sync(g.ctx); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	g.s.note(before, true)
	return nil
}

// Mixed makes n random changes of at most most bytes each.
func (g *Guest) Mixed(n int, most int64, weights ...int) error {
	// Writes, writes of whole clusters, discards, zeroings, syncs.
	w := [5]int{4, 2, 2, 1, 2}
	copy(w[:], weights)
	sum := 0
	for _, k := range w {
		sum += k
	}
	r, size, gran := g.s.Rand, g.Size(), g.Granule()
	for range n {
		off := r.Int64N(size)
		k := min(1+r.Int64N(most), size-off)
		pick, kind := r.IntN(sum), 0
		for ; pick >= w[kind]; kind++ {
			pick -= w[kind]
		}
		wholeOff := off / gran * gran
		wholeN := min(max(k/gran, 1)*gran, size-wholeOff)
		half := r.IntN(2) == 0
		var err error
		switch {
		case kind == 0:
			err = g.Write(off, k)
		case kind == 1:
			err = g.Write(wholeOff, wholeN)
		case kind < 4 && half:
			err = g.Zero(off, k, kind == 2)
		case kind < 4:
			err = g.Zero(wholeOff, wholeN, kind == 2)
		default:
			err = g.Sync()
		}
		if err != nil {
			return err
		}
	}
	return nil
}
