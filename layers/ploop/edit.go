package ploop

import (
	"context"
	"fmt"

	"github.com/imagestack/imagestack/layers"
)

type editor struct{}

func (i *Image) openEditor(context.Context, int64, *layers.Cache) error {
	return fmt.Errorf("%s: %w: writing ploop images", i.path, layers.ErrUnsupported)
}

// Close closes the file.
func (i *Image) Close() error { return i.f.Close() }
