// Package crash cuts the power at every moment of everything that changes a
// file.
//
// Design note. An Op is one line of a table: how its image is made, and the
// operation, which works on files that a backend.Recorder watches. The log is
// cut into epochs at every sync, and from it every state is rebuilt that a
// power cut may leave (backend.States has the rule). Each state is judged:
//
//   - it opens, and every byte of the guest has a value that it had at some
//     moment between the last completed sync and the cut,
//   - internal snapshots show what they always showed,
//   - our own checker finds leaks at most,
//   - doing the interrupted operation again ends where it would have ended,
//   - qemu-img check and ploop check agree, for a sample.
//
// An Op can replace these rules by its own (Judge), as a repair does, whose
// image is damaged to begin with.
//
// The negative control is part of the harness: each sync in turn is left out,
// and some state must then be judged bad. A sync whose absence does no harm is
// named in the table with the reason; a name that fits nothing is a failure,
// too.
//
// Operations on names (descriptors, bundles) are recorded from outside, by
// tracing a real process: see trace.go.
package crash

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
)

// ImageFile is the name of the image among the files of an Op.
const ImageFile = "image"

// Image is what an Op starts from.
type Image struct {
	Format string // qcow2, ploop or raw
	// Files are the files by name; ImageFile is the image.
	Files map[string]*backend.Mem
	// Below is what lies under the image.
	Below []byte
	// Snapshots are names of internal snapshots that must never change.
	Snapshots []string
}

// Op is one operation that changes files.
type Op struct {
	Name string
	// Setup makes the image, durable and closed. Seeds make variants.
	Setup func(seed uint64) (*Image, error)
	// Run does the operation. It is called again on what a power cut left and
	// must then do the same to the guest.
	Run func(ctx context.Context, s *Session) error
	// Judge replaces the rules of the package comment; it may call
	// State.Standard for them.
	Judge func(ctx context.Context, st *State) error
	// Fixed is set when seeds make no difference.
	Fixed bool
	// May are codes of findings that a power cut may leave although they are
	// worse than leaks.
	May []string
}

// Options bound a run of an Op.
type Options struct {
	// States is how many distinct states are wanted. Further seeds are run
	// until there are that many.
	States int
	// Full enumerates all that backend.States knows of; else about States are
	// chosen at random.
	Full bool
	// Oracle is asked about one state in Sample (0: none).
	Oracle func(st *State) error
	Sample int
	// Seed is the first.
	Seed uint64
	// Controls collects what is known of the syncs of the whole table.
	Controls *Controls
}

// Controls are the negative controls of a table of operations: for each place
// in the code that syncs, whether some state is bad without it. It may be used
// concurrently.
type Controls struct {
	mu      sync.Mutex
	noticed map[string]string // the operation and what went wrong
	tried   map[string]int
}

// Counts are the places that sync, and how many of them are noticed when they
// are left out.
func (c *Controls) Counts() (places, noticed int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.tried), len(c.noticed)
}

// Verify says which syncs nothing needed. harmless names those that may be
// left out: a part of their site, and why nothing is lost without them. A name
// that fits no sync, or one that is needed, is an error as well.
func (c *Controls) Verify(harmless map[string]string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	fits := map[string]bool{}
	for _, site := range slices.Sorted(maps.Keys(c.tried)) {
		named := false
		for part := range harmless {
			if strings.Contains(site, part) {
				named, fits[part] = true, true
			}
		}
		switch why, found := c.noticed[site]; {
		case found && named:
			errs = append(errs, fmt.Errorf("named as harmless, but without %s: %s", site, why))
		case !found && !named:
			errs = append(errs, fmt.Errorf("nothing notices when this sync is left out (%d times): %s", c.tried[site], site))
		}
	}
	for part := range harmless {
		if !fits[part] {
			errs = append(errs, fmt.Errorf("named as harmless, but nothing syncs there: %s", part))
		}
	}
	return errors.Join(errs...)
}

func (c *Controls) try(site string) (known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tried == nil {
		c.tried, c.noticed = map[string]int{}, map[string]string{}
	}
	c.tried[site]++
	return c.noticed[site] != ""
}

func (c *Controls) notice(site, why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noticed[site] = why
}

// Report is what a run has seen.
type Report struct {
	Op       string
	Seeds    int
	Epochs   int
	States   int // judged
	Distinct int // of these, with different bytes
	Oracle   int // shown to another program
	Syncs    int // calls
}

// Examine runs an Op with as many seeds as it takes.
func Examine(ctx context.Context, op Op, o Options) (*Report, error) {
	rep := &Report{Op: op.Name}
	seen := map[uint64]bool{}
	stuck := 0 // seeds in a row that brought nothing new
	for n := uint64(0); n < maxSeeds; n++ {
		r, err := record(ctx, op, o.Seed+n)
		if err != nil {
			return rep, fmt.Errorf("%s, seed %d: %w", op.Name, o.Seed+n, err)
		}
		before := len(seen)
		if err := r.judgeAll(ctx, o, rep, seen); err != nil {
			return rep, fmt.Errorf("%s, seed %d: %w", op.Name, o.Seed+n, err)
		}
		if o.Controls != nil && n < controlSeeds {
			r.controls(ctx, o.Controls)
		}
		rep.Seeds++
		rep.Syncs += r.rec.SyncCalls()
		rep.Distinct = len(seen)
		if len(seen) > before {
			stuck = 0
		} else {
			stuck++
		}
		if n+1 >= controlSeeds && (len(seen) >= o.States || stuck == 5 || op.Fixed) {
			break
		}
	}
	return rep, nil
}

// maxSeeds bounds the seeds of one run; the syncs of the first ones are left
// out.
const (
	maxSeeds     = 400
	controlSeeds = 5
)

// recording is an Op that ran.
type recording struct {
	op    Op
	seed  uint64
	image *Image
	rec   *backend.Recorder
	names []string
	sess  *Session
	sites []string // who called each sync
	final map[string]*backend.Mem
	// verdicts are those on contents judged before, as far as they do not
	// depend on what had been promised.
	verdicts map[uint64]error
}

func record(ctx context.Context, op Op, seed uint64) (*recording, error) {
	img, err := op.Setup(seed)
	if err != nil {
		return nil, fmt.Errorf("setup: %w", err)
	}
	r := &recording{op: op, seed: seed, image: img, rec: backend.NewRecorder(), final: map[string]*backend.Mem{}}
	files := map[string]backend.File{}
	for _, name := range slices.Sorted(maps.Keys(img.Files)) {
		m := img.Files[name].Clone()
		r.final[name] = m
		f, err := r.rec.Wrap(m)
		if err != nil {
			return nil, err
		}
		files[name] = f
		r.names = append(r.names, name)
	}
	dir, err := dirOf(r.names, func(name string) (backend.File, error) {
		if f := files[name]; f != nil {
			return f, nil
		}
		r.names = append(r.names, name)
		r.final[name] = backend.NewMem(name)
		return r.rec.Wrap(r.final[name])
	})
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	dir.SetHook(func(a layertest.Access) layertest.Verdict {
		if a.Op == "sync" {
			mu.Lock()
			defer mu.Unlock()
			r.sites = append(r.sites, layertest.SyncSite())
		}
		return layertest.Verdict{}
	})
	r.sess, err = newSession(ctx, img, dir, seed, r.rec.Syncs)
	if err != nil {
		return nil, fmt.Errorf("the image before: %w", err)
	}
	if err := op.Run(ctx, r.sess); err != nil {
		return nil, fmt.Errorf("without a power cut: %w", err)
	}
	return r, nil
}

// dirOf is a Dir in which the named files exist.
func dirOf(names []string, file func(name string) (backend.File, error)) (*layertest.Dir, error) {
	dir := layertest.NewDir(file)
	for _, name := range names {
		f, err := dir.Open(name, true)
		if err != nil {
			return nil, err
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
	return dir, nil
}

// state is the State for a state of the backend.
func (r *recording) state(s *backend.State) (*State, error) {
	files := map[string]*backend.Mem{}
	for i, name := range r.names {
		files[name] = s.Files[i]
	}
	dir, err := dirOf(r.names, func(name string) (backend.File, error) {
		if f := files[name]; f != nil {
			return f, nil
		}
		return backend.NewMem(name), nil
	})
	if err != nil {
		return nil, err
	}
	return &State{r: r, cut: s, Dir: dir, Files: files, Completed: s.Completed, Done: s.Completed == r.rec.Syncs()}, nil
}

// judgeAll judges the states of one recording.
func (r *recording) judgeAll(ctx context.Context, o Options, rep *Report, seen map[uint64]bool) error {
	so := backend.StateOptions{Seed: r.seed}
	if !o.Full {
		so.Random = 40
		so.MaxPerEpoch = max(3, o.States/(r.rec.SyncCalls()+1))
	}
	rep.Epochs += r.rec.SyncCalls() + 1
	r.verdicts = map[uint64]error{}
	for s := range r.rec.States(so) {
		st, err := r.state(s)
		if err != nil {
			return err
		}
		sum := hashOf(s.Files)
		rep.States++
		fresh := !seen[sum]
		seen[sum] = true
		if fresh && o.Sample > 0 && len(seen)%o.Sample == 0 && o.Oracle != nil {
			rep.Oracle++
			if err := o.Oracle(st); err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
		}
		if err := r.judge(ctx, st); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	return nil
}

func hashOf(files []*backend.Mem) uint64 {
	sum := uint64(0)
	for _, f := range files {
		sum = sum*0x9e3779b97f4a7c15 + f.Hash()
	}
	return sum
}

func (r *recording) judge(ctx context.Context, st *State) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	if r.op.Judge != nil {
		return r.op.Judge(ctx, st)
	}
	return st.Standard(ctx)
}

// controls leaves out each sync in turn.
func (r *recording) controls(ctx context.Context, c *Controls) {
	for i, site := range r.sites {
		if c.try(site) {
			continue
		}
		r.verdicts = map[uint64]error{}
		so := backend.StateOptions{Seed: r.seed, IgnoreSync: i + 1, Exhaustive: 6, Random: 30, MaxPerEpoch: 40}
		for s := range r.rec.States(so) {
			if s.Epoch < i { // nothing is missing yet
				continue
			}
			st, err := r.state(s)
			if err == nil {
				err = r.judge(ctx, st)
			}
			if err != nil {
				c.notice(site, fmt.Sprintf("%s: %v", r.op.Name, err))
				break
			}
		}
	}
}
