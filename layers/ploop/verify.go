package ploop

import (
	"context"

	"github.com/RoaringBitmap/roaring/v2"
)

// window is the number of slots that one pass of verify looks at: 32 MiB of
// bits, whatever the image says. One pass covers 256 TiB of 1 MiB clusters.
const window = 1 << 28

// verify checks every entry of the BAT (range, alignment, no slot twice, none
// behind the end of the disk) of a file of eof bytes, and returns the slots
// that no entry refers to. Damage is an ErrCorrupt that names the first bad
// entry.
func (i *Image) verify(ctx context.Context, eof int64) (*roaring.Bitmap, error) {
	free := roaring.New()
	// Slots that no entry can name are nobody's.
	slots := min(eof, i.bat.maxHost()) >> i.bat.shift
	for first := int64(0); first < slots || first == 0; first += window {
		used := make([]uint64, (min(window, slots-first)+63)/64)
		if err := i.walk(ctx, func(r run) error {
			slot := r.host >> i.bat.shift
			for k := max(first-slot, 0); k < r.count && slot+k-first < min(window, slots-first); k++ {
				s := slot + k - first
				if used[s/64]&(1<<(s%64)) != 0 {
					return i.bat.badEntry(r.idx+k, i.bat.entry(r.host+k<<i.bat.shift), "cluster is used by an earlier entry too")
				}
				used[s/64] |= 1 << (s % 64)
			}
			return nil
		}); err != nil {
			return nil, err
		}
		addFree(free, used, max(first, i.h.firstData>>i.bat.shift), first, min(first+window, slots))
	}
	return free, nil
}

// addFree adds the slots of [from, to) whose bit is not set; bit 0 of used is
// slot base.
func addFree(free *roaring.Bitmap, used []uint64, from, base, to int64) {
	ranges := 0
	for s := from; s < to; {
		w := used[(s-base)/64]
		if w == ^uint64(0) {
			s = base + ((s-base)/64+1)*64
			continue
		}
		if w&(1<<((s-base)%64)) != 0 {
			s++
			continue
		}
		start := s
		for s < to && used[(s-base)/64]&(1<<((s-base)%64)) == 0 {
			s++
		}
		free.AddRange(uint64(start), uint64(s))
		if ranges++; ranges%1024 == 0 && free.GetSizeInBytes() > maxFreeMemory {
			return
		}
	}
}

// empty reports whether no entry of the BAT is set.
func (i *Image) empty() (bool, error) {
	if i.h.entries == 0 {
		return true, nil // a disk of no bytes
	}
	r, err := i.bat.next(0, i.h.entries)
	for err == nil && r.host == 0 && r.idx+r.count < i.h.entries {
		r, err = i.bat.next(r.idx+r.count, i.h.entries)
	}
	return err == nil && r.host == 0, err
}
