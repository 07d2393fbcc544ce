package fsck

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/imagestack/imagestack/backend"
)

// DefaultMemory is the default of Options.Memory in bytes.
const DefaultMemory = 256 << 20

// Options are what a Checker needs to know besides the file.
type Options struct {
	// Memory bounds what the check holds in memory, in bytes, whatever the
	// image says; 0 means DefaultMemory. A check that needs more makes several
	// passes.
	Memory int64
	// Parallel is how many goroutines may walk at the same time; 0 means as
	// many as there are processors.
	Parallel int
	// Data also decodes the payload of compressed clusters.
	Data bool
	// Plan takes the fixes; nil when nothing may be changed. A checker reads
	// the file only through it when it is not nil, so that it sees what it has
	// fixed already.
	Plan *Plan
	// OpenFile opens, for reading, a further file that the image names (an
	// external data file), under the caller's path policy; nil: there is none
	// to be had, which is worth a finding.
	OpenFile func(name string) (backend.File, error)
	// Siblings lists the names of the regular files in the directory of the
	// file, itself included, which OpenFile opens; nil: they are not known.
	Siblings func() ([]string, error)
	// Parent tells that the image stands on another one: what it does not
	// store is not zeros but the parent's. It is also set when that cannot be
	// found out.
	Parent bool
	// GuestFree reports whether the guest's own metadata proves that the guest
	// does not use [off, off+n) of the disk: the evidence by which the owner
	// of a cluster that two places claim is chosen. nil: nothing is known.
	GuestFree func(off, n int64) bool
}

// Budget is Memory with its default.
func (o *Options) Budget() int64 {
	if o.Memory <= 0 {
		return DefaultMemory
	}
	return o.Memory
}

// Reader is what a checker reads the file through: f, or the plan.
func (o *Options) Reader(f backend.File) ReadSizer {
	if o.Plan != nil {
		return o.Plan
	}
	return f
}

// ReadSizer is the read side of a backend.File, and of a Plan.
type ReadSizer interface {
	ReadAt(p []byte, off int64) (int, error)
	Size() (int64, error)
}

// Stats are what a check learns by the way. A field that does not apply is 0.
type Stats struct {
	Format      string `json:"format"`
	VirtualSize int64  `json:"virtual-size"` // bytes
	ClusterSize int64  `json:"cluster-size"` // bytes
	// ImageEnd is the first byte behind the last cluster in use.
	ImageEnd int64 `json:"image-end-offset"`
	// Clusters of the virtual disk: all, those that are stored (compressed
	// ones included), those that do not follow their predecessor in the file,
	// and compressed ones; counted as qemu-img check counts them.
	TotalClusters      int64 `json:"total-clusters"`
	AllocatedClusters  int64 `json:"allocated-clusters"`
	FragmentedClusters int64 `json:"fragmented-clusters"`
	CompressedClusters int64 `json:"compressed-clusters"`
	// Leaked is the number of clusters that are used by nothing.
	LeakedClusters int64 `json:"leaked-clusters"`
	// CheckErrors counts parts that could not be checked (I/O errors).
	CheckErrors int64 `json:"check-errors"`
}

// Sink takes what a walk finds. Its methods may be called concurrently.
type Sink interface {
	// Report records the finding and returns whether its fix is wanted: the
	// checker then enters it in Options.Plan. Without a plan, or without a
	// fix, it is false.
	Report(Finding) bool
	// Progress says how far pass (1, 2, …) has come; the unit is the
	// checker's.
	Progress(pass int, done, total int64)
}

// Checker checks files of one format.
type Checker interface {
	// Format is the name by which the checker is found: "qcow2", "ploop",
	// "ploop-descriptor", "raw".
	Format() string
	// Check walks f and reports everything that is wrong. It never writes to
	// f. What is wrong with the image is a finding and not an error, however
	// bad: a file that is not of the format at all is a finding of severity
	// Fatal. Errors are those of ctx, of memory, and of reading where they
	// prevent any result; single unreadable places are findings and counted
	// in Stats.CheckErrors.
	//
	// With a Plan the walk goes on as if every wanted fix were done; after the
	// plan was executed a second check is clean, but for what could not or
	// should not be fixed. It need not all happen in one round: the tool
	// checks again after a repair, and repairs again while that makes
	// progress.
	Check(ctx context.Context, f backend.File, o Options, sink Sink) (Stats, error)
}

var (
	checkersMu sync.Mutex
	checkers   = map[string]Checker{}
)

// RegisterChecker makes c known; a checker's package calls it at init. It
// panics when the format has one already.
func RegisterChecker(c Checker) {
	checkersMu.Lock()
	defer checkersMu.Unlock()
	if checkers[c.Format()] != nil {
		panic("fsck: two checkers for " + c.Format())
	}
	checkers[c.Format()] = c
}

// CheckerFor returns the checker of a format.
func CheckerFor(format string) (Checker, error) {
	checkersMu.Lock()
	defer checkersMu.Unlock()
	if c := checkers[format]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("no checker for format %q (there are: %v)", format, slices.Sorted(maps.Keys(checkers)))
}

// CheckFile checks f, of the given format, without any plan and returns the
// report. It is for those who have no path, such as crash tests.
func CheckFile(ctx context.Context, f backend.File, format string) (*Report, error) {
	c, err := CheckerFor(format)
	if err != nil {
		return nil, err
	}
	col := NewCollector(CollectorOptions{File: f.Name()})
	stats, err := c.Check(ctx, f, Options{}, col)
	if err != nil {
		return nil, err
	}
	return col.Sum(stats), nil
}
