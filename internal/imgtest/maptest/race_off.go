//go:build !race

package maptest

const raceEnabled = false
