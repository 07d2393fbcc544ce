package freespace

import (
	"encoding/binary"
	"math/bits"
)

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
