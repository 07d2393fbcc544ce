package e2e

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/faultfs"
	"golang.org/x/sys/unix"
)

// The fault matrix: whole commands on files that fail, one operation at a time.
//
// A row of the table (matrix_rows_test.go) is a directory, a command, and what
// must hold of the directory afterwards. The command runs once without faults,
// which counts its operations; then it runs again for every operation and every
// mode, in which exactly that operation goes wrong.

var (
	matrixFull  = flag.Bool("matrix.full", false, "every fault at every operation, not a sample")
	matrixFew   = flag.Int("matrix.few", 6, "faults tried for each row when not all are")
	matrixSeed  = flag.Uint64("matrix.seed", 1, "of the sample; 0 is another each time")
	matrixMode  = flag.String("matrix.mode", "", "only this way of going wrong, as EIO, ENOSPC, SIGKILL")
	matrixLanes = flag.Int("matrix.lanes", 3, "rows at the same time")
)

// mode is how the operation goes wrong.
type mode string

const (
	modeNone  mode = "no fault"
	modeEIO   mode = "EIO"        // for a sync that is a failed sync
	modeBad   mode = "bad sector" // EIO for every read there until the command has ended or the guest goes on
	modeSpace mode = "ENOSPC"     // once
	modeFull  mode = "full disk"  // half of it is done, and nothing grows any more until the command has ended
	modeShort mode = "short"      // half of a read or write is done, without an error
	modeLoss  mode = "lost sync"  // EIO, and what was not synced is gone
	modeKill  mode = "SIGKILL"
)

var modes = []mode{modeEIO, modeBad, modeSpace, modeFull, modeShort, modeLoss, modeKill}

// applies tells whether an operation can go wrong so.
func (m mode) applies(o faultfs.Op) bool {
	switch m {
	case modeEIO, modeKill:
		return true
	case modeSpace, modeFull:
		return o.Grows || o.Kind == faultfs.Create || o.Kind == faultfs.Mkdir
	case modeBad:
		return o.Kind == faultfs.Read
	case modeLoss:
		return o.Kind == faultfs.Sync
	case modeShort:
		return (o.Kind == faultfs.Write || o.Kind == faultfs.Read) && o.N > 1
	}
	return false
}

// row is one command.
type row struct {
	name string
	// setup fills the directory, once; each run has a copy.
	setup func(t *testing.T, dir string)
	// run runs the command on the files in r.dir.
	run func(r *matrixRun) error
	// judge says what is wrong with the files in r.below afterwards. It may
	// change them.
	judge func(r *matrixRun) error
}

// tally is what the whole matrix has seen.
type tally struct {
	mu                        sync.Mutex
	rows, ops, faults, errors int
	byMode                    map[mode]int
}

func (c *tally) add(r *matrixRun) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults++
	if r.failed {
		c.errors++
	}
	if c.byMode == nil {
		c.byMode = map[mode]int{}
	}
	c.byMode[r.mode]++
}

// TestFaultMatrix runs the table.
func TestFaultMatrix(t *testing.T) {
	imgtest.RequireRoot(t)
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img", "qemu-io")
	seed := *matrixSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	rows := matrixRows()
	pristine := map[string]string{}
	for _, w := range rows {
		pristine[w.name] = filepath.Join(workDir(t), "files")
		t.Run("setup/"+w.name, func(t *testing.T) {
			if err := os.Mkdir(pristine[w.name], 0o755); err != nil {
				t.Fatal(err)
			}
			w.setup(t, pristine[w.name])
		})
	}
	if t.Failed() {
		return
	}
	var all tally
	began := time.Now()
	lanes := make(chan struct{}, *matrixLanes)
	t.Run("rows", func(t *testing.T) {
		for _, w := range rows {
			t.Run(w.name, func(t *testing.T) {
				t.Parallel()
				lanes <- struct{}{}
				defer func() { <-lanes }()
				newMatrixRow(t, w, pristine[w.name], seed).all(&all)
			})
		}
	})
	fmt.Printf("fault matrix: %d commands, %d operations of theirs, %d faults (%d EIO and failed syncs, %d bad sectors, %d syncs that lost data, %d ENOSPC, %d full disks, %d short, %d SIGKILL), of which %d made the command or its user see an error; %v\n",
		all.rows, all.ops, all.faults, all.byMode[modeEIO], all.byMode[modeBad], all.byMode[modeLoss], all.byMode[modeSpace], all.byMode[modeFull], all.byMode[modeShort], all.byMode[modeKill],
		all.errors, time.Since(began).Round(time.Second))
}

// matrixRow runs one row.
type matrixRow struct {
	*testing.T
	row
	pristine   string
	below, dir string // the directory with the files, and where it can fail
	fs         *faultfs.FS
	rng        *rand.Rand
	n          int
	clean      outcome                          // without a fault
	complain   func(format string, args ...any) // Errorf, but for controls
}

func newMatrixRow(t *testing.T, w row, pristine string, seed uint64) *matrixRow {
	m := &matrixRow{T: t, complain: t.Errorf, row: w, pristine: pristine, below: workDir(t), dir: mountPoint(t), rng: rand.New(rand.NewPCG(seed, uint64(len(w.name))))}
	var err error
	if m.fs, err = faultfs.Mount(m.below, m.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.fs.Set(nil)
		for range 100 {
			if err = m.fs.Unmount(); err == nil {
				return
			}
			time.Sleep(20 * time.Millisecond) // a server that was killed is on its way out
		}
		t.Errorf("unmounting: %v", err)
	})
	return m
}

// all tries every fault, or a sample.
func (m *matrixRow) all(c *tally) {
	var ops []faultfs.Op
	var mu sync.Mutex
	clean := m.one(modeNone, func(o faultfs.Op) faultfs.Verdict {
		mu.Lock()
		defer mu.Unlock()
		ops = append(ops, o)
		return faultfs.Verdict{}
	})
	if clean.err != nil || clean.failed {
		m.Fatalf("without a fault: %v\n%s", clean.err, clean.story())
	}
	m.clean = clean.said
	c.mu.Lock()
	c.rows++
	c.ops += len(ops)
	c.mu.Unlock()
	type fault struct {
		mode
		faultfs.Op
	}
	var faults []fault
	for _, o := range ops {
		for _, how := range modes {
			if how.applies(o) && (*matrixMode == "" || string(how) == *matrixMode) {
				faults = append(faults, fault{how, o})
			}
		}
	}
	if !*matrixFull {
		m.rng.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
		faults = faults[:min(len(faults), *matrixFew)]
	}
	bad := 0
	for _, f := range faults {
		r := m.fault(f.mode, f.Index)
		if r.fired() {
			c.add(r)
		}
		if r.err == nil {
			continue
		}
		m.complain("%s at %s: %v\n%s", f.mode, r.hit, r.err, r.story())
		if bad++; bad == 8 {
			break // and so on
		}
	}
}

// fault runs the command with one fault.
func (m *matrixRow) fault(how mode, at int) *matrixRun {
	var r *matrixRun
	var once sync.Mutex
	var hit *faultfs.Op
	r = m.one(how, func(o faultfs.Op) faultfs.Verdict {
		once.Lock()
		defer once.Unlock()
		switch {
		case hit != nil && how == modeFull && modeFull.applies(o) && o.Index > at:
			return faultfs.Verdict{Err: unix.ENOSPC}
		case hit != nil && how == modeBad && o.Kind == faultfs.Read && o.Name == hit.Name && o.Off < hit.Off+hit.N && hit.Off < o.Off+o.N:
			return faultfs.Verdict{Err: unix.EIO}
		case hit != nil || o.Index != at || !how.applies(o):
			return faultfs.Verdict{}
		}
		hit = &o
		switch how {
		case modeEIO, modeBad:
			return faultfs.Verdict{Err: unix.EIO}
		case modeSpace:
			return faultfs.Verdict{Err: unix.ENOSPC}
		case modeFull:
			return faultfs.Verdict{Err: unix.ENOSPC, Short: true}
		case modeShort:
			return faultfs.Verdict{Short: true}
		case modeLoss:
			return faultfs.Verdict{Err: unix.EIO, Lose: true}
		}
		return faultfs.Verdict{Kill: true}
	}, func() *faultfs.Op { once.Lock(); defer once.Unlock(); return hit })
	return r
}

// matrixRun is one run of a command.
type matrixRun struct {
	*matrixRow
	mode       mode
	dir, below string // of this run
	failed     bool   // the command, or its user, got an error
	now        func() *faultfs.Op
	hit        *faultfs.Op
	said       outcome // of the first command
	log        []string
	err        error // what is wrong
}

// fired tells whether the operation was reached; with several threads their
// order varies.
func (r *matrixRun) fired() bool { return r.now() != nil }

// broken tells whether the fault was an error, which somebody has to be told.
func (r *matrixRun) broken() bool { return r.fired() && r.mode != modeShort }

func (r *matrixRun) note(format string, args ...any) {
	r.log = append(r.log, fmt.Sprintf(format, args...))
}

func (r *matrixRun) story() string { return strings.Join(r.log, "\n") }

// one runs the command under a hook, and judges.
func (m *matrixRow) one(how mode, hook faultfs.Hook, now ...func() *faultfs.Op) *matrixRun {
	m.n++
	name := strconv.Itoa(m.n)
	r := &matrixRun{matrixRow: m, mode: how, dir: filepath.Join(m.dir, name), below: filepath.Join(m.below, name),
		now: func() *faultfs.Op { return nil }}
	if len(now) > 0 {
		r.now = now[0]
	}
	copyTree(m.T, m.pristine, r.below)
	m.fs.Track(how == modeLoss)
	m.fs.Set(hook)
	err := r.guarded(m.run)
	m.fs.Set(nil)
	m.fs.Track(false)
	r.hit = r.now()
	r.err = errors.Join(err, r.guarded(m.judge))
	if err := os.RemoveAll(r.below); err != nil {
		m.Fatal(err)
	}
	return r
}

func (r *matrixRun) guarded(f func(*matrixRun) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return f(r)
}

// tool runs one of the tools; the message of one that failed by the fault must
// name the file and the reason.
func (r *matrixRun) tool(name string, args ...string) (outcome, error) {
	out, err := os.CreateTemp("", "out")
	if err != nil {
		return outcome{}, err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	errOut, err := os.CreateTemp("", "err")
	if err != nil {
		return outcome{}, err
	}
	defer os.Remove(errOut.Name())
	defer errOut.Close()
	path := name // of a control
	if !filepath.IsAbs(name) {
		path = filepath.Join(binDir, name)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Join(r.dir, "tmp"))
	cmd.Stdout, cmd.Stderr = out, errOut
	began := time.Now()
	stuck := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	err = cmd.Run()
	if !stuck.Stop() {
		return outcome{}, fmt.Errorf("%s %q was stuck", name, args)
	}
	o := outcome{took: time.Since(began)}
	b, err1 := os.ReadFile(out.Name())
	e, err2 := os.ReadFile(errOut.Name())
	if err := errors.Join(err1, err2); err != nil {
		return o, err
	}
	o.stdout, o.stderr = string(b), string(e)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		o.exit = exit.ExitCode()
	case err != nil:
		return o, err
	}
	if r.log == nil {
		r.said = o
		r.said.stdout = vary.ReplaceAllString(strings.ReplaceAll(o.stdout, r.dir, "DIR"), `$1`)
	}
	r.note("%s %q: exit %d\n%.3000s%.3000s", name, args, o.exit, o.stdout, o.stderr)
	if o.exit != 0 && r.fired() {
		r.failed = true
	}
	if strings.Contains(o.stderr, "goroutine ") || strings.Contains(o.stderr, "DATA RACE") {
		return o, fmt.Errorf("%s: a panic or a race", name)
	}
	return o, nil
}

// vary is what may differ between two outputs that say the same.
var vary = regexp.MustCompile(`("allocated-size":|"allocated" *: *)\d+`)

// unharmed tells whether the command did all that it does without a fault:
// what it could not do was done in another way, or again, or was not needed.
func (r *matrixRun) unharmed() bool {
	return r.said.exit == r.clean.exit && r.said.stdout == r.clean.stdout
}

// explains checks the message about the fault.
func (r *matrixRun) explains(text string) error {
	hit := r.now()
	if hit == nil || r.mode == modeKill || r.mode == modeShort {
		return nil
	}
	reason := unix.ENOSPC.Error()
	if r.mode == modeEIO || r.mode == modeBad || r.mode == modeLoss {
		reason = unix.EIO.Error()
	}
	if !strings.Contains(text, reason) {
		return fmt.Errorf("the message does not say %q", reason)
	}
	name := filepath.Base(hit.Name)
	if hit.Kind == faultfs.SyncDir || hit.Kind == faultfs.Create || hit.Kind == faultfs.Rename || hit.Kind == faultfs.Mkdir ||
		r.mode == modeFull || name[0] == '.' || strings.HasPrefix(hit.Name, ".go-fuse") {
		name = r.dir // some file in it; nobody knows those of temporary or removed ones
	}
	if !strings.Contains(text, name) {
		return fmt.Errorf("the message does not name %q", name)
	}
	return nil
}

var errGone = []error{syscall.ENOTCONN, syscall.ECONNABORTED, syscall.ENODEV}

// gone tells whether an error means that the server has died.
func gone(err error) bool {
	return slices.ContainsFunc(errGone, func(e error) bool { return errors.Is(err, e) })
}
