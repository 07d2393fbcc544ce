package qcow2

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/imagestack/imagestack/backend"
)

// BenchmarkWrite measures writing to new clusters and in place, on a file.
func BenchmarkWrite(b *testing.B) {
	ctx := context.Background()
	below := nothing()
	const size = 4 << 30
	for _, n := range []int{4 << 10, 64 << 10, 1 << 20} {
		for _, random := range []bool{false, true} {
			for _, placed := range []bool{false, true} {
				b.Run(fmt.Sprintf("%dK random=%v placed=%v", n>>10, random, placed), func(b *testing.B) {
					path := b.TempDir() + "/image.qcow2"
					f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
					if err != nil {
						b.Fatal(err)
					}
					if err := Create(ctx, f, CreateOptions{Size: size}); err != nil {
						b.Fatal(err)
					}
					if err := f.Close(); err != nil {
						b.Fatal(err)
					}
					img := openRW(b, path)
					defer img.Close()
					span := int64(size)
					if placed {
						span = 64 << 20
						p := make([]byte, 1<<20)
						for off := int64(0); off < span; off += 1 << 20 {
							if err := img.WriteAt(ctx, p, off, below); err != nil {
								b.Fatal(err)
							}
						}
					}
					p := make([]byte, n)
					rng := rand.New(rand.NewPCG(1, 1))
					b.SetBytes(int64(n))
					b.ReportAllocs()
					var off int64
					for b.Loop() {
						if random {
							off = rng.Int64N(span/int64(n)) * int64(n)
						}
						if err := img.WriteAt(ctx, p, off%span, below); err != nil {
							b.Fatal(err)
						}
						off += int64(n)
					}
				})
			}
		}
	}
}
