package rewrite

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
)

// target is the layer to work on, as the top of a stack.
type target struct {
	stack  *layers.Stack
	path   string // of the image file
	format string
	record recordStore
	layer  layers.HostSpace
	reloc  layers.Relocator // nil when open for reading
	// above is what is free for the guest in the views above the layer, nil
	// when there are none.
	above *[]blockmap.Range
	files []string             // whose sizes count
	sizes func() (Size, error) // of files without a name
	name  string               // of the image file in its directory, for the record
	notes []string             // for the report
	// pending tells that an interrupted run has left its record, ours that it
	// is the record of this image.
	pending, ours bool
}

// mode is what a target is opened for.
type mode uint8

const (
	estimating mode = iota
	compacting
	resuming
	abandoning
)

// openTarget opens what path and o.Layer name. To resume, it takes the other
// options from the record.
func openTarget(ctx context.Context, path string, o *Options, m mode) (_ *target, err error) {
	trace, err := open.Follow(ctx, path, o.Open)
	if err != nil {
		return nil, err
	}
	if o.Layer < 0 || o.Layer >= len(trace.Images) {
		if trace.Err != nil {
			return nil, trace.Err
		}
		return nil, fmt.Errorf("%s: layer %d: the stack has %d layers: %w", path, o.Layer, len(trace.Images), layers.ErrUnsupported)
	}
	notes, err := checkChildren(ctx, trace, o)
	if err != nil {
		return nil, err
	}
	at := trace.Images[o.Layer]
	t := &target{path: at.Path, format: at.Format, notes: notes}
	// Beside the file itself, where everybody finds it who knows another name.
	real, err := filepath.EvalSymlinks(at.Path)
	if err != nil {
		return nil, err
	}
	t.record, t.name = fileRecord(real+recordSuffix), filepath.Base(real)
	if err := t.onDevice(); err != nil {
		return nil, err
	}
	if err := t.readRecord(o, m); err != nil {
		if busy := t.stillRunning(ctx, path, o, at, err); busy != nil {
			return nil, busy
		}
		if errors.Is(err, ErrNotPending) {
			err = elsewhere(trace, o.Layer, err)
		}
		return nil, err
	}
	oo := o.Open
	var above marks
	if o.Layer > 0 {
		if above, err = marksOf(trace.Images[:o.Layer]); err != nil {
			return nil, err
		}
		if o.Guest && m != abandoning {
			if err := t.freeAbove(ctx, path, o, trace.Images[:o.Layer]); err != nil {
				return nil, err
			}
		}
		path, oo = alone(o.Open, path, at)
	}
	oo.Writable, oo.Scratch = m != estimating, false
	if t.stack, err = open.Open(ctx, path, oo); err != nil {
		return nil, err
	}
	// The views had to be closed before, because they hold the layer for
	// reading. Whoever opens one of them from now on needs it, too.
	if err = above.check(); err == nil {
		err = t.attach(m != estimating)
	}
	if err == nil && m != estimating {
		err = sameBundle(trace, o, t.layer.Data().Name())
	}
	if err != nil {
		return nil, errors.Join(err, t.stack.Close())
	}
	return t, nil
}

// size is how large the files of the layer are together.
func (t *target) size() (Size, error) {
	if t.sizes != nil {
		return t.sizes()
	}
	return sizeOf(t.files)
}

// beside is the length of an external data file, which stays.
func (t *target) beside() (int64, error) {
	if t.sizes != nil {
		return 0, nil
	}
	size, err := sizeOf(t.files[1:])
	return size.Apparent, err
}

// sizeOf is how large the files are together.
func sizeOf(files []string) (Size, error) {
	var sum Size
	for _, path := range files {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return sum, &fs.PathError{Op: "stat", Path: path, Err: err}
		}
		sum.Apparent += st.Size
		sum.Allocated += st.Blocks * 512
	}
	return sum, nil
}

// freeAbove finds what is free for the guest in every view above the layer.
func (t *target) freeAbove(ctx context.Context, path string, o *Options, above []open.Traced) error {
	for _, v := range above {
		view, oo := alone(o.Open, path, v)
		s, err := open.Open(ctx, view, oo)
		if err != nil {
			return err
		}
		rep, err := guestfs.Free(ctx, s.ReaderAt(ctx), s.Size(), freeOptions(o, 0))
		if err = errors.Join(err, s.Close()); err != nil {
			return err
		}
		free := rep.Free
		// What lies behind the end of a shorter view is kept.
		if t.above != nil {
			free = intersect(*t.above, free)
		}
		t.above = &free
	}
	return nil
}

func freeOptions(o *Options, smallest int64) guestfs.Options {
	return guestfs.Options{Gaps: o.Gaps, Swap: o.Swap, MinRange: smallest}
}

// marks tell whether files were changed.
type marks map[string]os.FileInfo

func marksOf(images []open.Traced) (marks, error) {
	m := marks{}
	for _, i := range images {
		st, err := os.Stat(i.Path)
		if err != nil {
			return nil, err
		}
		m[i.Path] = st
	}
	return m, nil
}

func (m marks) check() error {
	for path, was := range m {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		if !os.SameFile(was, st) || st.Size() != was.Size() || !st.ModTime().Equal(was.ModTime()) {
			return fmt.Errorf("%s: %w: it was changed just now", path, layers.ErrInUse)
		}
	}
	return nil
}

// attach finds out what the top layer can do.
func (t *target) attach(writable bool) error {
	top := t.stack.Layers()[0]
	l, ok := top.(layers.HostSpace)
	if !ok {
		return fmt.Errorf("%s: %w: the format %s cannot be compacted", t.path, layers.ErrUnsupported, t.format)
	}
	t.layer = l
	t.files = []string{t.path}
	if data := top.Data().Name(); !sameFile(data, t.path) {
		t.files = append(t.files, data) // external
	}
	if !writable {
		return nil
	}
	if t.reloc, ok = top.(layers.Relocator); !ok {
		return fmt.Errorf("%s: %w: the format %s cannot be compacted", t.path, layers.ErrUnsupported, t.format)
	}
	t.stack.Alone()
	return nil
}

// alone is how a layer of the stack at path is opened as the top of what lies
// below it.
func alone(o open.Options, path string, layer open.Traced) (string, open.Options) {
	if st, err := os.Stat(path); err != nil || !st.IsDir() {
		path = filepath.Dir(path)
	}
	o.AllowPaths = append(slices.Clone(o.AllowPaths), path)
	o.Writable, o.Scratch = false, false
	if layer.Descriptor != "" {
		o.Format, o.Snapshot, o.Lower = "", layer.GUID, true
		return layer.Descriptor, o
	}
	o.Format = layer.Format
	return layer.Path, o
}

// onDevice sees to images on block devices, beside which no record can lie and
// which have no end to cut off: a raw one can give space back nevertheless, and
// needs no record.
func (t *target) onDevice() error {
	st, err := os.Stat(t.path)
	if err != nil || st.Mode().IsRegular() {
		return err
	}
	if t.format != "raw" {
		return fmt.Errorf("%s: %w: on a block device nothing is gained: its length stays", t.path, layers.ErrUnsupported)
	}
	t.record = noRecord{}
	t.sizes = func() (Size, error) { return Size{t.layer.Size(), t.layer.Size()}, nil }
	return nil
}

func sameFile(a, b string) bool {
	sa, erra := os.Stat(a)
	sb, errb := os.Stat(b)
	return erra == nil && errb == nil && os.SameFile(sa, sb)
}

// readRecord looks whether an interrupted run has left its record.
func (t *target) readRecord(o *Options, m mode) error {
	r, err := t.record.load()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if m == resuming || m == abandoning {
			return fmt.Errorf("%s: %w", t.path, ErrNotPending)
		}
		return nil
	case errors.Is(err, ErrNotRecord) && m == estimating:
		t.notes = append(t.notes, err.Error())
		return nil
	case errors.Is(err, ErrNotRecord):
		return err
	case m == compacting:
		return fmt.Errorf("%s: %w: image-compact --resume continues it, --abandon gives it up", t.path, ErrPending)
	case m == resuming && err != nil:
		return fmt.Errorf("%w; --abandon removes it", err)
	case m == resuming && (r.Image != t.name || r.Layer > o.Layer):
		// Of a layer that has got more layers above it all views are known.
		return fmt.Errorf("%s: its record is not of this run, but of one on layer %d of %s: "+
			"image-compact --resume with the image and the --layer it was begun with, or --abandon", t.path, r.Layer, r.Image)
	case m == resuming:
		r.restore(o)
	}
	t.pending, t.ours = true, err == nil && r.Image == t.name
	return nil
}

// elsewhere adds to an error which other layers have a record.
func elsewhere(trace *open.Trace, layer int, err error) error {
	for i, image := range trace.Images {
		real, e := filepath.EvalSymlinks(image.Path)
		if e != nil || i == layer {
			continue
		}
		if _, e = fileRecord(real + recordSuffix).load(); e == nil {
			err = fmt.Errorf("%w; layer %d has one: --layer %d", err, i, i)
		}
	}
	return err
}

// stillRunning is the error of opening an image whose run is not interrupted
// but under way, nil otherwise. It opens for reading: a run that is under way
// shuts out readers, too, and a ploop image that was not closed would be taken
// over by who opens it for writing.
func (t *target) stillRunning(ctx context.Context, path string, o *Options, at open.Traced, err error) error {
	if !errors.Is(err, ErrPending) {
		return nil
	}
	oo := o.Open
	if o.Layer > 0 {
		path, oo = alone(o.Open, path, at)
	}
	oo.Writable, oo.Scratch = false, false
	s, err := open.Open(ctx, path, oo)
	if err == nil {
		err = s.Close()
	}
	if errors.Is(err, layers.ErrInUse) {
		return err
	}
	return nil
}

// guestFree is what is free for the guest in every view of the layer.
func (t *target) guestFree(ctx context.Context, o *Options) ([]blockmap.Range, []guestfs.Area, error) {
	rep, err := guestfs.Free(ctx, t.stack.ReaderAt(ctx), t.stack.Size(), freeOptions(o, t.layer.Granule()))
	if err != nil {
		return nil, nil, err
	}
	if t.above != nil {
		return intersect(*t.above, rep.Free), rep.Areas, nil
	}
	return rep.Free, rep.Areas, nil
}

// intersect is what is in both of two ascending lists of disjoint ranges.
func intersect(a, b []blockmap.Range) []blockmap.Range {
	var out []blockmap.Range
	for len(a) > 0 && len(b) > 0 {
		from, to := max(a[0].Off, b[0].Off), min(a[0].End(), b[0].End())
		if from < to {
			out = append(out, blockmap.Range{Off: from, Len: to - from})
		}
		if a[0].End() < b[0].End() {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return out
}
