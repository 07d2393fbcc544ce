//go:build !race

package imgtest

// RaceEnabled: the race detector is on. It allocates, and takes time.
const RaceEnabled = false
