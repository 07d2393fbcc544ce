package qcow2

import (
	"errors"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// censusWords is what is known of as many clusters as are counted at a time:
// for each one what it is used for, whether a guest cluster of the active map
// is stored in it, and the number of references.
//
// The number of walks over all tables is the number of clusters by the number
// of words. So they are bytes as long as nothing has many references, which
// only snapshots and compressed clusters bring about.
type censusWords struct {
	narrow []uint8  // class, active, count: 4, 1 and 3 bits
	wide   []uint32 // 4, 1 and 27 bits
}

const (
	narrowShift, narrowActive, narrowCount = 4, 1 << 3, 1<<3 - 1
	wideShift, wideActive, wideCount       = 28, 1 << 27, 1<<27 - 1
)

// censusBytes is the memory for the words.
const censusBytes = 48 << 20

// Errors of add.
var (
	errNarrow     = errors.New("more references than a byte holds")
	errMany       = errors.New("too many references")
	errOtherClass = errors.New("used as something else")
	errActive     = errors.New("several guest clusters are stored in it")
)

// newCensusWords makes words for up to n clusters.
func newCensusWords(n int64, wide bool) *censusWords {
	if wide {
		return &censusWords{wide: make([]uint32, min(n, censusBytes/4))}
	}
	return &censusWords{narrow: make([]uint8, min(n, censusBytes))}
}

func (w *censusWords) len() int64 { return int64(max(len(w.narrow), len(w.wide))) }

func (w *censusWords) clear() {
	clear(w.narrow)
	clear(w.wide)
}

// blank reports whether nothing was entered for the clusters [from, to).
func (w *censusWords) blank(from, to int64) bool {
	if w.wide == nil {
		return backend.IsZero(w.narrow[from:to])
	}
	for _, v := range w.wide[from:to] {
		if v != 0 {
			return false
		}
	}
	return true
}

// get is what cluster i is used for, and how often.
func (w *censusWords) get(i int64) (class layers.Role, count uint64) {
	if w.wide != nil {
		return layers.Role(w.wide[i] >> wideShift), uint64(w.wide[i] & wideCount)
	}
	return layers.Role(w.narrow[i] >> narrowShift), uint64(w.narrow[i] & narrowCount)
}

// add enters a reference to cluster i, of a guest cluster of the active map or
// not.
func (w *censusWords) add(i int64, class layers.Role, active bool) error {
	if w.wide != nil {
		return addWord(&w.wide[i], uint32(class)<<wideShift, wideActive, wideCount, active, errMany)
	}
	return addWord(&w.narrow[i], uint8(class)<<narrowShift, narrowActive, narrowCount, active, errNarrow)
}

func addWord[T uint8 | uint32](w *T, class, activeBit, countMask T, active bool, full error) error {
	switch {
	case *w == 0:
		*w = class
	case *w&^(activeBit|countMask) != class:
		return errOtherClass
	case *w&countMask == countMask:
		return full
	}
	*w++
	if active {
		if *w&activeBit != 0 {
			return errActive
		}
		*w |= activeBit
	}
	return nil
}
