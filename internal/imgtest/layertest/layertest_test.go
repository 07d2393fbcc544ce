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

// findsOut runs every check with fixed seeds and returns the names of those
// that found something.
func findsOut(f Factory, seeds uint64) map[string]error {
	found := map[string]error{}
	for _, r := range rules {
		if raceEnabled && f.Name == refFactory(f.Granule, noLock).Name {
			break // the race detector would report before the rule does
		}
		if err := guard(func() error { return r.check(f) }); err != nil {
			found[r.name] = err
		}
	}
	for _, p := range properties {
		for seed := range seeds {
			if err := guard(func() error { return p.check(f, seeded(seed)) }); err != nil {
				found[p.name] = err
				break
			}
		}
	}
	return found
}

// TestBrokenEditors is the negative control: for each promise an editor that
// breaks it, and the check that must find it out.
func TestBrokenEditors(t *testing.T) {
	by := map[bug]string{
		noFill: "model", wideZero: "edges", narrowZero: "edges", staleFill: "model",
		freeAtOnce: "grace", freeEarly: "grace",
		forgiveSync: "failed sync", hideSync: "failed sync", hideWrite: "faults",
		noGrace: "grace", noLock: "parallel owners", unmapAlways: "model",
		readOnlyWrites: "read only", keepsBuffer: "model", noRange: "ranges", shortSize: "model",
		noClose: "model", leaksHandle: "model", blocksAfterError: "full disk", otherError: "faults",
		splitExtents: "model", neverReuses: "discard frees", changesBelow: "model", belowErrors: "below fails",
	}
	for b := correct + 1; b < numBugs; b++ {
		if by[b] == "" {
			continue
		}
		t.Run(fmt.Sprint(int(b)), func(t *testing.T) {
			if b == noLock && raceEnabled {
				return
			}
			found := findsOut(refFactory(4096, b), 30)
			if found[by[b]] == nil {
				names := []string{}
				for name, err := range found {
					names = append(names, name)
					t.Logf("%s: %v", name, err)
				}
				t.Errorf("%q did not find bug %d out; found by %v", by[b], b, names)
			}
		})
	}
}
