package layertest

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

// RunHuge checks an image of a size at which 32-bit sums, whole tables in
// memory and walks over clusters show: changes around several places of it
// against byte arrays, discards of everything, and the time that opening,
// looking up and discarding take.
func RunHuge(t *testing.T, f Factory, size int64) {
	t.Helper()
	if err := guard(func() error { return checkHuge(f, size) }); err != nil {
		t.Error(err)
	}
}

// window is a part of a huge disk with the bytes that it must show.
type window struct {
	off   int64
	model []byte
}

// windowsOf picks the ends and the places where numbers of bytes, sectors and
// clusters outgrow 31 and 32 bits.
func windowsOf(size, gran int64) (list []*window) {
	n := min(max(4*gran, 64<<10), 2<<20)
	last := int64(-1)
	for _, at := range []int64{0, 1 << 31, 1 << 32, 1 << 40, 1 << 41, gran << 20, gran << 22, gran << 31, gran << 32, size / 2, size - n} {
		at -= n / 2
		at = min(max(at, 0), size-n)
		known := false
		for _, w := range list {
			known = known || at < w.off+n && w.off < at+n
		}
		if !known && at != last && at >= 0 {
			list = append(list, &window{off: at, model: make([]byte, n)})
			last = at
		}
	}
	return list
}

func checkHuge(f Factory, size int64) error {
	ctx := context.Background()
	dir := NewMemDir()
	if err := f.Create(ctx, dir, size); err != nil {
		return err
	}
	below := zeroBelow()
	windows := windowsOf(size, f.Granule)
	d := seeded(uint64(size))
	var e layers.Editor
	timed := func(what string, limit time.Duration, do func() error) error {
		if imgtest.RaceEnabled { // on a machine with other things to do, too
			limit *= 15
		}
		start := time.Now()
		if err := do(); err != nil {
			return fmt.Errorf("%s, %d bytes: %s: %w", f.Name, size, what, err)
		}
		if took := time.Since(start); took > limit {
			return fmt.Errorf("%s, %d bytes: %s takes %v, more than %v", f.Name, size, what, took, limit)
		}
		return nil
	}
	open := func() (err error) {
		e, err = openEditor(f, dir)
		return err
	}
	compareAll := func() error {
		for _, w := range windows {
			if err := compare(e, below, w.model, w.off); err != nil {
				return fmt.Errorf("window at %d: %w", w.off, err)
			}
		}
		return nil
	}
	change := func() error {
		for i, w := range windows {
			for range 4 {
				off, n := span(d, int64(len(w.model)), f.Granule)
				part := w.model[off : off+n]
				var err error
				if d("zero", 0, 2) == 0 {
					clear(part)
					err = e.ZeroAt(ctx, w.off+off, n, true, below)
				} else {
					imgtest.Pattern(part, uint64(i+1), w.off+off)
					err = e.WriteAt(ctx, part, w.off+off, below)
				}
				if err != nil {
					return fmt.Errorf("change of %d +%d: %w", w.off+off, n, err)
				}
			}
		}
		return compareAll()
	}
	discard := func() error {
		for _, w := range windows {
			clear(w.model)
		}
		if err := e.ZeroAt(ctx, 0, size, true, below); err != nil {
			return err
		}
		return compareAll()
	}
	onestep := func() error {
		list, err := e.Lookup(ctx, 0, size, nil)
		if err != nil {
			return err
		}
		if len(list) != 1 || list[0].Len != size {
			return fmt.Errorf("an empty disk is %+v", list)
		}
		return nil
	}
	// The limits are far above what is promised and far below what walking
	// over every cluster would take.
	for _, s := range []struct {
		what  string
		limit time.Duration
		do    func() error
	}{
		{"open", 2 * time.Second, open},
		{"lookup of the empty disk", 2 * time.Second, onestep},
		{"change", 30 * time.Second, change},
		{"sync", 5 * time.Second, func() error { return e.Sync(ctx) }},
		{"close", 5 * time.Second, func() error { return e.Close() }},
		{"open again", 2 * time.Second, open},
		{"content", 10 * time.Second, compareAll},
		{"change again", 30 * time.Second, change},
		{"discard everything", 10 * time.Second, discard},
		{"sync of the discard", 5 * time.Second, func() error { return e.Sync(ctx) }},
		{"change after the discard", 30 * time.Second, change},
		{"discard again", 10 * time.Second, discard},
		{"close at last", 5 * time.Second, func() error { return e.Close() }},
		{"open at last", 2 * time.Second, open},
		{"empty content", 10 * time.Second, compareAll},
		{"close the empty disk", 5 * time.Second, func() error { return e.Close() }},
	} {
		if err := timed(s.what, s.limit, s.do); err != nil {
			return err
		}
	}
	return dir.misuse(true)
}
