package layertest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/imagestack/imagestack/backend"
)

// recording is a script that ran over recorded files.
type recording struct {
	f      Factory
	rec    *backend.Recorder
	names  []string // of the files, in the order of State.Files
	below  *Below
	size   int64
	script []change
	// before and after are the number of completed syncs when a change began
	// and when it had returned.
	before, after []int
	sites         []string // who called each sync
}

// record makes an image and runs a script on it, from opening to closing.
func record(f Factory, d draw) (*recording, error) {
	size := smallSize(d, f)
	r := &recording{f: f, rec: backend.NewRecorder(), size: size, below: valueBelow(d, f, size)}
	r.script = drawScript(d, size, f.Granule, 16, d("reopen", 0, 3) == 0)
	// The end is a close: the last change of a script is never forgotten.
	r.script = append(r.script, change{kind: doSync})
	plain := NewMemDir()
	if err := f.Create(context.Background(), plain, size); err != nil {
		return nil, err
	}
	dir, err := r.wrap(plain)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	dir.SetHook(func(a Access) Verdict {
		if a.Op == "sync" {
			mu.Lock()
			defer mu.Unlock()
			r.sites = append(r.sites, SyncSite())
		}
		return Verdict{}
	})
	e, err := openEditor(f, dir)
	if err != nil {
		return nil, err
	}
	for _, c := range r.script {
		r.before = append(r.before, r.rec.Syncs())
		if c.kind == doReopen {
			if err = e.Close(); err == nil {
				e, err = openEditor(f, dir)
			}
		} else {
			err = c.apply(e, r.below)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c, err)
		}
		r.after = append(r.after, r.rec.Syncs())
	}
	return r, e.Close()
}

// wrap gives the files of a Dir to the recorder.
func (r *recording) wrap(plain *Dir) (*Dir, error) {
	dir := NewDir(func(name string) (backend.File, error) {
		r.names = append(r.names, name)
		return r.rec.Wrap(backend.NewMem(name))
	})
	for _, name := range slices.Sorted(maps.Keys(plain.files)) {
		f, err := r.rec.Wrap(plain.files[name])
		if err != nil {
			return nil, err
		}
		r.names = append(r.names, name)
		dir.files[name] = f
	}
	return dir, nil
}

// SyncSite tells which code asked for a sync, when it is called from a Hook:
// the innermost two callers outside of the packages that record.
func SyncSite() string {
	var pcs [24]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs[:])])
	var list []string
	for {
		f, more := frames.Next()
		in := !strings.Contains(f.File, "imgtest/layertest/") && !strings.Contains(f.File, "imgtest/crash/") ||
			strings.HasSuffix(f.File, "ref_test.go")
		if in && !strings.Contains(f.Function, "/backend.") {
			list = append(list, fmt.Sprintf("%s (%s:%d)", path.Base(f.Function), path.Base(f.File), f.Line))
		}
		if !more || len(list) == 2 {
			return strings.Join(list, " < ")
		}
	}
}

// allowed is what the disk may hold after a power cut, when that many syncs
// had completed.
func (r *recording) allowed(completed int) []uint64 {
	h := newHistory(r.f, r.size, r.below)
	for i, c := range r.script {
		if r.before[i] > completed {
			break
		}
		h.begins(c)
		if r.after[i] <= completed || c.kind == doWrite || c.kind == doZero {
			h.done(c)
		}
	}
	return h.disk
}

// examine checks the states that power cuts may leave. ignore is the number of
// a sync that is left out, 0 for none.
func (r *recording) examine(o backend.StateOptions) error {
	completed := -1
	var allowed []uint64
	for s := range r.rec.States(o) {
		if s.Completed != completed {
			completed = s.Completed
			allowed = r.allowed(completed)
		}
		dir := r.files(s)
		if err := r.state(dir, allowed); err != nil {
			return fmt.Errorf("%s, %d bytes, below %d bytes: %w\n%s\nscript:\n%s", r.f.Name, r.size, len(r.below.content), err, s, r.trace(completed))
		}
	}
	return nil
}

// files is the Dir of a state.
func (r *recording) files(s *backend.State) *Dir {
	dir := NewMemDir()
	for i, f := range s.Files {
		dir.files[r.names[i]] = f
	}
	return dir
}

func (r *recording) trace(completed int) string {
	var b strings.Builder
	for i, c := range r.script {
		mark := "may be there "
		switch {
		case r.after[i] <= completed && (c.kind == doSync || c.kind == doReopen):
			mark = "completed    "
		case r.before[i] > completed:
			mark = "not begun    "
		}
		fmt.Fprintf(&b, "%s syncs %d to %d: %s\n", mark, r.before[i], r.after[i], c)
	}
	return b.String()
}

// state checks one image as a power cut left it.
func (r *recording) state(dir *Dir, allowed []uint64) error {
	ctx := context.Background()
	l, err := r.f.Open(ctx, dir, false)
	if err != nil {
		return fmt.Errorf("open for reading after the power cut: %w", err)
	}
	if err := errors.Join(checkLayer(l, r.below, allowed), l.Close()); err != nil {
		return fmt.Errorf("after the power cut: %w", err)
	}
	if err := dir.misuse(true); err != nil {
		return err
	}
	if r.f.Inspect != nil {
		if err := r.f.Inspect(ctx, dir); err != nil {
			return fmt.Errorf("inspection after the power cut: %w", err)
		}
	}
	if err := reuse(r.f, dir, r.below, allowed); err != nil {
		return fmt.Errorf("used after the power cut: %w", err)
	}
	if r.f.Inspect != nil {
		if err := r.f.Inspect(ctx, dir); err != nil {
			return fmt.Errorf("inspection of the image used after the power cut: %w", err)
		}
	}
	return nil
}

// checkCrash cuts the power at every moment of a short script.
func checkCrash(f Factory, d draw) error {
	r, err := record(f, d)
	if err != nil {
		return err
	}
	return r.examine(backend.StateOptions{Exhaustive: 4, Random: 12, MaxPerEpoch: 16, Seed: uint64(d("states", 0, 1<<30))})
}

// SyncReport tells for each place in the code that syncs whether the power-cut
// check notices its absence.
type SyncReport struct {
	Noticed map[string]error // the first thing that went wrong without it
	Never   []string         // places whose syncs nothing noticed
}

// NeedlessSyncs is the negative control of the power-cut check: in each of
// seeds random scripts each sync in turn is left out, and the check must fail
// for at least one of every place that syncs. A place in Never is either not
// needed or needs a sharper check.
func NeedlessSyncs(f Factory, seeds uint64) (SyncReport, error) {
	report := SyncReport{Noticed: make(map[string]error)}
	tried := make(map[string]int)
	for seed := range seeds {
		r, err := record(f, seeded(seed))
		if err != nil {
			return report, err
		}
		for i, site := range r.sites {
			if _, ok := report.Noticed[site]; ok {
				continue
			}
			tried[site]++
			err := guard(func() error {
				return r.examine(backend.StateOptions{Exhaustive: 4, Random: 12, MaxPerEpoch: 16, Seed: seed, IgnoreSync: i + 1})
			})
			if err != nil {
				report.Noticed[site] = err
			}
		}
	}
	for site := range tried {
		if _, ok := report.Noticed[site]; !ok {
			report.Never = append(report.Never, fmt.Sprintf("%s (left out %d times)", site, tried[site]))
		}
	}
	sort.Strings(report.Never)
	return report, nil
}

// RunSyncs fails for every place that syncs without anybody noticing when it
// does not, except those that contain one of the given strings (the test says
// why they are there).
func RunSyncs(t *testing.T, f Factory, seeds uint64, except ...string) {
	t.Helper()
	report, err := NeedlessSyncs(f, seeds)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Noticed) == 0 {
		t.Errorf("no sync was noticed to be missing; never: %q", report.Never)
	}
	for _, site := range report.Never {
		if !slices.ContainsFunc(except, func(e string) bool { return strings.Contains(site, e) }) {
			t.Errorf("nothing notices when this sync is left out: %s", site)
		}
	}
}
