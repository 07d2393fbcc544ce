//go:build race

package imgtest

// RaceEnabled says whether the race detector is on, which allocates and takes time.
const RaceEnabled = true
