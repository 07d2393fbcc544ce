package layertest

import (
	"fmt"
	"testing"
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
			if b == noLock && raceEnabled {
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
