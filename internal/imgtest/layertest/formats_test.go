package layertest_test

import (
	"context"
	"errors"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/raw"
)

// rawFactory makes raw images: no clusters, no layer below.
func rawFactory() layertest.Factory {
	return layertest.Factory{
		Name: "raw", Granule: 4096, SizeUnit: 1, Opaque: true,
		Create: func(ctx context.Context, dir *layertest.Dir, size int64) error {
			f, err := dir.Open("image.raw", true)
			if err != nil {
				return err
			}
			return errors.Join(raw.Create(ctx, f, size), f.Close())
		},
		Open: func(ctx context.Context, dir *layertest.Dir, writable bool) (layers.Layer, error) {
			f, err := dir.Open("image.raw", writable)
			if err != nil {
				return nil, err
			}
			i, err := raw.Open(ctx, f, layers.OpenOptions{Writable: writable})
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			return i, nil
		},
	}
}

func TestRaw(t *testing.T) { layertest.Run(t, rawFactory()) }
