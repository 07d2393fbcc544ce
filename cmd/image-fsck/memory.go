package main

import (
	"math"
	"runtime/debug"
)

// limitMemory makes the process keep to the memory that the user gave for
// tables, and 48 MiB for everything else. Tables are few and long-lived, so
// that collecting often costs little and saves what would lie about as
// garbage.
func limitMemory(tables int64) {
	const rest = 48 << 20
	debug.SetMemoryLimit(min(max(tables, 0), math.MaxInt64-rest) + rest)
	debug.SetGCPercent(25)
}
