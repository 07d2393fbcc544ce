package damage

import "bytes"

// qcow2More are damages that no other list has: the same value in other
// tables, values at the ends of their range, and what only a program that
// knows the format badly writes.
func qcow2More() []Damage {
	g := int64(16 << 12)
	ext := func(q *qcow2, typ uint32) int64 { return q.ext(typ) }
	return []Damage{
		qcow2Case("l2-table-0", "v3", func(q *qcow2) { q.p16(q.count(int64(q.u64(q.l1(0))&offsetMask)), 0) },
			Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("l1-past-eof-32p", "v3", func(q *qcow2) { q.p64(q.l1(1), copied|1<<55) },
			Damage{Codes: []string{"qcow2.l1.entry-past-eof"}, Preen: Damaged, Lost: rng(l2Span, l2Span), Foreign: 2}),
		qcow2Case("l1-unaligned-2a00", "64k", func(q *qcow2) { q.p64(q.l1(0), q.u64(q.l1(0))+0x2a00) },
			Damage{Codes: []string{"qcow2.l1.entry-unaligned"}, Preen: Damaged, Lost: rng(0, qcow2Disk), Foreign: 2}),
		qcow2Case("reftable-both-0", "v3", func(q *qcow2) { q.p64(48, 0); q.p32(56, 0) },
			Damage{Codes: []string{"qcow2.reftable.header"}, Foreign: 2}),
		qcow2Case("reftable-7fff", "v3", func(q *qcow2) { q.p64(q.table()+8, 1<<63-1) },
			Damage{Codes: []string{"qcow2.reftable.reserved-bits"}, Foreign: whatever}),
		qcow2Case("compatible", "v3", func(q *qcow2) { q.or64(80, 1<<20) },
			Damage{Codes: []string{"qcow2.header.reserved"}, Foreign: 0}),
		qcow2Case("crypt-method", "v3", func(q *qcow2) { q.p32(32, 9) },
			Damage{Codes: []string{"qcow2.header.crypt-method"}, Preen: Damaged, Full: Damaged, Foreign: 1}),
		qcow2Case("extension-twice", "64k", func(q *qcow2) {
			at := ext(q, 0x6803f857)
			n := int64(q.u32(at - 4)) // a multiple of 8
			copy(q.b[at+n:], q.b[at-8:at+n])
		}, Damage{Codes: []string{"qcow2.header.extension-twice"}, Preen: Damaged, Foreign: whatever}),
		qcow2Case("data-no-name", "data", func(q *qcow2) { q.p32(ext(q, 0x44415441)-8, 0x12345678) },
			Damage{Codes: []string{"qcow2.datafile.no-name"}, Preen: Damaged, Full: Damaged, Foreign: 1}),
		qcow2Case("bitmaps-bit-alone", "v3", func(q *qcow2) { q.or64(88, 1) },
			Damage{Codes: []string{"qcow2.bitmaps.no-extension"}, Foreign: whatever}),
		qcow2Case("snapshot-ids", "snapshot", func(q *qcow2) {
			at := int64(q.u64(64))
			id := func(at int64) int64 { return at + 40 + int64(q.u32(at+36)) }
			n := id(at) - at + int64(q.b[at+12])<<8 + int64(q.b[at+13]) + int64(q.b[at+14])<<8 + int64(q.b[at+15])
			second := at + (n+7)&^7
			q.b[id(second)] = q.b[id(at)]
		}, Damage{Codes: []string{"qcow2.snapshots.id"}, Foreign: whatever}),
		qcow2Case("snapshot-extra-64k", "snapshot", func(q *qcow2) {
			// The table moves to the end, with 64 KiB of extra data in its first entry.
			at := int64(q.u64(64))
			old := bytes.Clone(q.b[at : at+4096])
			n := int64(q.u32(at + 36))
			to := q.grow(18)
			copy(q.b[to:], old[:40+n])
			q.p32(to+36, 64<<10)
			copy(q.b[to+40+64<<10:], old[40+n:])
			q.p64(64, uint64(to))
			for k := range int64(18) {
				q.p16(q.count(to+k*4096), 1)
			}
			q.p16(q.count(at), 0)
		}, Damage{Codes: []string{"qcow2.snapshots.extra-long"}, Preen: Damaged, Foreign: 1}),
		qcow2Case("packed-into-metadata", "packed", func(q *qcow2) { q.p64(q.l2(g), packed|uint64(q.block())) },
			Damage{Codes: []string{"qcow2.packed.into-metadata"}, Preen: Damaged, Lost: rng(g, 4096), Foreign: whatever}),
		qcow2Case("packed-overflow", "narrow", func(q *qcow2) {
			// Three streams in one cluster, which one bit counts.
			const mask = 1<<58 - 1
			host := int64(q.u64(q.l2(0)) & mask)
			for k := range int64(3) {
				from := int64(q.u64(q.l2(k<<12)) & mask)
				copy(q.b[host+k<<10:host+(k+1)<<10], bytes.Clone(q.b[from:from+1<<10]))
				q.p64(q.l2(k<<12), packed|uint64(host+k<<10)|1<<58)
			}
		}, Damage{Codes: []string{"qcow2.refcount.overflow"}, Preen: Damaged, Foreign: whatever}),
	}
}
