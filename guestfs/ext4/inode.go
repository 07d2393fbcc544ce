package ext4

import (
	"context"
	"encoding/binary"
	"io"
	"sort"
)

// The journal's inode (kernel documentation, ext4: inodes; extent tree;
// indirect addressing). It is read as it is on the disk: a replay begins with
// reading it.
const (
	inodeExtents = 0x80000
	// What no journal is: compressed, encrypted, sealed, a value of
	// attributes, inside its inode.
	inodeOther  = 0x4 | 0x200 | 0x800 | 0x100000 | 0x200000 | 0x10000000
	extentMagic = 0xf30a
	maxDepth    = 5
	// maxRuns bounds the pieces of a journal, and the blocks of its own map.
	maxRuns = 1 << 16
)

// run is a piece of a file: n blocks from block logical of the file lie from
// block start of the disk.
type run struct{ logical, start, n uint64 }

// fileMap is where the blocks of a file are. It has no holes.
type fileMap struct {
	s      *super
	r      io.ReaderAt
	ctx    context.Context
	runs   []run
	blocks uint64   // of the file that are mapped so far
	next   uint64   // the end of the last extent, which may be behind that of the file
	want   uint64   // of the file
	own    []uint64 // blocks of the map itself
	seed   uint32   // of the checksums of the inode
}

// block translates a block of the file, which must be below blocks.
func (m *fileMap) block(logical uint64) uint64 {
	i := sort.Search(len(m.runs), func(i int) bool { return m.runs[i].logical > logical }) - 1
	return m.runs[i].start + logical - m.runs[i].logical
}

func (m *fileMap) add(start, n uint64) error {
	if start <= m.s.firstBlock || start >= m.s.blocks || n > m.s.blocks-start {
		return damaged("journal: blocks %d+%d of %d", start, n, m.s.blocks)
	}
	n = min(n, m.want-m.blocks) // blocks behind the end of the file
	if n == 0 {
		return nil
	}
	if k := len(m.runs); k > 0 && m.runs[k-1].start+m.runs[k-1].n == start {
		m.runs[k-1].n += n
	} else {
		if k == maxRuns {
			return damaged("journal: more than %d pieces", maxRuns)
		}
		m.runs = append(m.runs, run{m.blocks, start, n})
	}
	m.blocks += n
	return nil
}

// journalMap reads the inode of the journal and where its blocks are.
func journalMap(ctx context.Context, r io.ReaderAt, s *super) (*fileMap, error) {
	ino := uint64(s.journalInode)
	if ino == 0 || ino > s.inodes {
		return nil, damaged("journal: inode %d of %d", ino, s.inodes)
	}
	g, index := (ino-1)/s.inodesPerGroup, (ino-1)%s.inodesPerGroup
	d, err := newDescs(s, r).get(g)
	if err != nil {
		return nil, err
	}
	block := make([]byte, s.blockSize)
	if err := s.readBlock(r, block, d.inodeTable+index/s.inodesPerBlock); err != nil {
		return nil, err
	}
	b := block[index%s.inodesPerBlock*uint64(s.inodeSize):][:s.inodeSize]
	le := binary.LittleEndian
	m := &fileMap{s: s, r: r, ctx: ctx}
	m.seed = crc32c(crc32c(s.seed, le32(uint32(ino))), b[100:104])
	if err := m.checkInodeSum(b); err != nil {
		return nil, err
	}
	if mode, links := le.Uint16(b), le.Uint16(b[26:]); mode&0xf000 != 0x8000 || links == 0 {
		return nil, damaged("journal: inode %d has mode %#o and %d links", ino, mode, links)
	}
	size := uint64(le.Uint32(b[4:])) | uint64(le.Uint32(b[108:]))<<32
	if size%uint64(s.blockSize) != 0 || size/uint64(s.blockSize) > s.blocks {
		return nil, damaged("journal: %d bytes", size)
	}
	m.want = size / uint64(s.blockSize)
	if flags := le.Uint32(b[32:]); flags&inodeOther != 0 {
		return nil, damaged("journal: inode %d has flags %#x", ino, flags)
	}
	if le.Uint32(b[32:])&inodeExtents != 0 {
		if !s.inc(incompatExtents) {
			return nil, damaged("journal: extents without the feature")
		}
		err = m.extents(b[40:100], -1)
	} else {
		err = m.indirect(b[40:100])
	}
	if err != nil {
		return nil, err
	}
	if m.blocks < m.want || m.want == 0 {
		return nil, damaged("journal: %d of %d blocks are mapped", m.blocks, m.want)
	}
	return m, nil
}

func (m *fileMap) checkInodeSum(b []byte) error {
	if !m.s.ro(roMetadataCsum) {
		return nil
	}
	le := binary.LittleEndian
	want := uint32(le.Uint16(b[124:]))
	wide := len(b) > 128 && le.Uint16(b[128:]) >= 4
	c := make([]byte, len(b))
	copy(c, b)
	clear(c[124:126])
	if wide {
		want |= uint32(le.Uint16(b[130:])) << 16
		clear(c[130:132])
	}
	got := crc32c(m.seed, c)
	if !wide {
		got &= 0xffff
	}
	if got != want {
		return badSum("inode of the journal", got, want)
	}
	return nil
}

// load reads a block of the map.
func (m *fileMap) load(n uint64) ([]byte, error) {
	if err := m.ctx.Err(); err != nil {
		return nil, err
	}
	if n <= m.s.firstBlock || len(m.own) == maxRuns {
		return nil, damaged("journal: block %d of its map (%d before it)", n, len(m.own))
	}
	m.own = append(m.own, n)
	b := make([]byte, m.s.blockSize)
	return b, m.s.readBlock(m.r, b, n)
}

// extents reads a node of the extent tree. depth is what its parent demands,
// or -1 for the root.
func (m *fileMap) extents(b []byte, depth int) error {
	le := binary.LittleEndian
	entries, room, d := int(le.Uint16(b[2:])), int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	if le.Uint16(b) != extentMagic || 12+12*room > len(b) || entries > room || entries == 0 || d > maxDepth || depth >= 0 && d != depth {
		return damaged("journal: extent node with magic %#x, %d of %d entries, depth %d", le.Uint16(b), entries, room, d)
	}
	if at := 12 + 12*room; depth >= 0 && m.s.ro(roMetadataCsum) {
		if at+4 > len(b) {
			return damaged("journal: extent node without room for its checksum")
		}
		if got, want := crc32c(m.seed, b[:at]), le.Uint32(b[at:]); got != want {
			return badSum("extent node of the journal", got, want)
		}
	}
	for i := range entries {
		e := b[12+12*i:][:12]
		logical := uint64(le.Uint32(e))
		if logical < m.next || logical > m.next && m.next < m.want {
			return damaged("journal: extent for block %d, want %d", logical, m.next)
		}
		if d > 0 {
			child, err := m.load(uint64(le.Uint32(e[4:])) | uint64(le.Uint16(e[8:]))<<32)
			if err != nil {
				return err
			}
			if err := m.extents(child, d-1); err != nil {
				return err
			}
			continue
		}
		n := uint64(le.Uint16(e[4:]))
		if n == 0 || n > 32768 {
			return damaged("journal: extent of %d blocks, or not written yet", n)
		}
		m.next = logical + n
		if err := m.add(uint64(le.Uint32(e[8:]))|uint64(le.Uint16(e[6:]))<<32, n); err != nil {
			return err
		}
	}
	return nil
}

// indirect reads the map of an inode without extents: 12 blocks, then blocks
// of block numbers of one, two and three levels.
func (m *fileMap) indirect(b []byte) error {
	for i := range 15 {
		if err := m.pointer(binary.LittleEndian.Uint32(b[4*i:]), max(0, i-11)); err != nil {
			return err
		}
	}
	return nil
}

func (m *fileMap) pointer(n uint32, level int) error {
	if m.blocks == m.want {
		return nil
	}
	if n == 0 {
		return damaged("journal: a hole at its block %d", m.blocks)
	}
	if level == 0 {
		return m.add(uint64(n), 1)
	}
	b, err := m.load(uint64(n))
	if err != nil {
		return err
	}
	for i := 0; i < len(b); i += 4 {
		if err := m.pointer(binary.LittleEndian.Uint32(b[i:]), level-1); err != nil {
			return err
		}
	}
	return nil
}
