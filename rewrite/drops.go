package rewrite

import (
	"bytes"
	"context"
	"errors"
	"io"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// dropRun is a run of guest clusters that the layer need not store, and why.
type dropRun struct {
	blockmap.Range
	why  Phase
	host int64 // bytes of the file that it takes
}

// drops looks for clusters that a layer need not store.
//
// Clusters that the guest calls free are not read. Of the others only the
// first headBytes are read as long as they tell that the cluster is neither
// zero nor equal to what lies below, which is nearly always.
type drops struct {
	layer   layers.HostSpace
	below   layers.Below
	canZero bool
	free    []blockmap.Range // ascending, disjoint; what is in front of the present window was cut off
	zeros   bool
	dedup   bool
	pace    func(n int64) error // called with the bytes read

	granule int64
	size    int64
	buf     []byte
	under   []byte
	spans   dataSpans
	// blocked are bytes that would be dropped if nothing lay below.
	blocked int64
}

// headBytes is what is read of a cluster first.
const headBytes = 4 << 10

func newDrops(l layers.HostSpace, below layers.Below, canZero bool) *drops {
	g := l.Granule()
	return &drops{
		layer: l, below: below, canZero: canZero, granule: g, size: l.Size(),
		buf: make([]byte, g), under: make([]byte, g), spans: dataSpans{f: l.Data()},
		pace: func(int64) error { return nil },
	}
}

// in visits the runs to drop in [off, off+n), both multiples of the granule or
// the end of the disk.
func (d *drops) in(ctx context.Context, off, n int64, visit func(dropRun) error) error {
	for len(d.free) > 0 && d.free[0].End() <= off {
		d.free = d.free[1:]
	}
	free := d.free
	var last dropRun
	flush := func() error {
		if last.Len == 0 {
			return nil
		}
		r := last
		last = dropRun{}
		return visit(r)
	}
	err := d.layer.Own(ctx, off, n, func(e blockmap.Extent) error {
		for e.Len > 0 {
			c := e.Clip(e.Guest, d.granule)
			e.Guest, e.Len = c.End(), e.Len-c.Len
			if e.Kind == blockmap.Data {
				e.Host += c.Len
			}
			for len(free) > 0 && free[0].End() <= c.Guest {
				free = free[1:]
			}
			isFree := len(free) > 0 && free[0].Off <= c.Guest && c.End() <= free[0].End()
			why, err := d.judge(ctx, c, isFree)
			if err != nil {
				return err
			}
			if why == "" {
				continue
			}
			host := d.granule
			if c.Kind == blockmap.Packed {
				host = int64(c.PackedLen)
			}
			if last.why == why && last.End() == c.Guest {
				last.Len += c.Len
				last.host += host
				continue
			}
			if err := flush(); err != nil {
				return err
			}
			last = dropRun{blockmap.Range{Off: c.Guest, Len: c.Len}, why, host}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// judge tells why a cluster need not be stored, "" when it must.
func (d *drops) judge(ctx context.Context, c blockmap.Extent, free bool) (Phase, error) {
	why := Phase("")
	switch {
	case free:
		why = PhaseGuest
	case d.zeros:
		zero, err := d.isZero(ctx, c)
		if err != nil {
			return "", err
		}
		if zero {
			why = PhaseZeros
		}
	}
	if why != "" && !d.canZero {
		nothing, err := d.below.IsZero(ctx, c.Guest, c.Len)
		if err != nil {
			return "", err
		}
		if !nothing {
			d.blocked += c.Len
			why = ""
		}
	}
	if why == "" && d.dedup {
		same, err := d.sameAsBelow(ctx, c)
		if err != nil {
			return "", err
		}
		if same {
			why = PhaseDedup
		}
	}
	return why, nil
}

// isZero reports whether a cluster reads as zeros.
func (d *drops) isZero(ctx context.Context, c blockmap.Extent) (bool, error) {
	switch c.Kind {
	case blockmap.Zero:
		return true, nil
	case blockmap.Unmapped:
		if err := d.read(ctx, c, d.buf[:c.Len]); err != nil {
			return false, err
		}
		return backend.IsZero(d.buf[:c.Len]), d.pace(c.Len)
	case blockmap.Packed:
		// A cluster of zeros compresses to next to nothing.
		if int64(c.PackedLen) > max(1024, d.granule/64) {
			return false, nil
		}
		if err := d.pace(int64(c.PackedLen)); err != nil {
			return false, err
		}
		err := d.layer.Unpack(ctx, c, 0, d.buf)
		if errors.Is(err, layers.ErrCorrupt) {
			return false, nil // it stays as it is
		}
		return err == nil && backend.IsZero(d.buf[:c.Len]), err
	}
	return d.zeroData(c.Host, c.Len)
}

// zeroData reports whether a part of the data file reads as zeros. Holes are
// not read.
func (d *drops) zeroData(off, n int64) (bool, error) {
	part := min(n, headBytes)
	for end := off + n; off < end; part = end - off {
		data, hole := d.spans.at(off)
		if data >= end {
			return true, nil
		}
		off = max(off, data)
		part = min(part, end-off, hole-off)
		b := d.buf[:part]
		if err := readFull(d.layer.Data(), b, off); err != nil {
			return false, err
		}
		if err := d.pace(part); err != nil {
			return false, err
		}
		if !backend.IsZero(b) {
			return false, nil
		}
		off += part
	}
	return true, nil
}

// sameAsBelow reports whether a cluster reads as what lies below.
func (d *drops) sameAsBelow(ctx context.Context, c blockmap.Extent) (bool, error) {
	switch c.Kind {
	case blockmap.Zero:
		// A zero cluster with a place: equal when zeros lie below.
		return d.below.IsZero(ctx, c.Guest, c.Len)
	case blockmap.Packed, blockmap.Unmapped:
		err := d.read(ctx, c, d.buf[:c.Len])
		if errors.Is(err, layers.ErrCorrupt) && c.Kind == blockmap.Packed {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if err := d.below.ReadAt(ctx, d.under[:c.Len], c.Guest); err != nil {
			return false, err
		}
		return bytes.Equal(d.buf[:c.Len], d.under[:c.Len]), d.pace(2 * c.Len)
	}
	for from, to := int64(0), min(c.Len, headBytes); from < c.Len; from, to = to, c.Len {
		a, b := d.buf[from:to], d.under[from:to]
		if err := readFull(d.layer.Data(), a, c.Host+from); err != nil {
			return false, err
		}
		if err := d.below.ReadAt(ctx, b, c.Guest+from); err != nil {
			return false, err
		}
		if err := d.pace(2 * (to - from)); err != nil {
			return false, err
		}
		if !bytes.Equal(a, b) {
			return false, nil
		}
	}
	return true, nil
}

// read fills p with what a cluster shows that is packed or stored in parts.
func (d *drops) read(ctx context.Context, c blockmap.Extent, p []byte) error {
	if c.Kind == blockmap.Packed {
		return d.layer.Unpack(ctx, c, 0, p)
	}
	var room [1]blockmap.Extent
	for at := c.Guest; at < c.End(); {
		found, err := d.layer.Lookup(ctx, at, c.End()-at, room[:0])
		if err != nil {
			return err
		}
		e := found[0]
		b := p[at-c.Guest:][:e.Len]
		switch e.Kind {
		case blockmap.Data:
			err = readFull(d.layer.Data(), b, e.Host)
		case blockmap.Unmapped:
			err = d.below.ReadAt(ctx, b, at)
		case blockmap.Zero:
			clear(b)
		default:
			err = errors.New("a cluster that is stored in parts is packed")
		}
		if err != nil {
			return err
		}
		at = e.End()
	}
	return nil
}

// readFull fills p; what lies behind the end of the file reads as zeros.
func readFull(f backend.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	return err
}

// dataSpans remembers where a file has data, so that it is asked once for each
// of its extents.
type dataSpans struct {
	f          backend.File
	from       int64 // nothing but a hole up to data
	data, hole int64
}

// at returns the first offset at or behind off that has data, and the end of
// the data there. A file that cannot tell is data throughout.
func (s *dataSpans) at(off int64) (data, hole int64) {
	const never = 1<<63 - 1
	if off >= s.from && off < s.hole {
		return max(off, s.data), s.hole
	}
	s.from = off
	var err error
	s.data, err = s.f.SeekData(off)
	if errors.Is(err, io.EOF) {
		s.data, s.hole = never, never
		return s.data, s.hole
	}
	if err != nil || s.data < off {
		s.data, s.hole = off, never
		return s.data, s.hole
	}
	s.hole, err = s.f.SeekHole(s.data)
	if err != nil || s.hole <= s.data {
		s.hole = never
	}
	return s.data, s.hole
}
