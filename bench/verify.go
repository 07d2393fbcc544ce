package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A benchmark of wrong bytes is worthless. Before a peer is timed on an image,
// what it shows is compared with what the image holds; before it is timed
// writing, what it wrote is read back through the *other* server.

// checkShown compares the SHA-256 of what a server shows.
func checkShown(store *imageStore, srv *server, img *image, direct bool) error {
	got, err := sumFile(srv.file, img.size, direct)
	if err != nil {
		return fmt.Errorf("%s shows %s: %w", srv.peer, img.name, err)
	}
	if want := store.sum(img); got != want {
		return fmt.Errorf("%s shows other bytes than %s holds: sha256 %s, want %s", srv.peer, img.name, got, want)
	}
	return nil
}

// checkWritten lets peer write blocks into img and compares the whole disk, as
// seen through another server, with what it should be then.
func checkWritten(ctx context.Context, servers *servers, store *imageStore, peer string, img *image) error {
	blocks := map[int64]uint64{}
	n := img.size / patchBlock
	for i := range int64(64) { // scattered
		blocks[int64(mix(uint64(i)+0xb10c)%uint64(n))] = uint64(i) + 1
	}
	for i := range int64(256) { // and in sequence
		blocks[n/2+i] = uint64(i) + 1000
	}
	srv, err := servers.start(ctx, peer, img, true, false)
	if err != nil {
		return err
	}
	if err := errors.Join(writeBlocks(srv.file, blocks), srv.stop()); err != nil {
		return fmt.Errorf("%s writing to %s: %w", peer, img.name, err)
	}
	img.content = img.content.patched(blocks)
	reader := peerQSD
	if peer == peerQSD {
		reader = peerOurs
	}
	if srv, err = servers.start(ctx, reader, img, false, false); err != nil {
		return fmt.Errorf("reading what %s wrote: %w", peer, err)
	}
	if err := errors.Join(checkShown(store, srv, img, true), srv.stop()); err != nil {
		return fmt.Errorf("after %s wrote: %w", peer, err)
	}
	return nil
}

// writeBlocks writes with O_DIRECT, as fio does, and syncs.
func writeBlocks(path string, blocks map[int64]uint64) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf, free, err := aligned(patchBlock)
	if err != nil {
		return err
	}
	defer free()
	for b, seed := range blocks {
		fill(buf, seed, b*patchBlock)
		if _, err := f.WriteAt(buf, b*patchBlock); err != nil {
			return err
		}
	}
	return f.Sync()
}
