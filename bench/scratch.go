package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/loopdev"
)

// scratchPrefix begins the name of every scratch directory.
const scratchPrefix = "imagestack-bench-"

// scratch makes the directory that holds everything big, and sees to its end.
// As long as this program lives, it holds a lock in it.
func scratch(c *cleaner, parent string) (string, error) {
	dir, err := os.MkdirTemp(parent, scratchPrefix)
	if err != nil {
		return "", fmt.Errorf("scratch directory: %w", err)
	}
	c.add(func() error { return os.RemoveAll(dir) })
	lock, err := os.Create(lockOf(dir))
	if err != nil {
		return "", err
	}
	c.add(lock.Close)
	return dir, unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}

func lockOf(dir string) string { return filepath.Join(dir, "lock") }

// sweep takes away what runs left behind that were killed: their servers have
// ended with them, but not their loop devices, mounts and files.
func sweep(parent string, say func(string, ...any)) error {
	dirs, err := filepath.Glob(filepath.Join(parent, scratchPrefix+"*"))
	if err != nil {
		return err
	}
	var errs error
	for _, dir := range dirs {
		lock, err := os.OpenFile(lockOf(dir), os.O_RDWR, 0)
		if err != nil {
			continue // just being made, or not ours
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			say("cleaning up after a run that was killed: %s", dir)
			errs = errors.Join(errs, sweepDir(dir))
		}
		_ = lock.Close()
	}
	return errs
}

// loopRecord and the name of a loop device name the file, beside the mount
// points, that tells whether the device is still ours: its backing file does
// not, once the mount that it lies on is gone.
const loopRecord = "attached-"

// sysfs is a file about a block device.
func sysfs(device, name string) string {
	return filepath.Join("/sys/block", filepath.Base(device), name)
}

// diskSequence is a number that no other disk, before or after under the same
// name, has had since the machine was started; "" where the kernel (before
// 5.15) has none.
func diskSequence(device string) string {
	b, err := os.ReadFile(sysfs(device, "diskseq"))
	if err != nil {
		return ""
	}
	return string(b)
}

func sweepDir(dir string) error {
	mounts := filepath.Join(dir, "mounts")
	entries, err := os.ReadDir(mounts)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), loopRecord)
		if !ok {
			continue
		}
		device := filepath.Join("/dev", name)
		seq, readErr := os.ReadFile(filepath.Join(mounts, e.Name()))
		if readErr == nil && len(seq) > 0 && string(seq) == diskSequence(device) {
			err = errors.Join(err, loopdev.Detach(device, true))
		}
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), loopRecord) {
			detachMount(filepath.Join(mounts, e.Name()))
		}
	}
	return errors.Join(err, os.RemoveAll(dir))
}
