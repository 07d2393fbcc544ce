package ploop

import (
	"context"
	"crypto/md5"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/RoaringBitmap/roaring/v2"

	"github.com/imagestack/imagestack/layers"
)

// keptExtension is a format extension that stays true while clusters move: its
// bitmaps count parts of the disk, not of the file. The header goes on naming
// it while the image is in use, which is worth nothing to anybody (an image
// that was not closed has no valid extension) but to who goes on relocating
// after a crash.
type keptExtension struct {
	at    int64  // its cluster, byte of the file
	bytes []byte // of its cluster
	refs  []extensionRef
}

// slots are all clusters of the file that the extension uses.
func (k *keptExtension) slots(shift uint) *roaring.Bitmap {
	s := roaring.BitmapOf(uint32(k.at >> shift))
	for _, r := range k.refs {
		s.Add(uint32(r.host >> shift))
	}
	return s
}

// keepExtension decides, before the first change, that the format extension
// outlives the changes that follow. One of an image that was not closed is
// only kept when trust says that nothing but relocations was under way.
//
// An extension with a feature that is not understood is refused: it may name
// clusters that then would move, or be written over.
func (i *Image) keepExtension(ctx context.Context, trust bool) error {
	e := i.edit
	h := i.header()
	if h.extension == 0 || e.keep != nil || e.started.Load() {
		return nil
	}
	if h.inUse != inUseV21 && !(trust && h.inUse == inUseOpen) {
		return nil // out of date: the first change drops it
	}
	ext, b, err := i.loadExtension(h.extension)
	if err != nil {
		return err
	}
	if len(ext.unknown) > 0 {
		return &layers.ImageError{Path: i.path, Layer: -1, Offset: h.extension, Field: "format extension feature", Value: ext.unknown[0],
			Err: fmt.Errorf("%w: it is not known which clusters of the file it needs", layers.ErrUnsupported)}
	}
	keep := &keptExtension{at: h.extension, bytes: b, refs: ext.refs}
	if err := e.alloc.ready(ctx); err != nil {
		return err
	}
	mine := keep.slots(i.bat.shift)
	if err := i.walk(ctx, func(r run) error {
		from := uint64(r.host >> i.bat.shift)
		both := roaring.New()
		both.AddRange(from, from+uint64(r.count))
		both.And(mine)
		if both.IsEmpty() {
			return nil
		}
		k := int64(both.Minimum()) - int64(from)
		return i.bat.badEntry(r.idx+k, i.bat.entry(r.host+k<<i.bat.shift), "the format extension uses the cluster too")
	}); err != nil {
		return err
	}
	e.alloc.reserve(mine)
	e.keep = keep
	return nil
}

// reserve takes slots out of those that may be written.
func (a *allocator) reserve(slots *roaring.Bitmap) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.free.AndNot(slots)
}

// takeBelow returns the lowest free slot if it lies below host, else 0.
func (a *allocator) takeBelow(ctx context.Context, host int64) (int64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.scan(ctx); err != nil {
		return 0, err
	}
	if a.free.IsEmpty() {
		return 0, nil
	}
	first := a.free.Minimum()
	if int64(first)<<a.i.bat.shift >= host {
		return 0, nil
	}
	a.free.Remove(first)
	return int64(first) << a.i.bat.shift, nil
}

// lowerExtension moves the clusters of the kept extension into free slots
// below them until there are none, and returns the bytes moved. Nothing is
// overwritten: the extension is written to another place with its new sum, and
// the header then names it.
func (i *Image) lowerExtension(ctx context.Context) (moved int64, err error) {
	// Every round but the first lowers the sum of the places.
	for range 2 * (len(i.edit.keep.refs) + 2) {
		if err := ctx.Err(); err != nil {
			return moved, err
		}
		n, err := i.lowerOnce(ctx)
		moved += n
		if err != nil || n == 0 {
			return moved, err
		}
	}
	return moved, nil
}

func (i *Image) lowerOnce(ctx context.Context) (int64, error) {
	e, keep, shift := i.edit, i.edit.keep, i.bat.shift
	highest := int64(keep.slots(shift).Maximum()) << shift
	a := &e.alloc
	if !a.freeBelow(highest) {
		return 0, nil
	}
	if err := i.begin(); err != nil {
		return 0, err
	}
	var took []int64
	giveUp := func(err error) (int64, error) {
		for _, host := range took {
			err = errors.Join(err, a.giveBack(host, 1))
		}
		return 0, err
	}
	next := &keptExtension{bytes: slices.Clone(keep.bytes), refs: slices.Clone(keep.refs)}
	moves := map[int64]int64{} // a bitmap's cluster may be named twice
	for n, r := range next.refs {
		to, known := moves[r.host]
		if !known {
			var err error
			if to, err = a.takeBelow(ctx, r.host); err != nil {
				return giveUp(err)
			}
			if to == 0 {
				to = r.host
			} else {
				took = append(took, to)
				if _, err := i.f.CopyRange(i.f, r.host, to, i.h.cluster); err != nil {
					return giveUp(err)
				}
			}
			moves[r.host] = to
		}
		next.refs[n].host = to
		binary.LittleEndian.PutUint64(next.bytes[r.at:], uint64(to/sectorSize))
	}
	at, _, err := a.take(ctx, 1)
	if err != nil {
		return giveUp(err)
	}
	took = append(took, at)
	next.at = at
	sum := md5.Sum(next.bytes[extHead:])
	copy(next.bytes[8:extHead], sum[:])
	if _, err := i.f.WriteAt(next.bytes, at); err != nil {
		return giveUp(err)
	}
	if err := i.sync(); err != nil {
		return 0, err
	}
	if err := i.setHeader(func(h *header) { h.extension = next.at }); err != nil {
		// Which of the two the file names is not known: both stay.
		return 0, err
	}
	free := keep.slots(shift)
	free.AndNot(next.slots(shift))
	e.keep = next
	return int64(len(took)) << shift, a.freed(free)
}

// freeBelow reports whether a free slot lies below host.
func (a *allocator) freeBelow(host int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.free.IsEmpty() && int64(a.free.Minimum())<<a.i.bat.shift < host
}
