package hostile

import (
	"fmt"
	"hash/crc32"
)

// A raw disk of 4 MiB; what is wrong is its partition table.
const (
	diskName    = "disk.raw"
	diskSectors = 8192
)

type disk []byte

func newDisk() disk {
	d := make(disk, diskSectors*512)
	d[510], d[511] = 0x55, 0xaa
	return d
}

// entry writes entry i of the table in the sector.
func (d disk) entry(sector, i int, kind byte, start, count uint32) disk {
	b := d[sector*512+446+16*i:]
	b[4] = kind
	le.PutUint32(b[8:], start)
	le.PutUint32(b[12:], count)
	d[sector*512+510], d[sector*512+511] = 0x55, 0xaa
	return d
}

// gpt writes a primary and a backup GPT of one partition; change alters the
// header before its checksum is made.
func gpt(change func(h []byte)) disk {
	d := newDisk().entry(0, 0, 0xee, 1, diskSectors-1)
	table := make([]byte, 128*128)
	for i := range 16 {
		table[i], table[16+i] = byte(i+1), byte(i+2)
	}
	le.PutUint64(table[32:], 2048)
	le.PutUint64(table[40:], 4095)
	for _, at := range []struct{ own, other, entries uint64 }{{1, diskSectors - 1, 2}, {diskSectors - 1, 1, diskSectors - 33}} {
		copy(d[at.entries*512:], table)
		h := d[at.own*512 : at.own*512+512]
		copy(h, "EFI PART")
		le.PutUint32(h[8:], 0x10000)
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], at.own)
		le.PutUint64(h[32:], at.other)
		le.PutUint64(h[40:], 34)
		le.PutUint64(h[48:], diskSectors-34)
		le.PutUint64(h[72:], at.entries)
		le.PutUint32(h[80:], 128)
		le.PutUint32(h[84:], 128)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
		change(h)
		le.PutUint32(h[16:], 0)
		n := min(le.Uint32(h[12:]), 512)
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:n]))
	}
	return d
}

// gptEntry is gpt with a change of the first partition.
func gptEntry(first, last uint64) disk {
	return gpt(func(h []byte) {}).patchEntry(first, last)
}

func (d disk) patchEntry(first, last uint64) disk {
	for _, at := range []struct{ own, entries int }{{1, 2}, {diskSectors - 1, diskSectors - 33}} {
		table := d[at.entries*512 : at.entries*512+128*128]
		le.PutUint64(table[32:], first)
		le.PutUint64(table[40:], last)
		h := d[at.own*512:]
		le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
		le.PutUint32(h[16:], 0)
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	}
	return d
}

func disks() []Case {
	var all []Case
	// Only --partitions looks; whether it refuses is said here.
	add := func(title string, d disk, refused bool) {
		c := Case{Name: "disk with " + title, Class: Disk, Image: diskName, Build: file(diskName, d), Args: []string{"--format", "raw"},
			By: map[Tool]int{Partitions: 0, Fsck: 0, Repair: 0}}
		if refused {
			c.By[Partitions] = 1
			c.Words = []string{"partition"}
		}
		all = append(all, c)
	}
	ext := func() disk { return newDisk().entry(0, 0, 5, 64, 4096) }
	add("a logical partition that links to itself", ext().entry(64, 0, 0x83, 1, 8).entry(64, 1, 5, 0, 4096), true)
	add("logical partitions in a ring", ext().entry(64, 0, 0x83, 1, 8).entry(64, 1, 5, 64, 64).entry(128, 0, 0x83, 1, 8).entry(128, 1, 5, 0, 64), true)
	add("a link out of the disk", ext().entry(64, 0, 0x83, 1, 8).entry(64, 1, 5, 0xffffffff, 64), true)
	add("a logical partition out of its container", ext().entry(64, 0, 0x83, 1, 0xffffffff), true)
	endless := newDisk().entry(0, 0, 5, 1, diskSectors-1)
	for s := 1; s+2 < diskSectors; s += 2 {
		endless.entry(s, 0, 0x83, 1, 1).entry(s, 1, 5, uint32(s+1), 2)
	}
	add("four thousand logical partitions", endless, true)
	add("two extended partitions", ext().entry(0, 1, 5, 64, 4096), false)
	add("a partition of 2 TiB", newDisk().entry(0, 0, 0x83, 1, 0xffffffff), true)
	add("a partition behind the end", newDisk().entry(0, 0, 0x83, 0xffffffff, 1), true)
	add("partitions over one another", newDisk().entry(0, 0, 0x83, 64, 1000).entry(0, 1, 0x83, 512, 1000), true)
	add("a container in itself", newDisk().entry(0, 0, 5, 0, diskSectors), true)
	for _, v := range []uint32{129, 1 << 20, 0xffffffff} {
		add(fmt.Sprintf("a GPT of %d entries", v), gpt(func(h []byte) { le.PutUint32(h[80:], v) }), true)
	}
	for _, v := range []uint32{0, 7, 64, 129, 1 << 31, 0xffffff80} {
		add(fmt.Sprintf("GPT entries of %d bytes", v), gpt(func(h []byte) { le.PutUint32(h[84:], v) }), true)
	}
	for _, v := range []uint32{0, 91, 513, 0xffffffff} {
		add(fmt.Sprintf("a GPT header of %d bytes", v), gpt(func(h []byte) { le.PutUint32(h[12:], v) }), true)
	}
	for _, v := range []uint64{0, 1 << 54, 1 << 63, 1<<64 - 1} {
		add(fmt.Sprintf("the GPT entries at %#x", v), gpt(func(h []byte) { le.PutUint64(h[72:], v) }), true)
	}
	for title, e := range map[string][2]uint64{
		"ends before it begins": {4095, 2048}, "begins at 2^63": {1 << 63, 1<<63 + 1}, "ends at 2^64-1": {2048, 1<<64 - 1},
		"ends at 2^55": {2048, 1 << 55}, "lies over the table": {0, 4095}, "is the whole of the numbers": {0, 1<<64 - 1},
	} {
		add("a GPT partition that "+title, gptEntry(e[0], e[1]), true)
	}
	add("a GPT that is announced and not there", newDisk().entry(0, 0, 0xee, 1, diskSectors-1), true)
	return all
}
