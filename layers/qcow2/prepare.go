package qcow2

import (
	"context"
	"errors"
)

// prepare does what has to come before the first change of an image: nothing
// of it happens at open, so an image that is opened writable and only read
// stays as it is.
//
// Autoclear bits that this package does not maintain are cleared (section
// autoclear_features): unknown ones, and the one that calls persistent bitmaps
// consistent, because they do not follow our writes. The bitmaps themselves
// stay; from then on they are stale by the format's own rule. An external data
// file is kept raw, so that bit stays. An image with the dirty bit gets its
// reference counts rebuilt, then the bit is cleared.
func (ed *editor) prepare(ctx context.Context) error {
	ed.startMu.Lock()
	defer ed.startMu.Unlock()
	if ed.started.Load() {
		return nil
	}
	img := ed.img
	if err := ed.ref.load(); err != nil {
		return err
	}
	if img.hdr.Dirty() {
		if err := ed.rebuild(ctx); err != nil {
			return err
		}
	}
	keep := uint64(0)
	if img.external {
		keep = autoclearRawDataFile
	}
	if now := img.hdr.Autoclear & keep; now != img.hdr.Autoclear {
		if err := putHeader64(img.f, offAutoclear, now); err != nil {
			return err
		}
		if err := ed.syncFile(img.f); err != nil {
			return err
		}
		img.hdr.Autoclear = now
	}
	ed.started.Store(true)
	return nil
}

// closeEditor makes everything durable and cuts off the space that the file
// has in advance.
func (img *Image) closeEditor() error {
	ed := img.ed
	if !ed.started.Load() {
		return nil
	}
	err := img.Sync(context.Background())
	if err != nil {
		return err
	}
	// What the commit freed is not written for sure yet.
	oldTables, err := ed.ref.flush(func() error { return ed.syncFile(img.f) })
	if err == nil {
		err = ed.syncFile(img.f)
	}
	if err == nil && len(oldTables) > 0 {
		err = errors.Join(err, ed.free([]release{}))
	}
	return errors.Join(err, ed.ref.shrinkFile())
}
