//go:build race

package layertest

// raceEnabled: the race detector reports the controls that race on purpose.
const raceEnabled = true
