package mutate

import (
	"encoding/binary"
	"errors"
)

// The journal of ext3 and ext4 (kernel documentation, ext4: journal (jbd2)),
// big-endian.
const (
	jbdMagic  = 0xc03b3998
	jbd64Bit  = 2
	jbdCsumV2 = 8
	jbdCsumV3 = 16
)

// jbd is a recorded journal.
type jbd struct {
	*ext
	incompat uint32
	seed     uint32
	tagSize  int64
}

// log knows the journal's superblock and all blocks of its log.
func (e *ext) log() error {
	be := binary.BigEndian
	sb := e.g.Image.Bytes(e.journal, 1024)
	if be.Uint32(sb) != jbdMagic {
		return errors.New("the recording has no journal where its inode says")
	}
	j := &jbd{ext: e, incompat: be.Uint32(sb[40:]), seed: rawCRC(^uint32(0), sb[48:64]), tagSize: 8}
	switch {
	case j.incompat&jbdCsumV3 != 0:
		j.tagSize = 16
	default:
		if j.incompat&jbd64Bit != 0 {
			j.tagSize += 4
		}
		if j.incompat&jbdCsumV2 != 0 {
			j.tagSize += 2
		}
	}
	e.g.add(e.journal, true, run(0, 12, 4)...)
	e.g.add(e.journal, true, [2]int64{64, 4}, [2]int64{80, 1})
	at, sequence := int64(be.Uint32(sb[28:])), be.Uint32(sb[24:])
	for n := 0; at != 0 && n < 512; n++ {
		b := e.g.Image.Bytes(e.journal+at*e.block, int(e.block))
		if be.Uint32(b) != jbdMagic || be.Uint32(b[8:]) != sequence {
			break
		}
		place := e.journal + at*e.block
		e.g.add(place, true, [2]int64{4, 4}, [2]int64{8, 4})
		at++
		switch be.Uint32(b[4:]) {
		case 1:
			at += j.descriptor(b, place)
		case 2:
			j.commit(place)
			sequence++
		case 5:
			e.g.add(place+12, true, run(0, 6, 4)...)
			j.tail(place)
		}
	}
	if j.sums() {
		e.g.sums = append(e.g.sums, func(s memory) {
			b := s.Bytes(e.journal, 1024)
			be.PutUint32(b[0xfc:], 0)
			be.PutUint32(b[0xfc:], rawCRC(^uint32(0), b))
			s.Put(e.journal, b)
		})
	}
	return nil
}

func (j *jbd) sums() bool { return j.incompat&(jbdCsumV2|jbdCsumV3) != 0 }

// descriptor knows the tags of a descriptor block, and returns how many blocks
// of data follow it.
func (j *jbd) descriptor(b []byte, place int64) (n int64) {
	be := binary.BigEndian
	for at := int64(12); at+j.tagSize <= j.block; {
		n++
		tag, data := place+at, place+n*j.block
		flags := uint32(be.Uint16(b[at+6:]))
		if j.incompat&jbdCsumV3 != 0 {
			flags = be.Uint32(b[at+4:])
			j.g.add(tag, true, run(0, 3, 4)...)
		} else {
			j.g.add(tag, true, [2]int64{0, 4}, [2]int64{6, 2})
			if j.incompat&jbd64Bit != 0 {
				j.g.add(tag, true, [2]int64{8, 4})
			}
		}
		if j.sums() {
			j.g.sums = append(j.g.sums, func(s memory) {
				sequence := s.Bytes(place+8, 4)
				crc := rawCRC(rawCRC(j.seed, sequence), s.Bytes(data, int(j.block)))
				if j.incompat&jbdCsumV3 != 0 {
					s.Put(tag+12, be.AppendUint32(nil, crc))
				} else {
					s.Put(tag+4, be.AppendUint16(nil, uint16(crc)))
				}
			})
		}
		// What is said of the copied block, in the middle of a group's map or
		// inodes, counts too.
		j.g.add(data, false, run(0, 2, 8)...)
		at += j.tagSize
		if flags&2 == 0 {
			at += 16
		}
		if flags&8 != 0 {
			break
		}
	}
	j.tail(place)
	return n
}

// tail is the checksum at the end of a block.
func (j *jbd) tail(place int64) {
	if !j.sums() {
		return
	}
	j.g.sums = append(j.g.sums, func(s memory) {
		b := s.Bytes(place, int(j.block))
		clear(b[j.block-4:])
		binary.BigEndian.PutUint32(b[j.block-4:], rawCRC(j.seed, b))
		s.Put(place, b)
	})
}

func (j *jbd) commit(place int64) {
	j.g.add(place, true, [2]int64{12, 4}, [2]int64{16, 4})
	if !j.sums() {
		return
	}
	j.g.sums = append(j.g.sums, func(s memory) {
		b := s.Bytes(place, int(j.block))
		clear(b[16:20])
		binary.BigEndian.PutUint32(b[16:], rawCRC(j.seed, b))
		s.Put(place, b)
	})
}
