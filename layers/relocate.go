package layers

import (
	"context"

	"github.com/imagestack/imagestack/blockmap"
)

// HostSpace is implemented by layers whose image file has an allocation of its
// own, also when they are open for reading only.
type HostSpace interface {
	Layer

	// HostUnit is the unit of allocation in the image file, in bytes, a power
	// of two: the cluster size of qcow2 and of ploop.
	HostUnit() int64

	// Counted visits the byte ranges of the image file that the image's own
	// accounting calls in use (qcow2: what has a reference count; ploop, which
	// has no accounting: everything behind the header and the map), in whole
	// units, ascending and disjoint. What is visited here and not by WalkHost
	// is a leak; what WalkHost visits and this does not is damage. An error of
	// visit ends it and is returned.
	Counted(ctx context.Context, visit func(off, n int64) error) error

	// Own visits the clusters in [off, off+n) of the guest whose space belongs
	// to the active map alone, so that dropping them gives it back: what an
	// internal snapshot shares is left out. They come in guest order as
	// extents of whole clusters (the last one may be cut by the end of the
	// disk), neighbours joined: Data, Packed (each cluster for itself), Zero
	// for a cluster that reads as zeros and has a place nevertheless, or
	// Unmapped for one that is stored in parts only (subclusters; each for
	// itself). An error of visit ends it and is returned.
	Own(ctx context.Context, off, n int64, visit func(blockmap.Extent) error) error
}

// Relocation is how much Evacuate may do at a time.
type Relocation struct {
	// Batch is the number of bytes that may be stored twice at a time, the
	// extra space at the peak; at least one unit is moved at a time. 0 means
	// DefaultBatch.
	Batch int64
	// Memory bounds what is remembered of references, in bytes; 0 means
	// DefaultRelocationMemory.
	Memory int64
	// Moved, unless it is nil, is called after each batch, when the image is
	// consistent and durable, with the bytes that the batch moved. Its error
	// ends Evacuate and is returned.
	Moved func(n int64) error
}

// Defaults of a Relocation, bytes.
const (
	DefaultBatch            = 32 << 20
	DefaultRelocationMemory = 64 << 20
)

// Relocator is an Editor whose file can be made smaller in place. None of its
// methods changes a byte that the guest, a snapshot or a bitmap shows, except
// Unmap, which says so.
//
// Unlike the rest of an Editor these methods need the image for themselves: no
// other method of it runs meanwhile. A crash at any moment leaves the content
// as it is, at worst with leaks; all of them can be called again afterwards.
// When ctx ends they stop between two batches with its error.
type Relocator interface {
	Editor
	HostSpace

	// BeginRelocation checks all references of the image, before anything is
	// written, and has to succeed before the first change, also before a
	// ZeroAt. It refuses what must not be relocated: ErrCorrupt for an image
	// that is marked dirty or damaged, a unit that is used twice or that is
	// used and not counted; ErrUnsupported, with its name, for a feature whose
	// places in the file are not known. From then on changes leave persistent
	// bitmaps valid: what is dropped is content that nobody may ask for, or
	// that reads the same afterwards.
	//
	// step, unless it is nil, tells how much of the work is done.
	BeginRelocation(ctx context.Context, step func(done, total int64)) error

	// CanZero reports whether ZeroAt of whole clusters never stores anything,
	// whatever lies below (qcow2 version 3). Where it does not, only ranges
	// under which nothing but zeros lies can be given back.
	CanZero() bool

	// Unmap makes the whole clusters inside [off, off+n) unmapped, so that the
	// guest reads what lies below from then on. The caller has compared it.
	// Durable and freed with the next Sync.
	Unmap(ctx context.Context, off, n int64) error

	// FreeLeaks gives back what is counted and referenced by nothing, and what
	// an interrupted Evacuate left. It returns the bytes. Units that may
	// belong to something that is not known (an unknown header extension)
	// stay.
	FreeLeaks(ctx context.Context) (int64, error)

	// Evacuate moves what lies in the file at or behind cut, metadata
	// included, to free units in front of it, as far as there are any: for
	// each batch copy, sync, publish the map, sync, free. What cannot be moved
	// stays where it is. It returns the bytes moved.
	Evacuate(ctx context.Context, cut int64, o Relocation) (int64, error)

	// Shrink frees tables that have become empty, shortens those that are
	// longer than needed and cuts the file off behind the last unit in use.
	// What it frees in front of that is room for a further Evacuate.
	Shrink(ctx context.Context) error
}

// Below is what lies under the top layer, for those who work on the top layer
// itself.
func (s *Stack) Below() Below { return s.below }

// Alone ends what the stack does by itself, and returns when nothing of that is
// under way: from now on nothing reads but who is asked. Whoever needs the top
// layer for himself (Relocator) calls it.
func (s *Stack) Alone() { s.later.stop() }

// Forget drops what the stack keeps of decompressed clusters by their places in
// the file. Whoever has moved something in the top layer calls it.
func (s *Stack) Forget() { s.packed[0].DropAll() }
