package uring

import (
	"testing"
	"time"
)

// run lets requests come for a while, at a rate for each place of the thread,
// and returns the share of the time that it was free, and how often it moved.
func run(a *affinity, now *time.Duration, length time.Duration, home, free time.Duration) (share float64, moves int) {
	a.move = func(bool) { moves++ }
	end := *now + length
	var freeTime time.Duration
	for *now < end {
		each := home
		if a.free {
			each = free
			freeTime += 8 * each
		}
		*now += 8 * each
		a.note(8, *now)
	}
	return float64(freeTime) / float64(length), moves
}

// The thread goes where more gets done, stays there, comes back when that
// changes, and hardly moves where it makes no difference.
func TestAffinity(t *testing.T) {
	const fast, slow = 10 * time.Microsecond, 20 * time.Microsecond
	var a affinity
	var now time.Duration
	for _, step := range []struct {
		name       string
		home, free time.Duration
		low, high  float64
	}{
		{"home is better", fast, slow, 0, 0.08},
		{"away is better", slow, fast, 0.5, 1},
		{"still", slow, fast, 0.9, 1},
		{"home is better again", fast, slow, 0, 0.5},
		{"still", fast, slow, 0, 0.08},
		{"no difference", fast, fast, 0, 0.08},
		{"hardly any requests", 2 * time.Millisecond, 2 * time.Millisecond, 0, 0.1},
	} {
		share, moves := run(&a, &now, 5*time.Second, step.home, step.free)
		if share < step.low || share > step.high || moves > 100 {
			t.Errorf("%s: away %.0f %% of the time, %d moves", step.name, share*100, moves)
		}
	}
}
