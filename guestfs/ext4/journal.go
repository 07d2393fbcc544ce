package ext4

import (
	"encoding/binary"
	"fmt"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// The journal (kernel documentation, ext4: journal (jbd2)): everything in it
// is big-endian.
const (
	jbdMagic = 0xc03b3998

	jbdDescriptor = 1
	jbdCommit     = 2
	jbdSuperV1    = 3
	jbdSuperV2    = 4
	jbdRevoke     = 5

	jbdCompatChecksum = 1

	jbdRevokes     = 0x1
	jbd64Bit       = 0x2
	jbdAsyncCommit = 0x4
	jbdCsumV2      = 0x8
	jbdCsumV3      = 0x10
	jbdFastCommit  = 0x20
	jbdKnown       = jbdRevokes | jbd64Bit | jbdAsyncCommit | jbdCsumV2 | jbdCsumV3 | jbdFastCommit

	tagEscape   = 1
	tagSameUUID = 2
	tagDeleted  = 4
	tagLast     = 8

	jbdHeader   = 12
	jbdMinimum  = 1024 // blocks
	jbdSumCRC32 = 1
)

// journal is the journal's superblock and where its blocks are.
type journal struct {
	s     *super
	files *fileMap

	blocks, first, start uint64 // start is 0 when the journal is empty
	sequence             uint32
	compat, incompat     uint32
	seed                 uint32
}

func (j *journal) inc(bit uint32) bool { return j.incompat&bit != 0 }

// sums reports whether blocks have checksums of version 2 or 3.
func (j *journal) sums() bool { return j.inc(jbdCsumV2 | jbdCsumV3) }

func (j *journal) validate(b []byte) error {
	be := binary.BigEndian
	if m, t := be.Uint32(b), be.Uint32(b[4:]); m != jbdMagic || t != jbdSuperV1 && t != jbdSuperV2 {
		return damaged("journal superblock: magic %#x, type %d", m, t)
	} else if t == jbdSuperV2 {
		j.compat, j.incompat = be.Uint32(b[36:]), be.Uint32(b[40:])
		if bad := j.incompat &^ jbdKnown; bad != 0 || be.Uint32(b[44:]) != 0 || j.compat&^jbdCompatChecksum != 0 {
			return freespace.Refuse(freespace.UnknownFeature, "ext: journal features %#x %#x %#x", j.compat, j.incompat, be.Uint32(b[44:]))
		}
	}
	if j.inc(jbdCsumV2) && j.inc(jbdCsumV3) || j.sums() && j.compat&jbdCompatChecksum != 0 {
		return damaged("journal: more than one kind of checksum (%#x %#x)", j.compat, j.incompat)
	}
	if j.sums() {
		if b[80] != 4 {
			return freespace.Refuse(freespace.UnknownFeature, "ext: journal checksum type %d", b[80])
		}
		if got, want := crc32cWithout(^uint32(0), b[:1024], 0xfc, 4), be.Uint32(b[0xfc:]); got != want {
			return badSum("journal superblock", got, want)
		}
	}
	j.seed = crc32c(^uint32(0), b[48:64])
	if bs := be.Uint32(b[12:]); int64(bs) != j.s.blockSize {
		return damaged("journal: blocks of %d bytes", bs)
	}
	j.blocks, j.first = uint64(be.Uint32(b[16:])), uint64(be.Uint32(b[20:]))
	if j.blocks < jbdMinimum || j.blocks > j.files.want || j.first == 0 || j.first >= j.blocks {
		return damaged("journal: %d of %d blocks from %d", j.blocks, j.files.want, j.first)
	}
	j.sequence, j.start = be.Uint32(b[24:]), uint64(be.Uint32(b[28:]))
	if j.start != 0 && (j.start < j.first || j.start >= j.blocks) {
		return damaged("journal: it begins in block %d of %d to %d", j.start, j.first, j.blocks)
	}
	if e := be.Uint32(b[32:]); e != 0 {
		return freespace.Refuse(freespace.ErrorState, "ext: the journal was aborted (error %d): run e2fsck", int32(e))
	}
	return nil
}

// step is the block that follows n others from block at of the journal.
func (j *journal) step(at, n uint64) uint64 {
	if at += n; at >= j.blocks {
		at -= j.blocks - j.first
	}
	return at
}

// tag is an entry of a descriptor block: the journal's next block is the
// content of block target.
type tag struct {
	target uint64
	flags  uint32
	sum    uint32
}

// tagSize is the length of a tag without the UUID that may follow it.
func (j *journal) tagSize() int {
	n := 8
	if j.inc(jbdCsumV3) {
		return 16
	}
	if j.inc(jbd64Bit) {
		n += 4
	}
	if j.inc(jbdCsumV2) {
		n += 2
	}
	return n
}

// checkTail compares the checksum at the end of a descriptor or revoke block.
func (j *journal) checkTail(b []byte, what string) error {
	if !j.sums() {
		return nil
	}
	at := len(b) - 4
	if got, want := crc32cWithout(j.seed, b, at, 4), binary.BigEndian.Uint32(b[at:]); got != want {
		return badSum(what+" block of the journal", got, want)
	}
	return nil
}

// tags decodes a descriptor block.
func (j *journal) tags(b []byte) ([]tag, error) {
	if err := j.checkTail(b, "descriptor"); err != nil {
		return nil, err
	}
	end, size := len(b), j.tagSize()
	if j.sums() {
		end -= 4
	}
	be := binary.BigEndian
	var tags []tag
	for at := jbdHeader; ; {
		if at+size > end {
			return nil, damaged("journal: a descriptor block without a last tag")
		}
		e := b[at : at+size]
		t := tag{target: uint64(be.Uint32(e))}
		if j.inc(jbdCsumV3) {
			t.flags, t.sum = be.Uint32(e[4:]), be.Uint32(e[12:])
			if j.inc(jbd64Bit) {
				t.target |= uint64(be.Uint32(e[8:])) << 32
			}
		} else {
			t.sum, t.flags = uint32(be.Uint16(e[4:])), uint32(be.Uint16(e[6:]))
			if j.inc(jbd64Bit) {
				t.target |= uint64(be.Uint32(e[8:])) << 32
			}
		}
		if t.flags&^(tagEscape|tagSameUUID|tagDeleted|tagLast) != 0 || t.flags&tagDeleted != 0 {
			return nil, damaged("journal: tag flags %#x", t.flags)
		}
		tags = append(tags, t)
		at += size
		if t.flags&tagSameUUID == 0 {
			at += 16
		}
		if t.flags&tagLast != 0 {
			return tags, nil
		}
	}
}

// checkData compares the checksum that a tag has of its block.
func (j *journal) checkData(t tag, b []byte, sequence uint32) error {
	if !j.sums() {
		return nil
	}
	got := crc32c(crc32c(j.seed, binary.BigEndian.AppendUint32(nil, sequence)), b)
	if j.inc(jbdCsumV2) {
		got &= 0xffff
	}
	if got != t.sum {
		return badSum(fmt.Sprintf("journal's copy of block %d", t.target), got, t.sum)
	}
	return nil
}

// checkCommit compares the checksum of a commit block: its own one, or in
// version 1 that of the transaction, which the caller has computed.
func (j *journal) checkCommit(b []byte, transaction uint32) error {
	want := binary.BigEndian.Uint32(b[16:])
	switch {
	case j.sums():
		if got := crc32cWithout(j.seed, b, 16, 4); got != want {
			return badSum("commit block of the journal", got, want)
		}
	case j.compat&jbdCompatChecksum != 0:
		if b[12] == 0 && b[13] == 0 && want == 0 {
			return nil // a transaction from before checksums were switched on
		}
		if b[12] != jbdSumCRC32 || b[13] != 4 || want != transaction {
			return badSum("transaction of the journal", transaction, want)
		}
	}
	return nil
}

// revoked calls add for every block of a revoke block.
func (j *journal) revoked(b []byte, add func(block uint64) error) error {
	if err := j.checkTail(b, "revoke"); err != nil {
		return err
	}
	be := binary.BigEndian
	end, size := len(b), 4
	if j.sums() {
		end -= 4
	}
	if j.inc(jbd64Bit) {
		size = 8
	}
	n := int64(be.Uint32(b[jbdHeader:]))
	if n < jbdHeader+4 || n > int64(end) {
		return damaged("journal: a revoke block of %d bytes", n)
	}
	for at := jbdHeader + 4; at+size <= int(n); at += size {
		block := uint64(be.Uint32(b[at:]))
		if size == 8 {
			block = be.Uint64(b[at:])
		}
		if err := add(block); err != nil {
			return err
		}
	}
	return nil
}
