package qcow2

import "context"

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
	err := ed.begin(ctx)
	if err != nil {
		// The next attempt starts over.
		ed.ref.abandon()
		ed.ref = newRefcounts(ed.img)
		return err
	}
	ed.started.Store(true)
	return nil
}

func (ed *editor) begin(ctx context.Context) error {
	img := ed.img
	if err := ed.ref.load(); err != nil {
		return err
	}
	keep := uint64(autoclearBitmaps)
	if img.external {
		keep |= autoclearRawDataFile
	}
	if err := ed.clearAutoclear(^keep); err != nil {
		return err
	}
	if img.hdr.Dirty() {
		// Guest data do not change here, so bitmaps are good still and what
		// they occupy stays counted.
		if err := ed.rebuild(ctx); err != nil {
			return err
		}
	}
	if ed.relocating {
		return nil // what follows changes nothing that a bitmap would record
	}
	return ed.clearAutoclear(autoclearBitmaps)
}

// clearAutoclear durably clears those of the bits that are set.
func (ed *editor) clearAutoclear(bits uint64) error {
	img := ed.img
	now := img.hdr.Autoclear &^ bits
	if now == img.hdr.Autoclear {
		return nil
	}
	if err := putHeader64(img.f, offAutoclear, now); err != nil {
		return err
	}
	if err := ed.syncFile(img.f); err != nil {
		return err
	}
	img.hdr.Autoclear = now
	return nil
}

// closeEditor makes everything durable and cuts off the space that the file
// has in advance.
func (img *Image) closeEditor() error {
	ed := img.ed
	if !ed.started.Load() {
		return nil
	}
	if err := img.Sync(context.Background()); err != nil {
		return err
	}
	// What this commit freed, and what failed allocations gave back.
	if ed.ref.dirtyBytes() > 0 || ed.unsynced {
		if err := ed.ref.writePages(); err != nil {
			return err
		}
		if err := ed.syncFile(img.f); err != nil {
			return err
		}
	}
	return ed.ref.shrinkFile()
}
