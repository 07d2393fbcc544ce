package layertest

import (
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// TestReference: the kit passes an editor that is right.
func TestReference(t *testing.T) {
	for _, gran := range []int64{512, 4096, 64 << 10} {
		t.Run(fmt.Sprint(gran), func(t *testing.T) { Run(t, refFactory(gran, correct)) })
	}
}

// run does one check by name, random ones with fixed seeds until something is
// found.
func run(f Factory, name string, seeds uint64) error {
	for _, r := range rules {
		if r.name == name {
			return guard(func() error { return r.check(f) })
		}
	}
	for _, p := range properties {
		for seed := uint64(0); p.name == name && seed < seeds; seed++ {
			if err := guard(func() error { return p.check(f, seeded(seed)) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// TestBrokenEditors is the negative control: for each promise an editor that
// breaks it, and the check that must find it out.
func TestBrokenEditors(t *testing.T) {
	by := map[bug]string{
		noFill: "model", wideZero: "edges", narrowZero: "edges", staleFill: "model",
		freeAtOnce: "power cut", noDataSync: "power cut", noMapSync: "power cut",
		forgiveSync: "failed sync", hideSync: "failed sync", hideWrite: "faults",
		noGrace: "grace", noLock: "parallel owners", unmapAlways: "model",
		readOnlyWrites: "read only", keepsBuffer: "model", noRange: "ranges", shortSize: "model",
		noClose: "model", leaksHandle: "model", blocksAfterError: "full disk", otherError: "faults",
		splitExtents: "model", neverReuses: "discard frees", changesBelow: "model", belowErrors: "below fails",
	}
	for b := correct + 1; b < numBugs; b++ {
		t.Run(fmt.Sprintf("%d found by %s", b, by[b]), func(t *testing.T) {
			if b == noLock && imgtest.RaceEnabled {
				return // the race detector reports it before the check does
			}
			if err := run(refFactory(4096, b), by[b], 40); err == nil {
				t.Error("not found out")
			}
		})
	}
}

// TestNeededSyncs: leaving out either sync of the reference is noticed; of two
// syncs that do the same neither is needed, and both are reported.
func TestNeededSyncs(t *testing.T) {
	RunSyncs(t, refFactory(4096, correct), 10)
	report, err := NeedlessSyncs(refFactory(4096, thirdSync), 10)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Noticed) != 1 || len(report.Never) != 2 {
		t.Errorf("noticed %v, never %v; want one and two", report.Noticed, report.Never)
	}
}

// TestWrongStacks: what a stack shows, what seeking says and whether the lower
// layers stay as they are is really compared.
func TestWrongStacks(t *testing.T) {
	build := func() (*pile, func() error) {
		d := seeded(3)
		p := &pile{}
		for range 3 {
			if err := p.add(refFactory(4096, correct), d, 40_960, 3); err != nil {
				t.Fatal(err)
			}
		}
		return p, func() error {
			s, err := p.open(false)
			if err != nil {
				return err
			}
			if err := p.checkStack(s, d); err != nil {
				return err
			}
			if err := s.Close(); err != nil {
				return err
			}
			return p.lowerUnchanged()
		}
	}
	if _, check := build(); check() != nil {
		t.Errorf("a right stack: %v", check())
	}
	p, check := build()
	p.model()[20_000] ^= 1
	if check() == nil {
		t.Error("a wrong byte is not found out")
	}
	p, check = build()
	p.images[0].model[100] ^= 1
	if check() == nil {
		t.Error("a changed lower layer is not found out")
	}
	p, check = build()
	p.top().f = refFactory(4096, readOnlyWrites)
	if check() == nil {
		t.Error("a write while open for reading is not found out")
	}
}
