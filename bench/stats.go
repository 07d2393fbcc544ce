package main

import (
	"math"
	"slices"
)

// stats of a set of figures.
type stats struct {
	N      int     `json:"n"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// summarize of no figures is the zero stats.
func summarize(v []float64) stats {
	if len(v) == 0 {
		return stats{}
	}
	s := slices.Clone(v)
	slices.Sort(s)
	n := len(s)
	return stats{N: n, Median: (s[(n-1)/2] + s[n/2]) / 2, Min: s[0], Max: s[n-1]}
}

// ratios is how many times better a is than b, pair by pair. A pair of which
// one figure is missing (NaN) or not positive does not count.
func ratios(a, b []float64, lowerIsBetter bool) []float64 {
	var out []float64
	for i := range min(len(a), len(b)) {
		x, y := a[i], b[i]
		if lowerIsBetter {
			x, y = y, x
		}
		if x > 0 && y > 0 && !math.IsInf(x, 0) && !math.IsInf(y, 0) {
			out = append(out, x/y)
		}
	}
	return out
}
