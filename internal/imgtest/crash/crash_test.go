package crash_test

import (
	"flag"
	"fmt"
	"sort"
	"sync"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/crash"
)

var (
	states = flag.Int("crash.states", 2000, "distinct states of all operations together, at least")
	full   = flag.Bool("crash.full", false, "build all subsets of pieces, with 200 random ones for each epoch")
	sample = flag.Int("crash.sample", 20, "show one state in so many to qemu-img or ploop")
	seed   = flag.Uint64("crash.seed", 1, "the first seed")
)

// TestPowerCuts runs the table.
func TestPowerCuts(t *testing.T) {
	imgtest.Require(t, "strace")
	ops, names := append(table(t), fsckTable(t)...), namesTable()
	var mu sync.Mutex
	var reports []*crash.Report
	var controls crash.Controls
	t.Cleanup(func() {
		distinct := summary(reports, &controls)
		if len(reports) < len(ops)+len(names) || t.Failed() {
			return // a part of the table was run
		}
		if distinct < *states {
			t.Errorf("%d distinct states, want %d", distinct, *states)
		}
		if err := controls.Verify(harmless); err != nil {
			t.Error(err)
		}
	})
	done := func(t *testing.T, rep *crash.Report, err error) {
		mu.Lock()
		reports = append(reports, rep)
		mu.Unlock()
		if err != nil {
			t.Error(err)
		}
	}
	// Some operations have no more states than a few.
	o := crash.Options{States: *states*3/2/len(ops) + 1, Full: *full, Sample: *sample, Seed: *seed, Controls: &controls}
	for _, op := range ops {
		t.Run(op.Name, func(t *testing.T) {
			t.Parallel()
			o := o
			o.Oracle = crash.Oracle(t, t.TempDir())
			rep, err := crash.Examine(t.Context(), op, o)
			done(t, rep, err)
		})
	}
	for _, op := range names {
		t.Run(op.Name, func(t *testing.T) {
			t.Parallel()
			rep, err := crash.ExamineNames(t.Context(), op, t.TempDir(), o)
			done(t, rep, err)
		})
	}
}

// summary prints what was seen, and returns the number of distinct states.
func summary(reports []*crash.Report, controls *crash.Controls) int {
	sort.Slice(reports, func(i, j int) bool { return reports[i].Op < reports[j].Op })
	var all crash.Report
	fmt.Printf("%-62s %7s %8s %8s %6s %6s\n", "power cuts in", "seeds", "states", "distinct", "shown", "syncs")
	for _, r := range reports {
		fmt.Printf("%-62s %7d %8d %8d %6d %6d\n", r.Op, r.Seeds, r.States, r.Distinct, r.Oracle, r.Syncs)
		all.States += r.States
		all.Distinct += r.Distinct
		all.Oracle += r.Oracle
	}
	places, noticed := controls.Counts()
	fmt.Printf("crash: %d operations, %d states, %d distinct, %d shown to qemu-img or ploop; of %d places that sync, %d are missed when left out\n",
		len(reports), all.States, all.Distinct, all.Oracle, places, noticed)
	return all.Distinct
}
