package layertest

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
)

// runTools lets other programs judge images after random scripts, closed and
// as power cuts leave them.
func runTools(t *testing.T, f Factory) {
	for seed := range uint64(3) {
		dir := NewOSDir(t.TempDir())
		t.Cleanup(func() { _ = dir.Close() }) // the test is over
		d := seeded(seed)
		size := sizeFor(f, 30)
		s, err := newSessionIn(f, dir, size, drawBelow(d, f, size))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 60 {
			if err := s.randomChange(d); err != nil {
				t.Fatal(err)
			}
			if i%20 == 19 {
				if err := s.sync(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := s.finish(); err != nil {
			t.Fatal(err)
		}
		if f.Read != nil {
			otherReader(t, s)
		}
		if f.Check != nil {
			f.Check(t, dir, false)
		}
		if t.Failed() {
			t.Fatalf("seed %d, changes:\n%s", seed, s.trace())
		}
	}
	if f.Check != nil {
		crashedTools(t, f)
	}
}

// otherReader compares what the other program reads.
func otherReader(t *testing.T, s *session) {
	t.Helper()
	tmp := t.TempDir()
	below := ""
	if len(s.below.content) > 0 {
		below = filepath.Join(tmp, "below.raw")
		// Longer than the top is fine for us, not for every program.
		if err := os.WriteFile(below, s.below.content[:min(int64(len(s.below.content)), s.size)], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(tmp, "out.raw")
	s.f.Read(t, s.dir, below, out)
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	want := s.model
	if len(got) != len(want) && len(bytes.TrimRight(got, "\x00")) > len(want) {
		t.Errorf("the other program reads %d bytes, want %d", len(got), len(want))
	}
	n := min(len(got), len(want))
	if err := firstDifference(got[:n], want[:n], 0); err != nil {
		t.Errorf("as the other program reads: %v", err)
	}
}

// crashedTools shows the other program what power cuts leave.
func crashedTools(t *testing.T, f Factory) {
	const states = 12
	for seed := range uint64(2) {
		r, err := record(f, seeded(seed))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for s := range r.rec.States(backend.StateOptions{Exhaustive: 2, Random: 4, MaxPerEpoch: 4, Seed: seed}) {
			if n++; n%5 != 0 {
				continue
			}
			dir := NewOSDir(t.TempDir())
			if err := r.files(s).Save(dir.path); err != nil {
				t.Fatal(err)
			}
			f.Check(t, dir, true)
			if t.Failed() {
				t.Fatalf("seed %d, %s\n%s", seed, s, r.trace(s.Completed))
			}
			if n/5 >= states {
				break
			}
		}
	}
}
