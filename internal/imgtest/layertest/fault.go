package layertest

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

// faultSizes keeps the fault and crash scripts small.
func smallSize(d draw, f Factory) int64 {
	n := d("clusters", 1, 6)
	return max((n*f.Granule-d("short of a cluster", 0, 1)*512)/f.unit(), 1) * f.unit()
}

// trial is one run of a script with faults.
type trial struct {
	f      Factory
	dir    *Dir
	size   int64
	below  *Below
	script []change
	h      *history
	e      layers.Editor
	at     int // step of the script

	hit      *Access // the first access that failed, nil before
	lastHit  *Access // the last one
	deadSync bool    // a sync of the backend failed: nothing may succeed any more
	shaky    bool    // Sync or Close failed: whether the editor goes on is its choice
}

func (t *trial) errorf(format string, args ...any) error {
	log := ""
	for i, c := range t.script {
		mark := "   "
		if i == t.at {
			mark = "-> "
		}
		log += mark + c.String() + "\n"
	}
	hit := "no access failed"
	if t.hit != nil {
		hit = "failed: " + t.hit.String()
	}
	return fmt.Errorf("%s, %d bytes, below %d bytes, %s: %w\nscript:\n%s", t.f.Name, t.size, len(t.below.content), hit, fmt.Errorf(format, args...), log)
}

// expect judges the outcome of one call, before and after which hit stood as
// given.
func (t *trial) expect(what string, err error, hitBefore *Access, fault error, isSync bool) error {
	fired := t.lastHit != hitBefore
	switch {
	case fired && t.lastHit.Op == "sync":
		if err == nil {
			return t.errorf("%s succeeds although a sync failed", what)
		}
		t.deadSync = true
	case fired && t.lastHit.Op == "write" && err == nil && !t.deadSync:
		return t.errorf("%s succeeds although a write failed", what)
	}
	switch {
	case err == nil && t.deadSync:
		return t.errorf("%s succeeds after a failed sync", what)
	case err == nil:
		return nil
	case fired && !errors.Is(err, fault):
		return t.errorf("%s: %w; the cause %v is lost", what, err, fault)
	case !fired && !t.deadSync && !t.shaky:
		return t.errorf("%s fails without a cause: %w", what, err)
	}
	if isSync {
		t.shaky = true
	}
	return nil
}

func (t *trial) open(fault error) (ok bool, err error) {
	before := t.lastHit
	e, oerr := openEditor(t.f, t.dir)
	if oerr != nil {
		if t.lastHit == before {
			return false, t.errorf("open for writing: %w", oerr)
		}
		if !errors.Is(oerr, fault) {
			return false, t.errorf("open for writing: %w; the cause %v is lost", oerr, fault)
		}
		if err := t.dir.misuse(true); err != nil {
			return false, t.errorf("open that failed: %w", err)
		}
		return false, nil
	}
	if fired := t.lastHit != before; fired && (t.lastHit.Op == "write" || t.lastHit.Op == "sync") {
		return false, t.errorf("open for writing succeeds although it failed to write: %w", errors.Join(e.Close()))
	}
	t.e, t.deadSync, t.shaky = e, false, false
	return true, nil
}

// run does the script; fault is the error that the hook gives.
func (t *trial) run(fault error) error {
	ok, err := t.open(fault)
	if err != nil {
		return err
	}
	for t.at = 0; ok && t.at < len(t.script); t.at++ {
		c := t.script[t.at]
		before := t.lastHit
		if c.kind == doReopen {
			cerr := t.e.Close()
			if err := t.expect("close", cerr, before, fault, true); err != nil {
				return err
			}
			if cerr == nil {
				t.h.done(c)
			} else {
				t.h.undecided()
			}
			if ok, err = t.open(fault); err != nil {
				return err
			}
			continue
		}
		t.h.begins(c)
		cerr := c.apply(t.e, t.below)
		if err := t.expect(c.String(), cerr, before, fault, c.kind == doSync); err != nil {
			return err
		}
		if cerr != nil {
			t.h.failed(c)
		} else {
			t.h.done(c)
		}
		if err := t.readBack(fault); err != nil {
			return err
		}
	}
	t.at = len(t.script)
	if ok {
		before := t.lastHit
		cerr := t.e.Close()
		if err := t.expect("close", cerr, before, fault, true); err != nil {
			return err
		}
		if cerr == nil {
			t.h.done(change{kind: doSync})
		}
	}
	if err := t.dir.misuse(true); err != nil {
		return t.errorf("%w", err)
	}
	return nil
}

// undecided notes that the image was closed with an error: what it shows from
// now on is anything that the disk may hold.
func (h *history) undecided() { copy(h.now, h.disk) }

// readBack: reads go on whatever failed.
func (t *trial) readBack(fault error) error {
	before := t.lastHit
	got := make([]byte, t.size)
	if err := ReadLayer(context.Background(), t.e, t.below, got, 0); err != nil {
		if t.lastHit != before && errors.Is(err, fault) {
			return nil
		}
		return t.errorf("read: %w", err)
	}
	if err := check(got, t.h.now); err != nil {
		return t.errorf("read: %w", err)
	}
	return nil
}

// after opens the image again, without faults, and checks that it holds what
// was synced and can be used.
func (t *trial) after() error {
	t.dir.SetHook(nil)
	l, err := t.f.Open(context.Background(), t.dir, false)
	if err != nil {
		return t.errorf("open for reading afterwards: %w", err)
	}
	if err := errors.Join(checkLayer(l, t.below, t.h.disk), l.Close()); err != nil {
		return t.errorf("opened for reading afterwards: %w", err)
	}
	if t.f.Inspect != nil {
		if err := t.f.Inspect(context.Background(), t.dir); err != nil {
			return t.errorf("inspection afterwards: %w", err)
		}
	}
	if err := reuse(t.f, t.dir, t.below, t.h.disk); err != nil {
		return t.errorf("afterwards: %w", err)
	}
	return t.below.unchanged()
}

// reuse opens an image for writing after a failure, checks it against the
// values allowed, fills it, and checks that it holds that: space wrongly
// believed to be free shows here.
func reuse(f Factory, dir *Dir, below *Below, allowed []uint64) error {
	e, err := openEditor(f, dir)
	if err != nil {
		return fmt.Errorf("open for writing: %w", err)
	}
	size := int64(len(allowed))
	if err := checkLayer(e, below, allowed); err != nil {
		return fmt.Errorf("opened for writing: %w", errors.Join(err, e.Close()))
	}
	ctx := context.Background()
	want := make([]byte, size)
	if err := ReadLayer(ctx, e, below, want, 0); err != nil {
		return errors.Join(err, e.Close())
	}
	// Every second cluster, so that old and new clusters stand side by side.
	for off := int64(0); off < size; off += 2 * f.Granule {
		p := want[off:min(off+f.Granule, size)]
		for i := range p {
			p[i] = 200 + byte(off/f.Granule%50)
		}
		if err := e.WriteAt(ctx, p, off, below); err != nil {
			return fmt.Errorf("write %d +%d: %w", off, len(p), errors.Join(err, e.Close()))
		}
	}
	if err := compare(e, below, want, 0); err != nil {
		return fmt.Errorf("written anew: %w", errors.Join(err, e.Close()))
	}
	if err := e.Sync(ctx); err != nil {
		return fmt.Errorf("sync: %w", errors.Join(err, e.Close()))
	}
	if err := e.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	l, err := f.Open(ctx, dir, false)
	if err != nil {
		return fmt.Errorf("written anew and closed, open: %w", err)
	}
	if err := errors.Join(compare(l, below, want, 0), l.Close()); err != nil {
		return fmt.Errorf("written anew and closed: %w", err)
	}
	return dir.misuse(true)
}

// newTrials makes an image and returns a maker of trials on copies of it.
func newTrials(f Factory, d draw, most int64) (func() (*trial, error), error) {
	size := smallSize(d, f)
	below := valueBelow(d, f, size)
	script := drawScript(d, size, f.Granule, most, true)
	dir := NewMemDir()
	if err := f.Create(context.Background(), dir, size); err != nil {
		return nil, err
	}
	return func() (*trial, error) {
		c, err := dir.Copy()
		if err != nil {
			return nil, err
		}
		return &trial{f: f, dir: c, size: size, below: below, script: script, h: newHistory(f, size, below)}, nil
	}, nil
}

// failing is a hook that fails the accesses that pick says.
func (t *trial) failing(fault error, short bool, pick func(Access) bool) Hook {
	return func(a Access) Verdict {
		if !pick(a) {
			return Verdict{}
		}
		t.lastHit = &a
		if t.hit == nil {
			t.hit = &a
		}
		return Verdict{Err: fault, Short: short}
	}
}

// list runs the script without faults and returns its accesses.
func list(make func() (*trial, error)) ([]Access, error) {
	t, err := make()
	if err != nil {
		return nil, err
	}
	var all []Access
	t.dir.SetHook(func(a Access) Verdict {
		all = append(all, a)
		return Verdict{}
	})
	if err := t.run(nil); err != nil {
		return nil, err
	}
	return all, t.after()
}

// checkFaults fails each access of a small run once: with EIO, with ENOSPC
// (where it changes something), and after half of a write.
func checkFaults(f Factory, d draw) error {
	trials, err := newTrials(f, d, 10)
	if err != nil {
		return err
	}
	all, err := list(trials)
	if err != nil {
		return err
	}
	// Every access of a run of up to 60, a sample of longer ones: the next
	// script has others.
	most := 60
	if imgtest.RaceEnabled {
		most = 10
	}
	step := 1 + len(all)/most
	for i := int(d("first fault", 0, int64(step-1))); i < len(all); i += step {
		modes := []struct {
			err   error
			short bool
		}{{syscall.EIO, false}}
		if all[i].changes() {
			modes = append(modes, struct {
				err   error
				short bool
			}{syscall.ENOSPC, false})
		}
		if all[i].Op == "write" {
			modes = append(modes, struct {
				err   error
				short bool
			}{syscall.ENOSPC, true})
		}
		for _, m := range modes {
			t, err := trials()
			if err != nil {
				return err
			}
			t.dir.SetHook(t.failing(m.err, m.short, func(a Access) bool { return a.Index == i }))
			if err := t.run(m.err); err != nil {
				return fmt.Errorf("%v at access %d of %d: %w", m.err, i, len(all), err)
			}
			if err := t.after(); err != nil {
				return fmt.Errorf("%v at access %d of %d: %w", m.err, i, len(all), err)
			}
		}
	}
	return nil
}

// checkFailedSync fails each sync of a small run once.
func checkFailedSync(f Factory, d draw) error {
	trials, err := newTrials(f, d, 16)
	if err != nil {
		return err
	}
	all, err := list(trials)
	if err != nil {
		return err
	}
	for i, a := range all {
		if a.Op != "sync" {
			continue
		}
		t, err := trials()
		if err != nil {
			return err
		}
		t.dir.SetHook(t.failing(syscall.EIO, false, func(a Access) bool { return a.Index == i }))
		if err := t.run(syscall.EIO); err != nil {
			return err
		}
		if err := t.after(); err != nil {
			return err
		}
	}
	return nil
}

// checkFullDisk lets the files grow to a limit only. The writer gets ENOSPC,
// what is there stays readable and, when there is space again, all goes on.
func checkFullDisk(f Factory, d draw) error {
	trials, err := newTrials(f, d, 24)
	if err != nil {
		return err
	}
	all, err := list(trials)
	if err != nil {
		return err
	}
	var longest int64
	for _, a := range all {
		if a.Grows {
			longest = max(longest, a.Off+a.N)
		}
	}
	limit := d("limit", 0, longest)
	again := int(d("space again at", 0, int64(len(all))))
	short := d("short", 0, 1) == 1
	t, err := trials()
	if err != nil {
		return err
	}
	t.dir.SetHook(t.failing(syscall.ENOSPC, short, func(a Access) bool {
		return a.Index < again && a.Grows && a.Off+a.N > limit
	}))
	if err := t.run(syscall.ENOSPC); err != nil {
		return fmt.Errorf("file limited to %d bytes: %w", limit, err)
	}
	return t.after()
}
