package qcow2

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// TestHostileImages changes images whose metadata somebody has damaged:
// whatever comes of it, it ends soon and without a panic.
func TestHostileImages(t *testing.T) {
	ctx := context.Background()
	for _, o := range []CreateOptions{
		{Version: 3, ClusterSize: 512, RefcountBits: 64, Size: 200 << 10},
		{Version: 2, ClusterSize: 4096, Size: 200 << 10},
		{Version: 3, ClusterSize: 16384, ExtendedL2: true, RefcountBits: 1, Size: 700 << 10},
	} {
		img, m := memImage(t, o)
		if err := script(img, rand.New(rand.NewPCG(1, 1)), 40, make([]byte, o.Size), nil); err != nil {
			t.Fatal(err)
		}
		if err := img.closeEditor(); err != nil {
			t.Fatal(err)
		}
		// Where metadata stand: the header, and what the walk says.
		places := []int64{0, 8, 16, 24, 32, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100}
		err := img.WalkHost(ctx, func(h layers.HostRange) error {
			if h.Role != layers.RoleData {
				for at := h.Off; at < min(h.Off+h.Len, h.Off+512); at += 8 {
					places = append(places, at)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		opened, began := 0, time.Now()
		for seed := range uint64(150) {
			rng := rand.New(rand.NewPCG(seed, 7))
			bad := m.Clone()
			for range 1 + rng.IntN(4) {
				at := places[rng.IntN(len(places))]
				var b [8]byte
				if _, err := bad.ReadAt(b[:], at); err != nil {
					t.Fatal(err)
				}
				switch rng.IntN(4) {
				case 0:
					b[rng.IntN(8)] ^= 1 << rng.IntN(8)
				case 1:
					copy(b[:], bytes.Repeat([]byte{0xff}, 8))
				case 2:
					clear(b[:])
				default: // another place's content
					if _, err := bad.ReadAt(b[:], places[rng.IntN(len(places))]); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := bad.WriteAt(b[:], at); err != nil {
					t.Fatal(err)
				}
			}
			if rng.IntN(8) == 0 {
				if err := bad.Truncate(1 << (20 + rng.IntN(36))); err != nil {
					t.Fatal(err)
				}
			}
			hostile, err := Open(ctx, backend.File(bad), layers.OpenOptions{Writable: true})
			if err != nil {
				continue
			}
			if hostile.Size() < 512 {
				continue
			}
			opened++
			for i := range 12 { // after an error, too
				_ = script(hostile, rng, 5, make([]byte, min(hostile.Size(), 1<<20)), nil)
				if i%4 == 0 {
					_ = hostile.Sync(ctx)
				}
			}
			_ = hostile.closeEditor()
			if spent := time.Since(began); spent > time.Minute {
				t.Fatalf("seed %d: %v", seed, spent)
			}
		}
		if opened < 50 {
			t.Errorf("only %d images opened", opened)
		}
	}
}
