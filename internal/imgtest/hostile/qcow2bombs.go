package hostile

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/klauspost/compress/zstd"
)

// packed makes the first cluster of the disk a compressed one.
func packed(data []byte, sectors uint64) qcow2 {
	q := append(newQcow2(), make([]byte, len(data))...)
	copy(q[dataOff:], data)
	return q.set64(l2Off, 1<<62|sectors<<54|dataOff)
}

func qcow2Bombs() []Case {
	var all []Case
	add := func(title string, q qcow2, by map[Tool]int) {
		c := q2(title, Bomb, q, 0)
		c.By = by
		all = append(all, c)
	}
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestCompression)
	if err == nil {
		for range 1024 {
			_, err = w.Write(make([]byte, 64<<10))
		}
	}
	if err != nil {
		panic(err) // into memory
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	add("deflate bomb", packed(b.Bytes(), 127), nil)
	add("deflate that ends at once", packed([]byte{0x03, 0x00}, 0), exits(0, 0, 4, 4))
	add("deflate of empty blocks", packed(bytes.Repeat([]byte{0x00, 0x00, 0x00, 0xff, 0xff}, 13000), 127), exits(0, 0, 4, 4))
	enc, err := zstd.NewWriter(nil, zstd.WithWindowSize(zstd.MinWindowSize))
	if err != nil {
		panic(err)
	}
	bomb := enc.EncodeAll(make([]byte, 8<<20), nil)
	for title, data := range map[string][]byte{
		"zstd bomb":                       bomb,
		"zstd that claims 2^63 bytes":     {0x28, 0xb5, 0x2f, 0xfd, 0xc0, 0x00, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x01, 0, 0},
		"zstd with a window of 2^41":      {0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0x01, 0, 0},
		"zstd of skippable frames":        bytes.Repeat([]byte{0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0}, 8000),
		"zstd skippable frame of 4 GiB":   {0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff},
		"zstd of empty blocks":            append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x00}, make([]byte, 60000)...),
		"zstd of repeated bytes of 2 MiB": append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58}, bytes.Repeat([]byte{0xfa, 0xff, 0xff, 0x00}, 10000)...),
	} {
		q := packed(data, 127)
		q.set64(72, 1<<3)
		q[104] = 1
		by := exits(0, 0, 4, 4)
		if title == "zstd bomb" { // what is behind the cluster is not looked at
			by = nil
		}
		add(title, q, by)
	}
	// All tables of a disk of 2 PiB are one: walking them is a day's work.
	huge := func(d Dirs) error {
		q := newQcow2().set64(24, 1<<51).set32(36, 4<<20).set64(40, 16*cluster)
		for i := 0; i < cluster/8; i += 2 {
			q.set64(l2Off+8*i, dataOff)
		}
		f, err := os.OpenFile(filepath.Join(d.In, name), os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		_, err = f.Write(q)
		part := bytes.Repeat(be.AppendUint64(nil, l2Off), 1<<17)
		for i := range 32 {
			if err == nil {
				_, err = f.WriteAt(part, int64(16*cluster+i*len(part)))
			}
		}
		return errors.Join(err, f.Close())
	}
	all = append(all, Case{Name: "qcow2 four million tables in one", Class: Bomb, Image: name, Build: huge, By: exits(4, 4, 0, 0)})
	sparse := func(d Dirs) error {
		q := newQcow2().set64(24, 1<<51).set32(36, 4<<20).set64(40, 16*cluster)
		p := filepath.Join(d.In, name)
		if err := os.WriteFile(p, q, 0o644); err != nil {
			return err
		}
		return os.Truncate(p, 1<<40)
	}
	all = append(all, Case{Name: "qcow2 of 2 PiB, the file a hole of 1 TiB", Class: Bomb, Image: name, Build: sparse})
	for _, n := range []int{250, 1 << 20} {
		all = append(all, Case{Name: fmt.Sprintf("qcow2 %d refcount blocks in a hole for 2^24 clusters each", n), Class: Bomb, Image: name,
			Build: manyCounts(n)})
	}
	return append(all, longTables()...)
}

// manyCounts builds an image with clusters of 2 MiB and counts of one bit: its
// refcount blocks, all but the first of zeros, can count 2^24 clusters each.
func manyCounts(blocks int) func(Dirs) error {
	const large, table, l1 = 2 << 20, 1, 6
	head := newQcow2()[:512]
	head.set32(20, 21).set64(40, l1*large).set64(48, table*large).set32(56, 4).set32(96, 0)
	entries := make(qcow2, 8*blocks)
	counts := make([]byte, (blocks+6+7)/8)
	for i := range blocks {
		entries.set64(8*i, uint64(i+6)*large)
	}
	entries.set64(0, 5*large)
	for i := range blocks + 6 {
		counts[i/8] |= 1 << (i % 8)
	}
	return func(d Dirs) error {
		f, err := os.OpenFile(filepath.Join(d.In, name), os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		_, err0 := f.WriteAt(head, 0)
		_, err1 := f.WriteAt(entries, table*large)
		_, err2 := f.WriteAt(counts, 5*large)
		return errors.Join(err0, err1, err2, f.Truncate(int64(blocks+6)*large), f.Close())
	}
}

// bigTable builds q with a table at off, whose entry i is entry(i), and a hole
// up to size behind it.
func bigTable(q qcow2, off int64, entries int, size int64, entry func(i int) uint64) func(Dirs) error {
	return func(d Dirs) error {
		f, err := os.OpenFile(filepath.Join(d.In, name), os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		_, err = f.Write(q)
		const part = 1 << 17
		for i := 0; i < entries && err == nil; i += part {
			var b []byte
			for k := i; k < min(i+part, entries); k++ {
				b = be.AppendUint64(b, entry(k))
			}
			_, err = f.WriteAt(b, off+int64(i)*8)
		}
		return errors.Join(err, f.Truncate(size), f.Close())
	}
}

// longTables are bombs whose tables are as long as the format allows.
func longTables() []Case {
	const entries = 4 << 20 // of L1
	const behind = 16*cluster + entries*8
	l1 := func() qcow2 { return newQcow2().set64(24, 1<<51).set32(36, entries).set64(40, 16*cluster) }
	table := func(title string, by map[Tool]int, size int64, entry func(i int) uint64) Case {
		return Case{Name: "qcow2 " + title, Class: Bomb, Image: name, By: by, Build: bigTable(l1(), 16*cluster, entries, size, entry)}
	}
	later := func(i int) uint64 { return uint64(min(i>>14, 1)) } // the beginning of a table is looked at first
	const counts = 1 << 20                                       // refcount table entries
	rt := newQcow2().set64(48, 16*cluster).set32(56, 8<<20/cluster)
	// 65,536 snapshots, whose L1 tables go down through a hole.
	snaps := newQcow2().set32(60, 65536).set64(64, 16*cluster)
	const snapHole = 16*cluster + 65536*64
	snapTable := func(i int) uint64 {
		return [8]uint64{
			snapHole + uint64(65535-i/8)<<20, 128<<10<<32 | 1<<16 | 1, 0, 0,
			16, 0, 0, 0x3131 << 48, // a disk of 0 bytes, ID and name
		}[i%8]
	}
	// Every descriptor of an L2 table of 2 MiB reaches behind the end.
	const large = 2 << 20
	packed := make(qcow2, 6*large)
	copy(packed, newQcow2()[:cluster])
	packed.set32(20, 21).set64(24, large/8*large).set64(40, 3*large).set64(48, large)
	packed.set64(large, 2*large).set64(3*large, copied|4*large)
	for i := range 5 {
		be.PutUint16(packed[2*large+2*i:], 1)
	}
	for i := range large / 8 {
		packed.set64(4*large+8*i, 1<<62|uint64(0x1fff)<<49|uint64(5*large+i))
	}
	// Very many entries of such a table name the same cluster, or 16 of them each
	// cluster of a hole: copies for all would be half a terabyte.
	same, sixteen := slices.Clone(packed), slices.Clone(packed)
	for i := range large / 8 {
		same.set64(4*large+8*i, 0)
		if i < 170_000 {
			same.set64(4*large+8*i, copied|5*large)
		}
		sixteen.set64(4*large+8*i, copied|uint64(5+i/16)*large)
	}
	copy(same[5*large:], "data of the guest")
	all := []Case{
		{Name: "qcow2 a table of 2 MiB that names one cluster", Class: Bomb, Image: name, By: exits(0, 4, 0, 0), Build: file(name, same)},
		{Name: "qcow2 a table of 2 MiB that names each cluster 16 times", Class: Bomb, Image: name,
			Build: both(file(name, sixteen), func(d Dirs) error { return os.Truncate(filepath.Join(d.In, name), (5+large/8/16)*large) })},
		table("four million tables in a hole", nil, behind+entries*cluster, func(i int) uint64 { return copied | uint64(behind+i*cluster) }),
		table("four million tables in a hole, backwards", nil, behind+entries*cluster, func(i int) uint64 { return copied | uint64(behind+(entries-1-i)*cluster) }),
		table("four million tables in a hole, in no order", nil, behind+entries*cluster, func(i int) uint64 { return copied | uint64(behind+i*2654435761%entries*cluster) }),
		table("four million tables with reserved bits", exits(4, 4, 0, 0), behind+entries*cluster, func(i int) uint64 { return uint64(behind+i*cluster) | later(i) }),
		table("four million tables out of place", exits(4, 4, 0, 0), behind, func(i int) uint64 { return uint64(4*cluster+i*512) * later(i) }),
		{Name: "qcow2 a million refcount blocks in a hole", Class: Bomb, Image: name,
			Build: bigTable(rt, 16*cluster, counts, 16*cluster+8<<20+counts*cluster, func(i int) uint64 { return uint64(16*cluster + 8<<20 + i*cluster) })},
		{Name: "qcow2 a million refcount blocks in one", Class: Bomb, Image: name,
			Build: bigTable(rt, 16*cluster, counts, 16*cluster+8<<20, func(int) uint64 { return rbOff })},
		{Name: "qcow2 65,536 snapshots in a hole", Class: Bomb, Image: name,
			Build: bigTable(snaps, 16*cluster, 65536*8, snapHole+65536<<20, snapTable)},
		{Name: "qcow2 compressed clusters that reach behind the end", Class: Bomb, Image: name, Build: file(name, packed), By: exits(0, 0, 4, 4)}, // where they end is seen by who unpacks
	}
	return all
}
