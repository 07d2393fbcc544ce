package ploop

import (
	"bytes"
	"context"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// FuzzRelocate packs a hostile image: it is refused, or shows the same disk
// afterwards.
func FuzzRelocate(f *testing.F) {
	for seed, bitmaps := range []int{0, 1, 2} {
		f.Add(scatter(uint64(seed), 1+seed%2, 8, 4, bitmaps).bytes[:MinCluster], uint8(9), uint32(seed))
	}
	f.Fuzz(func(t *testing.T, head []byte, slots uint8, drop uint32) {
		ctx := context.Background()
		m := backend.NewMemBytes("fuzz", head[:min(len(head), 64<<10)])
		if err := m.Truncate(int64(slots%40) * MinCluster); err != nil {
			t.Fatal(err)
		}
		i, err := Open(ctx, keep{m}, layers.OpenOptions{Writable: true, Cache: layers.NewCache(0)})
		if err != nil {
			classified(t, err)
			return
		}
		if i.Size() > 4<<20 || i.Granule() > 1<<20 {
			return
		}
		if err := i.BeginRelocation(ctx, nil); err != nil {
			classified(t, err)
			return
		}
		want := stack{i}.content(t, nil)
		if from := int64(drop) % (i.Size() + 1) &^ (i.Granule() - 1); from < i.Size() {
			if err := i.Unmap(ctx, from, min(2*i.Granule(), i.Size()-from)); err != nil {
				t.Fatal(err)
			}
			clear(want[from:min(from+2*i.Granule(), i.Size())])
		}
		if err := pack(ctx, i, 2*MinCluster); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(stack{i}.content(t, nil), want) {
			t.Error("the disk is another")
		}
		if err := i.Close(); err != nil {
			t.Fatal(err)
		}
		again, err := Open(ctx, keep{m}, layers.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(stack{again}.content(t, nil), want) {
			t.Error("the disk is another after closing")
		}
		if err := again.Own(ctx, 0, again.Size(), func(blockmap.Extent) error { return nil }); err != nil {
			t.Error(err)
		}
	})
}
