package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// TestParallelQemuImage: writers, discarders, a syncer and readers work on the
// same clusters of an image whose tables and data are shared with a snapshot
// and partly compressed. Each writer owns every fourth sector, so the clusters
// are everybody's and the outcome is known: a reader finds in a sector only
// what its owner put there last or is putting there, never a mix with others
// and never old content of another place.
func TestParallelQemuImage(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	const size, sector, writers = 1 << 20, 512, 4
	for _, opts := range []string{"cluster_size=4096", "cluster_size=512", "cluster_size=16384,extended_l2=on", "cluster_size=4096,compat=0.10"} {
		t.Run(opts, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", opts, path, fmt.Sprint(size))
			imgtest.QemuIO(t, "qcow2", path, "write -c -P 255 0 128k", "write -c -P 255 256k 128k", "write -P 255 512k 512k")
			imgtest.QemuImg(t, "snapshot", "-c", "before", path)
			model := qemuRead(t, path, "")
			snap := bytes.Clone(model)
			img := openRW(t, path)
			ctx, below := context.Background(), nothing()
			var stop atomic.Bool
			var readers, workers sync.WaitGroup
			// The values of a sector count up; 255 is the start, 0 a discard.
			newest := make([]atomic.Int32, size/sector)
			for w := range writers {
				workers.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 5))
					for i := range 500 {
						at := (rng.Int64N(size/sector/writers)*writers + int64(w)) * sector
						v := int32(1 + i%200)
						if rng.IntN(3) == 0 {
							v = 0
						}
						newest[at/sector].Store(-1) // changing
						var err error
						if v == 0 {
							err = img.ZeroAt(ctx, at, sector, rng.IntN(2) == 0, below)
							clear(model[at : at+sector])
						} else {
							p := bytes.Repeat([]byte{byte(v)}, sector)
							err = img.WriteAt(ctx, p, at, below)
							copy(model[at:], p)
						}
						if err != nil {
							t.Error(err)
							return
						}
						newest[at/sector].Store(v + 1)
					}
				})
			}
			workers.Go(func() {
				for range 20 {
					if err := img.Sync(ctx); err != nil {
						t.Error(err)
						return
					}
				}
			})
			for r := range 2 {
				readers.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(r), 6))
					cluster := make([]byte, img.Granule())
					for !stop.Load() {
						at := rng.Int64N(size/sector) * sector
						before := newest[at/sector].Load()
						p, err := readSector(img, at, cluster)
						if err != nil {
							t.Error(err)
							return
						}
						if before != newest[at/sector].Load() || before < 0 {
							continue
						}
						want := byte(before - 1)
						if before == 0 {
							want = snap[at]
						}
						for _, c := range p {
							// Unchanged while we read, or changed back and forth
							// to the same value: then other values may show.
							if c != want && before == newest[at/sector].Load() && !stop.Load() {
								if q, err := readSector(img, at, cluster); err == nil && q[0] == c && newest[at/sector].Load() == before {
									t.Errorf("sector %#x reads %#x, want %#x", at, c, want)
									return
								}
							}
						}
					}
				})
			}
			workers.Wait()
			stop.Store(true)
			readers.Wait()
			got, err := readAll(img, nil)
			if err != nil {
				t.Fatal(err)
			}
			same(t, "content", got, model)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			checkClean(t, path)
			same(t, "QEMU", qemuRead(t, path, ""), model)
			same(t, "snapshot", qemuRead(t, path, "before"), snap)
		})
	}
}

// readSector reads 512 bytes as a Stack does.
func readSector(img *Image, at int64, cluster []byte) ([]byte, error) {
	t := img.Readers().Enter(at)
	defer img.Readers().Exit(t)
	var one [1]blockmap.Extent
	ext, err := img.Lookup(context.Background(), at, 512, one[:0])
	if err != nil {
		return nil, err
	}
	p := make([]byte, 512)
	switch e := ext[0]; e.Kind {
	case blockmap.Data:
		err = img.readData(p, e.Host)
	case blockmap.Packed:
		err = img.Unpack(context.Background(), e, 0, cluster)
		copy(p, cluster[at&(img.Granule()-1):])
	}
	return p, err
}
