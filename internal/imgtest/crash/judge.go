package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	_ "github.com/imagestack/imagestack/fsck/ploopfsck" // the checkers
	_ "github.com/imagestack/imagestack/fsck/qcow2fsck"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
)

// State is what a power cut left of the files of an Op.
type State struct {
	Dir   *layertest.Dir
	Files map[string]*backend.Mem
	// Completed is how many syncs had returned before the cut; Done means all
	// of them.
	Completed int
	Done      bool

	r   *recording
	cut *backend.State
}

// Session is the run that was cut short.
func (st *State) Session() *Session { return st.r.sess }

// Final is a file as that run left it when the power stayed on.
func (st *State) Final(name string) *backend.Mem { return st.r.final[name] }

// Image is what it started from.
func (st *State) Image() *Image { return st.r.image }

// Standard is the rules of the package comment.
func (st *State) Standard(ctx context.Context) error {
	s := &Session{Image: st.r.image, Dir: st.Dir}
	got, err := s.Content(ctx, "")
	if err != nil {
		return fmt.Errorf("after the power cut: %w", err)
	}
	if err := st.r.sess.Allowed(got, st.Completed); err != nil {
		return err
	}
	// The rest depends on nothing but the bytes.
	sum := hashOf(st.cut.Files)
	err, known := st.r.verdicts[sum]
	if !known {
		err = st.timeless(ctx, s)
		st.r.verdicts[sum] = err
	}
	return err
}

// timeless are the rules that hold whatever was promised.
func (st *State) timeless(ctx context.Context, s *Session) error {
	for name, want := range st.r.sess.saved {
		got, err := s.Content(ctx, name)
		if err != nil {
			return fmt.Errorf("snapshot %s after the power cut: %w", name, err)
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("snapshot %s has changed", name)
		}
	}
	if err := st.Check(ctx, fsck.Leak); err != nil {
		return fmt.Errorf("after the power cut: %w", err)
	}
	if err := st.Rerun(ctx); err != nil {
		return fmt.Errorf("operation done again after the power cut: %w", err)
	}
	return nil
}

// Check asks our checker, which may find nothing worse than worst.
func (st *State) Check(ctx context.Context, worst fsck.Severity) error {
	return check(ctx, st.r.image.Format, st.Dir, worst, st.r.op.May)
}

// CheckDir asks our checker about the image in dir, of which leaks are allowed.
func CheckDir(ctx context.Context, format string, dir *layertest.Dir) error {
	return check(ctx, format, dir, fsck.Leak, nil)
}

func check(ctx context.Context, format string, dir *layertest.Dir, worst fsck.Severity, may []string) (err error) {
	if format == "raw" {
		return nil // nothing to check
	}
	c, err := fsck.CheckerFor(format)
	if err != nil {
		return err
	}
	f, err := dir.Open(ImageFile, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	col := fsck.NewCollector(fsck.CollectorOptions{File: ImageFile})
	stats, err := c.Check(ctx, f, fsck.Options{
		Memory: 32 << 20, Parallel: 1, Data: true,
		OpenFile: func(name string) (backend.File, error) { return dir.Open(name, false) },
	}, col)
	if err != nil {
		return fmt.Errorf("fsck: %w", err)
	}
	for _, d := range col.Sum(stats).Findings {
		if d.Sev() > worst && !slices.Contains(may, d.Code.Name) {
			return fmt.Errorf("fsck: %s: %s: %s: %s", d.Sev(), d.Code, d.Place, d.Text)
		}
	}
	return nil
}

// Again does the operation again on the state.
func (st *State) Again(ctx context.Context) error {
	return st.r.op.Run(ctx, newRerun(st.r.image, st.Dir, st.r.seed, len(st.r.sess.now)))
}

// Rerun does the operation again on the state and compares the end with that
// of the run without a power cut.
func (st *State) Rerun(ctx context.Context) error {
	want := st.r.sess.now
	s := newRerun(st.r.image, st.Dir, st.r.seed, len(want))
	if err := st.r.op.Run(ctx, s); err != nil {
		return err
	}
	got, err := s.Content(ctx, "")
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("byte %#x differs from a run that was not interrupted", differs(got, want))
	}
	for name, want := range st.r.sess.saved {
		if got, err := s.Content(ctx, name); err != nil || !bytes.Equal(got, want) {
			return errors.Join(fmt.Errorf("snapshot %s has changed", name), err)
		}
	}
	return check(ctx, st.r.image.Format, st.Dir, fsck.Leak, nil)
}

func differs(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
