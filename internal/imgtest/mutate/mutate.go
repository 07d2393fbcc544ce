// Package mutate damages disk images where it hurts: in the fields of headers
// and in table entries, with values that are nearly right. The fuzz targets
// that compare with QEMU use it.
//
// Design note. A script of bytes, which a fuzzer changes freely, is read as a
// list of edits. Each picks a field that the image really has, found by
// following its tables, and one of a few kinds of new values, so that almost
// every script reaches code behind the first check.
package mutate

import (
	"crypto/md5"
	"encoding/binary"
)

// field is a number in an image.
type field struct {
	off, size int
	big       bool
}

// Apply changes a copy of an image of the format ("qcow2" or "ploop") as the
// script says: four bytes for each edit, at most 6 edits. Then the checksum of
// a ploop format extension is made right, unless one byte of the script is
// left over.
func Apply(format string, image, script []byte) []byte {
	b := append([]byte(nil), image...)
	for n := 0; len(script) >= 4 && n < 6; n++ {
		fields := ploopFields
		if format == "qcow2" {
			fields = qcow2Fields
		}
		if f := fields(b); len(f) > 0 {
			edit(b, f[(int(script[0])<<8|int(script[1]))%len(f)], f, script[2], script[3])
		}
		script = script[4:]
	}
	if format == "ploop" && len(script) != 1 {
		fixExtension(b)
	}
	return b
}

func (f field) get(b []byte) uint64 {
	var w [8]byte
	if f.big {
		copy(w[8-f.size:], b[f.off:f.off+f.size])
		return binary.BigEndian.Uint64(w[:])
	}
	copy(w[:], b[f.off:f.off+f.size])
	return binary.LittleEndian.Uint64(w[:])
}

func (f field) put(b []byte, v uint64) {
	var w [8]byte
	if f.big {
		binary.BigEndian.PutUint64(w[:], v)
		copy(b[f.off:f.off+f.size], w[8-f.size:])
		return
	}
	binary.LittleEndian.PutUint64(w[:], v)
	copy(b[f.off:f.off+f.size], w[:])
}

// edit gives f a new value.
func edit(b []byte, f field, all []field, kind, arg byte) {
	other := all[int(arg)*7%len(all)]
	f.put(b, newValue(f.get(b), other.get(b), f.size, int64(len(b)), kind, arg))
}

// newValue is what becomes of a number of size bytes in an image of length
// bytes. other is the value of another field.
func newValue(old, other uint64, size int, length int64, kind, arg byte) uint64 {
	switch kind % 10 {
	case 0:
		return old ^ 1<<(int(arg)%(8*size))
	case 1:
		return old + uint64(arg) + 1
	case 2:
		return old - uint64(arg) - 1
	case 3: // what another field says
		return other
	case 4:
		return 0
	case 5:
		return ^uint64(0) >> (arg % 64)
	case 6: // a neighbouring cluster, for many sizes of clusters
		return old + 1<<(9+arg%10)
	case 7:
		return uint64(length) + uint64(arg) - 128
	case 8:
		return old<<(arg%8) | old>>(8-arg%8)
	}
	return 1 << (int(arg) % (8 * size))
}

// inside adds a field that lies in the image.
func inside(list []field, b []byte, off uint64, size int, big bool) []field {
	if off > uint64(len(b)) || uint64(len(b))-off < uint64(size) {
		return list
	}
	return append(list, field{int(off), size, big})
}

// qcow2Fields are the header's, and entries of L1, L2 and refcount tables.
func qcow2Fields(b []byte) (list []field) {
	if len(b) < 104 {
		return nil
	}
	for _, f := range [][2]int{{4, 4}, {8, 8}, {16, 4}, {20, 4}, {24, 8}, {32, 4}, {36, 4}, {40, 8}, {48, 8}, {56, 4}, {60, 4}, {64, 8}, {72, 8}, {80, 8}, {88, 8}, {96, 4}, {100, 4}} {
		list = inside(list, b, uint64(f[0]), f[1], true)
	}
	be := binary.BigEndian
	const place = 0x00fffffffffffe00
	table := func(at uint64, n int, do func(entry uint64)) {
		for i := range uint64(n) {
			before := len(list)
			list = inside(list, b, at+8*i, 8, true)
			if len(list) > before && do != nil {
				do(be.Uint64(b[at+8*i:]) & place)
			}
		}
	}
	table(be.Uint64(b[40:])&place, 4, func(l2 uint64) {
		if l2 != 0 {
			table(l2, 24, nil)
		}
	})
	table(be.Uint64(b[48:])&place, 2, func(block uint64) {
		for i := range uint64(16) {
			if block != 0 {
				list = inside(list, b, block+2*i, 2, true)
			}
		}
	})
	return list
}

// ploopFields are the header's, the first entries of the BAT, and those of the
// format extension.
func ploopFields(b []byte) (list []field) {
	for _, f := range [][2]int{{16, 4}, {20, 4}, {24, 4}, {28, 4}, {32, 4}, {36, 8}, {44, 4}, {48, 4}, {52, 4}, {56, 8}} {
		list = inside(list, b, uint64(f[0]), f[1], false)
	}
	for i := range uint64(24) {
		list = inside(list, b, 64+4*i, 4, false)
	}
	at, n := extension(b)
	if n == 0 {
		return list
	}
	// A feature is magic, flags, size; a bitmap's data is size, id,
	// granularity, length of its table, and the table.
	for _, f := range [][2]uint64{{0, 8}, {24, 8}, {32, 8}, {40, 4}, {48, 8}, {72, 4}, {76, 4}, {80, 8}, {88, 8}, {96, 8}} {
		list = inside(list, b[:at+n], at+f[0], int(f[1]), false)
	}
	return list
}

// extensionMagic begins the format extension of a ploop image (QEMU's
// parallels.txt); then comes the MD5 of the rest of its cluster.
const (
	extensionMagic = 0xab234cef23dcea87
	extensionHead  = 24
)

// extension is where the extension is and how long, 0 when there is none.
func extension(b []byte) (at, n uint64) {
	le := binary.LittleEndian
	if len(b) < 64 {
		return 0, 0
	}
	at, n = le.Uint64(b[56:]), uint64(le.Uint32(b[28:]))*512
	if at == 0 || at > uint64(len(b))/512 || n < 512 || n > uint64(len(b))-at*512 || le.Uint64(b[at*512:]) != extensionMagic {
		return 0, 0
	}
	return at * 512, n
}

func fixExtension(b []byte) {
	if at, n := extension(b); n > 0 {
		sum := md5.Sum(b[at+extensionHead : at+n])
		copy(b[at+8:], sum[:])
	}
}
