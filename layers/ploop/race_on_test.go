//go:build race

package ploop

const raceEnabled = true // the detector allocates
