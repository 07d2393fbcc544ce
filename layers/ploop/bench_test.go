package ploop

import (
	"context"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
)

// BenchmarkLookup4K asks for one block at random places of a warm map.
func BenchmarkLookup4K(b *testing.B) {
	ctx := context.Background()
	m := newMem(b, CreateOptions{Size: 4096 * k64, ClusterSize: k64})
	i := mustOpen(b, m, true, nil)
	for idx := int64(0); idx < 4096; idx += 2 {
		if err := i.WriteAt(ctx, make([]byte, k64), idx*k64, bytesBelow(nil)); err != nil {
			b.Fatal(err)
		}
	}
	dst := make([]blockmap.Extent, 0, 8)
	pos := int64(1)
	b.ReportAllocs()
	for b.Loop() {
		pos = (pos*6364136223846793005 + 1442695040888963407) & (4096*k64 - 1)
		if _, err := i.Lookup(ctx, pos&^4095, 4096, dst); err != nil {
			b.Fatal(err)
		}
	}
}
