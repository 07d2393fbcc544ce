package crash_test

import (
	"context"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/crash"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/rewrite"
)

type op = crash.Op

// edit is an operation of a guest.
func edit(do func(g *crash.Guest) error) func(context.Context, *crash.Session) error {
	return func(ctx context.Context, s *crash.Session) error { return s.Edit(ctx, do) }
}

// mixed are n random changes; see crash.Guest.Mixed for the weights.
func mixed(n int, most int64, weights ...int) func(context.Context, *crash.Session) error {
	return edit(func(g *crash.Guest) error { return g.Mixed(n, most, weights...) })
}

// writeAndMixed begins with a write: before the first one an image stays as
// dirty as it was.
func writeAndMixed(n int, most int64) func(context.Context, *crash.Session) error {
	return edit(func(g *crash.Guest) error {
		if err := g.Write(5000, 700); err != nil {
			return err
		}
		return g.Mixed(n, most)
	})
}

// syncedWrites are single writes, each made durable.
func syncedWrites(n int, most int64) func(context.Context, *crash.Session) error {
	return edit(func(g *crash.Guest) error {
		for range n {
			if err := g.Mixed(2, most, 1, 0, 0, 0, 0); err != nil {
				return err
			}
			if err := g.Sync(); err != nil {
				return err
			}
		}
		return nil
	})
}

// harmless are the syncs that may be left out, and why.
var harmless = map[string]string{
	"qcow2.(*Image).closeEditor":   "it makes lowered counts durable: without it space leaks, which is no loss",
	"qcow2.(*editor).cutFile (":    "it makes durable that the file is shorter: without it what lies behind the end is referenced by nothing",
	"qcow2.(*editor).syncCounts (": "it makes durable that counts were lowered, which is no loss without it; what relies on them syncs again before",
	"< rewrite.(*job).run (":       "of a raw image: holes that are not durable are space that is not given back, which is no loss",
	"< qcow2.(*editor).rebuild (":  "it makes durable that the image is no longer dirty: without it the counts, which are durable, are rebuilt once more",
}

// table is every operation that changes a file. A new one is one line.
func table(t testing.TB) []op {
	type c = qcow2.CreateOptions
	const k = 1 << 10
	q4 := qcow2New(c{Size: 256 * k, ClusterSize: 4 * k})
	compressed := func(options string) setup {
		return qcow2ByQemu(t, options, "256k", "write -c -P 1 0 64k", "write -c -P 2 80k 64k", "write -P 3 160k 32k")
	}
	snapshot := func(options string) setup {
		return qcow2ByQemu(t, options, "256k", "write -c -P 1 0 32k", "write -P 2 32k 96k", "snapshot s1",
			"write -P 3 48k 40k", "write -c -P 4 160k 32k", "write -z 100k 8k", "snapshot s2")
	}
	bitmaps := qcow2ByQemu(t, "cluster_size=4096", "256k", "write -P 1 0 128k", "bitmap b1", "bitmap b2")
	dirty := qcow2ByQemu(t, "cluster_size=4096,lazy_refcounts=on", "256k", "write -P 1 0 64k", "crash write -P 3 128k 100k")
	dirty512 := qcow2ByQemu(t, "cluster_size=512,refcount_bits=64,lazy_refcounts=on", "256k", "write -P 1 0 64k", "crash write -P 3 128k 100k")
	p1, p2 := ploopNew(1, 512*k), ploopNew(2, 512*k-512)
	const most = 12 * k
	broken := func(s setup, how ...func([]byte) []byte) *damaged {
		d, err := damage(s, how...)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	brokenP := broken(filled(p2, same(96*k)), inUse, twice(0, 1))
	brokenQ := broken(filled(q4, half(24*k)), badCounts(4), notCopied)

	return []op{
		{Name: "qcow2/allocating writes", Setup: q4, Run: mixed(12, most, 4, 2, 0, 0, 2)},
		{Name: "qcow2/single durable writes", Setup: q4, Run: syncedWrites(4, most)},
		{Name: "qcow2/allocating writes, 64K clusters", Setup: qcow2New(c{Size: 512 * k, ClusterSize: 64 * k}), Run: mixed(6, 70*k, 4, 0, 1, 0, 2)},
		{Name: "qcow2/allocating writes, version 2", Setup: qcow2New(c{Size: 256 * k, ClusterSize: 4 * k, Version: 2}), Run: mixed(12, most)},
		{Name: "qcow2/counts of 1 bit", Setup: qcow2New(c{Size: 256 * k, ClusterSize: 4 * k, RefcountBits: 1}), Run: mixed(12, most)},
		{Name: "qcow2/copy on write over a parent", Setup: lowered(q4, 200*k), Run: mixed(12, most)},
		{Name: "qcow2/copy on write inside extended L2 clusters", Setup: lowered(qcow2New(c{Size: 256 * k, ClusterSize: 16 * k, ExtendedL2: true}), 200*k), Run: mixed(12, most)},
		{Name: "qcow2/overwriting compressed clusters", Setup: compressed("cluster_size=4096"), Run: mixed(12, most)},
		{Name: "qcow2/overwriting compressed clusters, zstd", Setup: compressed("cluster_size=16k,compression_type=zstd"), Run: mixed(8, 20*k)},
		{Name: "qcow2/writing below internal snapshots", Setup: snapshot("cluster_size=4096"), Run: mixed(10, most)},
		{Name: "qcow2/writing below internal snapshots, extended L2", Setup: snapshot("cluster_size=16k,extended_l2=on"), Run: mixed(8, most)},
		{Name: "qcow2/discards", Setup: filled(q4, half(24*k)), Run: mixed(12, 24*k, 1, 1, 6, 3, 2)},
		{Name: "qcow2/discards over a parent", Setup: lowered(filled(q4, half(24*k)), 200*k), Run: mixed(12, 24*k, 1, 1, 6, 3, 2)},
		{Name: "qcow2/writing in place and flush", Setup: filled(q4, half(256*k)), Run: mixed(10, most, 4, 0, 0, 0, 3)},
		{Name: "qcow2/refcount blocks grow", Setup: qcow2New(c{Size: 128 * k, ClusterSize: 512, RefcountBits: 64}), Run: mixed(8, 24*k, 3, 2, 1, 0, 2)},
		{Name: "qcow2/the refcount table grows", Setup: nearTableGrowth(), Run: edit(func(g *crash.Guest) error { return g.Write(2<<20, 32*k) }), Fixed: true},
		{Name: "qcow2/bitmaps are invalidated", Setup: bitmaps, Run: mixed(4, most), Judge: bitmapsJudge},
		{Name: "qcow2/counts of a dirty image are rebuilt", Setup: dirty, Run: writeAndMixed(2, most), Judge: dirtyJudge},
		{Name: "qcow2/counts of a dirty image are rebuilt, 512 byte clusters", Setup: dirty512, Run: writeAndMixed(2, most), Judge: dirtyJudge},
		{Name: "qcow2/lazy counts", Setup: qcow2New(c{Size: 256 * k, ClusterSize: 4 * k, LazyRefcounts: true}), Run: mixed(10, most)},
		{Name: "qcow2/data file", Setup: qcow2New(c{Size: 256 * k, ClusterSize: 4 * k, DataFile: "data"}), Run: mixed(10, most)},
		{Name: "qcow2/raw data file", Setup: qcow2New(c{Size: 256 * k, ClusterSize: 4 * k, DataFile: "data", DataFileRaw: true}), Run: mixed(10, most)},
		{Name: "ploop/allocating writes, version 1", Setup: p1, Run: mixed(6, 40*k, 4, 2, 0, 0, 2), Judge: closedJudge},
		{Name: "ploop/allocating writes, version 2", Setup: p2, Run: mixed(6, 40*k, 4, 2, 0, 0, 2), Judge: closedJudge},
		{Name: "ploop/copy on write over a parent", Setup: lowered(p2, 400*k), Run: mixed(6, 40*k), Judge: closedJudge},
		{Name: "ploop/discards", Setup: filled(p2, half(64*k)), Run: mixed(7, 70*k, 1, 1, 6, 3, 2), Judge: closedJudge},
		{Name: "ploop/writing in place and flush", Setup: filled(p2, half(512*k)), Run: mixed(8, most, 4, 0, 0, 0, 3), Judge: closedJudge},
		{Name: "ploop/the format extension is dropped", Setup: changed(filled(p2, half(64*k)), withExtension), Run: mixed(3, 40*k), Judge: extensionJudge},
		{Name: "ploop/taken over after a crash, closed", Setup: changed(filled(p2, half(64*k)), inUse), Run: mixed(2, 8*k), Judge: closedJudge},
		{Name: "qcow2/create", Setup: nothing, Run: create("qcow2", c{Size: 1 << 40, ClusterSize: 4 * k, BackingFile: "base", BackingFormat: "raw"}), Judge: createdJudge("qcow2", 1<<40), Fixed: true},
		{Name: "qcow2/create over an image", Setup: blank(qcow2New(c{Size: 4 << 20, ClusterSize: 512})), Run: create("qcow2", c{Size: 1 << 30, ClusterSize: 4 * k}), Judge: createdJudge("qcow2", 1<<30), Fixed: true},
		{Name: "ploop/create", Setup: nothing, Run: create("ploop", c{Size: 1 << 30, ClusterSize: 32 * k}), Judge: createdJudge("ploop", 1<<30), Fixed: true},
		{Name: "fsck/repair of ploop", Setup: brokenP.make, Run: brokenP.repair, Judge: brokenP.judge, Fixed: true},
		{Name: "fsck/undo of ploop", Setup: brokenP.repaired, Run: undoRepair, Judge: brokenP.undoneJudge, Fixed: true},
		{Name: "fsck/repair of qcow2", Setup: brokenQ.make, Run: brokenQ.repair, Judge: brokenQ.judge, Fixed: true},
		{Name: "fsck/undo of qcow2", Setup: brokenQ.repaired, Run: undoRepair, Judge: brokenQ.undoneJudge, Fixed: true},
		compacting("qcow2/compaction", filled(qcow2New(c{Size: 160 * k, ClusterSize: 4 * k}), holed(12*k)), rewrite.Options{MaxExtra: 32 * k}),
		compacting("qcow2/compaction, tables of several clusters", filled(qcow2New(c{Size: 160 * k, ClusterSize: 512, RefcountBits: 64}), holed(12*k)), rewrite.Options{MaxExtra: 64 * k}),
		compactingCounts("qcow2/compaction, counts too high, version 2", changed(filled(qcow2New(c{Size: 128 * k, ClusterSize: 4 * k, Version: 2}), holed(12*k)), highCounts), rewrite.Options{MaxExtra: 32 * k}),
		compacting("qcow2/compaction over a parent", lowered(filled(qcow2New(c{Size: 160 * k, ClusterSize: 4 * k}), holed(12*k)), 120*k), rewrite.Options{MaxExtra: 32 * k, DedupParent: true}),
		compacting("qcow2/compaction, extended L2", lowered(filled(qcow2New(c{Size: 256 * k, ClusterSize: 16 * k, ExtendedL2: true}), holed(20*k)), 200*k), rewrite.Options{MaxExtra: 64 * k}),
		compacting("qcow2/compaction, snapshots and bitmaps", qcow2ByQemu(t, "cluster_size=4096", "256k", "write -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 9 128k 120k",
			"snapshot s1", "bitmap b1", "write -P 3 16k 40k", "discard 80k 32k", "write -c -P 4 80k 32k", "snapshot s2", "bitmap b2", "write -P 5 0 16k", "drop s1", "discard 130k 100k"), rewrite.Options{MaxExtra: 32 * k}),
		compacting("qcow2/compaction, compressed", packedStreams(t, "cluster_size=4096", 128*k), rewrite.Options{MaxExtra: 16 * k}),
		compacting("qcow2/compaction, data file", filled(qcow2New(c{Size: 384 * k, ClusterSize: 512, DataFile: "data"}), holed(32*k)), rewrite.Options{MaxExtra: 32 * k}),
		compacting("ploop/compaction", filled(p2, holed(32*k)), rewrite.Options{MaxExtra: 64 * k}),
		compacting("ploop/compaction, version 1, over a parent", lowered(filled(p1, holed(32*k)), 300*k), rewrite.Options{MaxExtra: 64 * k, DedupParent: true}),
		compactingExtension("ploop/compaction, format extension", changed(filled(p2, holed(32*k)), withExtension), rewrite.Options{MaxExtra: 64 * k}),
		{Name: "raw/compaction", Setup: filled(rawNew(256*k), holed(12*k)), Run: compactRaw},
		{Name: "raw/writes and discards", Setup: rawNew(256 * k), Run: mixed(10, most)},
	}
}
