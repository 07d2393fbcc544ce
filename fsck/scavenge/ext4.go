package scavenge

import (
	"encoding/binary"
	"math/bits"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
)

// extFS is what a superblock of ext2, 3 or 4 says (kernel documentation, ext4
// data structures; all numbers little-endian).
type extFS struct {
	block                   int64
	blocks, first, perGroup uint64
	groups, inodes          uint64
	inodesPerGroup          uint64
	inodeSize, desc         int64
	perBlock                uint64 // inodes
	tableBlocks             uint64 // of the inode table of a group
	sums                    bool   // metadata_csum
	sumSeed                 uint32

	// tables is the first block of the inode table of each group, from the
	// group descriptors; 0 is not known, noTable is contradicted.
	tables []uint64

	// journal is where it lies, in bytes of the filesystem; it is full of
	// copies of metadata.
	journal  []blockmap.Range
	log      journalled
	bitmaps  []bitmap // see ext4bitmap.go
	bigalloc uint     // log2 of the blocks of a cluster

	unInode, unDir *unzeros
	unExtent       *unzeros
	scratch        []byte
}

const (
	noTable        = ^uint64(0)
	maxGroups      = 1 << 22
	maxDescTries   = 1 << 24
	extExtentMagic = 0xf30a
	journalMagic   = "\xc0\x3b\x39\x98"
)

func (e *evidence) extSuper(w []byte, loc int64) {
	le := binary.LittleEndian
	if le.Uint32(w[24:]) > 6 {
		return
	}
	bs := int64(1024) << le.Uint32(w[24:])
	x := &extFS{block: bs, blocks: uint64(le.Uint32(w[4:])), first: uint64(le.Uint32(w[20:])), perGroup: uint64(le.Uint32(w[32:])),
		inodes: uint64(le.Uint32(w)), inodesPerGroup: uint64(le.Uint32(w[40:])), inodeSize: int64(le.Uint16(w[88:])), desc: 32}
	incompat, ro := le.Uint32(w[96:]), le.Uint32(w[100:])
	if le.Uint32(w[76:]) == 0 { // revision 0
		incompat, ro, x.inodeSize = 0, 0, 128
	}
	if incompat&0x80 != 0 { // 64bit
		x.blocks |= uint64(le.Uint32(w[0x150:])) << 32
		x.desc = int64(le.Uint16(w[0xfe:]))
	}
	want := uint64(0)
	if bs == 1024 && ro&0x200 == 0 {
		want = 1
	}
	if x.first != want || x.perGroup == 0 || x.perGroup > uint64(8*bs)*1024 || x.perGroup%8 != 0 || x.blocks <= x.first ||
		x.blocks > uint64(anySize/bs) || x.inodeSize < 128 || x.inodeSize > bs || x.inodeSize&(x.inodeSize-1) != 0 ||
		x.desc < 32 || x.desc > 1024 || x.desc&(x.desc-1) != 0 || x.desc > bs {
		return
	}
	if ro&0x200 != 0 { // bigalloc
		if x.bigalloc = uint(le.Uint32(w[28:])) - uint(le.Uint32(w[24:])); x.bigalloc > 20 {
			return
		}
	}
	x.groups = (x.blocks - x.first + x.perGroup - 1) / x.perGroup
	x.perBlock = uint64(bs / x.inodeSize)
	if x.groups > maxGroups || x.inodesPerGroup == 0 || x.inodesPerGroup > uint64(8*bs) || x.inodes != x.inodesPerGroup*x.groups {
		return
	}
	x.tableBlocks = (x.inodesPerGroup + x.perBlock - 1) / x.perBlock
	var uuid [16]byte
	copy(uuid[:], w[104:])
	if ro&0x400 != 0 {
		if w[0x175] != 1 || crc32c(^uint32(0), w[:0x3fc]) != le.Uint32(w[0x3fc:]) {
			return
		}
		x.sums = true
		x.sumSeed = crc32c(^uint32(0), uuid[:])
		if incompat&0x2000 != 0 { // metadata_csum_seed
			x.sumSeed = le.Uint32(w[0x270:])
		}
	}
	if w[0xfd] == 1 { // a copy of the journal's inode is here
		if depth, ext := parseExtents(w[0x10c:0x10c+60], nil); depth == 0 {
			for _, r := range ext {
				if r.phys < x.blocks && r.n <= x.blocks-r.phys {
					x.journal = append(x.journal, blockmap.Range{Off: int64(r.phys) * bs, Len: int64(r.n) * bs})
				}
			}
		}
	}
	group := uint64(le.Uint16(w[90:]))
	if group >= x.groups {
		return
	}
	off := int64(x.first+group*x.perGroup) * bs
	if group == 0 {
		off = 1024
	}
	g := e.guestFor("ext4", uuid, bs)
	if g == nil {
		return
	}
	// Copies of other groups fall behind; so may those in the journal.
	newest := uint64(le.Uint32(w[48:]))<<1 | 1
	if group != 0 {
		newest = 0
	}
	if g.ext == nil || newest > g.newest {
		if g.ext != nil && g.ext.groups >= x.groups {
			x.tables, x.bitmaps, x.log = g.ext.tables, g.ext.bitmaps, g.ext.log
		}
		g.ext, g.newest, g.size = x, newest, int64(x.blocks)*bs
	}
	g.super(loc, off, group == 0)
}

// prepare makes what look needs.
func (x *extFS) prepare(e *evidence) error {
	if !x.sums || x.scratch != nil {
		return nil
	}
	if err := e.src.take(int64(x.groups)*8, "group descriptors"); err != nil {
		return err
	}
	x.tables = make([]uint64, x.groups)
	x.unInode = newUnzeros(int(x.inodeSize))
	x.unDir = newUnzeros(int(x.block - 12))
	x.unExtent = newUnzeros(int(x.extentBytes()))
	x.scratch = make([]byte, x.inodeSize)
	return nil
}

// extentBytes is what the checksum of an extent block covers.
func (x *extFS) extentBytes() int64 { return 12 + 12*((x.block-12)/12) }

// look looks at one block.
func (x *extFS) look(e *evidence, g *guest, b []byte, loc int64) error {
	if x.scratch == nil || backend.IsZero(b) {
		return nil
	}
	le := binary.LittleEndian
	if string(b[:4]) == journalMagic {
		if t := b[7]; t >= 1 && t <= 5 && b[4]|b[5]|b[6] == 0 {
			if t == 1 {
				if err := x.log.descriptor(e, b, x.blocks); err != nil {
					return err
				}
			}
			return e.add(g, kindJournal, loc, 0, x.block)
		}
	}
	// A directory block: its last entry holds the checksum.
	if t := b[len(b)-12:]; le.Uint32(t) == 0 && le.Uint16(t[4:]) == 12 && t[6] == 0 && t[7] == 0xde {
		s := seedHit{loc: loc, fs: g.index, depth: -1, seed: x.unDir.seed(le.Uint32(t[8:]), b[:len(b)-12])}
		if le.Uint16(b[4:]) == 12 && b[6] == 1 && b[8] == '.' {
			s.first = 1
		}
		return e.addSeed(s)
	}
	if le.Uint16(b) == extExtentMagic {
		n := x.extentBytes()
		entries, most, depth := le.Uint16(b[2:]), le.Uint16(b[4:]), le.Uint16(b[6:])
		if n+4 <= x.block && int64(most) == (n-12)/12 && entries > 0 && entries <= most && depth < 5 {
			return e.addSeed(seedHit{loc: loc, fs: g.index, depth: int8(depth), first: le.Uint32(b[12:]),
				seed: x.unExtent.seed(le.Uint32(b[n:]), b[:n])})
		}
	}
	if ino := x.inodeBlock(b); ino != 0 {
		group, index := (ino-1)/x.inodesPerGroup, (ino-1)%x.inodesPerGroup
		at := group*x.tableBlocks + index/x.perBlock
		return e.add(g, kindInodes, loc, int64(at)*x.block, x.block)
	}
	return x.descriptors(e, g, b, loc)
}

// inodeBlock returns the number of the first inode in a block of an inode
// table, 0 when it is none. Each inode in use has to tell the same.
func (x *extFS) inodeBlock(b []byte) uint64 {
	if x.inodeSize < 256 {
		return 0 // the checksum has 16 bits: it proves too little
	}
	first := uint64(0)
	for i := range x.perBlock {
		raw := b[int64(i)*x.inodeSize:][:x.inodeSize]
		ino, ok := x.inode(raw)
		if !ok {
			return 0
		}
		if ino == 0 {
			continue
		}
		if ino > x.inodes || (ino-1)%x.inodesPerGroup%x.perBlock != i || first != 0 && first != ino-i {
			return 0
		}
		first = ino - i
	}
	return first
}

// inode solves the checksum for the number of an inode. Number 0 is a slot
// that holds none; not ok, that this is no inode at all.
func (x *extFS) inode(raw []byte) (uint64, bool) {
	le := binary.LittleEndian
	mode := le.Uint16(raw)
	if mode == 0 {
		// Never used, or one of the special ones without a mode.
		return 0, le.Uint16(raw[128:]) <= uint16(x.inodeSize-128)
	}
	extra := le.Uint16(raw[128:])
	switch mode >> 12 {
	case 1, 2, 4, 6, 8, 10, 12:
	default:
		return 0, false
	}
	if extra < 4 || extra%4 != 0 || int64(extra) > x.inodeSize-128 {
		return 0, false
	}
	sum := uint32(le.Uint16(raw[124:])) | uint32(le.Uint16(raw[130:]))<<16
	copy(x.scratch, raw)
	clear(x.scratch[124:126])
	clear(x.scratch[130:132])
	seed := x.unInode.seed(sum, x.scratch)
	return uint64(word(x.sumSeed, wordBefore(le.Uint32(raw[100:]), seed))), true
}

// seed is what the checksums of an inode's blocks begin with.
func (x *extFS) seed(ino uint64, raw []byte) uint32 {
	return crc32c4(crc32c4(x.sumSeed, uint32(ino)), binary.LittleEndian.Uint32(raw[100:]))
}

// descriptors takes a block of group descriptors: their checksums, 16 bits
// each, tell of which groups.
func (x *extFS) descriptors(e *evidence, g *guest, b []byte, loc int64) error {
	le := binary.LittleEndian
	table := func(d []byte) (bitmap, inodeTable uint64) {
		bitmap, inodeTable = uint64(le.Uint32(d)), uint64(le.Uint32(d[8:]))
		if x.desc >= 64 {
			bitmap |= uint64(le.Uint32(d[32:])) << 32
			inodeTable |= uint64(le.Uint32(d[40:])) << 32
		}
		return
	}
	plausible := func(d []byte) bool {
		m, t := table(d)
		return m > 0 && m < x.blocks && t > 0 && t < x.blocks && x.tableBlocks <= x.blocks-t
	}
	if !plausible(b) {
		return nil
	}
	right := func(d []byte, group uint64) bool {
		e.spent++
		c := crc32c(crc32c4(x.sumSeed, uint32(group)), d[:30])
		c = crc32c(crc32c(c, []byte{0, 0}), d[32:x.desc])
		return uint16(c) == le.Uint16(d[30:])
	}
	per := uint64(x.block / x.desc)
	for k := uint64(0); k*per < x.groups && e.spent < maxDescTries; k++ {
		n := min(per, x.groups-k*per)
		good := uint64(0)
		for good < n {
			d := b[int64(good)*x.desc:][:x.desc]
			if !plausible(d) || !right(d, k*per+good) {
				break
			}
			good++
		}
		if good != n || n == 1 && k > 0 {
			continue
		}
		for i := range n {
			_, t := table(b[int64(i)*x.desc:])
			switch at := &x.tables[k*per+i]; *at {
			case 0, t:
				*at = t
			default:
				*at = noTable
			}
			if err := x.addBitmaps(e, b[int64(i)*x.desc:][:x.desc]); err != nil {
				return err
			}
		}
		// Behind a superblock they stand where it stands.
		ahead := int64(1+k) * x.block
		for _, sup := range g.supers {
			if sup.loc&^(x.block-1) == loc-ahead {
				return e.add(g, kindPlain, loc, sup.off&^(x.block-1)+ahead, x.block)
			}
		}
		return nil
	}
	return nil
}

// sameTable tells that two places among all inode tables are in one table.
func (x *extFS) sameTable(a, b int64) bool {
	n := x.block * int64(x.tableBlocks)
	return a/n == b/n
}

// inodePlace appends where in the filesystem a byte among all inode tables is.
func (x *extFS) inodePlace(off int64, dst []int64) []int64 {
	n := x.block * int64(x.tableBlocks)
	group := off / n
	if group >= int64(len(x.tables)) || x.tables[group] == 0 || x.tables[group] == noTable {
		return dst
	}
	return append(dst, int64(x.tables[group])*x.block+off%n)
}

// extent is a run of a file's blocks.
type extent struct {
	logical, phys, n uint64
	unwritten        bool
}

// parseExtents reads the node of an extent tree in b, whose header has been
// found: extents at depth 0, else where its children are (n is 0 there).
func parseExtents(b []byte, dst []extent) (depth int, _ []extent) {
	le := binary.LittleEndian
	entries := int(le.Uint16(b[2:]))
	depth = int(le.Uint16(b[6:]))
	if le.Uint16(b) != extExtentMagic || depth > 5 || 12+12*entries > len(b) {
		return -1, dst
	}
	for i := range entries {
		n := b[12+12*i:]
		logical := uint64(le.Uint32(n))
		if depth > 0 {
			dst = append(dst, extent{logical, uint64(le.Uint32(n[4:])) | uint64(le.Uint16(n[8:]))<<32, 0, false})
			continue
		}
		count := uint64(le.Uint16(n[4:]))
		unwritten := count > 32768
		if unwritten {
			count -= 32768
		}
		dst = append(dst, extent{logical, uint64(le.Uint32(n[8:])) | uint64(le.Uint16(n[6:]))<<32, count, unwritten})
	}
	return depth, dst
}

// powerOfTwo tells whether v is one.
func powerOfTwo(v int64) bool { return v > 0 && bits.OnesCount64(uint64(v)) == 1 }
