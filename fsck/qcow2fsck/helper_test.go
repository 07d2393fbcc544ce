package qcow2fsck

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
)

// memory keeps what a plan quarantines.
type memory struct{ files map[string]*backend.Mem }

func (m *memory) Create(name string) (backend.File, string, error) {
	f := backend.NewMem(fmt.Sprintf("%s.%d", name, len(m.files)))
	m.files[f.Name()] = f
	return f, f.Name(), nil
}
func (m *memory) Remove(name string) error { delete(m.files, name); return nil }
func (m *memory) Sync() error              { return nil }

// options are those of the tests; data files lie beside the image.
func options(dir string) fsck.Options {
	return fsck.Options{OpenFile: func(name string) (backend.File, error) {
		return backend.Open(filepath.Join(dir, filepath.Base(name)), backend.Options{})
	}}
}

// checkFile checks f and, with decide, repairs it once.
func checkFile(t testing.TB, f backend.File, o fsck.Options, decide fsck.Decide, undo backend.File) *fsck.Report {
	t.Helper()
	rep, err := tryCheck(f, o, decide, undo)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func tryCheck(f backend.File, o fsck.Options, decide fsck.Decide, undo backend.File) (*fsck.Report, error) {
	ctx := context.Background()
	if decide != nil {
		plan, err := fsck.NewPlan(f, fsck.PlanOptions{})
		if err != nil {
			return nil, err
		}
		defer plan.Close()
		o.Plan = plan
	}
	col := fsck.NewCollector(fsck.CollectorOptions{File: f.Name(), Decide: decide, Details: 100000})
	stats, err := Checker{}.Check(ctx, f, o, col)
	if err != nil {
		return nil, err
	}
	if o.Plan != nil && !o.Plan.Empty() {
		if undo == nil {
			undo = backend.NewMem("undo")
		}
		if _, err := o.Plan.Execute(ctx, fsck.ExecuteOptions{Undo: undo, Lost: &memory{files: map[string]*backend.Mem{}}}); err != nil {
			return nil, err
		}
	}
	return col.Sum(stats), nil
}

// repair repairs f until a round changes nothing, as the tool does, and
// returns the reports of all rounds.
func repair(t testing.TB, f backend.File, o fsck.Options, decide fsck.Decide, undo backend.File) []*fsck.Report {
	t.Helper()
	var all []*fsck.Report
	for range 5 {
		rep := checkFile(t, f, o, decide, undo)
		all = append(all, rep)
		fixed := int64(0)
		for _, n := range rep.Counts {
			fixed += n.Fixed
		}
		if fixed == 0 {
			break
		}
	}
	return all
}

// list is a report for a message.
func list(rep *fsck.Report) string {
	var b strings.Builder
	for i, f := range rep.Findings {
		if i == 40 {
			fmt.Fprintf(&b, "…\n")
			break
		}
		fix := "no fix"
		if f.Fix != nil {
			fix = fmt.Sprintf("%v: %s, loses %v", f.Fix.Level, f.Fix.Text, f.Fix.Loses)
		}
		fmt.Fprintf(&b, "%v %v: %v: %s [%s] fixed=%t\n", f.Sev(), f.Code, f.Place, f.Text, fix, f.Fixed)
	}
	return b.String()
}

func openMem(t testing.TB, path string) *backend.Mem {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return backend.NewMemBytes(path, b)
}
