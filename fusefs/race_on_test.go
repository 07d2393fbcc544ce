//go:build race

package fusefs

// raceEnabled: sync.Pool drops values on purpose under the race detector.
const raceEnabled = true
