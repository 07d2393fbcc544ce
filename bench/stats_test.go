package main

import (
	"math"
	"slices"
	"testing"
)

func TestSummarize(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want stats
	}{
		{nil, stats{}},
		{[]float64{3}, stats{1, 3, 3, 3}},
		{[]float64{4, 1}, stats{2, 2.5, 1, 4}},
		{[]float64{9, 1, 5}, stats{3, 5, 1, 9}},
		{[]float64{4, 3, 2, 1}, stats{4, 2.5, 1, 4}},
	} {
		in := slices.Clone(c.in)
		if got := summarize(c.in); got != c.want {
			t.Errorf("%v: got %+v, want %+v", c.in, got, c.want)
		}
		if !slices.Equal(in, c.in) {
			t.Errorf("%v was reordered to %v: pairs would be torn apart", in, c.in)
		}
	}
}

func TestRatios(t *testing.T) {
	nan := math.NaN()
	for _, c := range []struct {
		a, b  []float64
		lower bool
		want  []float64
	}{
		{[]float64{10, 30}, []float64{5, 10}, false, []float64{2, 3}},
		{[]float64{10, 30}, []float64{5, 10}, true, []float64{0.5, 1.0 / 3}},
		{[]float64{10, nan, 6}, []float64{5, 10, 2}, false, []float64{2, 3}},
		{[]float64{10, 6}, []float64{0, 2}, false, []float64{3}},
		{[]float64{10, 6}, []float64{5}, false, []float64{2}},
		{nil, []float64{5}, false, nil},
	} {
		if got := ratios(c.a, c.b, c.lower); !slices.Equal(got, c.want) {
			t.Errorf("%v / %v: got %v, want %v", c.a, c.b, got, c.want)
		}
	}
}
