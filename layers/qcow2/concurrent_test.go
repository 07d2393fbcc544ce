package qcow2

import (
	"context"
	"sync"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// zeroBelow is the Below of the lowest layer.
type zeroBelow struct{}

func (zeroBelow) ReadAt(_ context.Context, p []byte, _ int64) error  { clear(p); return nil }
func (zeroBelow) IsZero(context.Context, int64, int64) (bool, error) { return true, nil }

// TestReadSideUnderEditor: the read side works while an editor changes the
// image (for the race detector), and agrees with the counts afterwards.
func TestReadSideUnderEditor(t *testing.T) {
	ctx := context.Background()
	for name, o := range map[string]CreateOptions{
		"plain":    {Size: 8 << 20, ClusterSize: 4 << 10},
		"extended": {Size: 8 << 20, ClusterSize: 16 << 10, ExtendedL2: true},
	} {
		t.Run(name, func(t *testing.T) {
			f := backend.NewMem("image")
			if err := Create(ctx, f, o); err != nil {
				t.Fatal(err)
			}
			img, err := Open(ctx, f, layers.OpenOptions{Writable: true})
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for g := range int64(2) {
				wg.Go(func() {
					p := make([]byte, 3000)
					for i := range int64(100) {
						off := (g*100 + i) * 7919 * 5 % (o.Size - 3000)
						if err := img.WriteAt(ctx, p, off, zeroBelow{}); err != nil {
							t.Error(err)
						}
						if i%10 == 9 {
							if err := img.ZeroAt(ctx, off, 3000, true, zeroBelow{}); err != nil {
								t.Error(err)
							}
							if err := img.Sync(ctx); err != nil {
								t.Error(err)
							}
						}
					}
				})
			}
			for range 20 {
				if _, err := lookupAll(img); err != nil {
					t.Error(err)
				}
				if _, err := img.Describe(ctx); err != nil {
					t.Error(err)
				}
				err := img.WalkHost(ctx, func(layers.HostRange) error { return nil })
				if err != nil {
					t.Error(err)
				}
			}
			wg.Wait()
			if err := img.Sync(ctx); err != nil {
				t.Fatal(err)
			}
			walkMatchesRefcounts(t, img)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}
