package scavenge

import (
	"encoding/binary"
	"hash/crc32"
	"sync"
)

// ext4 and jbd2 chain CRC-32C without the inversion at its ends. Such a CRC is
// linear over GF(2): crc(seed, data) = crc(0, data) ^ zeros(seed, len(data)),
// where zeros(s, n) is s after n zero bytes. zeros is a bijection, so that the
// seed follows from data and checksum; and since the seed of most checksums is
// made of the filesystem's seed, an inode number and a generation, whoever
// knows two of these knows the third.

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c continues a CRC-32C without inversion.
func crc32c(crc uint32, p []byte) uint32 { return ^crc32.Update(^crc, castagnoli, p) }

func crc32c4(crc, v uint32) uint32 {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	return crc32c(crc, b[:])
}

// unzeros inverts zeros(·, n) for one n.
type unzeros struct{ t [4][256]uint32 }

// newUnzeros makes the inverse for n bytes, n at most 64 KiB.
func newUnzeros(n int) *unzeros {
	zero := make([]byte, n)
	// Gauss: rows hold zeros(x) beside x, until the left side is the identity.
	var left, right [32]uint32
	for i := range 32 {
		right[i] = 1 << i
		left[i] = crc32c(right[i], zero)
	}
	for bit := range 32 {
		p := bit
		for p < 32 && left[p]>>bit&1 == 0 {
			p++
		}
		if p == 32 {
			return &unzeros{} // cannot be: the polynomial has a constant term
		}
		left[bit], left[p], right[bit], right[p] = left[p], left[bit], right[p], right[bit]
		for i := range 32 {
			if i != bit && left[i]>>bit&1 != 0 {
				left[i] ^= left[bit]
				right[i] ^= right[bit]
			}
		}
	}
	u := new(unzeros)
	for k := range 4 {
		for v := range 256 {
			var r uint32
			for bit := range 8 {
				if v>>bit&1 != 0 {
					r ^= right[8*k+bit]
				}
			}
			u.t[k][v] = r
		}
	}
	return u
}

// state is the CRC before n zero bytes led to crc.
func (u *unzeros) state(crc uint32) uint32 {
	return u.t[0][byte(crc)] ^ u.t[1][byte(crc>>8)] ^ u.t[2][byte(crc>>16)] ^ u.t[3][byte(crc>>24)]
}

// seed is the CRC that led to crc over p, of the length of u.
func (u *unzeros) seed(crc uint32, p []byte) uint32 { return u.state(crc ^ crc32c(0, p)) }

// unzeros4 is for words.
var unzeros4 = sync.OnceValue(func() *unzeros { return newUnzeros(4) })

// word is the 32-bit number that led from one CRC to another.
func word(from, to uint32) uint32 { return from ^ unzeros4().state(to) }

// wordBefore is the CRC from which the number v led to crc.
func wordBefore(v, to uint32) uint32 { return v ^ unzeros4().state(to) }

// sumMatches tells whether the CRC-32C (the usual one, inverted) of p, with
// the four bytes at byte at taken as zeros, is what they say in little-endian.
func sumMatches(p []byte, at int) bool {
	var zero [4]byte
	c := crc32.Update(0, castagnoli, p[:at])
	c = crc32.Update(c, castagnoli, zero[:])
	return crc32.Update(c, castagnoli, p[at+4:]) == binary.LittleEndian.Uint32(p[at:])
}
