package qcow2

import "encoding/binary"

// A refcount block is an array of entries of 1<<order bits (section Host
// cluster management). Entries narrower than a byte count from its least
// significant bit, wider ones are big-endian.

// maxRefcount is the largest count that fits.
func maxRefcount(order uint) uint64 { return ^uint64(0) >> (64 - 1<<order) }

// getRefcount returns entry i of a block.
func getRefcount(b []byte, order uint, i int) uint64 {
	switch order {
	case 3:
		return uint64(b[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(b[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(b[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(b[8*i:])
	}
	perByte := 8 >> order
	shift := uint(i%perByte) << order
	return uint64(b[i/perByte]) >> shift & maxRefcount(order)
}

// putRefcount sets entry i of a block to v, which must fit.
func putRefcount(b []byte, order uint, i int, v uint64) {
	switch order {
	case 3:
		b[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(b[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(b[4*i:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(b[8*i:], v)
	default:
		perByte := 8 >> order
		shift := uint(i%perByte) << order
		mask := byte(maxRefcount(order)) << shift
		b[i/perByte] = b[i/perByte]&^mask | byte(v)<<shift&mask
	}
}

// freeRun finds the first entry that is zero in [from, to) of a block and how
// many of those behind it are zero too, at most want. It returns n = 0 when
// there is none.
func freeRun(b []byte, order uint, from, to, want int) (i, n int) {
	for i = from; i < to; i++ {
		if getRefcount(b, order, i) != 0 {
			continue
		}
		for n = 1; n < want && i+n < to && getRefcount(b, order, i+n) == 0; n++ {
		}
		return i, n
	}
	return to, 0
}
