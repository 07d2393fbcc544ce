package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest/faultfs"
)

// copyTree copies small files, holes as holes.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		dst := filepath.Join(to, rel)
		if e.IsDir() {
			return os.MkdirAll(dst, 0o755)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		st, err := e.Info()
		if err := errors.Join(err, writeSparse(dst, b)); err != nil {
			return err
		}
		return os.Chtimes(dst, st.ModTime(), st.ModTime())
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(to, "tmp"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func writeSparse(path string, b []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	zeros := make([]byte, slotSize)
	for at := 0; at < len(b) && err == nil; at += slotSize {
		p := b[at:min(at+slotSize, len(b))]
		if !slices.Equal(p, zeros[:len(p)]) {
			_, err = f.WriteAt(p, int64(at))
		}
	}
	return errors.Join(err, f.Truncate(int64(len(b))), f.Close())
}

// files are the names in a directory and their contents.
func files(dir string) (map[string]string, error) {
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		all[rel] = string(b)
		return err
	})
	return all, err
}

// soonUntouched is untouched, with a moment for the helper of a tool, which
// cleans up when the tool has ended.
func (r *matrixRun) soonUntouched(but ...string) (err error) {
	for range 100 {
		if err = r.untouched(but...); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// untouched checks that the files are what they were, but for names that are
// allowed to come or change.
func (r *matrixRun) untouched(but ...string) error {
	was, err1 := files(r.pristine)
	now, err2 := files(r.below)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	for name := range was {
		if _, ok := now[name]; !ok && !slices.Contains(but, name) {
			return fmt.Errorf("%s has gone", name)
		}
	}
	for name, b := range now {
		old, ok := was[name]
		switch {
		case slices.Contains(but, name):
		case r.mode == modeKill && !ok:
			// A temporary file: who was killed cannot clean up.
		case !ok && r.hit != nil && r.hit.Kind == faultfs.Remove && filepath.Base(r.hit.Name) == filepath.Base(name):
			// The fault was that it could not be removed.
		case !ok:
			return fmt.Errorf("%s was left behind", name)
		case old != b:
			return fmt.Errorf("%s was changed", name)
		}
	}
	return nil
}
