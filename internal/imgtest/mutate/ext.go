package mutate

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// rawCRC is a CRC-32C without the inversions at both ends, as Linux chains it.
func rawCRC(crc uint32, p []byte) uint32 { return ^crc32.Update(^crc, castagnoli, p) }

// crc16 is the CRC of group descriptors without metadata_csum (polynomial
// 0x8005, reflected).
func crc16(crc uint16, p []byte) uint16 {
	for _, c := range p {
		crc ^= uint16(c)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0xa001
			} else {
				crc >>= 1
			}
		}
	}
	return crc
}

// ext is a recorded ext2, ext3 or ext4 (kernel documentation, ext4). Its
// places are those of the recording; what is written there may change.
type ext struct {
	g         *Guest
	block     int64 // bytes
	desc      int64 // bytes of a group descriptor
	uuid      []byte
	sums, gdt bool // metadata_csum; uninit_bg's
	perGroup  int64
	seed      uint32
	journal   int64 // byte of its superblock
}

func parseExt(g *Guest) error {
	le := binary.LittleEndian
	sb := g.Image.Bytes(1024, 1024)
	if le.Uint16(sb[56:]) != 0xef53 {
		return errors.New("no ext superblock")
	}
	e := &ext{g: g, block: 1024 << le.Uint32(sb[24:]), desc: 32, uuid: sb[104:120], perGroup: int64(le.Uint32(sb[36:]))}
	incompat, ro := le.Uint32(sb[96:]), le.Uint32(sb[100:])
	if incompat&0x80 != 0 {
		e.desc = int64(le.Uint16(sb[0xfe:]))
	}
	e.sums, e.gdt = ro&0x400 != 0, ro&0x10 != 0
	if e.seed = rawCRC(^uint32(0), e.uuid); incompat&0x2000 != 0 {
		e.seed = le.Uint32(sb[0x270:])
	}
	e.super(1024)
	first := int64(le.Uint32(sb[20:]))
	blocks := int64(le.Uint32(sb[4:]))
	groups := (blocks - first + int64(le.Uint32(sb[32:])) - 1) / int64(le.Uint32(sb[32:]))
	table := e.block * (first + 1)
	if e.block > 1024 {
		table = e.block
	}
	g.Marks["descriptors"] = table
	for n := range groups {
		e.group(table+n*e.desc, uint32(n))
	}
	if le.Uint32(sb[92:])&4 != 0 {
		inode := g.Image.Bytes(table, 32)
		size := int64(le.Uint16(sb[88:]))
		g.Marks["journal inode"] = int64(le.Uint32(inode[8:]))*e.block + 7*size
		g.Marks["bitmap"] = int64(le.Uint32(inode)) * e.block
		if err := e.journalInode(int64(le.Uint32(inode[8:]))*e.block+7*size, size); err != nil {
			return err
		}
	}
	// The superblock last: its checksum covers nothing of the others.
	g.sums = append(g.sums, func(s memory) {
		if b := s.Bytes(1024, 1024); e.sums {
			le.PutUint32(b[0x3fc:], rawCRC(^uint32(0), b[:0x3fc]))
			s.Put(1024, b)
		}
	})
	return nil
}

func (e *ext) super(at int64) {
	e.g.add(at, false, run(0, 13, 4)...)
	e.g.add(at, false, [][2]int64{{54, 2}, {56, 2}, {58, 2}, {60, 2}, {72, 4}, {76, 4}, {88, 2}, {90, 2}, {92, 4}, {96, 4}, {100, 4}, {104, 4},
		{0xce, 2}, {0xe0, 4}, {0xe4, 4}, {0xfe, 2}, {0x104, 4}, {0x150, 4}, {0x15c, 2}, {0x160, 4}, {0x168, 8}, {0x174, 1}, {0x175, 1},
		{0x180, 4}, {0x190, 4}, {0x194, 4}, {0x24c, 4}, {0x250, 4}, {0x270, 4}}...)
}

// group knows a group descriptor, and the block bitmap where the recording has
// it.
func (e *ext) group(at int64, number uint32) {
	le := binary.LittleEndian
	pairs := [][2]int64{{0, 4}, {4, 4}, {8, 4}, {12, 2}, {14, 2}, {16, 2}, {18, 2}, {24, 2}, {28, 2}}
	if e.desc >= 64 {
		pairs = append(pairs, [2]int64{32, 4}, [2]int64{36, 4}, [2]int64{40, 4}, [2]int64{44, 2}, [2]int64{50, 2})
	}
	e.g.add(at, false, pairs...)
	bitmap := int64(le.Uint32(e.g.Image.Bytes(at, 4))) * e.block
	e.g.add(bitmap, false, run(0, 4, 8)...)
	if e.sums {
		e.g.sums = append(e.g.sums, func(s memory) {
			d := s.Bytes(at, int(e.desc))
			crc := rawCRC(e.seed, s.Bytes(bitmap, int(e.perGroup/8)))
			le.PutUint16(d[24:], uint16(crc))
			if e.desc >= 64 {
				le.PutUint16(d[56:], uint16(crc>>16))
			}
			le.PutUint16(d[30:], 0)
			crc = rawCRC(rawCRC(e.seed, le.AppendUint32(nil, number)), d)
			le.PutUint16(d[30:], uint16(crc))
			s.Put(at, d)
		})
	} else if e.gdt {
		e.g.sums = append(e.g.sums, func(s memory) {
			d := s.Bytes(at, int(e.desc))
			crc := crc16(crc16(crc16(0xffff, e.uuid), le.AppendUint32(nil, number)), d[:30])
			if e.desc > 32 {
				crc = crc16(crc, d[32:])
			}
			le.PutUint16(d[30:], crc)
			s.Put(at, d)
		})
	}
}

// journalInode knows inode 8 and, through its first extent or block, the log.
func (e *ext) journalInode(at, size int64) error {
	le := binary.LittleEndian
	e.g.add(at, false, [][2]int64{{0, 2}, {4, 4}, {26, 2}, {28, 4}, {32, 4}, {100, 4}, {108, 4}, {116, 2}}...)
	in := e.g.Image.Bytes(at, int(size))
	if le.Uint16(in[40:]) == 0xf30a {
		e.g.add(at+40, false, run(0, 6, 2)...)
		for i := range int64(4) {
			e.g.add(at+52+12*i, false, [2]int64{0, 4}, [2]int64{4, 2}, [2]int64{6, 2}, [2]int64{8, 4})
		}
		if le.Uint16(in[46:]) != 0 {
			return errors.New("the recording's journal has a deep tree")
		}
		e.journal = int64(le.Uint32(in[60:])) * e.block
	} else {
		e.g.add(at+40, false, run(0, 15, 4)...)
		e.journal = int64(le.Uint32(in[40:])) * e.block
		indirect := int64(le.Uint32(in[40+48:])) * e.block
		e.g.add(indirect, false, run(0, 8, 4)...)
	}
	if e.sums {
		e.g.sums = append(e.g.sums, func(s memory) {
			b := s.Bytes(at, int(size))
			generation := append([]byte(nil), b[100:104]...)
			le.PutUint16(b[124:], 0)
			wide := size > 128 && le.Uint16(b[128:]) >= 4
			if wide {
				le.PutUint16(b[130:], 0)
			}
			crc := rawCRC(rawCRC(rawCRC(e.seed, le.AppendUint32(nil, 8)), generation), b)
			le.PutUint16(b[124:], uint16(crc))
			if wide {
				le.PutUint16(b[130:], uint16(crc>>16))
			}
			s.Put(at, b)
		})
	}
	e.g.Marks["journal"] = e.journal
	return e.log()
}
