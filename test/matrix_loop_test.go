package e2e

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// loopScript is the guest of a loop device: small writes, a discard, and syncs.
var loopScript = []guestStep{
	{off: 68 << 10, n: 4 << 10},
	{off: 500<<10 + 512, n: 20 << 10},
	{},
	{off: 96 << 10, n: 32 << 10, how: punch},
	{off: 100 << 10, n: 8 << 10},
	{},
}

// uses does what the guest does with the file, or loop device, at path.
func (g *faultGuest) uses(path string) error {
	if !g.readOnly {
		return g.script(path)
	}
	// Linux lets it be opened for writing, and refuses each write.
	if err := writeSector(path); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		if err == nil {
			return fmt.Errorf("%s can be written", path)
		}
		if err := g.accept("writing", err); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return g.accept("open", err)
	}
	defer f.Close()
	for try := range 2 {
		got := make([]byte, len(g.before))
		_, err := f.ReadAt(got, 0)
		g.r.note("guest: read, try %d: %v", try, err)
		if err == nil {
			return g.check(got, 0, true)
		}
		if err := g.accept("reading", err); err != nil || g.unsure {
			return err
		}
		if try == 1 {
			return fmt.Errorf("read again after the fault was over: %w", err)
		}
		g.r.fs.Set(nil)
		g.r.ended()
	}
	return nil
}

func writeSector(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, sector), 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// leftUnder is what there still is of a mount at or under dir: mount points, and
// loop devices.
func leftUnder(dir string) []string { return append(mountsUnder(dir), loopsUnder(dir)...) }
