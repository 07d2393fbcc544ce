package blockmap

import (
	"iter"
	"slices"
	"sort"
)

// Set is a set of byte ranges (or of cluster numbers: the unit is the
// caller's), kept sorted, disjoint and as few as possible. The zero value is
// empty. It is not safe for concurrent use.
type Set struct {
	r []Range
}

// find is the index of the first range that ends behind off.
func (s *Set) find(off int64) int {
	return sort.Search(len(s.r), func(i int) bool { return s.r[i].End() > off })
}

// Add adds [off, off+n).
func (s *Set) Add(off, n int64) {
	if n <= 0 {
		return
	}
	// All ranges that touch the new one, neighbours included, become one.
	i := sort.Search(len(s.r), func(i int) bool { return s.r[i].End() >= off })
	j := i
	end := off + n
	for j < len(s.r) && s.r[j].Off <= end {
		off = min(off, s.r[j].Off)
		end = max(end, s.r[j].End())
		j++
	}
	s.r = slices.Replace(s.r, i, j, Range{off, end - off})
}

// Remove takes [off, off+n) out.
func (s *Set) Remove(off, n int64) {
	if n <= 0 {
		return
	}
	end := off + n
	i := s.find(off)
	j := i
	var rest []Range
	for j < len(s.r) && s.r[j].Off < end {
		if r := s.r[j]; r.Off < off {
			rest = append(rest, Range{r.Off, off - r.Off})
		}
		if r := s.r[j]; r.End() > end {
			rest = append(rest, Range{end, r.End() - end})
		}
		j++
	}
	s.r = slices.Replace(s.r, i, j, rest...)
}

// Contains reports whether all of [off, off+n) is in the set.
func (s *Set) Contains(off, n int64) bool {
	i := s.find(off)
	return n <= 0 || i < len(s.r) && s.r[i].Off <= off && off+n <= s.r[i].End()
}

// Overlaps reports whether any of [off, off+n) is in the set.
func (s *Set) Overlaps(off, n int64) bool {
	i := s.find(off)
	return n > 0 && i < len(s.r) && s.r[i].Off < off+n
}

// Len is the number of units in the set.
func (s *Set) Len() int64 {
	var n int64
	for _, r := range s.r {
		n += r.Len
	}
	return n
}

// Ranges iterates over the ranges in ascending order.
func (s *Set) Ranges() iter.Seq[Range] { return slices.Values(s.r) }

// Gaps iterates over what [off, off+n) holds that the set does not.
func (s *Set) Gaps(off, n int64) iter.Seq[Range] {
	return func(yield func(Range) bool) {
		end := off + n
		for i := s.find(off); i < len(s.r) && s.r[i].Off < end; i++ {
			if s.r[i].Off > off && !yield(Range{off, s.r[i].Off - off}) {
				return
			}
			off = s.r[i].End()
		}
		if off < end {
			yield(Range{off, end - off})
		}
	}
}
