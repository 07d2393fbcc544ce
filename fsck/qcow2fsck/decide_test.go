package qcow2fsck

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

// TestDecisions: whatever fixes somebody wants and does not want, nothing gets
// worse: a full repair afterwards ends as one at once does.
func TestDecisions(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, d := range damage.Qcow2() {
		if d.Full != damage.Clean {
			continue
		}
		t.Run(d.Name, func(t *testing.T) {
			dir := t.TempDir()
			damaged := openMem(t, d.Build(t, dir))
			original, err := os.ReadFile(damage.Original(dir))
			if err != nil {
				t.Fatal(err)
			}
			base, _ := os.ReadFile(filepath.Join(dir, "base.raw")) // only one shape has it
			for seed := range uint64(2) {
				rng := rand.New(rand.NewPCG(seed, 5))
				f := damaged.Clone()
				o := options(dir)
				o.Data = d.Data
				first := checkFile(t, f, o, func(fsck.Finding) bool { return rng.IntN(2) == 0 }, nil)
				reps := repair(t, f, o, fsck.DecideAll, nil)
				if last := reps[len(reps)-1]; state(last) != damage.Clean {
					t.Fatalf("seed %d: %v\n%s", seed, state(last), list(last))
				}
				got, err := content(f, dir, base)
				if err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				if at := differs(got, original, append(append(lost(reps), lost([]*fsck.Report{first})...), d.Lost...)); at >= 0 {
					t.Errorf("seed %d: content differs at %#x\nfirst\n%sthen\n%s", seed, at, list(first), list(reps[0]))
				}
			}
		})
	}
}

// TestRandomHeader: whatever bytes of the header are damaged, a check neither
// panics nor needs much memory, and a full repair either ends clean or says
// that the header is beyond repair in place.
func TestRandomHeader(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	runs := uint64(80)
	if testing.Short() {
		runs = 30
	}
	for _, shape := range []string{"v3", "v2", "snapshot", "bitmaps", "extl2", "backing", "64k"} {
		in := loadIntact(t, shape)
		for run := range runs {
			rng := rand.New(rand.NewPCG(run, 11))
			b := append([]byte(nil), in.b...)
			for range 1 + rng.IntN(4) {
				b[rng.IntN(200)] = byte(rng.Uint32())
			}
			f := backend.NewMemBytes("image", b)
			var rep *fsck.Report
			var err error
			for range 5 {
				if rep, err = tryCheck(f, options(in.dir), fsck.DecideAll, nil); err != nil {
					t.Fatalf("%s, run %d: %v", shape, run, err)
				}
			}
			if rep.Worst() <= fsck.Note {
				continue
			}
			for _, fd := range rep.Findings {
				if fd.Fix != nil {
					t.Fatalf("%s, run %d: still fixing after five rounds:\n%s", shape, run, list(rep))
				}
			}
		}
	}
}
