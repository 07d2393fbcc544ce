package main

import (
	"encoding/binary"
	"errors"
	"os"
)

// fsckImage says what is in an image for the check workload.
type fsckImage struct {
	clusters int64 // of the disk that are stored
	damage   []byte
	damageAt int64 // where these bytes make it a damaged one
}

// fsckCases are images of which only the metadata is there; the data is a
// hole, which no check reads.
func fsckCases() []fsckCase {
	return []fsckCase{
		{Name: "qcow2, 1 TiB mapped", Format: "qcow2", build: func(p string) (fsckImage, error) { return mappedQcow2(p, 1<<40, 0) }},
		{Name: "qcow2, 64 GiB mapped, 200 snapshots", Format: "qcow2", build: func(p string) (fsckImage, error) { return mappedQcow2(p, 64<<30, 200) }},
		{Name: "qcow2, 1 GiB mapped", Format: "qcow2", Start: true, build: func(p string) (fsckImage, error) { return mappedQcow2(p, 1<<30, 0) }},
		{Name: "ploop, 1 TiB mapped", Format: "parallels", build: mappedPloop},
	}
}

// Bits of qcow2 entries, and the size of the clusters.
const (
	q2Copied  = 1 << 63
	q2Cluster = int64(64 << 10)
)

// tableWriter writes clusters one after the other.
type tableWriter struct {
	f   *os.File
	err error
}

func (w *tableWriter) put(cluster int64, b []byte) {
	if w.err == nil {
		_, w.err = w.f.WriteAt(b, cluster*q2Cluster)
	}
}

// mappedQcow2 makes a version 3 image of size bytes, all of them mapped, and
// snapshots of it. Each snapshot has an L1 table, and one L2 table that is not
// that of the others.
func mappedQcow2(path string, size, snapshots int64) (img fsckImage, err error) {
	const cs = q2Cluster
	be := binary.BigEndian
	up := func(n, by int64) int64 { return (n + by - 1) / by }
	data := size / cs
	tables := up(data, cs/8)
	l1Clusters := up(tables*8, cs)
	const snapBytes = 64 // of a snapshot table entry
	// Header, refcount table, L1 tables, snapshot table, L2 tables, blocks, data.
	const table = int64(1)
	l1 := table + 1
	snapTable := l1 + l1Clusters*(1+snapshots)
	l2 := snapTable + up(snapshots*snapBytes, cs)
	block := l2 + tables + snapshots
	blocks := up(block+data, cs/2-1)
	first := block + blocks
	total := first + data

	f, err := os.Create(path)
	if err != nil {
		return img, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := &tableWriter{f: f}
	h := make([]byte, 112)
	copy(h, "QFI\xfb")
	be.PutUint32(h[4:], 3)
	be.PutUint32(h[20:], 16)
	be.PutUint64(h[24:], uint64(size))
	be.PutUint32(h[36:], uint32(tables))
	be.PutUint64(h[40:], uint64(l1*cs))
	be.PutUint64(h[48:], uint64(table*cs))
	be.PutUint32(h[56:], 1)
	be.PutUint32(h[60:], uint32(snapshots))
	if snapshots > 0 {
		be.PutUint64(h[64:], uint64(snapTable*cs))
	}
	be.PutUint32(h[96:], 4)
	be.PutUint32(h[100:], 104)
	w.put(0, h)
	b := make([]byte, cs)
	for i := range blocks {
		be.PutUint64(b[8*i:], uint64((block+i)*cs))
	}
	w.put(table, b)
	flag := uint64(q2Copied)
	if snapshots > 0 {
		flag = 0
	}
	// Snapshot s has its own table for index s modulo their number.
	for s := int64(-1); s < snapshots; s++ {
		b = make([]byte, l1Clusters*cs)
		for i := range tables {
			be.PutUint64(b[8*i:], flag|uint64((l2+i)*cs))
		}
		if s >= 0 {
			be.PutUint64(b[8*(s%tables):], uint64((l2+tables+s)*cs))
		}
		w.put(l1+(s+1)*l1Clusters, b)
	}
	b = make([]byte, up(snapshots*snapBytes, cs)*cs)
	for s := range snapshots {
		e := b[s*snapBytes:]
		be.PutUint64(e, uint64((l1+(s+1)*l1Clusters)*cs))
		be.PutUint32(e[8:], uint32(tables))
		be.PutUint16(e[12:], 4) // ID
		be.PutUint16(e[14:], 4) // name
		be.PutUint32(e[36:], 16)
		be.PutUint64(e[48:], uint64(size))
		id := []byte{'0' + byte(s/1000%10), '0' + byte(s/100%10), '0' + byte(s/10%10), '0' + byte(s%10)}
		copy(e[56:], id)
		copy(e[60:], id)
	}
	w.put(snapTable, b)
	b = make([]byte, cs)
	entries := func(i int64) {
		clear(b)
		for k := range min(cs/8, data-i*cs/8) {
			be.PutUint64(b[8*k:], flag|uint64((first+i*cs/8+k)*cs))
		}
	}
	for i := range tables {
		entries(i)
		w.put(l2+i, b)
	}
	for s := range snapshots {
		entries(s % tables)
		w.put(l2+tables+s, b)
	}
	count := func(cluster int64) uint16 {
		switch {
		case cluster >= first:
			return uint16(1 + snapshots)
		case cluster >= l2 && cluster < l2+tables:
			i := cluster - l2
			own := up(max(snapshots-i, 0), tables)
			return uint16(1 + snapshots - own)
		}
		return 1
	}
	for i := range blocks {
		clear(b)
		for k := range min(cs/2, total-i*cs/2) {
			be.PutUint16(b[2*k:], count(i*cs/2+k))
		}
		w.put(block+i, b)
	}
	img = fsckImage{clusters: data, damage: []byte{0, 0}, damageAt: block*cs + (total-1)/(cs/2)*cs + (total-1)%(cs/2)*2}
	return img, errors.Join(w.err, f.Truncate(total*cs))
}

// mappedPloop makes a ploop image of version 2 of 1 TiB in clusters of 1 MiB,
// all mapped.
func mappedPloop(path string) (img fsckImage, err error) {
	const (
		cluster = 1 << 20
		entries = 1 << 20
		first   = (64 + 4*entries + cluster - 1) / cluster
	)
	le := binary.LittleEndian
	b := make([]byte, first*cluster)
	copy(b, "WithouFreSpacExt")
	le.PutUint32(b[16:], 2)
	le.PutUint32(b[20:], 16)
	le.PutUint32(b[24:], 1<<20)
	le.PutUint32(b[28:], cluster/512)
	le.PutUint32(b[32:], entries)
	le.PutUint64(b[36:], entries*cluster/512)
	le.PutUint32(b[48:], first*cluster/512)
	for i := range entries {
		le.PutUint32(b[64+4*i:], uint32(first+i))
	}
	f, err := os.Create(path)
	if err != nil {
		return img, err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Truncate((first+entries)*cluster), f.Close())
	return fsckImage{clusters: entries, damage: []byte{0xff, 0xff, 0xff, 0x7f}, damageAt: 64 + 4*entries/2}, err
}
