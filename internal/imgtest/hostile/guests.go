package hostile

import (
	"fmt"

	"github.com/imagestack/imagestack/internal/imgtest/mutate"
)

// Filesystems whose numbers lie, with checksums that are right. Of such a
// filesystem nothing may be called free. Each is the disk of a qcow2 image
// in which one cluster is entered twice, so that image-fsck asks the guest
// which of the two places is in use.

// put is a number at a byte; b is big-endian.
type put struct {
	at   int64
	size int
	v    uint64
	big  bool
}

func (p put) into(s *mutate.Sparse) {
	b := make([]byte, 8)
	if p.big {
		be.PutUint64(b, p.v)
		s.Put(p.at, b[8-p.size:])
		return
	}
	le.PutUint64(b, p.v)
	s.Put(p.at, b[:p.size])
}

// guest makes a case of a recorded filesystem.
func guest(recording, title string, puts ...put) Case {
	g := mutate.ByName(recording)
	s := g.Image.Clone()
	for _, p := range puts {
		p.into(s)
	}
	g.Fix(s)
	return guestCase(recording+" with "+title, s)
}

func guestCase(title string, s *mutate.Sparse) Case {
	c := Case{Name: title, Class: Guest, Image: name, Build: file(name, around(s)), By: map[Tool]int{Fsck: 4, Repair: 1, Partitions: 0}}
	if s.Size() <= cluster { // nothing to enter twice
		c.By[Fsck], c.By[Repair] = 0, 0
	}
	return c
}

// around is a qcow2 image whose disk is s, with one cluster entered twice.
func around(s *mutate.Sparse) qcow2 {
	q := newQcow2()[:dataOff]
	q.set64(24, uint64(s.Size()))
	clusters := (s.Size() + cluster - 1) / cluster
	zeros := make([]byte, cluster)
	twice := uint64(0)
	for i := range clusters {
		b := s.Bytes(i*cluster, cluster)
		entry := l2Off + 8*int(i)
		if string(b) != string(zeros) {
			twice = copied | uint64(len(q))
			q.set64(entry, twice)
			be.PutUint16(q[rbOff+2*(len(q)/cluster):], 1)
			q = append(q, b...)
			continue
		}
		q.set64(entry, 0)
	}
	// The last cluster of all that is not stored.
	for i := clusters - 1; i >= 0; i-- {
		if entry := l2Off + 8*int(i); be.Uint64(q[entry:]) == 0 {
			q.set64(entry, twice)
			break
		}
	}
	return q
}

// Sound are the recordings as they are, in the same image: what the cases
// are measured against.
func Sound() []Case {
	var all []Case
	for _, g := range mutate.Guests() {
		all = append(all, guestCase("sound "+g.Name, g.Image.Clone()))
	}
	return all
}

func guests() []Case {
	var all []Case
	for _, some := range [][]Case{extSupers(), extGroups(), extJournals(), xfsGuests(), swapGuests()} {
		all = append(all, some...)
	}
	return all
}

// lies makes a case for each value of a field.
func lies(recording, field string, at int64, size int, big bool, values ...uint64) []Case {
	var all []Case
	for _, v := range values {
		all = append(all, guest(recording, fmt.Sprintf("%s %#x", field, v), put{at, size, v, big}))
	}
	return all
}

func extSupers() []Case {
	var all []Case
	for _, r := range []string{"ext2", "ext4-clean", "ext4-dirty"} {
		field := func(name string, off int64, size int, values ...uint64) {
			all = append(all, lies(r, name, 1024+off, size, false, values...)...)
		}
		field("inodes", 0, 4, 0, 0xffffffff)
		field("blocks", 4, 4, 0, 1, 0xffffffff)
		field("first data block", 20, 4, 0, 0xffffffff)
		field("block size 2^10+", 24, 4, 3, 7, 31, 32, 0xffffffff)
		field("blocks per group", 32, 4, 0, 1, 8, 0xffffffff)
		field("clusters per group", 36, 4, 0, 0xffffffff)
		field("inodes per group", 40, 4, 0, 1, 0xffffffff)
		field("revision", 76, 4, 2, 0xffffffff)
		field("inode size", 88, 2, 0, 1, 129, 0x8000, 0xffff)
		field("unknown features", 96, 4, 1<<31)
		field("reserved descriptor blocks", 0xce, 2, 0xffff)
	}
	wide := func(name string, off int64, size int, values ...uint64) {
		all = append(all, lies("ext4-clean", name, 1024+off, size, false, values...)...)
	}
	wide("blocks above 2^32", 0x150, 4, 1, 0x7fffffff, 0xffffffff)
	wide("descriptor size", 0xfe, 2, 0, 1, 63, 65, 2048, 0xffff)
	wide("journal inode", 0xe0, 4, 0, 1, 11, 97, 0xffffffff)
	wide("journal device", 0xe4, 4, 1)
	wide("checksum type", 0x175, 1, 0, 2, 255)
	all = append(all,
		guest("ext4-clean", "meta block groups from 2^32", put{1024 + 96, 4, 0x2d2, false}, put{1024 + 0x104, 4, 0xffffffff, false}),
		guest("ext4-clean", "mount protection in block 2^63", put{1024 + 96, 4, 0x3c2, false}, put{1024 + 0x168, 8, 1 << 63, false}),
		guest("ext4-bigalloc", "clusters of 2^10+31 bytes", put{1024 + 28, 4, 31, false}),
		guest("ext4-bigalloc", "clusters smaller than blocks", put{1024 + 28, 4, 0, false}))
	return all
}

func extGroups() []Case {
	var all []Case
	const recording = "ext4-clean"
	g := mutate.ByName(recording)
	at := g.Marks["descriptors"]
	own := func(off int64) uint64 { return uint64(le.Uint32(g.Image.Bytes(at+off, 4))) }
	field := func(name string, off int64, size int, values ...uint64) {
		all = append(all, lies(recording, name, at+off, size, false, values...)...)
	}
	field("a block bitmap in block", 0, 4, 0, 1, 20480, 0xffffffff, own(4), own(8))
	field("a block bitmap above 2^32:", 32, 4, 1, 0xffffffff)
	field("an inode bitmap in block", 4, 4, 0, 1, 20480, 0xffffffff)
	field("an inode table in block", 8, 4, 0, 1, 20479, 20480, 0xffffffff)
	field("an inode table above 2^32:", 40, 4, 1, 0xffffffff)
	field("free blocks", 12, 2, 0, 0xffff)
	field("a group without a bitmap, flags", 18, 2, 2, 3, 7)
	bitmap := g.Marks["bitmap"]
	all = append(all,
		guest(recording, "the superblock marked free", put{bitmap, 1, 0xfe, false}),
		guest(recording, "everything marked free", put{bitmap, 8, 0, false}),
		guest(recording, "an inode table marked free", put{bitmap + int64(own(8)-1)/8, 8, 0, false}))
	return all
}

func extJournals() []Case {
	var all []Case
	const recording = "ext4-dirty"
	g := mutate.ByName(recording)
	inode, journal := g.Marks["journal inode"], g.Marks["journal"]
	first := uint64(journal / 1024)
	in := func(name string, off int64, size int, values ...uint64) {
		all = append(all, lies(recording, "a journal inode: "+name, inode+off, size, false, values...)...)
	}
	in("mode", 0, 2, 0, 0x41ed)
	in("size", 4, 4, 0, 0xffffffff)
	in("size above 2^32", 108, 4, 1, 0x7fffffff, 0xffffffff)
	in("flags", 32, 4, 0, 0xffffffff)
	in("extents", 42, 2, 0, 5, 0xffff)
	in("room for extents", 44, 2, 0, 0xffff)
	in("depth", 46, 2, 1, 5, 6, 0xffff)
	in("first extent at", 52, 4, 1, 0xffffffff)
	in("extent length", 56, 2, 0, 1, 0x8000, 0xffff)
	in("extent in block", 60, 4, 0, 1, 10239, 0xffffffff)
	in("extent above 2^32", 58, 2, 1, 0xffff)
	all = append(all,
		// A tree whose root has itself below it: the inode table's own block.
		guest(recording, "a journal inode: a tree that holds itself", put{inode + 46, 2, 1, false}, put{inode + 56, 4, uint64(inode / 1024), false}),
		guest(recording, "a journal inode: two extents over each other", put{inode + 42, 2, 2, false}, put{inode + 64, 4, 512, false},
			put{inode + 68, 2, 512, false}, put{inode + 72, 4, first, false}))
	super := func(name string, off int64, size int, values ...uint64) {
		all = append(all, lies(recording, "a journal: "+name, journal+off, size, true, values...)...)
	}
	super("type", 4, 4, 0, 3, 0xffffffff)
	super("block size", 12, 4, 0, 1, 512, 4096, 0xffffffff)
	super("blocks", 16, 4, 0, 1, 1025, 0xffffffff)
	super("first block", 20, 4, 0, 1024, 0xffffffff)
	super("start", 28, 4, 1024, 0xffffffff)
	super("error", 32, 4, 1, 0xffffffff)
	super("unknown features", 40, 4, 0x80000013)
	super("both checksums", 40, 4, 0x1b)
	log := journal + 1024
	block := func(name string, off int64, size int, values ...uint64) {
		all = append(all, lies(recording, "a log: "+name, log+off, size, true, values...)...)
	}
	block("a block of type", 4, 4, 0, 6, 0xffffffff)
	block("tag for block", 12, 4, 10240, 0xffffffff, first, first+5)
	block("tag above 2^32", 20, 4, 1, 0xffffffff)
	block("tag flags", 16, 4, 0xffffffff, 4)
	all = append(all, rings()...)
	return all
}

// rings are logs without an end.
func rings() []Case {
	const recording, blocks = "ext4-gdt", 1024
	g := mutate.ByName(recording)
	journal := g.Marks["journal"]
	sequence := be.Uint32(g.Image.Bytes(journal+24, 4))
	var all []Case
	for title, kind := range map[string]uint32{"commits": 2, "revokes": 5, "descriptors": 1} {
		s := g.Image.Clone()
		for n := int64(1); n < blocks; n++ {
			b := make([]byte, 1024)
			be.PutUint32(b, 0xc03b3998)
			be.PutUint32(b[4:], kind)
			be.PutUint32(b[8:], sequence)
			switch kind {
			case 1:
				be.PutUint32(b[12:], 5000)
				be.PutUint16(b[18:], 8|2)
			case 2:
				sequence++
			case 5:
				be.PutUint32(b[12:], 1024)
				for i := 16; i < 1024; i += 4 {
					be.PutUint32(b[i:], uint32(n)<<8|uint32(i/4))
				}
			}
			s.Put(journal+n*1024, b)
		}
		sequence = be.Uint32(g.Image.Bytes(journal+24, 4))
		g.Fix(s)
		all = append(all, guestCase(recording+" with a ring of "+title, s))
	}
	return all
}

func xfsGuests() []Case {
	var all []Case
	for _, r := range []string{"xfs", "xfs-v4"} {
		field := func(name string, at int64, size int, values ...uint64) {
			all = append(all, lies(r, name, at, size, true, values...)...)
		}
		field("block size", 4, 4, 0, 1, 511, 1<<31, 0xffffffff)
		field("blocks", 8, 8, 0, 1, 1<<63, 1<<63-1, 1<<64-1)
		field("log at", 48, 8, 0, 1, 1<<63, 1<<64-1)
		field("root inode", 56, 8, 1<<63, 1<<64-1)
		field("blocks of a group", 84, 4, 0, 1, 1<<31, 0xffffffff)
		field("groups", 88, 4, 0, 1, 3, 0xffffffff)
		field("log blocks", 96, 4, 0, 1, 1<<31, 0xffffffff)
		field("version", 100, 2, 0, 3, 6, 0xffff)
		field("sector size", 102, 2, 0, 511, 0x8000, 0xffff)
		field("inodes per block", 106, 2, 0, 0xffff)
		field("log2 of blocks", 120, 1, 0, 64, 255)
		field("log2 of sectors", 121, 1, 0, 64, 255)
		field("log2 of inodes per block", 123, 1, 64, 255)
		field("log2 of a group", 124, 1, 0, 32, 64, 255)
		field("free blocks", 144, 8, 0, 1<<63, 1<<64-1)
		const agf = 512
		field("AGF number", agf+8, 4, 1, 0xffffffff)
		field("AGF length", agf+12, 4, 0, 1, 0xffffffff)
		field("tree root", agf+16, 4, 0, 2, 4352, 0xffffffff)
		field("size tree root", agf+20, 4, 0, 1, 4352, 0xffffffff)
		field("tree levels", agf+28, 4, 0, 2, 9, 10, 0xffff, 0xffffffff)
		field("list begins", agf+40, 4, 119, 128, 0xffffffff)
		field("list length", agf+48, 4, 0, 129, 0xffffffff)
		field("free blocks of a group", agf+52, 4, 0, 0xffffffff)
		field("longest extent", agf+56, 4, 0, 0xffffffff)
		all = append(all, xfsTrees(r)...)
		log := mutate.ByName(r).Marks["log"]
		field("log magic", log, 4, 0, 0xffffffff)
		field("log cycle", log+4, 4, 0, 2, 0xffffffff)
		field("log version", log+8, 4, 0, 3, 0xffffffff)
		field("log record length", log+12, 4, 0, 0x80000000, 0xffffffff)
		field("log record at", log+16, 8, 1<<63, 1<<64-1)
		field("log operations", log+40, 4, 0, 2, 0xffffffff)
		field("log record header size", log+320, 4, 0x80000000, 0xffffffff)
		field("log operation flags", log+512+9, 1, 0)
	}
	return all
}

func xfsTrees(recording string) []Case {
	at := mutate.ByName(recording).Marks["tree"]
	head := at + 16
	if recording == "xfs" {
		head = at + 56
	}
	self := uint64(at / 4096)
	room := (4096 - (head - at)) / 12
	var all []Case
	field := func(name string, off int64, size int, values ...uint64) {
		all = append(all, lies(recording, "a tree: "+name, off, size, true, values...)...)
	}
	field("level", at+4, 2, 1, 0xffff)
	field("records", at+6, 2, 0, 0xffff)
	field("left neighbour", at+8, 4, 0, self)
	field("right neighbour", at+12, 4, 0, self)
	field("first extent at", head, 4, 0, 1, 4352, 0xffffffff)
	field("first extent's length", head+4, 4, 0, 4352, 0xffffffff)
	// Nodes that have themselves below them.
	for _, levels := range []uint64{2, 9} {
		all = append(all, guest(recording, fmt.Sprintf("a tree of %d levels that holds itself", levels), put{512 + 28, 4, levels, true}, put{at + 4, 2, levels - 1, true},
			put{at + 6, 2, 1, true}, put{head + room*8, 4, self, true}))
	}
	return all
}

func swapGuests() []Case {
	var all []Case
	field := func(name string, at int64, size int, values ...uint64) {
		all = append(all, lies("swap", name, at, size, false, values...)...)
	}
	field("version", 1024, 4, 0, 2, 0xffffffff)
	field("last page", 1028, 4, 0, 16, 0xffffffff)
	field("bad pages", 1032, 4, 1, 638, 0x7fffffff, 0xffffffff)
	return all
}
