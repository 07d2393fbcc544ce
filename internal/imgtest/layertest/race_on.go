//go:build race

package layertest

// raceEnabled: under the race detector, which makes everything slow, scripts
// of one goroutine are few; and it reports the controls that race on purpose.
const raceEnabled = true
