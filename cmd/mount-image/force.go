package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/mounttab"
)

// abortPatience is how long a process that has asked the server may take to
// hear that the mount was aborted.
const abortPatience = 2 * time.Second

// unmountForced is mount-image -u --force. A server that does not answer (its
// disk hangs, or it was stopped) gets forcePatience; then its mount is aborted,
// which ends every system call that waits for it (over io_uring those that the
// server has been given end when it is killed or goes on), and the rest is
// cleaned up as after a dead server. What was not synced may be lost, and that
// is an error.
func unmountForced(ctx context.Context, arg string) error {
	a, err := startApart(arg, true)
	if err != nil {
		return err
	}
	if ended, err := a.wait(ctx, time.After(forcePatience+2*time.Second)); ended { // it has a patience of its own
		return err
	}
	// To look at the directory itself would be to ask the server.
	parent, err := mounttab.Resolve(filepath.Dir(filepath.Clean(arg)))
	if err != nil {
		return err
	}
	dir := filepath.Join(parent, filepath.Base(filepath.Clean(arg)))
	err = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it has gone
		return cli.WithHint(fmt.Errorf("%s: the server does not answer, and the mount cannot be aborted: %w", arg, err),
			"kill the server, or do it as root")
	}
	select {
	case err := <-a.done:
		_ = err // what it says of an aborted mount helps nobody
	case <-time.After(abortPatience):
	}
	return fmt.Errorf("%s: the server did not answer, and the mount was aborted: what was not synced may be lost", arg)
}
