package qcow2

import (
	"context"
	"fmt"

	"github.com/imagestack/imagestack/layers"
)

// editor is the write side of an image.
type editor struct{}

func (img *Image) openEditor(ctx context.Context) error {
	return img.errorf(-1, "", nil, fmt.Errorf("%w: writing", layers.ErrUnsupported))
}

func (img *Image) closeEditor() error { return nil }
