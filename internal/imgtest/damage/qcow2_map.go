package damage

import "github.com/imagestack/imagestack/blockmap"

const (
	copied   = 1 << 63
	packed   = 1 << 62
	l2Span   = 2 << 20 // of a table of 4 KiB
	mib      = 1 << 20
	whatever = -1 // of Foreign: QEMU sees it or not, depending on its version
)

// qcow2Map are damages of L1 and L2 entries and of what they point to.
func qcow2Map() []Damage {
	g := int64(16 << 12) // a guest offset with data
	one := rng(g, 4096)
	return []Damage{
		qcow2Case("l1-unaligned", "v3", func(q *qcow2) { q.p64(q.l1(0), q.u64(q.l1(0))+0x200) },
			Damage{Codes: []string{"qcow2.l1.entry-unaligned"}, Preen: Damaged, Lost: rng(0, l2Span), Foreign: 2}),
		qcow2Case("l1-past-eof", "v3", func(q *qcow2) { q.p64(q.l1(1), copied|1<<40) },
			Damage{Codes: []string{"qcow2.l1.entry-past-eof"}, Preen: Damaged, Lost: rng(l2Span, l2Span), Foreign: 2}),
		qcow2Case("l1-itself", "v3", func(q *qcow2) { q.p64(q.l1(0), copied|q.u64(40)) },
			Damage{Codes: []string{"qcow2.l1.entry-into-metadata"}, Preen: Damaged, Lost: rng(0, l2Span), Foreign: 2}),
		qcow2Case("l1-refcount-block", "v3", func(q *qcow2) { q.p64(q.l1(0), copied|uint64(q.block())) },
			Damage{Codes: []string{"qcow2.l1.entry-into-metadata"}, Preen: Damaged, Lost: rng(0, l2Span), Foreign: 2}),
		qcow2Case("l1-data", "v3", func(q *qcow2) { q.p64(q.l1(0), copied|uint64(q.host(3*mib))) },
			Damage{Codes: []string{"qcow2.l1.not-a-table"}, Preen: Damaged, Lost: rng(0, l2Span), Foreign: 2}),
		qcow2Case("l1-duplicate", "v3", func(q *qcow2) { q.p64(q.l1(1), q.u64(q.l1(0))) },
			Damage{Codes: []string{"qcow2.l1.duplicate"}, Preen: Damaged, Lost: rng(0, 2*l2Span), Foreign: 2}),
		qcow2Case("l1-reserved", "v3", func(q *qcow2) { q.or64(q.l1(0), 1<<57|1) },
			Damage{Codes: []string{"qcow2.l1.reserved-bits"}, Foreign: 2}),
		qcow2Case("l1-copied-clear", "v3", func(q *qcow2) { q.p64(q.l1(0), q.u64(q.l1(0))&^copied) },
			Damage{Codes: []string{"qcow2.l1.copied-clear"}, Foreign: 2}),
		qcow2Case("l1-copied-set", "snapshot", func(q *qcow2) { q.or64(q.l1(3), copied) },
			Damage{Codes: []string{"qcow2.l1.copied-set"}, Foreign: 2}),
		qcow2Case("l2-unaligned", "v3", func(q *qcow2) { q.p64(q.l2(g), q.u64(q.l2(g))+0x200) },
			Damage{Codes: []string{"qcow2.l2.entry-unaligned"}, Preen: Damaged, Lost: one, Foreign: 2}),
		qcow2Case("l2-past-eof", "v3", func(q *qcow2) { q.p64(q.l2(g), copied|1<<40) },
			Damage{Codes: []string{"qcow2.l2.entry-past-eof"}, Preen: Damaged, Lost: one, Foreign: 2}),
		qcow2Case("l2-past-eof-v2", "v2", func(q *qcow2) { q.p64(q.l2(g), copied|1<<55) },
			Damage{Codes: []string{"qcow2.l2.entry-past-eof"}, Preen: Damaged, Lost: one, Foreign: 2}),
		qcow2Case("l2-header-of-refcounts", "v3", func(q *qcow2) { q.p64(q.l2(g), copied|uint64(q.table())) },
			Damage{Codes: []string{"qcow2.l2.entry-into-metadata"}, Preen: Damaged, Lost: one, Foreign: 2}),
		qcow2Case("l2-block", "v3", func(q *qcow2) { q.p64(q.l2(g), copied|uint64(q.block())) },
			Damage{Codes: []string{"qcow2.l2.entry-into-metadata"}, Preen: Damaged, Lost: one, Foreign: 2}),
		qcow2Case("l2-l2", "v3", func(q *qcow2) { q.p64(q.l2(g), q.u64(q.l1(1))) },
			Damage{Codes: []string{"qcow2.l2.entry-into-metadata"}, Preen: Damaged, Lost: one, Foreign: 2}),
		qcow2Case("l2-duplicate", "v3", func(q *qcow2) { q.p64(q.l2(g), q.u64(q.l2(0))) },
			Damage{Codes: []string{"qcow2.l2.duplicate"}, Preen: Damaged, Lost: []blockmap.Range{{Off: 0, Len: 4096}, {Off: g, Len: 4096}}, Foreign: 2}),
		qcow2Case("l2-duplicate-counted", "v3", func(q *qcow2) { // as qemu-img check -r all leaves it
			q.p64(q.l2(g), q.u64(q.l2(0))&^copied)
			q.p64(q.l2(0), q.u64(q.l2(g)))
			q.p16(q.count(q.host(0)), 2)
		}, Damage{Codes: []string{"qcow2.l2.duplicate"}, Preen: Damaged, Lost: []blockmap.Range{{Off: 0, Len: 4096}, {Off: g, Len: 4096}}, Foreign: 3}),
		qcow2Case("l2-duplicate-snapshot", "snapshot", func(q *qcow2) { q.p64(q.l2(g), q.u64(q.l2(3*mib))|copied) },
			Damage{Codes: []string{"qcow2.l2.duplicate"}, Preen: Damaged, Lost: []blockmap.Range{{Off: 3 * mib, Len: 4096}, {Off: g, Len: 4096}}, Foreign: 2}),
		qcow2Case("l2-reserved", "v3", func(q *qcow2) { q.or64(q.l2(g), 1<<57|2) },
			Damage{Codes: []string{"qcow2.l2.reserved-bits"}, Foreign: 2}),
		qcow2Case("l2-copied-clear", "v3", func(q *qcow2) { q.p64(q.l2(g), q.u64(q.l2(g))&^copied) },
			Damage{Codes: []string{"qcow2.l2.copied-clear"}, Foreign: 2}),
		qcow2Case("l2-copied-set", "snapshot", func(q *qcow2) { q.or64(q.l2(0), copied) },
			Damage{Codes: []string{"qcow2.l2.copied-set"}, Foreign: 2}),
		qcow2Case("l2-copied-unmapped", "v3", func(q *qcow2) { q.or64(q.l2(2*mib), copied) },
			Damage{Codes: []string{"qcow2.l2.copied-unmapped"}, Lost: nil, Foreign: whatever}),
		qcow2Case("l2-zero-flag-v2", "v2", func(q *qcow2) { q.or64(q.l2(g), 1) },
			Damage{Codes: []string{"qcow2.l2.zero-flag-v2"}, Foreign: whatever}),
		qcow2Case("l2-several", "v3", func(q *qcow2) {
			q.p64(q.l2(g), 0xffffffffffffffff)
			q.p64(q.l2(g+4096), 0x3f00000000000001)
			q.p64(q.l2(g+8192), 1<<62)
		}, Damage{Codes: []string{"qcow2.packed.reserved-bits", "qcow2.l2.reserved-bits", "qcow2.packed.past-eof"}, Preen: Damaged, Lost: rng(g, 3*4096), Foreign: 2}),
		qcow2Case("extl2-bit0", "extl2", func(q *qcow2) { q.or64(q.l2n(0, 16), 1) },
			Damage{Codes: []string{"qcow2.l2.zero-flag-extended"}, Foreign: 0}),
		qcow2Case("extl2-both", "extl2", func(q *qcow2) { q.or64(q.l2n(0, 16)+8, 1<<32) },
			Damage{Codes: []string{"qcow2.l2.subcluster-both"}, Preen: Damaged, Lost: rng(0, 512), Foreign: whatever}),
		qcow2Case("extl2-unmapped", "extl2", func(q *qcow2) { q.p64(q.l2n(0, 16), 0) },
			Damage{Codes: []string{"qcow2.l2.subcluster-unmapped"}, Preen: Damaged, Lost: rng(0, 16384), Foreign: whatever}),
		qcow2Case("cut-data", "v3", func(q *qcow2) { q.b = q.b[:len(q.b)-100] },
			Damage{Codes: []string{"qcow2.data.cut"}, Preen: Damaged, Lost: rng(8*mib-8192, 4096), Foreign: whatever}),
		qcow2Case("cut-cluster", "v3", func(q *qcow2) { q.b = q.b[:len(q.b)-3*4096] },
			Damage{Codes: []string{"qcow2.l2.entry-past-eof"}, Preen: Damaged, Lost: rng(8*mib-4*4096, 3*4096), Foreign: 2}),
		qcow2Case("cut-table", "v3", func(q *qcow2) {
			at := q.grow(1)
			copy(q.b[at:], q.b[q.u64(q.l1(0))&offsetMask:][:4096])
			old := int64(q.u64(q.l1(0)) & offsetMask)
			q.p16(q.count(at), 1)
			q.p16(q.count(old), 0)
			q.p64(q.l1(0), copied|uint64(at))
			q.b = q.b[:len(q.b)-4000]
		}, Damage{Codes: []string{"qcow2.l2.table-cut"}, Preen: Damaged, Lost: rng(12*4096, l2Span), Foreign: whatever}),
		qcow2Case("packed-copied", "packed", func(q *qcow2) { q.or64(q.l2(g), copied) },
			Damage{Codes: []string{"qcow2.packed.reserved-bits"}, Foreign: 2}),
		qcow2Case("packed-past-eof", "packed", func(q *qcow2) { q.or64(q.l2(g), 1<<40) },
			Damage{Codes: []string{"qcow2.packed.past-eof"}, Preen: Damaged, Lost: one, Foreign: 2}),
		qcow2Case("packed-sectors", "mixed", func(q *qcow2) { q.or64(q.l2(g), 0xf<<58) },
			Damage{Codes: []string{"qcow2.packed.too-long"}, Foreign: whatever}),
		qcow2Case("packed-payload", "packed", func(q *qcow2) {
			off := int64(q.u64(q.l2(g)) & (1<<58 - 1))
			for i := range int64(64) {
				q.b[off+i] = 0xff
			}
		}, Damage{Codes: []string{"qcow2.packed.payload"}, Data: true, Preen: Damaged, Lost: rng(g-8*4096, 16*4096), Foreign: 0}),
		qcow2Case("packed-over-data", "mixed", func(q *qcow2) { q.p64(q.l2(g), packed|uint64(q.host(4*mib))|1<<58) },
			Damage{Codes: []string{"qcow2.l2.duplicate"}, Data: true, Preen: Damaged, Lost: []blockmap.Range{{Off: g, Len: 4096}, {Off: 4 * mib, Len: 8192}}, Foreign: 2}),
		qcow2Case("packed-refcount", "packed", func(q *qcow2) {
			q.p16(q.count(int64(q.u64(q.l2(g))&(1<<58-1))), 1)
		}, Damage{Codes: []string{"qcow2.refcount.too-low"}, Foreign: 2}),
		qcow2Case("datafile-offset", "data", func(q *qcow2) { q.p64(q.l2(g), q.u64(q.l2(g))+4096) },
			Damage{Codes: []string{"qcow2.datafile.offset"}, Foreign: whatever}),
		qcow2Case("datafile-packed", "data", func(q *qcow2) { q.or64(q.l2(g), packed) },
			Damage{Codes: []string{"qcow2.packed.external"}, Preen: Damaged, Lost: one, Foreign: whatever}),
	}
}
