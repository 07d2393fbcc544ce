//go:build race

package maptest

// raceEnabled: the race detector allocates on its own, so allocations are not
// counted then.
const raceEnabled = true
