package blockmap

import (
	"context"
	"iter"
)

// All iterates over the extents of [guest, guest+n) in order, whole: an
// extent is never cut in two because a buffer was full. After an error the
// sequence ends; the error comes with a zero Extent.
func All(ctx context.Context, m Map, guest, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		end := guest + n
		buf := make([]Extent, 0, 256)
		for guest < end {
			err := ctx.Err()
			if err == nil {
				buf, err = m.Lookup(ctx, guest, end-guest, buf[:0])
			}
			if err != nil {
				yield(Extent{}, err)
				return
			}
			for _, e := range buf {
				if !yield(e, nil) {
					return
				}
				guest = e.End()
			}
		}
	}
}

// Stored reports whether the extent's bytes are stored somewhere, so that
// SEEK_DATA stops there.
func (e Extent) Stored() bool { return e.Kind == Data || e.Kind == Packed }

// Seek returns the first byte at or behind from where stored is as wanted, or
// the size of the map if there is none.
func Seek(ctx context.Context, m Map, from int64, stored bool) (int64, error) {
	if from >= m.Size() {
		return m.Size(), nil
	}
	for e, err := range All(ctx, m, from, m.Size()-from) {
		if err != nil {
			return 0, err
		}
		if e.Stored() == stored {
			return e.Guest, nil
		}
	}
	return m.Size(), nil
}

// Range is a range of bytes, of a disk or of a file.
type Range struct{ Off, Len int64 }

// End is the first byte behind r.
func (r Range) End() int64 { return r.Off + r.Len }

// Runs iterates over the maximal stretches of [guest, guest+n) whose bytes
// are stored (as wanted by stored) or not, whatever layer they lie in.
func Runs(ctx context.Context, m Map, guest, n int64, stored bool) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		var run Range
		for e, err := range All(ctx, m, guest, n) {
			if err != nil {
				yield(Range{}, err)
				return
			}
			if e.Stored() != stored {
				continue
			}
			if run.Len > 0 && run.End() == e.Guest {
				run.Len += e.Len
				continue
			}
			if run.Len > 0 && !yield(run, nil) {
				return
			}
			run = Range{Off: e.Guest, Len: e.Len}
		}
		if run.Len > 0 {
			yield(run, nil)
		}
	}
}

// Diff iterates over the stretches of [guest, guest+n) for which the two maps
// do not name the same place, so that only there content has to be compared.
// Two extents name the same place when both are zeros (Unmapped counts as
// zeros: compare resolved maps), or when they are stored alike at the same
// host bytes and same reports that the two layers are one file.
func Diff(ctx context.Context, a, b Map, guest, n int64, same func(layerA, layerB uint16) bool) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		nextB, stop := iter.Pull2(All(ctx, b, guest, n))
		defer stop()
		var eb Extent
		var run Range
		for ea, err := range All(ctx, a, guest, n) {
			for err == nil && ea.Len > 0 {
				if eb.Len == 0 {
					var ok bool
					if eb, err, ok = nextB(); err != nil || !ok {
						break
					}
				}
				c := min(ea.Len, eb.Len)
				if !alike(ea, eb, same) {
					if run.Len > 0 && run.End() == ea.Guest {
						run.Len += c
					} else {
						if run.Len > 0 && !yield(run, nil) {
							return
						}
						run = Range{Off: ea.Guest, Len: c}
					}
				}
				ea, eb = ea.skip(c), eb.skip(c)
			}
			if err != nil {
				yield(Range{}, err)
				return
			}
		}
		if run.Len > 0 {
			yield(run, nil)
		}
	}
}

// alike reports whether two extents that begin at the same guest byte name
// the same bytes.
func alike(a, b Extent, same func(layerA, layerB uint16) bool) bool {
	if !a.Stored() && !b.Stored() {
		return true
	}
	return a.Kind == b.Kind && a.Host == b.Host && a.PackedLen == b.PackedLen && same(a.Layer, b.Layer)
}

// skip is what is left of e behind its first n bytes; n may be all of them.
func (e Extent) skip(n int64) Extent {
	if n >= e.Len {
		return Extent{}
	}
	return e.Clip(e.Guest+n, e.Len-n)
}
