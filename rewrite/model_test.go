package rewrite_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	_ "github.com/imagestack/imagestack/fsck/qcow2fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
	"github.com/imagestack/imagestack/rewrite"
)

// disk is a qcow2 image in memory, with what lies under it.
type disk struct {
	file  backend.File
	below []byte // nil: nothing
}

// kept stays open when it is closed.
type kept struct{ backend.File }

func (kept) Close() error           { return nil }
func (k kept) Unwrap() backend.File { return k.File }

// open opens the disk as a stack.
func (d *disk) open(ctx context.Context, writable bool, snapshot string, cache int64) (*layers.Stack, error) {
	c := layers.NewCache(cache)
	top, err := qcow2.Open(ctx, kept{d.file}, layers.OpenOptions{Path: "image", Writable: writable, Snapshot: snapshot, Cache: c})
	if err != nil {
		return nil, err
	}
	pile := []layers.Layer{top}
	if d.below != nil {
		base, err := raw.Open(ctx, backend.NewMemBytes("base", d.below), layers.OpenOptions{Path: "base"})
		if err != nil {
			return nil, err
		}
		pile = append(pile, base)
	}
	return layers.NewStack(pile, layers.StackOptions{Writable: writable, Cache: c})
}

func (d *disk) content(ctx context.Context, snapshot string) ([]byte, error) {
	s, err := d.open(ctx, false, snapshot, 0)
	if err != nil {
		return nil, err
	}
	p := make([]byte, s.Size())
	_, err = s.ReadAt(ctx, p, 0)
	return p, errors.Join(err, s.Close())
}

// check asks our checker, which may find nothing worse than worst.
func (d *disk) check(ctx context.Context, worst fsck.Severity) error {
	c, err := fsck.CheckerFor("qcow2")
	if err != nil {
		return err
	}
	col := fsck.NewCollector(fsck.CollectorOptions{File: "image"})
	stats, err := c.Check(ctx, d.file, fsck.Options{Memory: 32 << 20, Parallel: 1, Data: true}, col)
	if err != nil {
		return err
	}
	for _, f := range col.Sum(stats).Findings {
		if f.Sev() > worst {
			return fmt.Errorf("%s: %s: %s: %s", f.Sev(), f.Code, f.Place, f.Text)
		}
	}
	return nil
}

// compact runs rewrite on the disk.
func (d *disk) compact(ctx context.Context, o rewrite.Options, cache int64) (*rewrite.Report, error) {
	s, err := d.open(ctx, true, "", cache)
	if err != nil {
		return nil, err
	}
	r, err := rewrite.CompactStack(ctx, s, o)
	return r, errors.Join(err, s.Close())
}

// scribble makes random changes through an editor.
func scribble(ctx context.Context, s *layers.Stack, rng *rand.Rand, n int) error {
	for range n {
		g := s.Granule()
		off := rng.Int64N(s.Size())
		k := min(1+rng.Int64N(6*g), s.Size()-off)
		if rng.IntN(2) == 0 {
			off, k = off/g*g, (k+g-1)/g*g
			k = min(k, s.Size()-off)
		}
		var err error
		switch rng.IntN(8) {
		case 0, 1, 2:
			_, err = s.WriteAt(ctx, imgtest.PatternBytes(rng.Uint64(), off, int(k)), off)
		case 3:
			_, err = s.WriteAt(ctx, make([]byte, k), off)
		case 4, 5:
			err = s.ZeroAt(ctx, off, k, true)
		case 6:
			err = s.ZeroAt(ctx, off, k, false)
		case 7:
			err = s.Sync(ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func TestModel(t *testing.T) {
	ctx := t.Context()
	type c = qcow2.CreateOptions
	for _, o := range []c{
		{Size: 1 << 20, ClusterSize: 512},
		{Size: 1<<20 - 512, ClusterSize: 512, RefcountBits: 64},
		{Size: 1 << 20, ClusterSize: 4096},
		{Size: 1<<20 + 512, ClusterSize: 4096, Version: 2},
		{Size: 1 << 20, ClusterSize: 4096, RefcountBits: 1},
		{Size: 1 << 20, ClusterSize: 16384, ExtendedL2: true},
		{Size: 8 << 20, ClusterSize: 65536},
	} {
		for seed := range uint64(30) {
			rng := rand.New(rand.NewPCG(seed, uint64(o.ClusterSize)))
			d := &disk{file: backend.NewMem("image")}
			if seed%3 == 1 {
				d.below = imgtest.PatternBytes(7, 0, int(o.Size))
				clear(d.below[:len(d.below)/3])
			}
			name := fmt.Sprintf("%+v seed %d", o, seed)
			if err := qcow2.Create(ctx, d.file, o); err != nil {
				t.Fatal(err)
			}
			s, err := d.open(ctx, true, "", 1<<20)
			if err == nil {
				err = errors.Join(scribble(ctx, s, rng, 60), s.Close())
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			before, err := d.content(ctx, "")
			if err != nil {
				t.Fatal(err)
			}
			opts := rewrite.Options{DedupParent: seed%2 == 1, KeepZeros: seed%5 == 4, MaxExtra: []int64{0, 1, 1 << 16}[seed%3]}
			r, err := d.compact(ctx, opts, []int64{0, 1 << 20}[seed%2])
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			after, err := d.content(ctx, "")
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if !bytes.Equal(before, after) {
				t.Fatalf("%s: the content has changed", name)
			}
			if err := d.check(ctx, fsck.Note); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if r.After.Apparent > r.Ideal {
				t.Errorf("%s: %d bytes, ideal %d, before %d", name, r.After.Apparent, r.Ideal, r.Before.Apparent)
			}
			again, err := d.compact(ctx, opts, 0)
			if err != nil || again.Move != 0 || again.After.Apparent != r.After.Apparent {
				t.Errorf("%s: again: %v, %+v", name, err, again)
			}
		}
	}
}
