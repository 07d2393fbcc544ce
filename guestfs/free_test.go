package guestfs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

// content makes what the command makes in an image of size bytes.
func content(t testing.TB, size int64, command ...string) []byte {
	t.Helper()
	imgtest.Require(t, command[0])
	path := guesttest.Image(t, size)
	imgtest.Run(t, command[0], append(command[1:], path)...)
	return guesttest.Bytes(t, path)
}

func mustFree(t testing.TB, b []byte, o Options) *Report {
	t.Helper()
	rep, err := Free(context.Background(), bytes.NewReader(b), int64(len(b)), o)
	if err != nil {
		t.Fatal(err)
	}
	last := int64(-1)
	for _, r := range rep.Free {
		if r.Off <= last || r.Len <= 0 || r.End() > int64(len(b)) {
			t.Fatalf("range %+v behind %d", r, last)
		}
		last = r.End()
	}
	return rep
}

func find(t testing.TB, rep *Report, name string) Area {
	t.Helper()
	for _, a := range rep.Areas {
		if a.Name == name {
			return a
		}
	}
	t.Fatalf("no area %s in %+v", name, rep.Areas)
	return Area{}
}

// A disk with an ext4, a swap area, an unknown partition and gaps.
func TestFreeDisk(t *testing.T) {
	path, _ := sfdisk(t, 64<<20, "label: gpt\nstart=4M, size=16M\nstart=24M, size=8M\nstart=40M, size=4M\n")
	disk := guesttest.Bytes(t, path)
	ext := content(t, 16<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024")
	copy(disk[4<<20:], ext)
	copy(disk[24<<20:], content(t, 8<<20, "mkswap", "-q"))

	alone := mustFree(t, ext, Options{})
	rep := mustFree(t, disk, Options{})
	if a := find(t, rep, "p1"); a.Refusal != nil || a.Type != "ext" || a.Free != alone.Bytes() || a.Free == 0 {
		t.Errorf("%+v", a)
	}
	if a := find(t, rep, "p2"); a.Refusal == nil || a.Refusal.Code != freespace.NotAsked || a.Type != "swap" {
		t.Errorf("%+v", a)
	}
	if a := find(t, rep, "p3"); a.Refusal == nil || a.Refusal.Code != freespace.UnknownType {
		t.Errorf("%+v", a)
	}
	if len(rep.Free) != len(alone.Free) {
		t.Errorf("%d ranges in the partition, %d alone", len(rep.Free), len(alone.Free))
	}
	for i, r := range rep.Free {
		if w := alone.Free[i]; r.Off != w.Off+4<<20 || r.Len != w.Len {
			t.Errorf("%+v, alone %+v", r, w)
		}
	}
	rep = mustFree(t, disk, Options{Swap: true, Gaps: true})
	if a := find(t, rep, "p2"); a.Refusal != nil || a.Free != 8<<20-4096 {
		t.Errorf("%+v", a)
	}
	set := guesttest.Set(rep.Free)
	for _, c := range []struct {
		off, n int64
		free   bool
	}{{0, 1 << 20, false}, {1 << 20, 3 << 20, true}, {20 << 20, 4 << 20, true}, {24 << 20, 4096, false}, {32 << 20, 8 << 20, true},
		{40 << 20, 4 << 20, false}, {44 << 20, 19 << 20, true}, {63 << 20, 1 << 20, false}} {
		if c.free && !set.Contains(c.off, c.n) || !c.free && set.Overlaps(c.off, c.n) {
			t.Errorf("%d+%d: free %v expected", c.off, c.n, c.free)
		}
	}
	if few := mustFree(t, disk, Options{Swap: true, Gaps: true, MaxRanges: 3}); len(few.Free) > 3 || few.Bytes() == 0 {
		t.Errorf("MaxRanges 3: %d ranges", len(few.Free))
	}
	if long := mustFree(t, disk, Options{MinRange: 7_200_000}); len(long.Free) != 1 || long.Free[0].Len < 7_200_000 || find(t, long, "p1").Dropped == 0 {
		t.Errorf("MinRange: %+v", long.Free)
	}
}

// A guest that is hibernated in its swap area knows more than its disk: then
// nothing is free, wherever the swap area is.
func TestHibernatedGuest(t *testing.T) {
	path, _ := sfdisk(t, 64<<20, "label: gpt\nstart=4M, size=16M\nstart=24M, size=8M\n")
	disk := guesttest.Bytes(t, path)
	copy(disk[4<<20:], content(t, 16<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024"))
	copy(disk[24<<20:], content(t, 8<<20, "mkswap", "-q"))
	if rep := mustFree(t, disk, Options{}); find(t, rep, "p1").Refusal != nil || rep.Bytes() == 0 {
		t.Fatalf("%+v", rep)
	}
	copy(disk[24<<20+4086:], "S1SUSPEND\x00")
	rep := mustFree(t, disk, Options{Swap: true, Gaps: true})
	for _, a := range rep.Areas {
		if a.Refusal == nil || a.Free != 0 {
			t.Errorf("%+v", a)
		}
	}
	if r := find(t, rep, "p1").Refusal; len(rep.Free) > 0 || r == nil || r.Code != freespace.InUse {
		t.Errorf("%+v", rep)
	}
}

func TestFreeWholeDisk(t *testing.T) {
	ext := content(t, 16<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024")
	for _, c := range []struct {
		name string
		b    func() []byte
		want freespace.Code
	}{
		{"ext", func() []byte { return ext }, ""},
		{"empty", func() []byte { return nil }, freespace.UnknownType},
		{"zeros", func() []byte { return make([]byte, 1<<20) }, freespace.UnknownType},
		{"tiny", func() []byte { return make([]byte, 7) }, freespace.UnknownType},
		{"two signatures", func() []byte {
			b := bytes.Clone(ext)
			copy(b[0x10040:], "_BHRfS_M")
			return b
		}, freespace.Ambiguous},
		{"in a pool", func() []byte {
			b := bytes.Clone(ext)
			copy(b[128<<10+5*1024:], "\x0c\xb1\xba\x00\x00\x00\x00\x00")
			return b
		}, freespace.Ambiguous},
		{"in an array", func() []byte {
			b := bytes.Clone(ext)
			copy(b[len(b)-8192:], "\xfc\x4e\x2b\xa9")
			return b
		}, freespace.Ambiguous},
		{"and partitions", func() []byte {
			b := bytes.Clone(ext)
			copy(b[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0})
			b[510], b[511] = 0x55, 0xaa
			return b
		}, freespace.Ambiguous},
		{"partition outside", func() []byte {
			b := make([]byte, 1<<20)
			copy(b[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0})
			b[510], b[511] = 0x55, 0xaa
			return b
		}, freespace.Damaged},
		{"luks", func() []byte {
			b := make([]byte, 1<<20)
			copy(b, "LUKS\xba\xbe")
			return b
		}, freespace.NotJudged},
	} {
		rep := mustFree(t, c.b(), Options{Gaps: true, Swap: true})
		a := find(t, rep, "disk")
		if c.want == "" && (a.Refusal != nil || a.Free == 0) || c.want != "" && (a.Refusal == nil || a.Refusal.Code != c.want || len(rep.Free) > 0) {
			t.Errorf("%s: %+v, want %q", c.name, a, c.want)
		}
	}
}

type lossy struct{ io.ReaderAt }

func (f lossy) ReadAt(p []byte, off int64) (int, error) {
	if off > 100_000 {
		return 0, errors.New("cluster is lost")
	}
	return f.ReaderAt.ReadAt(p, off)
}

func TestFreeUnreadable(t *testing.T) {
	ext := content(t, 16<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024")
	rep, err := Free(context.Background(), lossy{bytes.NewReader(ext)}, int64(len(ext)), Options{})
	if err != nil || len(rep.Free) > 0 || rep.Areas[0].Refusal == nil || rep.Areas[0].Refusal.Code != freespace.Unreadable {
		t.Errorf("%+v %v", rep, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Free(ctx, bytes.NewReader(ext), int64(len(ext)), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// A swap area's header and bad pages stay; one to resume from is refused.
func TestSwap(t *testing.T) {
	b := content(t, 1<<20, "mkswap", "-q")
	b[1032], b[1536], b[1540] = 2, 7, 5
	rep := mustFree(t, b, Options{Swap: true})
	want := []blockmap.Range{{Off: 4096, Len: 4 * 4096}, {Off: 6 * 4096, Len: 4096}, {Off: 8 * 4096, Len: 1<<20 - 8*4096}}
	if len(rep.Free) != len(want) || rep.Free[0] != want[0] || rep.Free[1] != want[1] || rep.Free[2] != want[2] {
		t.Errorf("%+v, want %+v", rep.Free, want)
	}
	copy(b[4086:], "S1SUSPEND\x00")
	if rep := mustFree(t, b, Options{Swap: true}); len(rep.Free) > 0 || rep.Areas[0].Type != "hibernation" {
		t.Errorf("to resume from: %+v", rep)
	}
}

func TestCollectorBound(t *testing.T) {
	c := freespace.NewCollector(100, 1)
	rng := rand.New(rand.NewPCG(1, 1))
	total, at := int64(0), int64(0)
	for range 100_000 {
		n := 1 + rng.Int64N(1000)
		at += 1 + rng.Int64N(5)
		if err := c.Add(at, n); err != nil {
			t.Fatal(err)
		}
		at += n
		total += n
	}
	kept := int64(0)
	for _, r := range c.Ranges() {
		kept += r.Len
	}
	if len(c.Ranges()) > 100 || kept+c.Dropped() != total || kept == 0 {
		t.Errorf("%d ranges, kept %d + dropped %d of %d", len(c.Ranges()), kept, c.Dropped(), total)
	}
	if err := c.Add(at-1, 1); err == nil {
		t.Error("a range out of order was taken")
	}
}
