// Package blockmap is the algebra of extents: what a block map answers, and
// what can be computed from such answers without knowing a file or a format.
//
// Design note. A disk image is, for everybody above its codec, a function from
// a guest range to a list of extents. All that imagestack does with images
// (reading through a pile of layers, listing holes, comparing, compacting)
// is built from that one function, so its contract is narrow and is pinned by
// one conformance suite (internal/imgtest/maptest) that every format and every
// combinator of this package passes.
//
// The package uses the standard library only and does no I/O.
package blockmap

import (
	"context"
	"fmt"
)

// Kind tells what an extent of a layer holds.
type Kind uint8

const (
	// Unmapped: this layer says nothing, the layer below answers. Under the
	// lowest layer everything reads as zeros.
	Unmapped Kind = iota
	// Zero reads as zeros, whatever lies below.
	Zero
	// Data is stored as it is at Host in the layer's data file.
	Data
	// Packed is stored compressed at Host in the layer's image file.
	Packed
)

func (k Kind) String() string {
	switch k {
	case Unmapped:
		return "unmapped"
	case Zero:
		return "zero"
	case Data:
		return "data"
	case Packed:
		return "packed"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Extent is a range of the virtual disk that is stored in one way.
type Extent struct {
	Guest int64 // first byte on the virtual disk
	Len   int64 // bytes, at least 1
	// Host is a byte offset in the layer's file. For Data it is the place of
	// byte Guest. For Packed it is the start of the compressed bytes of the
	// whole cluster in which Guest lies (the cluster that begins at Guest
	// rounded down to the layer's granule). It is 0 for Zero and Unmapped.
	Host      int64
	PackedLen uint32 // upper bound of the compressed length in bytes, for Packed
	Layer     uint16 // 0 is the top layer
	Kind      Kind
}

// End is the first guest byte behind e.
func (e Extent) End() int64 { return e.Guest + e.Len }

// Clip returns the part of e inside [guest, guest+n). The two must overlap.
func (e Extent) Clip(guest, n int64) Extent {
	if d := guest - e.Guest; d > 0 {
		e.Guest += d
		e.Len -= d
		if e.Kind == Data {
			e.Host += d
		}
	}
	if over := e.End() - (guest + n); over > 0 {
		e.Len -= over
	}
	return e
}

// Joins reports whether b, which begins where a ends, continues a, so that the
// two are one extent: same kind, same layer and, for Data, adjacent host bytes.
// Packed extents join when they are parts of the same compressed cluster.
func (a Extent) Joins(b Extent) bool {
	if a.Kind != b.Kind || a.Layer != b.Layer || a.End() != b.Guest {
		return false
	}
	switch a.Kind {
	case Data:
		return a.Host+a.Len == b.Host
	case Packed:
		return a.Host == b.Host && a.PackedLen == b.PackedLen
	}
	return true
}

// Map is a block map: of one layer, or of a pile of them.
type Map interface {
	// Size is the length of the virtual disk in bytes.
	Size() int64
	// Granule is the cluster size in bytes, a power of two.
	Granule() int64
	// Lookup appends extents that tile a prefix of [guest, guest+n) to dst:
	// the first begins at guest, each begins where the one before ends, none
	// reaches outside the range, and neighbours that could be one extent
	// (Extent.Joins) are one. The whole range is tiled unless cap(dst) was
	// reached; the last extent is then as long as it can be in the range.
	//
	// At least one extent is appended (dst grows by one when it is full), so
	// that a caller who asks again from the end of the last extent makes
	// progress; or an error is returned, and then nothing of dst is promised.
	// n must be at least 1, guest at least 0 and guest+n must not overflow;
	// anything else is an error. Behind Size the answer is Zero.
	//
	// Lookup keeps no reference to dst and may be called concurrently. Its
	// cost follows the extents, not the clusters: an empty table or a hole of
	// 1 TiB is one step.
	Lookup(ctx context.Context, guest, n int64, dst []Extent) ([]Extent, error)
}
