package freespace

import (
	"context"
	"encoding/binary"
	"io"
	"math/bits"
)

// Zeros goes through the first n bits of r, calls f (unless it is nil) for
// every run of zeros in order, and returns how many are ones. A run may come in
// several pieces.
func Zeros(ctx context.Context, r io.ReaderAt, n int64, f func(start, n int64) error) (ones int64, err error) {
	b := make([]byte, 64<<10)
	for first := int64(0); first < n; first += int64(len(b)) * 8 {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		k := min(int64(len(b))*8, n-first)
		p := b[:(k+7)/8]
		if err := ReadAt(r, p, first/8); err != nil {
			return 0, err
		}
		ones += k
		for at := uint64(0); ; {
			start, run := NextZeros(p, at, uint64(k))
			if run == 0 {
				break
			}
			at = start + run
			ones -= int64(run)
			if f == nil {
				continue
			}
			if err := f(first+int64(start), int64(run)); err != nil {
				return 0, err
			}
		}
	}
	return ones, nil
}

// NextZeros finds the first run of zero bits of b in [at, end): its start and
// length, or end and 0. The lowest bit of a byte comes first.
func NextZeros(b []byte, at, end uint64) (start, n uint64) {
	start = nextBit(b, at, end, false)
	return start, nextBit(b, start, end, true) - start
}

// nextBit finds the first bit in [at, end) that is as wanted, or end.
func nextBit(b []byte, at, end uint64, set bool) uint64 {
	for at < end {
		var w uint64
		i := at / 64 * 8
		if i+8 <= uint64(len(b)) {
			w = binary.LittleEndian.Uint64(b[i:])
		} else {
			for k := range uint64(len(b)) - i {
				w |= uint64(b[i+k]) << (8 * k)
			}
		}
		if !set {
			w = ^w
		}
		if w >>= at % 64; w != 0 {
			return min(at+uint64(bits.TrailingZeros64(w)), end)
		}
		at = at/64*64 + 64
	}
	return end
}
