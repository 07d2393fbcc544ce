package damage

// qcow2Counts are damages of the reference counts.
func qcow2Counts() []Damage {
	g := int64(16 << 12)
	return []Damage{
		qcow2Case("leak", "v3", func(q *qcow2) { q.p16(q.count(q.grow(2)), 1) },
			Damage{Codes: []string{"qcow2.refcount.leak"}, Foreign: 3}),
		qcow2Case("leak-middle", "v3", func(q *qcow2) { q.p64(q.l2(g), 0) },
			Damage{Codes: []string{"qcow2.refcount.leak"}, Lost: rng(g, 4096), Foreign: 3}),
		qcow2Case("leak-behind-eof", "v3", func(q *qcow2) { q.p16(q.count(q.end()+8*4096), 1) },
			Damage{Codes: []string{"qcow2.refcount.leak"}, Foreign: whatever}),
		qcow2Case("too-high", "v3", func(q *qcow2) { q.p16(q.count(q.host(g)), 2) },
			Damage{Codes: []string{"qcow2.refcount.too-high-copied"}, Foreign: 2}),
		qcow2Case("data-0", "v3", func(q *qcow2) { q.p16(q.count(q.host(g)), 0) },
			Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("l1-0", "v3", func(q *qcow2) { q.p16(q.count(int64(q.u64(40))), 0) },
			Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("header-0", "v3", func(q *qcow2) { q.p16(q.count(0), 0) },
			Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("block-0", "v3", func(q *qcow2) { q.p16(q.count(q.block()), 0) },
			Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("snapshot-too-low", "snapshot", func(q *qcow2) { q.p16(q.count(q.host(0)), 1) },
			Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("block-zeros", "v3", func(q *qcow2) { clear(q.b[q.block():][:4096]) },
			Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("block-garbage", "v3", func(q *qcow2) {
			for i := range int64(4096) {
				q.b[q.block()+i] = byte(i*7 + 1)
			}
		}, Damage{Codes: []string{"qcow2.refcount.too-high"}, Foreign: whatever}),
		qcow2Case("block-zeros-64k", "64k", func(q *qcow2) { clear(q.b[q.block():][:65536]) },
			Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("reftable-0", "v3", func(q *qcow2) { q.p64(q.table(), 0) },
			Damage{Codes: []string{"qcow2.reftable.block-missing"}, Foreign: 2}),
		qcow2Case("reftable-0-full", "v3", func(q *qcow2) { q.p64(q.table(), 0) },
			Damage{Codes: []string{"qcow2.reftable.block-missing"}, Foreign: 2}),
		qcow2Case("reftable-past-eof", "v3", func(q *qcow2) { q.p64(q.table()+8, 1<<40) },
			Damage{Codes: []string{"qcow2.reftable.entry-past-eof"}, Foreign: 2}),
		qcow2Case("reftable-ones", "v3", func(q *qcow2) { q.p64(q.table()+8, ^uint64(0)) },
			Damage{Codes: []string{"qcow2.reftable.reserved-bits"}, Foreign: whatever}),
		qcow2Case("reftable-unaligned", "v3", func(q *qcow2) { q.p64(q.table(), uint64(q.block())+0x200) },
			Damage{Codes: []string{"qcow2.reftable.entry-unaligned"}, Foreign: whatever}),
		qcow2Case("reftable-reserved", "v3", func(q *qcow2) { q.or64(q.table(), 5) },
			Damage{Codes: []string{"qcow2.reftable.reserved-bits"}, Foreign: whatever}),
		qcow2Case("reftable-shared", "v3", func(q *qcow2) { q.p64(q.table()+8, uint64(q.block())) },
			Damage{Codes: []string{"qcow2.reftable.entry-shared"}, Foreign: whatever}),
		qcow2Case("reftable-into-l1", "v3", func(q *qcow2) { q.p64(q.table()+8, q.u64(40)) },
			Damage{Codes: []string{"qcow2.reftable.entry-into-metadata"}, Foreign: whatever}),
		qcow2Case("reftable-into-data", "v3", func(q *qcow2) { q.p64(q.table()+8, uint64(q.host(g))) },
			Damage{Codes: []string{"qcow2.reftable.entry-into-metadata"}, Foreign: whatever}),
		qcow2Case("reftable-offset-0", "v3", func(q *qcow2) { q.p64(48, 0) },
			Damage{Codes: []string{"qcow2.reftable.header"}, Foreign: whatever}),
		qcow2Case("reftable-offset-huge", "v3", func(q *qcow2) { q.p64(48, 1<<62) },
			Damage{Codes: []string{"qcow2.reftable.header"}, Foreign: 2}),
		qcow2Case("reftable-offset-unaligned", "v3", func(q *qcow2) { q.p64(48, q.u64(48)+0x100) },
			Damage{Codes: []string{"qcow2.reftable.header"}, Foreign: 1}),
		qcow2Case("reftable-offset-data", "v3", func(q *qcow2) { q.p64(48, uint64(q.host(g))) },
			Damage{Codes: []string{"qcow2.reftable.header"}, Foreign: whatever}),
		qcow2Case("reftable-clusters-0", "v3", func(q *qcow2) { q.p32(56, 0) },
			Damage{Codes: []string{"qcow2.reftable.header"}, Foreign: whatever}),
		qcow2Case("reftable-clusters-huge", "v3", func(q *qcow2) { q.p32(56, 1<<31) },
			Damage{Codes: []string{"qcow2.reftable.header"}, Foreign: 1}),
	}
}

// qcow2Header are damages of the header and its extensions.
func qcow2Header() []Damage {
	ext := func(q *qcow2, typ uint32) int64 { return q.ext(typ) }
	return []Damage{
		qcow2Case("magic", "v3", func(q *qcow2) { q.b[0] = 0 }, Damage{Codes: []string{"qcow2.header.magic"}, Preen: Fatal, Foreign: 1}),
		qcow2Case("version", "v3", func(q *qcow2) { q.p32(4, 77) }, Damage{Codes: []string{"qcow2.header.version"}, Preen: Fatal, Foreign: 1}),
		qcow2Case("cluster-bits", "64k", func(q *qcow2) { q.p32(20, 40) }, Damage{Codes: []string{"qcow2.header.cluster-bits"}, Preen: Fatal, Full: Clean, Foreign: 1}),
		qcow2Case("cluster-bits-larger", "v3", func(q *qcow2) { q.p32(20, 13) }, Damage{Codes: []string{"qcow2.header.cluster-bits"}, Preen: Fatal, Foreign: whatever}),
		qcow2Case("refcount-order", "v3", func(q *qcow2) { q.p32(96, 7) }, Damage{Codes: []string{"qcow2.header.refcount-order"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("header-length", "v3", func(q *qcow2) { q.p32(100, 13) }, Damage{Codes: []string{"qcow2.header.header-length"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("header-length-huge", "v3", func(q *qcow2) { q.p32(100, 1<<30) }, Damage{Codes: []string{"qcow2.header.header-length"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("header-cut", "v3", func(q *qcow2) { q.b = q.b[:60] }, Damage{Codes: []string{"qcow2.header.truncated"}, Preen: Fatal, Full: Fatal, Foreign: 1}),
		qcow2Case("incompatible", "64k", func(q *qcow2) { q.or64(72, 1<<40) }, Damage{Codes: []string{"qcow2.header.incompatible-features"}, Preen: Fatal, Foreign: 1}),
		qcow2Case("incompatible-named", "64k", func(q *qcow2) {
			q.or64(72, 1<<40)
			at := ext(q, 0x6803f857)
			copy(q.b[at:], append([]byte{0, 40}, "a feature of the future\x00"...))
		}, Damage{Codes: []string{"qcow2.header.incompatible-features"}, Preen: Fatal, Full: Fatal, Foreign: 1}),
		qcow2Case("dirty", "v3", func(q *qcow2) { q.or64(72, 1) }, Damage{Codes: []string{"qcow2.header.dirty"}, Foreign: 0}),
		qcow2Case("dirty-wrong", "v3", func(q *qcow2) { q.or64(72, 1); q.p16(q.count(q.host(0)), 0) },
			Damage{Codes: []string{"qcow2.header.dirty", "qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("corrupt", "v3", func(q *qcow2) { q.or64(72, 2) }, Damage{Codes: []string{"qcow2.header.corrupt"}, Foreign: 0}),
		qcow2Case("autoclear", "v3", func(q *qcow2) { q.or64(88, 1<<50); q.p16(q.count(q.host(0)), 0) },
			Damage{Codes: []string{"qcow2.header.autoclear-features"}, Foreign: 2}),
		qcow2Case("compression-byte", "packed", func(q *qcow2) { q.b[104] = 1 },
			Damage{Codes: []string{"qcow2.header.compression-type"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("compression-bit", "zstd", func(q *qcow2) { q.p64(72, q.u64(72)&^8) },
			Damage{Codes: []string{"qcow2.header.compression-type"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("extl2-bit-set", "64k", func(q *qcow2) { q.or64(72, 16) },
			Damage{Codes: []string{"qcow2.header.extended-l2"}, Preen: Damaged, Foreign: whatever}),
		qcow2Case("extl2-bit-clear", "extl2", func(q *qcow2) { q.p64(72, q.u64(72)&^16) },
			Damage{Codes: []string{"qcow2.header.extended-l2"}, Preen: Damaged, Foreign: 2}),
		qcow2Case("raw-bit", "v3", func(q *qcow2) { q.or64(88, 2) },
			Damage{Codes: []string{"qcow2.header.raw-data-file"}, Foreign: whatever}),
		qcow2Case("backing-size", "backing", func(q *qcow2) { q.p32(16, 5000) },
			Damage{Codes: []string{"qcow2.header.backing-name"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("backing-offset", "backing", func(q *qcow2) { q.p64(8, 1<<40) },
			Damage{Codes: []string{"qcow2.header.backing-name"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("extension-length", "64k", func(q *qcow2) { q.p32(ext(q, 0x6803f857)-4, 1<<31) },
			Damage{Codes: []string{"qcow2.header.extension-length"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("size-0", "v3", func(q *qcow2) { q.p64(24, 0) },
			Damage{Codes: []string{"qcow2.header.size"}, Preen: Damaged, Lost: rng(8*mib-4096, 4096), Foreign: 0}),
		qcow2Case("size-huge", "v3", func(q *qcow2) { q.p64(24, 1<<61) },
			Damage{Codes: []string{"qcow2.header.size"}, Preen: Damaged, Foreign: whatever}),
		qcow2Case("l1-size-small", "v3", func(q *qcow2) { q.p32(36, 1) },
			Damage{Codes: []string{"qcow2.header.l1-size"}, Preen: Damaged, Foreign: whatever}),
		qcow2Case("l1-size-huge", "v3", func(q *qcow2) { q.p32(36, 1<<30) },
			Damage{Codes: []string{"qcow2.header.l1-size"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("l1-offset-huge", "v3", func(q *qcow2) { q.p64(40, 1<<62) },
			Damage{Codes: []string{"qcow2.header.l1-offset"}, Preen: Fatal, Full: Fatal, Foreign: whatever}),
		qcow2Case("l1-offset-unaligned", "v3", func(q *qcow2) { q.p64(40, q.u64(40)+0x300) },
			Damage{Codes: []string{"qcow2.header.l1-offset"}, Preen: Fatal, Foreign: whatever}),
		qcow2Case("l1-offset-reftable", "v3", func(q *qcow2) { q.p64(40, q.u64(48)) },
			Damage{Codes: []string{"qcow2.header.l1-offset"}, Preen: Fatal, Full: Fatal, Foreign: whatever}),
	}
}

// qcow2Tables are damages of snapshots and bitmaps.
func qcow2Tables() []Damage {
	snap := func(q *qcow2) int64 { return int64(q.u64(64)) }
	second := func(q *qcow2) int64 { // the second entry
		at := snap(q)
		n := 40 + int64(q.u32(at+36)) + int64(q.b[at+12])<<8 + int64(q.b[at+13]) + int64(q.b[at+14])<<8 + int64(q.b[at+15])
		return at + (n+7)&^7
	}
	bm := func(q *qcow2) int64 { return q.ext(0x23852875) }
	dir := func(q *qcow2) int64 { return int64(q.u64(bm(q) + 16)) }
	return []Damage{
		qcow2Case("snapshots-huge", "snapshot", func(q *qcow2) { q.p32(60, 1<<30) },
			Damage{Codes: []string{"qcow2.snapshots.table"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("snapshots-one-more", "snapshot", func(q *qcow2) { q.p32(60, 3) },
			Damage{Codes: []string{"qcow2.snapshots.entry-cut"}, Preen: Damaged, Foreign: whatever}),
		qcow2Case("snapshots-offset", "snapshot", func(q *qcow2) { q.p64(64, snap2(q)+0x100) },
			Damage{Codes: []string{"qcow2.snapshots.table"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("snapshot-extra-0", "snapshot", func(q *qcow2) {
			at := snap(q)
			n := int64(q.u32(at + 36))
			names := append([]byte(nil), q.b[at+40+n:second(q)]...)
			rest := append([]byte(nil), q.b[second(q):at+4096]...)
			q.p32(at+36, 0)
			k := copy(q.b[at+40:], names[:len("1")+len("first")])
			k = (40 + k + 7) &^ 7
			copy(q.b[at+int64(k):at+4096], rest)
		}, Damage{Codes: []string{"qcow2.snapshots.extra-short"}, Foreign: 2}),
		qcow2Case("snapshot-extra-long", "snapshot", func(q *qcow2) {
			// The last entry gets 2 KiB of extra data.
			at := second(q)
			n := int64(q.u32(at + 36))
			names := append([]byte(nil), q.b[at+40+n:][:len("2")+len("second")]...)
			q.p32(at+36, 2048)
			copy(q.b[at+40+2048:], names)
		}, Damage{Codes: []string{"qcow2.snapshots.extra-long"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("snapshot-l1-offset", "snapshot", func(q *qcow2) { q.p64(snap(q), q.u64(snap(q))+0x200) },
			Damage{Codes: []string{"qcow2.snapshots.l1"}, Preen: Damaged, Foreign: whatever}),
		qcow2Case("snapshot-l1-active", "snapshot", func(q *qcow2) { q.p64(snap(q), q.u64(40)) },
			Damage{Codes: []string{"qcow2.snapshots.l1"}, Preen: Damaged, Foreign: whatever}),
		qcow2Case("snapshot-l1-size", "snapshot", func(q *qcow2) { q.p32(snap(q)+8, 1) },
			Damage{Codes: []string{"qcow2.snapshots.l1-size"}, Preen: Damaged, Foreign: whatever}),
		qcow2Case("snapshot-l1-entry", "snapshot", func(q *qcow2) { q.p64(int64(q.u64(snap(q))), 1<<40) },
			Damage{Codes: []string{"qcow2.l1.entry-past-eof"}, Preen: Damaged, Lost: rng(0, l2Span), Foreign: 2}),
		qcow2Case("bitmaps-stale", "bitmaps", func(q *qcow2) { q.p64(88, 0) },
			Damage{Codes: []string{"qcow2.bitmaps.stale", "qcow2.refcount.leak"}, Foreign: 3}),
		qcow2Case("bitmaps-none", "bitmaps", func(q *qcow2) { q.p32(bm(q), 0) },
			Damage{Codes: []string{"qcow2.bitmaps.directory"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("bitmaps-many", "bitmaps", func(q *qcow2) { q.p32(bm(q), 70000) },
			Damage{Codes: []string{"qcow2.bitmaps.directory"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("bitmaps-offset", "bitmaps", func(q *qcow2) { q.p64(bm(q)+16, 1<<50) },
			Damage{Codes: []string{"qcow2.bitmaps.directory"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("bitmap-table", "bitmaps", func(q *qcow2) { q.p64(dir(q), q.u64(dir(q))+8) },
			Damage{Codes: []string{"qcow2.bitmaps.directory"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("bitmap-entry", "bitmaps", func(q *qcow2) { q.or64(int64(q.u64(dir(q))), 1<<60) },
			Damage{Codes: []string{"qcow2.bitmaps.table-entry"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("bitmap-name", "bitmaps", func(q *qcow2) { q.p16(dir(q)+18, 0) },
			Damage{Codes: []string{"qcow2.bitmaps.directory"}, Preen: Damaged, Foreign: 1}),
	}
}

func snap2(q *qcow2) uint64 { return q.u64(64) }

// Qcow2 are all damages of qcow2 images.
func Qcow2() []Damage {
	var all []Damage
	for _, part := range [][]Damage{qcow2Header(), qcow2Map(), qcow2Counts(), qcow2Tables(), qcow2More()} {
		all = append(all, part...)
	}
	return all
}
