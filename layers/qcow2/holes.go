package qcow2

import (
	"errors"
	"io"
)

// fileHole is a range of the image file without storage, which reads as zeros.
// L2 tables in it say nothing. Millions of tables may lie in one hole, in a file
// that somebody made to keep its reader busy, and need not be read.
type fileHole struct {
	from, to int64
	back     int64 // how far in front of the last table its beginning was looked for
}

// has reports whether all of [off, off+n) is in the hole.
func (h *fileHole) has(off, n int64) bool { return h.from <= off && off+n <= h.to }

// noteHole looks whether the table at off begins a hole. Only for images that
// are opened for reading: what is written makes holes smaller.
func (img *Image) noteHole(off int64) {
	if img.ed != nil || img.o.Writable || off&(img.clusterSize-1) != 0 {
		return
	}
	var last fileHole
	if h := img.hole.Load(); h != nil {
		last = *h
	}
	// A table that is cut off is none in a hole.
	if h := img.holeAt(off, last); h.to >= off+img.clusterSize {
		img.hole.Store(&h)
	}
}

// holeAt is the hole at off, which is empty where there is none. last is the
// one that was met before. Where a hole begins cannot be asked, and tables may
// go down through it: so it is looked for, twice as far each time.
func (img *Image) holeAt(off int64, last fileHole) fileHole {
	h := fileHole{from: off, to: img.dataBehind(off)}
	if off < last.from && h.to == last.to {
		h.back = min(max(2*last.back, img.clusterSize), off)
		if from := off - h.back; img.dataBehind(from) == h.to {
			h.from = from
		} else {
			h.back = 0
		}
	}
	return h
}

// dataBehind is the first byte of the image file at or behind off that may not
// be zero: off itself when that is not known. Only who knows that nothing is
// written there may go by it.
func (img *Image) dataBehind(off int64) int64 {
	data, err := img.f.SeekData(off)
	if errors.Is(err, io.EOF) {
		data, err = img.refreshEnd(img.f), nil
	}
	if err != nil {
		return off
	}
	return max(off, data)
}

// inHole reports whether the table is known to lie in a hole.
func (img *Image) inHole(table int64) bool {
	h := img.hole.Load()
	return h != nil && h.has(table, img.clusterSize)
}

// stillHoles finds tables that lie in holes of the image file, for a walk
// during which nobody writes. One that is told of writers (still is false)
// finds none.
type stillHoles struct {
	img   *Image
	still bool
	last  fileHole
}

// isStill reports whether walks have the image for themselves: it is open for
// reading only, or an editor relocates it, which has written what it changed.
func (img *Image) isStill() bool {
	return img.ed == nil && !img.o.Writable || img.ed != nil && img.ed.relocating
}

// in reports whether [off, off+n) lies in a hole.
func (h *stillHoles) in(off, n int64) bool {
	return h.still && h.end(off) >= off+n
}

// end is where the hole at off ends, off itself where there is none.
func (h *stillHoles) end(off int64) int64 {
	if h.last.from <= off && off < h.last.to {
		return h.last.to
	}
	h.last = h.img.holeAt(off, h.last)
	return h.last.to
}
