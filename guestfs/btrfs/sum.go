package btrfs

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash/crc32"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/crypto/blake2b"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// sumSize is the room for a checksum at the start of the superblock and of
// every tree block.
const sumSize = 32

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sums are the kinds of checksums by number (btrfs_tree.h: btrfs_csum_type).
var sums = map[uint16]func([]byte) []byte{
	0: func(p []byte) []byte { return binary.LittleEndian.AppendUint32(nil, crc32.Checksum(p, castagnoli)) },
	1: func(p []byte) []byte { return binary.LittleEndian.AppendUint64(nil, xxhash.Sum64(p)) },
	2: func(p []byte) []byte { h := sha256.Sum256(p); return h[:] },
	3: func(p []byte) []byte { h := blake2b.Sum256(p); return h[:] },
}

// checkSum compares the checksum of b, which covers all that follows it. The
// room that a short checksum leaves is not looked at, as by the kernel.
func checkSum(kind uint16, b []byte, what string, at uint64) error {
	f, ok := sums[kind]
	if !ok {
		return freespace.Refuse(freespace.UnknownFeature, "btrfs: checksums of kind %d", kind)
	}
	got := f(b[sumSize:])
	if want := b[:len(got)]; !bytes.Equal(got, want) {
		return freespace.Refuse(freespace.BadChecksum, "btrfs: %s at %d: checksum %x, computed %x", what, at, want, got)
	}
	return nil
}
