package ext4

import (
	"io"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// walker goes through the groups in order and emits what is free.
type walker struct {
	s    *super
	r    io.ReaderAt
	used []span // fixed metadata, sorted; what lies before the present group is cut off
	emit freespace.Emit
	buf  []byte // one block: the bitmap
}

// group judges group g.
func (w *walker) group(g uint64, d desc) error {
	s := w.s
	first, blocks := s.groupFirst(g), s.groupBlocks(g)
	for len(w.used) > 0 && w.used[0].end() <= first {
		w.used = w.used[1:]
	}
	clusters := (blocks + s.ratio - 1) / s.ratio
	if d.uninit() {
		w.synthesise(first, blocks, clusters)
	} else {
		if err := s.readBlock(w.r, w.buf, d.blockBitmap); err != nil {
			return err
		}
		if err := s.checkBitmapSum(w.buf, d, g); err != nil {
			return err
		}
	}
	if start, _ := freespace.NextZeros(w.buf, clusters, s.clustersPerGroup); start < s.clustersPerGroup {
		return damaged("bitmap of group %d: bit %d behind the end of the filesystem is clear", g, start)
	}
	free, used := uint64(0), w.used
	for at := uint64(0); ; {
		start, n := freespace.NextZeros(w.buf, at, clusters)
		if n == 0 {
			break
		}
		at = start + n
		free += n
		run := span{first + start*s.ratio, n * s.ratio}
		run.n = min(run.n, first+blocks-run.start)
		for len(used) > 0 && used[0].end() <= run.start {
			used = used[1:]
		}
		if len(used) > 0 && used[0].start < run.end() {
			return damaged("bitmap of group %d: block %d holds metadata and is marked as free", g, max(used[0].start, run.start))
		}
		if err := w.emit(int64(run.start)*s.blockSize, int64(run.n)*s.blockSize); err != nil {
			return err
		}
	}
	if free != d.free {
		return freespace.Refuse(freespace.CountMismatch, "ext: group %d: %d clusters are free in the bitmap, the descriptor says %d", g, free, d.free)
	}
	return nil
}

// synthesise fills the buffer with the bitmap of a group whose own was never
// written: only fixed metadata is used.
func (w *walker) synthesise(first, blocks, clusters uint64) {
	clear(w.buf)
	for _, u := range w.used {
		if u.start >= first+blocks {
			break
		}
		low, high := max(u.start, first)-first, min(u.end(), first+blocks)-first
		for c := low / w.s.ratio; c*w.s.ratio < high; c++ {
			w.buf[c/8] |= 1 << (c % 8)
		}
	}
	for c := clusters; c < w.s.clustersPerGroup; c++ {
		w.buf[c/8] |= 1 << (c % 8)
	}
}
