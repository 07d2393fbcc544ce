package mutate

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
)

// parseXFS knows the headers of the allocation groups, the free-space trees as
// far as a recording has them, and the last record of the log (XFS Algorithms
// and Data Structures), big-endian with little-endian checksums.
func parseXFS(g *Guest) error {
	be := binary.BigEndian
	sb := g.Image.Bytes(0, 512)
	if string(sb[:4]) != "XFSB" {
		return errors.New("no XFS superblock")
	}
	block, sector := int64(be.Uint32(sb[4:])), int64(be.Uint16(sb[102:]))
	groups, length := int64(be.Uint32(sb[88:])), int64(be.Uint32(sb[84:]))*block
	v5 := be.Uint16(sb[100:])&15 == 5
	sum := func(at, n, crc int64) {
		if !v5 {
			return
		}
		g.sums = append(g.sums, func(s memory) {
			b := s.Bytes(at, int(n))
			clear(b[crc : crc+4])
			binary.LittleEndian.PutUint32(b[crc:], crc32.Checksum(b, castagnoli))
			s.Put(at, b)
		})
	}
	tree := func(at int64) {
		head := int64(16)
		if v5 {
			head = 56
		}
		g.add(at, true, [][2]int64{{0, 4}, {4, 2}, {6, 2}, {8, 4}, {12, 4}}...)
		if v5 {
			g.add(at, true, [][2]int64{{16, 8}, {32, 8}, {48, 4}}...)
		}
		g.add(at+head, true, run(0, 8, 4)...)
		sum(at, block, 52)
	}
	for n := range groups {
		at := n * length
		g.add(at, true, [][2]int64{{0, 4}, {4, 4}, {8, 8}, {16, 8}, {32, 8}, {48, 8}, {56, 8}, {84, 4}, {88, 4}, {96, 4}, {100, 2}, {102, 2}, {104, 2},
			{106, 2}, {120, 1}, {121, 1}, {122, 1}, {123, 1}, {124, 1}, {126, 1}, {144, 8}, {180, 4}, {200, 4}, {208, 4}, {212, 4}, {216, 4}, {248, 8}}...)
		sum(at, sector, 224)
		agf := at + sector
		g.add(agf, true, run(0, 20, 4)...)
		sum(agf, sector, 216)
		g.add(at+2*sector, true, run(0, 10, 4)...)
		sum(at+2*sector, sector, 312)
		g.add(at+3*sector, true, run(0, 18, 4)...)
		sum(at+3*sector, sector, 32)
		b := g.Image.Bytes(agf, 64)
		if n == 0 {
			g.Marks["tree"] = int64(be.Uint32(b[16:])) * block
		}
		tree(at + int64(be.Uint32(b[16:]))*block)
		tree(at + int64(be.Uint32(b[20:]))*block)
	}
	// The log: its first record, which mkfs writes.
	start := be.Uint64(sb[48:])
	log := int64(start>>sb[124])*length + int64(start&(1<<sb[124]-1))*block
	g.Marks["log"] = log
	g.add(log, true, run(0, 12, 4)...)
	g.add(log, true, [2]int64{304, 8}, [2]int64{320, 4})
	g.add(log+512, true, [][2]int64{{0, 4}, {4, 4}, {8, 1}, {9, 1}, {10, 2}, {12, 4}}...)
	g.add(log+1024, true, [2]int64{0, 4})
	return nil
}
