package hostile

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
)

var be = binary.BigEndian

// qcow2 is an image of version 3 with clusters of 64 KiB: header, refcount
// table, refcount block, L1 table, L2 table, one data cluster, one free one.
type qcow2 []byte

const (
	cluster = 64 << 10
	rtOff   = 1 * cluster
	rbOff   = 2 * cluster
	l1Off   = 3 * cluster
	l2Off   = 4 * cluster
	dataOff = 5 * cluster
	freeOff = 6 * cluster
	extOff  = 112 // where header extensions begin
	copied  = 1 << 63
)

func newQcow2() qcow2 {
	q := make(qcow2, 7*cluster)
	copy(q, "QFI\xfb")
	q.set32(4, 3)
	q.set32(20, 16)
	q.set64(24, 1<<20)
	q.set32(36, 1)
	q.set64(40, l1Off)
	q.set64(48, rtOff)
	q.set32(56, 1)
	q.set32(96, 4)
	q.set32(100, extOff)
	q.set64(rtOff, rbOff)
	for i := range 6 {
		be.PutUint16(q[rbOff+2*i:], 1)
	}
	q.set64(l1Off, copied|l2Off)
	q.set64(l2Off, copied|dataOff)
	copy(q[dataOff:], "data of the guest")
	return q
}

func (q qcow2) set32(off int, v uint32) qcow2 { be.PutUint32(q[off:], v); return q }
func (q qcow2) set64(off int, v uint64) qcow2 { be.PutUint64(q[off:], v); return q }

// ext adds a header extension at off and returns where the next one goes.
func (q qcow2) ext(off int, magic uint32, data string) int {
	q.set32(off, magic).set32(off+4, uint32(len(data)))
	copy(q[off+8:], data)
	return off + 8 + (len(data)+7)/8*8
}

// backing names a parent. An empty format leaves the extension out.
func (q qcow2) backing(name, format string) qcow2 {
	off := extOff
	if format != "" {
		off = q.ext(off, 0xe2792aca, format)
	}
	off += 8
	copy(q[off:], name)
	q.set64(8, uint64(off)).set32(16, uint32(len(name)))
	q.set64(l2Off, 0)
	return q
}

// dataFile names an external data file.
func (q qcow2) dataFile(name string) qcow2 {
	q.set64(72, 1<<2)
	q.set64(88, 1<<1) // raw
	q.ext(extOff, 0x44415441, name)
	q.set64(l2Off, copied)
	return q
}

const name = "disk.qcow2"

func q2(title string, class Class, q qcow2, exit int, words ...string) Case {
	return Case{Name: "qcow2 " + title, Class: class, Image: name, Build: file(name, q), Exit: exit, Words: append(words, name)}
}

func qcow2Headers() []Case {
	var all []Case
	bad32 := func(field string, off int, exit int, word string, values ...uint32) {
		for _, v := range values {
			all = append(all, q2(fmt.Sprintf("%s %#x", field, v), Header, newQcow2().set32(off, v), exit, word))
		}
	}
	bad64 := func(field string, off int, exit int, word string, values ...uint64) {
		for _, v := range values {
			all = append(all, q2(fmt.Sprintf("%s %#x", field, v), Header, newQcow2().set64(off, v), exit, word))
		}
	}
	bad32("version", 4, 1, "", 0, 1, 4, 0xffffffff)
	bad32("cluster_bits", 20, 1, "cluster_bits", 0, 8, 22, 31, 63, 64, 0xffffffff)
	bad64("size", 24, 1, "size", 1<<63, 1<<64-1, 1<<63-1)
	bad64("size without tables", 24, 1, "size", 1<<60, 1<<40)
	bad32("crypt_method", 32, 1, "", 1, 2, 99)
	bad32("l1_size", 36, 1, "l1_size", 0, 0xffffffff, 0x80000000, 32<<20/8+1)
	bad64("l1_table_offset", 40, 1, "l1_table_offset", l1Off+1, 1<<63, 1<<64-cluster)
	// Reading needs no reference counts.
	onlyWrite := len(all)
	bad64("refcount_table_offset", 48, 0, "refcount_table_offset", 0, 1<<40)
	bad64("refcount_table_offset", 48, 1, "refcount_table_offset", 1<<63, rtOff+8)
	bad32("refcount_table_clusters", 56, 0, "refcount_table_offset", 0)
	for i := range all[onlyWrite:] {
		if c := &all[onlyWrite+i]; c.Exit == 0 {
			c.By = exits(0, 0, 0, 4)
		}
	}
	bad32("refcount_table_clusters", 56, 1, "refcount_table_clusters", 0xffffffff, 129)
	bad32("refcount_order", 96, 1, "refcount_order", 7, 63, 0xffffffff)
	bad32("header_length", 100, 1, "header_length", 0, 72, 103, 108, cluster+8, 0xffffffff)
	bad32("nb_snapshots", 60, 1, "snapshot", 65537, 0xffffffff)
	bad64("unknown incompatible feature", 72, 1, "", 1<<5, 1<<63, 1<<64-1)
	bad64("data file without a name", 72, 1, "data file", 1<<2)
	bad64("compression bit without a type", 72, 1, "compression", 1<<3)
	bad32("backing_file_size", 16, 1, "", 0)
	all = all[:len(all)-1] // size 0 without an offset is no backing file at all
	for _, c := range []struct {
		title string
		off   uint64
		size  uint32
	}{
		{"backing_file_size too large", extOff, 1024}, {"backing_file_size endless", extOff, 0xffffffff},
		{"backing_file_offset in the header", 8, 8}, {"backing_file_offset behind the cluster", 1 << 63, 8},
		{"backing_file_offset at the end of the cluster", cluster - 4, 8},
	} {
		q := newQcow2().set64(8, c.off).set32(16, c.size)
		all = append(all, q2(c.title, Header, q, 1, "backing_file"))
	}
	// Extensions.
	for title, length := range map[string]uint32{"endless": 0xffffffff, "behind the cluster": cluster, "of 2 GiB": 1 << 31, "of -8": 1<<32 - 8} {
		q := newQcow2()
		q.set32(extOff, 0x12345678).set32(extOff+4, length)
		all = append(all, q2("extension "+title, Header, q, 1, "extension"))
	}
	q := newQcow2()
	for off := extOff; off+8 <= cluster; off += 8 {
		q.set32(off, 0x12345678)
	}
	all = append(all, q2("extensions to the end of the cluster", Header, q, 0))
	q = newQcow2()
	q.ext(extOff, 0x0537be77, strings.Repeat("\xff", 16))
	all = append(all, q2("encryption header", Header, q, 1))
	// Bitmaps: count, size and offset of the directory.
	for title, b := range map[string][3]uint64{
		"none": {0, 8, freeOff}, "too many": {0xffffffff, 1 << 20, freeOff}, "directory endless": {1, 1<<64 - 1, freeOff},
		"directory behind the end": {1, 64, 1 << 60}, "directory unaligned": {1, 64, freeOff + 1}, "directory of zeros": {1, 64, freeOff},
	} {
		q := newQcow2().set64(88, 1)
		data := be.AppendUint64(be.AppendUint64(be.AppendUint32(be.AppendUint32(nil, uint32(b[0])), 0), b[1]), b[2])
		q.ext(extOff, 0x23852875, string(data))
		c := q2("bitmaps: "+title, Header, q, 0)
		c.By = exits(4, 0, 0, 0) // who does not look at bitmaps is not stopped by them
		all = append(all, c)
	}
	// Snapshots: one header in the free cluster.
	for title, change := range map[string]func(s []byte){
		"l1_size endless":         func(s []byte) { be.PutUint32(s[8:], 0xffffffff) },
		"l1 offset behind end":    func(s []byte) { be.PutUint64(s, 1<<60) },
		"extra data endless":      func(s []byte) { be.PutUint32(s[36:], 0xffffffff) },
		"extra data of 2 KiB":     func(s []byte) { be.PutUint32(s[36:], 2048) },
		"names longer than table": func(s []byte) { be.PutUint16(s[12:], 0xffff); be.PutUint16(s[14:], 0xffff) },
	} {
		q := newQcow2().set32(60, 1).set64(64, freeOff)
		s := q[freeOff:]
		be.PutUint64(s, l1Off)
		be.PutUint32(s[8:], 1)
		be.PutUint16(s[12:], 1)
		be.PutUint16(s[14:], 1)
		be.PutUint32(s[36:], 16)
		change(s)
		c := q2("snapshot "+title, Header, q, 0)
		if !strings.HasPrefix(title, "l1") { // a table that only who opens the snapshot follows
			c.By = exits(4, 0, 0, 0)
		}
		all = append(all, c)
	}
	for title, off := range map[string]uint64{"behind the end": 1 << 62, "in the header": 0} {
		c := q2("snapshots "+title, Header, newQcow2().set32(60, 1).set64(64, off), 0, "snapshot")
		c.By = exits(4, 0, 0, 0)
		all = append(all, c)
	}
	for _, n := range []int{0, 3, 4, 7, 71, 100, 111, 300, cluster} {
		c := q2(fmt.Sprintf("cut off at %d", n), Header, newQcow2()[:n], 1)
		if n == 300 || n == cluster {
			c.Exit = 4
		}
		all = append(all, c)
	}
	return all
}

func qcow2Tables() []Case {
	var all []Case
	add := func(title string, q qcow2, by map[Tool]int, words ...string) {
		c := q2(title, Table, q, 0, words...)
		c.By = by
		all = append(all, c)
	}
	for title, e := range map[string]uint64{
		"unaligned": copied | l2Off | 0x200, "behind the end": copied | 1<<40, "of 2^55": copied | 0x00ff_ffff_ffff_0000,
		"reserved bits": copied | l2Off | 1<<60, "low reserved bits": copied | l2Off | 1,
	} {
		add("L1 entry "+title, newQcow2().set64(l1Off, e), exits(4, 4, 4, 4))
	}
	add("L1 entry to the L1 table", newQcow2().set64(l1Off, copied|l1Off), exits(4, 4, 4, 4))
	add("L1 entry to the header", newQcow2().set64(l1Off, copied), nil)
	for title, e := range map[string]uint64{
		"unaligned": copied | dataOff | 0x200, "behind the end": copied | 1<<40, "of 2^55": copied | 0x00ff_ffff_ffff_0000,
		"reserved bits":         copied | dataOff | 1<<60,
		"packed behind the end": 1<<62 | 1<<40, "packed with all sectors": 1<<62 | 0xff<<54 | dataOff, "packed and counted as one": 3<<62 | dataOff,
	} {
		by := exits(4, 4, 4, 4)
		if title == "packed with all sectors" { // it lies in the file; unpacking fails
			by = exits(0, 0, 4, 4)
		}
		add("L2 entry "+title, newQcow2().set64(l2Off, e), by)
	}
	q := newQcow2()
	for i := range cluster / 8 {
		q.set64(l2Off+8*i, copied|dataOff)
	}
	add("L2 entries all the same", q, nil)
	return all
}

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
			Build: manyCounts(n), Only: []Tool{Info, Map, Estimate, Compact}})
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
	// image-compact has to look at every cluster that is named before it changes
	// anything. It takes little memory, and can be stopped, but these take it more
	// than 4 s of processor time:
	slow := map[string]Tool{
		"qcow2 four million tables in a hole":          Compact,  // over 47 s
		"qcow2 four million tables with reserved bits": Compact,  // 5 s
		"qcow2 65,536 snapshots in a hole":             Compact,  // over 37 s
		"qcow2 a million refcount blocks in one":       Estimate, // 4 s
	}
	for i := range all {
		if not, is := slow[all[i].Name]; is {
			all[i].Only = slices.DeleteFunc(Tools(), func(t Tool) bool { return t == not })
		}
	}
	return all
}

// badNames are names of files that an image has no business with.
func badNames() map[string]string {
	return map[string]string{
		"outside by ..":          "../outside/" + Secret,
		"outside by link":        "link.raw",
		"outside by linked dir":  "linkdir/" + Secret,
		"password hashes":        "/etc/shadow",
		"own environment":        "/proc/self/environ",
		"own memory":             "/proc/self/mem",
		"own descriptors":        "/proc/self/fd/0",
		"endless device":         "/dev/zero",
		"terminal":               "/dev/tty",
		"fifo":                   "fifo",
		"socket":                 "/dev/log",
		"directory":              ".",
		"parent directory":       "..",
		"root":                   "/",
		"loop of links":          "loop",
		"json":                   `json:{"driver":"file","filename":"/etc/shadow"}`,
		"json of the network":    `json:{"driver":"nbd","host":"127.0.0.1"}`,
		"nbd":                    "nbd://127.0.0.1:1/x",
		"nbd over a socket":      "nbd:unix:/dev/log",
		"http":                   "http://127.0.0.1:1/x",
		"ssh":                    "ssh://localhost/etc/shadow",
		"file protocol":          "file:" + Secret,
		"fat":                    "fat:rw:/etc",
		"with a NUL":             "a\x00b",
		"with control sequences": "\x1b]0;owned\x07\x1b[2J\n\rmount-image: all is well",
		"not UTF-8":              "\xff\xfe\x80",
		"very long":              strings.Repeat("a/", 500),
		"deep":                   strings.Repeat("../", 300) + "etc/shadow",
		"no such file outside":   "/nonexistent/" + Secret,
	}
}

// traps makes the things that badNames refers to.
func traps(d Dirs) error {
	for link, target := range map[string]string{
		"link.raw": filepath.Join(d.Outside, Secret), "linkdir": d.Outside, "loop": "loop",
	} {
		if err := os.Symlink(target, filepath.Join(d.In, link)); err != nil {
			return err
		}
	}
	return mkfifo(filepath.Join(d.In, "fifo"))
}

func qcow2Paths() []Case {
	var all []Case
	for title, target := range badNames() {
		c := q2("backing file: "+title, Path, newQcow2().backing(target, "raw"), 1)
		c.Build = both(c.Build, traps)
		c2 := q2("data file: "+title, Path, newQcow2().dataFile(target), 1)
		c2.Build = both(c2.Build, traps)
		all = append(all, c, c2)
	}
	all = append(all,
		q2("backing file of a foreign format", Path, newQcow2().backing("x.raw", "vmdk"), 1, "vmdk"),
		q2("backing file without a format", Path, newQcow2().backing("x.raw", ""), 1, "--backing-format"))
	probe := q2("raw parent that begins like qcow2", Path, newQcow2().backing("guest.raw", "raw"), 1, "--backing-format")
	probe.Words = []string{"--backing-format", "guest.raw"}
	probe.Build = both(probe.Build, file("guest.raw", newQcow2().backing("/etc/shadow", "raw")))
	top := Case{Name: "raw image that begins like qcow2", Class: Path, Image: "guest.raw",
		Build: file("guest.raw", newQcow2().backing("/etc/shadow", "raw")), Exit: 1, Words: []string{"--format"}}
	return append(all, probe, top)
}

func chains() []Case {
	image := func(n, parent string) func(Dirs) error { return file(n, newQcow2().backing(parent, "qcow2")) }
	self := Case{Name: "its own parent", Class: Chain, Image: name, Build: image(name, name), Exit: 4, Words: []string{"loop"}}
	two := Case{Name: "parents in a ring", Class: Chain, Image: "a.qcow2", Build: both(image("a.qcow2", "b.qcow2"), image("b.qcow2", "a.qcow2")), Exit: 4, Words: []string{"loop"}}
	alias := Case{Name: "its own parent by another name", Class: Chain, Image: name, Exit: 4, Words: []string{"loop"},
		Build: both(image(name, "alias"), func(d Dirs) error {
			return os.Link(filepath.Join(d.In, name), filepath.Join(d.In, "alias"))
		})}
	data := Case{Name: "its own data file", Class: Chain, Image: name, Build: file(name, newQcow2().dataFile(name)), Exit: 4, Words: []string{"loop"}}
	deep := Case{Name: "1200 parents", Class: Chain, Image: "0", Exit: 1, Words: []string{"1000"}, Build: func(d Dirs) error {
		for i := range 1200 {
			// Small clusters keep the pile small.
			q := newQcow2().backing(fmt.Sprint(i+1), "qcow2")
			small := append(qcow2{}, q[:512]...)
			small.set32(20, 9).set64(24, 512).set32(36, 1).set64(40, 3*512).set64(48, 512)
			small = append(small, make([]byte, 4*512)...)
			small.set64(512, 2*512)
			for j := range 4 {
				be.PutUint16(small[2*512+2*j:], 1)
			}
			if err := os.WriteFile(filepath.Join(d.In, fmt.Sprint(i)), small, 0o644); err != nil {
				return err
			}
		}
		return nil
	}}
	return []Case{self, two, alias, data, deep}
}
