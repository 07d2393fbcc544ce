package layers

import (
	"context"
	"fmt"

	"github.com/imagestack/imagestack/blockmap"
)

// lower is what the editor of a stack sees under it.
type lower struct{ s *Stack }

// Lookup resolves the layers under the editor; without any, all is zeros.
func (b lower) Lookup(ctx context.Context, guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return dst, err
	}
	t := blockmap.NewTiler(guest, n, dst)
	if b.s.spans == nil {
		t.Add(blockmap.Extent{Guest: guest, Len: n, Kind: blockmap.Zero})
		return t.Extents(), nil
	}
	for more := true; more; {
		var err error
		if more, err = b.s.spans.add(ctx, &t, guest+n); err != nil {
			return dst, err
		}
	}
	return t.Extents(), nil
}

// ReadAt implements Below.
func (b lower) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off < 0 {
		return fmt.Errorf("read below: %w", blockmap.ErrRange)
	}
	_, err := b.s.readMapped(ctx, b, p, off, false)
	return err
}

// IsZero implements Below.
func (b lower) IsZero(ctx context.Context, off, n int64) (bool, error) {
	if n <= 0 {
		return true, nil
	}
	room := extentRoom.Get().(*[roomExtents]blockmap.Extent)
	defer extentRoom.Put(room)
	for end := off + n; off < end; {
		found, err := b.Lookup(ctx, off, end-off, room[:0])
		if err != nil {
			return false, err
		}
		for _, e := range found {
			if e.Stored() {
				return false, nil
			}
			off = e.End()
		}
	}
	return true, nil
}
