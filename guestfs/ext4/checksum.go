package ext4

import (
	"encoding/binary"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c continues a CRC-32C without the inversion at both ends that the
// standard function has: that is how ext4 and jbd2 chain it.
func crc32c(crc uint32, p []byte) uint32 { return ^crc32.Update(^crc, castagnoli, p) }

// crc32cWithout is crc32c over p with the bytes [at, at+n) taken as zeros.
func crc32cWithout(crc uint32, p []byte, at, n int) uint32 {
	var zero [4]byte
	crc = crc32c(crc, p[:at])
	crc = crc32c(crc, zero[:n])
	return crc32c(crc, p[at+n:])
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

var crc16Table = func() (t [256]uint16) {
	for i := range t {
		c := uint16(i)
		for range 8 {
			if c&1 != 0 {
				c = c>>1 ^ 0xa001
			} else {
				c >>= 1
			}
		}
		t[i] = c
	}
	return t
}()

// crc16 continues the CRC-16 (polynomial 0x8005, reflected) of uninit_bg.
func crc16(crc uint16, p []byte) uint16 {
	for _, b := range p {
		crc = crc>>8 ^ crc16Table[byte(crc)^b]
	}
	return crc
}

var crc32beTable = func() (t [256]uint32) {
	for i := range t {
		c := uint32(i) << 24
		for range 8 {
			if c&0x80000000 != 0 {
				c = c<<1 ^ 0x04c11db7
			} else {
				c <<= 1
			}
		}
		t[i] = c
	}
	return t
}()

// crc32be continues the CRC-32 with the highest bit first and without
// inversion that commit blocks of journals with checksums of version 1 hold.
func crc32be(crc uint32, p []byte) uint32 {
	for _, b := range p {
		crc = crc<<8 ^ crc32beTable[byte(crc>>24)^b]
	}
	return crc
}
