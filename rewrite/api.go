package rewrite

import (
	"context"
	"errors"

	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
)

// Options say what to do. The zero value does everything that is always safe,
// without the guest's free space.
type Options struct {
	// Open says how to open the image; Writable and Scratch are set here.
	Open open.Options
	// Layer is the layer to work on, 0 is the top.
	Layer int
	// ChildDirs are further directories in which images are looked for that
	// stand on the layer; its own is always looked at.
	ChildDirs []string
	// Guest drops what the guest's filesystems do not use. It must not be set
	// for the disk of a guest that is suspended: its memory may know more.
	Guest bool
	// Gaps and Swap are those of guestfs.Options.
	Gaps, Swap bool
	// KeepZeros leaves stored clusters of zeros alone.
	KeepZeros bool
	// DedupParent drops clusters that are equal to what the layers below show.
	DedupParent bool
	// MostLeaked admits an image of which more is leaked than in use: one whose
	// map was lost looks like that, too.
	MostLeaked bool
	// MaxExtra is the extra space at the peak, in bytes; 0 means
	// DefaultMaxExtra.
	MaxExtra int64
	// RateLimit bounds what is read and moved, in bytes a second; 0 is no
	// limit.
	RateLimit int64
	// Progress, unless it is nil, is called often, from one goroutine at a
	// time.
	Progress func(Progress)
}

// DefaultMaxExtra is the extra space that a run takes at the peak, in bytes.
const DefaultMaxExtra = 64 << 20

// Progress is how far a run has come.
type Progress struct {
	Phase       Phase
	Done, Total int64 // bytes
}

// Phase is a part of a run.
type Phase string

// The phases, in their order.
const (
	PhaseCheck Phase = "check"          // references are checked
	PhaseGuest Phase = "guest-free"     // free space of the guest is dropped
	PhaseZeros Phase = "zeros"          // zeros are looked for
	PhaseDedup Phase = "same-as-parent" // equal clusters are looked for
	PhaseLeaks Phase = "leaks"
	PhaseTail  Phase = "tail" // the end of the file is moved
)

// Size is how large a file is.
type Size struct {
	Apparent  int64 `json:"apparent"`  // bytes, as ls shows
	Allocated int64 `json:"allocated"` // bytes of storage, as du shows
}

// Step is what one step reclaims, or has reclaimed.
type Step struct {
	Name Phase `json:"name"`
	// Bytes of the image file in whole clusters. What an internal snapshot
	// shares is not counted: dropping it gives nothing back. For the tail:
	// bytes by which the file gets shorter beyond what is dropped.
	Bytes int64 `json:"bytes"`
	// Guest is the bytes of the virtual disk that are concerned.
	Guest int64 `json:"guest-bytes,omitempty"`
	// Skipped says why a step is not done at all.
	Skipped string `json:"skipped,omitempty"`
}

// Report is the estimate of a run, or what one has achieved.
type Report struct {
	Image       string `json:"image"` // file of the layer that is worked on
	Format      string `json:"format"`
	Layer       int    `json:"layer"`
	VirtualSize int64  `json:"virtual-size"`
	ClusterSize int64  `json:"cluster-size"`
	Before      Size   `json:"before"`
	After       *Size  `json:"after,omitempty"` // of a run
	Steps       []Step `json:"steps"`
	// Ideal is the length of the file in bytes when every cluster that is
	// needed lies without a hole.
	Ideal int64 `json:"ideal"`
	// Move is the bytes that will be, or were, moved.
	Move int64 `json:"moved"`
	// Extra is the extra space needed at the peak, bytes.
	Extra int64 `json:"extra-space"`
	// Guest is what was judged of the guest's filesystems, and why not.
	Guest []guestfs.Area `json:"-"`
	// Notes are what the user should know: features that limit the result.
	Notes []string `json:"notes,omitempty"`
	// Pending tells that the run was interrupted or failed and has left its
	// record: Resume or Abandon it.
	Pending bool `json:"-"`
	// Resumed tells that the run continued an interrupted one.
	Resumed bool `json:"resumed,omitempty"`
}

// Estimate says what Compact would do. Nothing is written.
//
// Errors of all four functions: layers.ErrInUse, ErrCorrupt (run image-fsck),
// ErrUnsupported, ErrPolicy, ErrBase, ErrPending, ErrNotPending, or those of
// the operating system.
func Estimate(ctx context.Context, path string, o Options) (*Report, error) {
	t, err := openTarget(ctx, path, &o, estimating)
	if err != nil {
		return nil, err
	}
	j, err := newJob(ctx, t, o)
	if err == nil {
		if t.pending {
			j.r.Notes = append(j.r.Notes, "an earlier run was interrupted: --resume or --abandon it")
		}
		err = j.estimate()
	}
	return j.r, errors.Join(err, t.stack.Close())
}

// Compact makes the image smaller. When ctx ends it stops at a consistent
// point with ctx's error, and the record stays: Resume or Abandon go on.
// Another error leaves a consistent image as well, and the report, if there is
// one, says how far it came.
func Compact(ctx context.Context, path string, o Options) (*Report, error) {
	return change(ctx, path, o, compacting)
}

// Resume continues an interrupted run with the options of its record; of o
// only Open, Layer, MaxExtra, RateLimit and Progress count.
func Resume(ctx context.Context, path string, o Options) (*Report, error) {
	return change(ctx, path, o, resuming)
}

// Abandon gives an interrupted run up: it frees what the run left and removes
// the record.
func Abandon(ctx context.Context, path string, o Options) (*Report, error) {
	return change(ctx, path, o, abandoning)
}

// change opens an image for writing, changes it and closes it.
func change(ctx context.Context, path string, o Options, m mode) (*Report, error) {
	t, err := openTarget(ctx, path, &o, m)
	if err != nil {
		return nil, err
	}
	j, err := newJob(ctx, t, o)
	switch {
	case err != nil:
		return nil, errors.Join(err, t.stack.Close())
	case m == abandoning:
		return j.r, j.abandon()
	}
	return j.r, j.compact(m == resuming)
}

// CompactStack does what Compact does to the top layer of a stack that is open
// for writing, without a record: for images that are not files. The stack
// stays open. What the run has done is durable when it returns nil.
func CompactStack(ctx context.Context, s *layers.Stack, o Options) (*Report, error) {
	t := &target{stack: s, record: noRecord{}}
	t.sizes = func() (Size, error) {
		f := s.Layers()[0].Data()
		apparent, err := f.Size()
		if err != nil {
			return Size{}, err
		}
		allocated, err := f.Allocated()
		return Size{apparent, allocated}, err
	}
	if err := t.attach(true); err != nil {
		return nil, err
	}
	j, err := newJob(ctx, t, o)
	if err != nil {
		return nil, err
	}
	if _, err := j.begin(); err != nil {
		return j.r, err
	}
	if err := j.run(); err != nil {
		return j.r, err
	}
	return j.r, j.finish()
}
