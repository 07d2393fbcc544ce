package hostile

import (
	"encoding/binary"
	"fmt"
	"strings"
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
