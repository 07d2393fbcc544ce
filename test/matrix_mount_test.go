package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/faultfs"
	"github.com/imagestack/imagestack/layers/open"
	"golang.org/x/sys/unix"
)

// guestStep is one call of a guest on the disk; a sync when n is 0.
type guestStep struct {
	off, n int64
	how    int // 0 writes, else the mode of fallocate(2)
}

const (
	punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zero  = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
)

// guestScript overwrites, allocates, discards, zeroes, and uses again what was
// discarded, with syncs between, all of it behind the first 64 KiB.
var guestScript = []guestStep{
	{off: 68 << 10, n: 4 << 10},
	{off: 500<<10 + 512, n: 60 << 10},
	{},
	{off: 96 << 10, n: 64 << 10, how: punch},
	{off: 290 << 10, n: 24<<10 + 512},
	{off: 200 << 10, n: 32 << 10, how: zero},
	{},
	{off: 100 << 10, n: 8 << 10},
	{off: 700 << 10, n: 4 << 10},
	{off: 512 << 10, n: 32 << 10, how: punch},
	{},
}

// faultGuest is what the user of a mount knows: for each sector the values that it
// may have, as indexes of steps (0: as before), the last at the end.
type faultGuest struct {
	r      *matrixRun
	before []byte
	at     int64 // of the file that it uses, on the disk
	steps  []guestStep
	may    [][]int
	sure   []int // of may, how many from the start are older than the last success
	frozen bool  // the host failed to sync: nothing may be changed any more
	unsure bool  // the server died or a close failed

	loop     bool // it uses a loop device
	readOnly bool // and only reads
}

func newFaultGuest(r *matrixRun, before []byte) *faultGuest {
	g := &faultGuest{r: r, before: before, steps: guestScript, may: make([][]int, len(before)/sector), sure: make([]int, len(before)/sector)}
	for i := range g.may {
		g.may[i] = []int{0}
	}
	return g
}

func (g *faultGuest) value(version, i int) []byte {
	at := int64(i) * sector
	switch {
	case version == 0:
		return g.before[at:][:sector]
	case g.steps[(version-1)%len(g.steps)].how != 0:
		return make([]byte, sector)
	}
	return imgtest.PatternBytes(uint64(version+100), at, sector)
}

// tried notes a change and whether it succeeded.
func (g *faultGuest) tried(version int, s guestStep, ok bool) {
	for i := (g.at + s.off) / sector; i < (g.at+s.off+s.n)/sector; i++ {
		g.may[i] = append(g.may[i], version)
		if ok {
			g.sure[i] = len(g.may[i]) - 1
		}
	}
}

// synced forgets what a completed sync has made impossible.
func (g *faultGuest) synced() {
	for i := range g.may {
		g.may[i] = g.may[i][g.sure[i]:]
		g.sure[i] = 0
	}
}

// check compares a disk from byte at on with what it may be; now is set when it is read while
// it is in use: then only the last success, and what failed after it, counts.
func (g *faultGuest) check(got []byte, at int64, now bool) error {
	if int64(len(got)) != int64(len(g.before))-at {
		return fmt.Errorf("a disk of %d bytes, want %d", len(got), int64(len(g.before))-at)
	}
	for i := int(at / sector); i < len(g.may); i++ {
		may := g.may[i]
		if now {
			may = may[g.sure[i]:]
		}
		p := got[int64(i)*sector-at:][:sector]
		if !slices.ContainsFunc(may, func(v int) bool { return bytes.Equal(p, g.value(v, i)) }) {
			return fmt.Errorf("sector %d (byte %#x) has none of its values: steps %v", i, i*sector, may)
		}
	}
	return nil
}

// step does one step of the script.
func (g *faultGuest) step(f *os.File, version int, s guestStep) error {
	switch {
	case s.n == 0:
		return f.Sync()
	case s.how != 0:
		return unix.Fallocate(int(f.Fd()), uint32(s.how), s.off, s.n)
	}
	p := make([]byte, 0, max(s.n, 64<<10)) // so large that it begins with a page, for O_DIRECT
	for i := (g.at + s.off) / sector; i < (g.at+s.off+s.n)/sector; i++ {
		p = append(p, g.value(version, int(i))...)
	}
	_, err := f.WriteAt(p, s.off)
	return err
}

// script runs the guest. After an error the fault is over (there is room
// again), and the step is done again.
func (g *faultGuest) script(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return g.accept("open", err)
	}
	defer f.Close()
	for k, s := range g.steps {
		for try := range 2 {
			version := 1 + k + try*len(g.steps)
			err := g.step(f, version, s)
			g.r.note("guest: step %d, try %d: %v", k, try, err)
			if s.n > 0 {
				g.tried(version, s, err == nil)
			} else if err == nil {
				g.synced()
			}
			switch {
			case err == nil && g.frozen:
				return fmt.Errorf("step %d succeeds after a failed sync", k)
			case err == nil:
			default:
				if err := g.accept(fmt.Sprintf("step %d", k), err); err != nil {
					return err
				}
				if try == 1 && !g.frozen && !g.unsure {
					return fmt.Errorf("step %d, done again after the fault was over: %w", k, err)
				}
				if try == 0 && !g.frozen && !g.unsure {
					g.r.fs.Set(nil)
					g.r.ended()
					continue
				}
			}
			break
		}
		if g.unsure {
			return nil
		}
		if g.frozen && g.r.mode == modeLoss {
			continue // what was not synced reads as anything
		}
		got := make([]byte, int64(len(g.before))-g.at)
		if _, err := f.ReadAt(got, 0); err != nil {
			if err := g.accept("reading", err); err != nil {
				return err
			}
			continue
		}
		if err := g.check(got, g.at, true); err != nil {
			return fmt.Errorf("read after step %d: %w", k, err)
		}
	}
	return nil
}

// accept judges an error that the guest got.
func (g *faultGuest) accept(what string, err error) error {
	r := g.r
	hit := r.now()
	if hit == nil || r.mode == modeShort {
		return fmt.Errorf("%s without a cause: %w", what, err)
	}
	r.failed = true
	switch r.mode {
	case modeKill:
		g.unsure = true
		if gone(err) || g.loop && errors.Is(err, unix.EIO) {
			return nil
		}
	case modeEIO, modeBad, modeLoss:
		if hit.Kind == faultfs.Sync {
			g.frozen = true
		}
		if errors.Is(err, unix.EIO) {
			return nil
		}
	default:
		// A loop device says of many requests only that they failed.
		if errors.Is(err, unix.ENOSPC) || g.loop && errors.Is(err, unix.EIO) {
			return nil
		}
	}
	return fmt.Errorf("%s: %w; want the fault's own errno", what, err)
}

// ended keeps what was hit although the hook has gone.
func (r *matrixRun) ended() {
	hit := r.now()
	r.now = func() *faultfs.Op { return hit }
}

// mounts is a writable mount with a guest on it.
func mounts(name string, setup func(*testing.T, string), image string, flags ...string) row {
	scratch, parts := slices.Contains(flags, "--scratch"), slices.Contains(flags, "--partitions")
	loop, writes := slices.Contains(flags, "--loop"), scratch || slices.Contains(flags, "-w")
	var g *faultGuest // of the run that is judged next: a row runs one after the other
	return row{name: name, setup: setup,
		run: func(r *matrixRun) error {
			before, err := diskOf(filepath.Join(r.pristine, image), "")
			if err != nil {
				return err
			}
			g = newFaultGuest(r, before)
			mnt, err := os.MkdirTemp("", "mnt")
			if err != nil {
				return err
			}
			defer os.Remove(mnt)
			log := mnt + ".log"
			defer os.Remove(log)
			path := filepath.Join(mnt, "disk.raw")
			if parts {
				path, g.at = filepath.Join(mnt, "p1"), partitionAt
			}
			if loop {
				path, g.steps = "", loopScript
			}
			g.loop, g.readOnly = loop, !writes
			return g.use(mnt, log, path, append(slices.Clone(flags), "--log", log, filepath.Join(r.dir, image), mnt))
		},
		judge: func(r *matrixRun) error {
			if scratch || !writes {
				return r.untouched(lockNames...)
			}
			return g.judge(image)
		},
	}
}

// lockNames are files that ploop's tools leave, too.
var lockNames = []string{"DiskDescriptor.xml.lck"}

// use mounts, runs the script on the file at path ("": the loop device) and
// unmounts.
func (g *faultGuest) use(mnt, log, path string, args []string) (err error) {
	r := g.r
	o, err := r.tool("mount-image", args...)
	if err != nil {
		return err
	}
	if o.exit != 0 {
		// The keeper of a killed server clears up after it.
		for try := 0; len(leftUnder(mnt)) > 0; try++ {
			if try == 250 || r.mode != modeKill {
				left := sweep(mnt)
				return fmt.Errorf("it failed and is mounted: %q", left)
			}
			time.Sleep(20 * time.Millisecond)
		}
		switch {
		case !r.broken():
			return errors.New("it failed without a cause")
		case r.mode == modeKill:
			return nil
		case o.exit != 1:
			return fmt.Errorf("exit %d, want 1", o.exit)
		}
		return r.explains(o.stderr)
	}
	if path == "" {
		path = strings.TrimSpace(o.stdout)
		if !slices.Equal(loopsUnder(mnt), []string{path}) {
			err = fmt.Errorf("it says that the loop device is %q; there is %q", path, loopsUnder(mnt))
		}
	}
	if err == nil {
		err = g.uses(path)
	}
	o, uerr := r.tool("mount-image", "-u", mnt)
	said, _ := os.ReadFile(log)
	r.note("the server said: %s", said)
	err = errors.Join(err, uerr)
	if len(leftUnder(mnt)) > 0 {
		err = errors.Join(err, fmt.Errorf("-u left %q", sweep(mnt)))
	}
	if err != nil {
		return err
	}
	switch {
	case o.exit == 0 && !g.unsure && !g.frozen:
		if r.mode != modeKill || !r.fired() {
			g.synced()
		}
	case o.exit == 0 && g.frozen:
		return errors.New("-u succeeds although a sync failed")
	case o.exit != 0 && !r.broken():
		return fmt.Errorf("-u: exit %d without a cause", o.exit)
	case o.exit != 0 && o.exit != 1 && r.mode != modeKill:
		return fmt.Errorf("-u: exit %d, want 1", o.exit)
	}
	if r.failed && r.mode != modeKill {
		return r.explains(string(said) + o.stderr)
	}
	return nil
}

// judge looks at the image that was mounted.
func (g *faultGuest) judge(image string) error {
	r := g.r
	path := filepath.Join(r.below, image)
	got, err := diskOf(path, "")
	if err != nil {
		return fmt.Errorf("afterwards: %w", err)
	}
	if err := g.check(got, 0, false); err != nil {
		return fmt.Errorf("afterwards: %w", err)
	}
	if err := r.sound(); err != nil {
		return fmt.Errorf("afterwards: %w", err)
	}
	if err := r.goesOn(path, got); err != nil {
		return fmt.Errorf("used again: %w", err)
	}
	return r.untouched(append([]string{"top.qcow2", "data", "root.hds", "disk.raw"}, lockNames...)...)
}

// sound asks our checker and the others about every image of the directory:
// leaks at most.
func (r *matrixRun) sound() error {
	entries, err := os.ReadDir(r.below)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(r.below, e.Name())
		format := map[string]string{".qcow2": "qcow2", ".hds": "ploop"}[filepath.Ext(path)]
		if format == "" {
			continue
		}
		if err := soundFile(path, format); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
		if format == "ploop" {
			imgtest.Run(r, "sync", path) // it looks at host extents
			if exit, out := imgtest.Ploop(r, "check", "-f", "-c", "-d", "-S", path); exit != 0 {
				return fmt.Errorf("ploop check: exit %d\n%s", exit, out)
			}
			continue
		}
		exit, out := imgtest.Try(r, "sh", "-c", `cd "$1" && exec qemu-img check -f qcow2 "$2"`, "sh", r.below, e.Name())
		if exit != 0 && exit != 3 {
			return fmt.Errorf("qemu-img check: exit %d\n%s", exit, out)
		}
	}
	return nil
}

func soundFile(path, format string) error {
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := fsck.CheckerFor(format)
	if err != nil {
		return err
	}
	col := fsck.NewCollector(fsck.CollectorOptions{File: path})
	stats, err := c.Check(context.Background(), f, fsck.Options{OpenFile: func(name string) (backend.File, error) {
		return backend.Open(filepath.Join(filepath.Dir(path), name), backend.Options{})
	}}, col)
	if err != nil {
		return err
	}
	var bad []string
	for _, d := range col.Sum(stats).Findings {
		if d.Sev() > fsck.Leak {
			bad = append(bad, fmt.Sprintf("%s: %s: %s", d.Code, d.Place, d.Text))
		}
	}
	if len(bad) > 0 {
		return fmt.Errorf("our fsck: %s", strings.Join(bad, "; "))
	}
	return nil
}

// goesOn fills the disk again: space that is wrongly believed to be free would
// show.
func (r *matrixRun) goesOn(path string, was []byte) error {
	ctx := context.Background()
	s, err := openStack(path, open.Options{Writable: true})
	if err != nil {
		return err
	}
	want := bytes.Clone(was)
	for at := 0; at < len(want); at += 24 << 10 {
		p := want[at:min(at+8<<10, len(want))]
		imgtest.Pattern(p, 999, int64(at))
		if _, err := s.WriteAt(ctx, p, int64(at)); err != nil {
			return errors.Join(err, s.Close())
		}
	}
	if err := s.Close(); err != nil {
		return err
	}
	got, err := diskOf(path, "")
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("the disk is not what was written")
	}
	return r.sound()
}
