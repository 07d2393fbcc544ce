package qcow2

import (
	"context"

	"github.com/imagestack/imagestack/layers"
)

const maxSnapshots = 65536

func (img *Image) selectSnapshot(ctx context.Context, which string) error {
	return img.errorf(-1, "snapshot", which, layers.ErrFormat)
}
