// Package layers resolves reads through a pile of image layers and carries
// writes into the top one: the stacked device of ploop's design, without a
// format and without a kernel.
//
// Design note. A Layer is the read side of one image: a block map and the file
// its extents point into. An Editor is a Layer that can be changed. A Stack is
// a pile of Layers with, when writable, an Editor on top. The formats
// (layers/raw, layers/ploop, layers/qcow2) implement Layer and Editor and know
// nothing of each other; they share the metadata Cache and the small
// mechanisms (Readers, Stripes, Commit) of this package.
//
// Concurrency. Reads take no lock that another reader could wait for: a Lookup
// works on published cache pages whose entries are read atomically, and then
// one pread follows per extent. What protects a reader from space being reused
// under it is not a lock but a grace period (Readers): released space is
// handed out again only after every read that might have seen the old mapping
// has ended.
//
// Lock order, outermost first: Commit (one flush at a time) -> a Stripe of the
// guest cluster being remapped -> the format's allocator lock -> the stripe
// lock of the Cache that loads a missing page. None is held while waiting for
// a grace period except Commit.
//
// Order of durability, the same for every format: copy data -> sync -> publish
// the map -> sync -> only then is the old place free. Released space is
// neither reused nor punched before the commit that unlinked it is durable. A
// failed sync makes the Editor refuse every further change; it is never
// retried as if it could still succeed.
package layers

import (
	"context"
	"encoding/json"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
)

// Layer is one image of a stack, its read side. All methods except Close may
// be called concurrently.
//
// The extents that Lookup returns have Layer 0; a Stack fills in the position.
type Layer interface {
	blockmap.Map

	// Data is the file that the Host offset of Data extents refers to: the
	// image itself, or its external data file.
	Data() backend.File

	// Unpack decompresses the cluster of which e, an extent of Kind Packed
	// returned by Lookup, is a part, and fills dst with its bytes from within
	// on; from 0 on with len(dst) Granule() is the whole. Damage in the payload
	// up to there is an ErrCorrupt, never short or zero-filled output; what
	// lies behind may not be looked at.
	Unpack(ctx context.Context, e blockmap.Extent, within int64, dst []byte) error

	// Describe tells what image-stack info shows of this layer. It may read
	// the whole map, within OpenOptions.MaxTables.
	Describe(ctx context.Context) (Info, error)

	// WalkHost visits every reference from the layer's metadata to a byte
	// range of its image file, once per reference: a data cluster that two
	// snapshots share is visited twice. Ranges come in no particular order.
	// What is never visited is a leak. An error of visit ends the walk and is
	// returned. Entries that are damaged are errors (image-fsck has its own,
	// forgiving walk).
	WalkHost(ctx context.Context, visit func(HostRange) error) error

	// Close releases the layer and its files. On an Editor it first makes
	// everything durable and marks the image closed.
	Close() error
}

// Flat is implemented by layers in which every guest byte lies at the same
// offset of Data() (a raw image, or one with a raw external data file that is
// wholly mapped). A Stack of one such layer needs no lookup to read.
type Flat interface {
	Flat() bool
}

// Below is what the layers under an Editor show: the bytes that fill up a
// partly written cluster, and whether unmapping would let anything shine
// through. The Below of the lowest layer shows zeros everywhere.
type Below interface {
	// ReadAt fills all of p; what lies behind the end of the lower layers
	// reads as zeros.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// IsZero reports whether [off, off+n) is known, from the maps alone, to
	// read as zeros.
	IsZero(ctx context.Context, off, n int64) (bool, error)
}

// Editor is a layer that can be changed. Its methods may be called
// concurrently with each other and with reads; two changes of the same bytes
// at the same time leave either, per byte, never anything else.
//
// Changes are in memory and in not yet synced writes until Sync returns nil.
// A crash before that loses any subset of them, at worst as leaked space;
// nothing that an earlier Sync covered is touched.
//
// Ranges must lie inside [0, Size()). Errors of the operating system come
// through unchanged (ENOSPC stays ENOSPC), and after one that is not a failed
// sync the image is as consistent as before and the Editor stays usable.
type Editor interface {
	Layer

	// WriteAt stores all of p at off. Clusters that the layer does not own
	// yet and that p covers only in part are completed from below.
	WriteAt(ctx context.Context, p []byte, off int64, below Below) error

	// ZeroAt makes [off, off+n) read as zeros, exactly: edges smaller than a
	// cluster are written as zeros (or do not change when they read as zeros
	// already), whole clusters are unmapped when below shows zeros there,
	// else they become zero clusters where the format has such, else zeros
	// are written. With punch the space of mapped clusters is given back;
	// without it a mapped cluster may keep its place.
	ZeroAt(ctx context.Context, off, n int64, punch bool, below Below) error

	// Sync makes all changes that returned before it was called durable, in
	// the order of the package comment, and then frees what they released.
	// Concurrent calls may share one commit.
	Sync(ctx context.Context) error

	// Readers is the grace-period counter: whoever uses the result of Lookup
	// (to read, or to write in place) does so between Enter and Exit.
	Readers() *Readers
}

// InPlaceWriter is an Editor that can tell which writes need nothing but the
// write itself.
type InPlaceWriter interface {
	// WriteInPlace stores p at off, inside the disk, if all of it goes to a
	// place that the layer owns already, and reports whether it did. After
	// false, which errors also are, any part of p may have been stored, and
	// WriteAt is to follow.
	WriteInPlace(p []byte, off int64) bool
}

// OpenOptions are what every format's Open takes.
type OpenOptions struct {
	// Path names the image in messages.
	Path string
	// Writable asks for an Editor. The caller holds the image's lock and
	// opened the file for writing. Without it not one byte is written.
	Writable bool
	// Cache holds the metadata; nil means a private one of DefaultCacheSize.
	Cache *Cache
	// Snapshot selects an internal snapshot by id or name (read-only).
	Snapshot string
	// OpenFile opens a further file that the image names (an external data
	// file), under the caller's path policy. nil refuses such images.
	OpenFile func(name string, writable bool) (backend.File, error)
	// MaxTables bounds the bytes of tables that Describe reads to count
	// clusters (see Info.Uncounted); 0 is no bound.
	MaxTables int64
}

// Parent is what an image says about the layer below it.
type Parent struct {
	// Name as written in the image; relative names are relative to the
	// directory of the image that names it. "" means there is no parent.
	Name string
	// Format as stated by the image, "" when it does not say.
	Format string
}

// Info is a layer as image-stack info shows it.
type Info struct {
	Path           string            `json:"path"`
	Format         string            `json:"format"`                    // raw, ploop, qcow2
	Version        int               `json:"version,omitempty"`         // of the format
	VirtualSize    int64             `json:"virtual-size"`              // bytes
	ClusterSize    int64             `json:"cluster-size"`              // bytes
	FileSize       int64             `json:"file-size"`                 // apparent bytes of the image file
	AllocatedSize  int64             `json:"allocated-size"`            // bytes of host storage
	UsedClusters   int64             `json:"used-clusters"`             // guest clusters mapped here (data or compressed)
	PackedClusters int64             `json:"compressed-clusters"`       // of these, compressed
	ZeroClusters   int64             `json:"zero-clusters"`             // recorded as zeros
	Backing        string            `json:"backing-file,omitempty"`    // as written in the image
	BackingFormat  string            `json:"backing-format,omitempty"`  // as written in the image
	DataFile       string            `json:"data-file,omitempty"`       // external data file
	Flags          []string          `json:"flags,omitempty"`           // dirty, corrupt, in-use, lazy-refcounts, …
	Snapshots      []Snapshot        `json:"snapshots,omitempty"`       // internal
	Bitmaps        []Bitmap          `json:"bitmaps,omitempty"`         // persistent dirty bitmaps
	Details        map[string]string `json:"format-specific,omitempty"` // refcount width, compression, …

	// Uncounted: the tables exceed OpenOptions.MaxTables, and the numbers of
	// clusters are not known. In JSON they are null.
	Uncounted bool `json:"-"`
}

// MarshalJSON implements json.Marshaler.
func (i Info) MarshalJSON() ([]byte, error) {
	type plain Info
	if !i.Uncounted {
		return json.Marshal(plain(i))
	}
	return json.Marshal(struct {
		plain
		Used   *int64 `json:"used-clusters"`
		Packed *int64 `json:"compressed-clusters"`
		Zero   *int64 `json:"zero-clusters"`
	}{plain: plain(i)})
}

// Snapshot is an internal snapshot, or one of a ploop bundle.
type Snapshot struct {
	ID          string `json:"id"`
	Name        string `json:"name,omitempty"`
	VirtualSize int64  `json:"virtual-size,omitempty"`
	VMStateSize int64  `json:"vm-state-size,omitempty"`
	Time        int64  `json:"time,omitempty"` // seconds since 1970
	Parent      string `json:"parent,omitempty"`
	Current     bool   `json:"current,omitempty"`
}

// Bitmap is a persistent dirty bitmap.
type Bitmap struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"` // bytes
	Flags       []string `json:"flags,omitempty"`
}
