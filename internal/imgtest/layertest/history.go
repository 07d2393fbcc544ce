package layertest

import (
	"context"
	"fmt"
	"math/bits"

	"github.com/imagestack/imagestack/layers"
)

// change is one step of a script whose outcome may be undetermined. Its value
// fills all of its range, and no other change of the script has it, so that a
// byte tells which change it comes from.
type change struct {
	kind   changeKind
	off, n int64
	value  byte // 0 to 63; 0 is a zeroing
	punch  bool
}

type changeKind uint8

const (
	doWrite changeKind = iota
	doZero
	doSync
	doReopen
)

func (c change) String() string {
	switch c.kind {
	case doWrite:
		return fmt.Sprintf("write %d +%d value %d", c.off, c.n, c.value)
	case doZero:
		return fmt.Sprintf("zero %d +%d punch %v", c.off, c.n, c.punch)
	case doSync:
		return "sync"
	}
	return "close and open"
}

// maxValue is the largest value of a write; the values behind it are those of
// the layer below.
const maxValue = 55

// drawScript makes a script of at most maxValue changes.
func drawScript(d draw, size, gran int64, most int64, reopen bool) []change {
	script := make([]change, d("changes", 1, min(most, maxValue)))
	// Scripts of whole clusters allocate and free all the time; scripts of any
	// ranges mostly change clusters in place.
	whole := d("whole clusters", 0, 1) == 0
	for i := range script {
		c := &script[i]
		switch k := d("kind", 0, 9); {
		case k < 5:
			c.kind, c.value = doWrite, byte(i+1)
		case k < 7:
			c.kind, c.punch = doZero, k == 5
		case k == 7 && reopen:
			c.kind = doReopen
			continue
		default:
			c.kind = doSync
			continue
		}
		c.off, c.n = span(d, size, gran)
		if whole {
			end := min((c.off+c.n+gran-1)/gran*gran, size)
			c.off = c.off / gran * gran
			c.n = min(end-c.off, 2*gran)
		}
	}
	return script
}

// valueBelow is a layer below whose bytes have the values behind maxValue, and
// zeros.
func valueBelow(d draw, f Factory, size int64) *Below {
	if f.Opaque || d("below", 0, 2) == 0 {
		return zeroBelow()
	}
	content := make([]byte, d("below length", 1, size))
	for i := range content {
		if c := i / 512 % 12; c < 8 {
			content[i] = maxValue + 1 + byte(c)
		}
	}
	return NewBelow(content, 512)
}

// history knows for each byte which values it may have: now, for who reads the
// open image, and on disk, for who opens it after a failure.
type history struct {
	now  []uint64 // bit v: the byte may read as v
	disk []uint64 // superset: what a crash may leave
}

//go:norace
func newHistory(f Factory, size int64, below *Below) *history {
	h := &history{now: make([]uint64, size), disk: make([]uint64, size)}
	for i, c := range f.shows(size, below) {
		h.now[i] = 1 << c
	}
	copy(h.disk, h.now)
	return h
}

// begins notes that a change was asked for: from now on it may be on disk.
//
//go:norace
func (h *history) begins(c change) {
	if c.kind == doWrite || c.kind == doZero {
		for i := c.off; i < c.off+c.n; i++ {
			h.disk[i] |= 1 << c.value
		}
	}
}

// done notes that the change succeeded.
//
//go:norace
func (h *history) done(c change) {
	switch c.kind {
	case doWrite, doZero:
		for i := c.off; i < c.off+c.n; i++ {
			h.now[i] = 1 << c.value
		}
	case doSync, doReopen:
		copy(h.disk, h.now)
	}
}

// failed notes that the change failed: each byte is old or new.
//
//go:norace
func (h *history) failed(c change) {
	if c.kind == doWrite || c.kind == doZero {
		for i := c.off; i < c.off+c.n; i++ {
			h.now[i] |= 1 << c.value
		}
	}
}

// check compares bytes with the values allowed. The loops over all bytes are
// not watched by the race detector: they touch what one goroutine owns, and
// would take most of the time of its runs.
//
//go:norace
func check(got []byte, allowed []uint64) error {
	for i, c := range got {
		if c > 63 || allowed[i]>>c&1 == 0 {
			return fmt.Errorf("byte %d is %d, allowed are %v", i, c, values(allowed[i]))
		}
	}
	return nil
}

func values(set uint64) (list []int) {
	for ; set != 0; set &= set - 1 {
		list = append(list, bits.TrailingZeros64(set))
	}
	return list
}

func checkLayer(l layers.Layer, below *Below, allowed []uint64) error {
	got := make([]byte, len(allowed))
	if err := ReadLayer(context.Background(), l, below, got, 0); err != nil {
		return err
	}
	return check(got, allowed)
}

// apply does one change; close and open is the caller's.
func (c change) apply(e layers.Editor, below *Below) error {
	ctx := context.Background()
	switch c.kind {
	case doWrite:
		return e.WriteAt(ctx, filled(c.n, c.value), c.off, below)
	case doZero:
		return e.ZeroAt(ctx, c.off, c.n, c.punch, below)
	case doSync:
		return e.Sync(ctx)
	}
	panic("not a change of an open image")
}
