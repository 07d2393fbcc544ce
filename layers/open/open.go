// Package open finds what belongs to an image and makes a layers.Stack of it:
// it detects the format, follows parents, applies the policy on untrusted
// images and takes the locks.
//
// Design note. Every image may be hostile, because a guest could write to it.
// What an image says is therefore used in three steps that are kept apart:
//
//   - detect.go decides the format of a file. Only the image that the user
//     named is probed; the format of a parent is what the child (or the user)
//     states, and a parent stated as raw that begins like an image is refused
//     until the user confirms it.
//   - policy.go turns a name found in an image into an open file. The file must
//     lie in the directory of the image that the user named, or in one that
//     the user allowed, after all symbolic links are followed; and it must be a
//     regular file, or a block device under a directory that the user allowed.
//   - chain.go follows parents, remembers every file by device and inode so
//     that a loop is an error, and stops at layers.MaxDepth.
//
// Every file is locked as QEMU's tools lock theirs: the top layer of a
// writable stack for writing, everything else for reading.
package open

import (
	"context"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// Options say how to open an image.
type Options struct {
	// Writable opens the top layer for changes.
	Writable bool
	// Scratch makes the stack writable into a throw-away layer on top; the
	// image itself is opened for reading only. It wins over Writable.
	Scratch bool
	// ScratchDir is where the throw-away layer lives, "" for os.TempDir(), and
	// for the directory of the image with Flat.
	ScratchDir string
	// ScratchFile, if not nil, is the file of the throw-away layer; a
	// successful Open takes it over.
	ScratchFile backend.File
	// Flat makes one file without a name of the whole stack, which shares the
	// storage of its files (reflinks), and opens that. With Scratch it is
	// writable, and no further layer is needed. ScratchFile, or one in
	// ScratchDir, must lie on the filesystem of the image.
	Flat bool
	// Format states the format of the image named: raw, ploop (parallels) or
	// qcow2. "" probes.
	Format string
	// BackingFormat states the format of every parent whose child does not
	// say, and confirms one that contradicts its content.
	BackingFormat string
	// Snapshot selects an internal snapshot (qcow2: id or name) or a snapshot
	// of a ploop bundle (GUID). Such a stack is writable only with Scratch, or
	// with Lower.
	Snapshot string
	// Lower lets Writable and Snapshot together open an image of a ploop
	// bundle on which others stand: for who changes where its clusters lie,
	// and nothing that any image of the bundle shows.
	Lower bool
	// AllowPaths are directories, besides that of the image, in which files
	// that an image names may lie.
	AllowPaths []string
	// CacheSize is the metadata budget in bytes, 0 for
	// layers.DefaultCacheSize.
	CacheSize int64
	// MaxTables is that of layers.OpenOptions, for each layer.
	MaxTables int64
	// DontCache reads the files without leaving them in the page cache
	// (backend.DontCache), for a disk whose reader has one of its own.
	DontCache bool
}

// Open opens the stack whose top layer, descriptor or bundle directory is at
// path.
//
// Errors wrap layers.ErrFormat, ErrUnsupported, ErrCorrupt, ErrInUse (another
// program holds one of the files) or ErrPolicy (the message names the flag
// that permits it), or are those of the operating system.
func Open(ctx context.Context, path string, o Options) (*layers.Stack, error) {
	s, _, err := openStack(ctx, path, o)
	return s, err
}

func openStack(ctx context.Context, path string, o Options) (_ *layers.Stack, _ *opener, err error) {
	op, err := newOpener(ctx, path, o)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			op.abandon()
		}
		op.policy.close()
	}()
	if err := op.openTop(path); err != nil {
		return nil, nil, err
	}
	if o.Scratch && !o.Flat {
		if err := op.addScratch(); err != nil {
			return nil, nil, err
		}
	}
	s, err := layers.NewStack(op.pile, layers.StackOptions{
		Writable: (o.Writable || o.Scratch) && !o.Flat,
		Cache:    op.cache,
		Closers:  op.closers,
	})
	if err != nil || !o.Flat {
		return s, op, err
	}
	flat, err := op.flat(s)
	if err != nil {
		_ = s.Close()                  // nothing was changed
		op.pile, op.closers = nil, nil // which were its own
		return nil, nil, err
	}
	return flat, op, nil
}

// opener collects the layers of one stack.
type opener struct {
	ctx    context.Context // of the one call of Open that the opener serves
	path   string          // the image named
	o      Options
	policy *policy
	cache  *layers.Cache
	seen   map[fileID]string
	pile   []layers.Layer
	named  string            // the descriptor that the user named, "" if none
	bundle []layers.Snapshot // snapshots of the ploop bundle, if it is one
	found  []Traced          // every image come upon, opened or not
	xmls   []string          // descriptors come upon
	// closers are what the stack holds besides its layers (locks of bundles).
	closers []io.Closer
}

type fileID struct{ dev, ino uint64 }

func newOpener(ctx context.Context, path string, o Options) (*opener, error) {
	if o.Flat && o.Writable && !o.Scratch {
		return nil, fmt.Errorf("%s: %w: a flat view is read-only or thrown away", path, layers.ErrUnsupported)
	}
	if o.Writable && !o.Scratch && o.Snapshot != "" && !o.Lower {
		return nil, errSnapshot(path, o.Snapshot)
	}
	if err := checkFormat(o.Format); err != nil {
		return nil, err
	}
	if err := checkFormat(o.BackingFormat); err != nil {
		return nil, err
	}
	size := o.CacheSize
	if size == 0 {
		size = layers.DefaultCacheSize
	}
	p, err := newPolicy(path, o.AllowPaths)
	if err != nil {
		return nil, err
	}
	return &opener{
		path: path,
		ctx:  ctx, o: o, policy: p,
		cache: layers.NewCache(size),
		seen:  map[fileID]string{},
	}, nil
}

// abandon closes everything after an error.
func (op *opener) abandon() {
	for _, l := range op.pile {
		_ = l.Close() // nothing was changed yet
	}
	for _, c := range op.closers {
		_ = c.Close()
	}
}

// writableLayer reports whether the layer about to be opened takes the
// stack's changes.
func (op *opener) writableLayer() bool {
	return len(op.pile) == 0 && op.o.Writable && !op.o.Scratch
}

// errSnapshot refuses to write to a snapshot.
func errSnapshot(path, name string) error {
	return &layers.ImageError{Path: path, Layer: 0, Offset: -1, Field: "snapshot", Value: name,
		Err: fmt.Errorf("%w: writing to a snapshot (--scratch writes to a throw-away layer)", layers.ErrUnsupported)}
}

// errDepth is a chain that does not end where it should.
func errDepth(path string) error {
	return &layers.ImageError{Path: path, Layer: layers.MaxDepth, Offset: -1, Field: "parent",
		Err: fmt.Errorf("%w: more than %d layers", layers.ErrUnsupported, layers.MaxDepth)}
}
