package ploopfsck_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

const fuzzCluster = 32 << 10

// fuzzImage is one of the images that random damage is done to, and where.
func fuzzImage(kind uint8) (p *damage.PloopImage, places []int) {
	p = damage.NewPloop(1+int(kind%2), fuzzCluster, 16, 0, 3, 4, 5, 15)
	if kind&2 != 0 {
		p.SetEntry(4, 0) // a leak inside
	}
	for i := range 64 + 4*20 {
		places = append(places, i)
	}
	if kind&4 != 0 {
		at := len(p.B)
		p.AddExtension()
		for i := range 96 {
			places = append(places, at+i)
		}
	}
	return p, places
}

// sizeFields are the fields of the header that say how large everything is.
var sizeFields = []blockmap.Range{{Off: 0, Len: 16}, {Off: 28, Len: 4}, {Off: 32, Len: 4}, {Off: 36, Len: 8}, {Off: 48, Len: 4}}

// hurt does the damage: pairs of place and value.
func hurt(t testing.TB, kind uint8, changes []byte) {
	t.Helper()
	p, places := fuzzImage(kind)
	want := p.Guest()
	sound := bytes.Clone(p.B)
	for len(changes) >= 2 {
		p.B[places[int(changes[0])%len(places)]] = changes[1]
		changes = changes[2:]
	}
	if kind&8 != 0 {
		p.B = p.B[:max(0, len(p.B)-fuzzCluster/2)]
	}
	f := backend.NewMemBytes("image", p.B)
	ctx := context.Background()
	small := fsck.Options{Memory: 1 << 20, Parent: kind&16 != 0}
	if _, err := fsck.CheckFile(ctx, f, "ploop"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.Bytes(), p.B) {
		t.Fatal("the check changed the image")
	}

	pre := backend.NewMemBytes("image", p.B)
	res, undo, _ := repair(t, checker, pre, fsck.DecidePreen, small)
	restored(t, pre, undo, res, p.B)

	res, undo, _ = repair(t, checker, f, fsck.DecideAll, small)
	switch worst := res.Left.Worst(); {
	case worst == fsck.Fatal:
		// Some headers cannot be repaired; then nothing is.
		for _, d := range res.Left.Findings {
			if d.Sev() == fsck.Fatal && d.Fix != nil {
				show(t, "left", res.Left)
				t.Fatal("a fix was wanted and not done")
			}
		}
		return
	case worst > fsck.Note:
		show(t, "found", res.Found)
		for _, r := range res.Later {
			show(t, "later", r)
		}
		show(t, "left", res.Left)
		t.Fatal("not clean after a full repair")
	}
	if has(res.Left, "ploop.header.cluster-size-odd") {
		return // so much damage that it fits again; nobody reads such images here
	}
	got := guestOf(t, f)
	compareUndamaged(t, got, want, sound, p.B, lostIn(res))
	restored(t, f, undo, res, p.B)
}

func restored(t testing.TB, f *backend.Mem, undo backend.File, res *fsck.Result, before []byte) {
	t.Helper()
	if !res.Changed {
		return
	}
	if _, err := fsck.ApplyUndo(context.Background(), undo, f, fsck.UndoOptions{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.Bytes(), before) {
		t.Fatal("undo does not restore the image")
	}
}

// compareUndamaged compares the guest clusters whose entries were not changed
// and that were not named as lost. Where more than one field of sizes was hit
// the evidence may be wrong, and nothing is promised.
func compareUndamaged(t testing.TB, got, want, sound, hurt []byte, lost []blockmap.Range) {
	t.Helper()
	fields := 0
	for _, r := range sizeFields {
		if !bytes.Equal(sound[r.Off:r.End()], hurt[r.Off:r.End()]) {
			fields++
		}
	}
	if fields > 1 {
		return
	}
	var gone blockmap.Set
	for _, r := range lost {
		gone.Add(r.Off, r.Len)
	}
	for idx := range 16 {
		e := 64 + 4*idx
		off := idx * fuzzCluster
		if !bytes.Equal(sound[e:e+4], hurt[e:e+4]) || gone.Overlaps(int64(off), fuzzCluster) || off+fuzzCluster > len(got) {
			continue
		}
		if !bytes.Equal(got[off:off+fuzzCluster], want[off:off+fuzzCluster]) {
			t.Fatalf("guest cluster %d has changed and was not named as lost", idx)
		}
	}
}

// TestRandomDamage is a short walk over what FuzzDamage covers.
func TestRandomDamage(t *testing.T) {
	rnd := rand.New(rand.NewPCG(4, 2026))
	for n := range 400 {
		kind := uint8(rnd.IntN(32))
		changes := make([]byte, 2*(1+rnd.IntN(4)))
		for i := range changes {
			changes[i] = byte(rnd.Uint32())
		}
		ok := t.Run(fmt.Sprintf("%d %d %x", n, kind, changes), func(t *testing.T) { hurt(t, kind, changes) })
		if !ok {
			return
		}
	}
}

func FuzzDamage(f *testing.F) {
	f.Add(uint8(2), []byte{28, 1, 40, 2})
	f.Add(uint8(7), []byte{68, 3, 150, 7})
	f.Fuzz(func(t *testing.T, kind uint8, changes []byte) {
		hurt(t, kind, changes[:min(len(changes), 64)])
	})
}

// FuzzBytes: any file at all.
func FuzzBytes(f *testing.F) {
	p, _ := fuzzImage(4)
	f.Add(p.B[:300])
	f.Fuzz(func(t *testing.T, b []byte) {
		m := backend.NewMemBytes("image", b)
		undo := backend.NewMem("undo")
		res, err := fsck.Repair(context.Background(), checker, m, fsck.RepairOptions{
			Options: fsck.Options{Memory: 1 << 20}, Decide: fsck.DecideAll,
			Undo:    func() (backend.File, error) { return undo, nil },
			Execute: fsck.ExecuteOptions{Lost: memLost{}}, Plan: fsck.PlanOptions{MaxSize: 4 << 20},
		})
		if err != nil {
			t.Fatal(err)
		}
		restored(t, m, undo, res, b)
	})
}

// big is a sparse image of n clusters of 32 KiB, mapped backwards, with a
// duplicate, a leak, and entries behind the end.
func big(t testing.TB, n int) *backend.Mem {
	t.Helper()
	p := damage.NewPloop(2, fuzzCluster, n)
	first := len(p.B) / fuzzCluster
	for idx := range n {
		p.SetEntry(idx, first+n-1-idx)
	}
	p.Put32(52, 0).SetEntry(7, first).SetEntry(n/2, 1<<30).SetEntry(n-2, first+9000)
	m := backend.NewMemBytes("image", p.B)
	if err := m.Truncate(int64(first+n) * fuzzCluster); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestWindows: with little memory the file is checked in windows, with the
// same result.
func TestWindows(t *testing.T) {
	m := big(t, 20000)
	var reports []string
	for _, o := range []fsck.Options{{}, {Memory: 1}, {Memory: 1, Parallel: 1}, {Memory: 5 << 10, Parallel: 7}} {
		col := fsck.NewCollector(fsck.CollectorOptions{})
		stats, err := checker.Check(context.Background(), m, o, col)
		if err != nil {
			t.Fatal(err)
		}
		r := col.Sum(stats)
		if stats.LeakedClusters != 3 || stats.AllocatedClusters != 19999 {
			t.Errorf("%+v: %d leaked, %d allocated", o, stats.LeakedClusters, stats.AllocatedClusters)
		}
		text := ""
		for _, c := range r.Counts {
			if c.Code.Severity > fsck.Note {
				text += fmt.Sprintf("%s %d\n", c.Code, c.Found)
			}
		}
		reports = append(reports, text)
		if reports[0] != text || !has(r, "ploop.bat.duplicate") {
			t.Errorf("%+v: %s, want %s", o, text, reports[0])
		}
	}
	res, _, _ := repair(t, checker, m, fsck.DecideAll, fsck.Options{Memory: 1 << 20})
	if res.Left.Worst() > fsck.Note {
		show(t, "left", res.Left)
		t.Error("not clean")
	}
}
