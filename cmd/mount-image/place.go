package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/loopdev"
	"github.com/imagestack/imagestack/internal/mounttab"
)

// place is where the disk appears: all that needs rights over the directory
// and devices, and nothing of the image. The server itself uses it only when
// it is not isolated, otherwise its keeper does.
type place struct {
	Dir        string // absolute
	Source     string // shown in the table of mounts
	AllowOther bool
	Flags      []string
	ReadOnly   bool
	UID        uint32 // owner of the disk
	SectorSize uint32 // of the loop device
	loop       string // device, "" when none
	backing    *backing
	device     string // major:minor of the mount, "" when there is none
	ready      bool   // the user has been told of it
}

func (p *place) disk() string { return filepath.Join(p.Dir, fusefs.DiskName) }

func (p *place) options() fusefs.MountOptions {
	return fusefs.MountOptions{Source: p.Source, AllowOther: p.AllowOther, Flags: p.Flags}
}

// probe reads a byte of the disk through the mount.
func (p *place) probe() error {
	fusefs.SetReadAhead(p.Dir)
	fusefs.NoPoll(p.disk())
	f, err := os.Open(p.disk())
	if errors.Is(err, unix.EACCES) && p.UID != uint32(os.Geteuid()) {
		return nil // the owner that was asked for is somebody else: the kernel has answered
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 1), 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// attachLoop attaches a loop device to the disk.
func (p *place) attachLoop() (string, error) {
	name, err := loopdev.Attach(p.disk(), loopdev.Options{ReadOnly: p.ReadOnly, SectorSize: p.SectorSize})
	p.loop = name
	return name, err
}

// mounted notes which mount is ours.
func (p *place) mounted() {
	if m, found, err := mounttab.Find(p.Dir); err == nil && found {
		p.device = m.Dev
	}
}

// dead tells whether nobody serves the mount. That its server is on its way
// out may take a moment; somebody else's mount, which can have got the same
// device by now, may not answer at all.
func (p *place) dead() bool {
	gone := make(chan bool, 1)
	go func() {
		var st unix.Stat_t
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			err := unix.Stat(p.Dir, &st)
			if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) {
				gone <- true
				return
			}
		}
		gone <- false
	}()
	select {
	case is := <-gone:
		return is
	case <-time.After(2 * patience):
		return false
	}
}

// abandon takes away what a server has left that ended before anybody was told
// of its mount. Nobody would look for it.
func (p *place) abandon() {
	m, found, err := mounttab.Find(p.Dir)
	if p.ready || p.device == "" || err != nil || !found || m.Dev != p.device || !p.dead() {
		return
	}
	// Best effort, as there is nobody to tell.
	if p.loop != "" {
		_ = loopdev.Detach(p.loop, true)
	}
	_ = fusefs.Unmount(p.Dir, true)
}

// patience is how long leave waits for those who use the mount.
const patience = 2 * time.Second

// leave ends the mount. It makes everything durable first, then detaches the
// loop device and unmounts; users who do not go in time lose the mount from
// under them, which lazy reports. What goes wrong does not stop it.
func (p *place) leave() (lazy bool, troubles []error) {
	f, err := os.Open(p.disk())
	if err == nil {
		err = f.Sync()
		_ = f.Close()
	}
	if err != nil && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.ENOENT) {
		troubles = append(troubles, fmt.Errorf("the last sync: %w", err))
	}
	if p.loop != "" {
		if err := loopdev.Detach(p.loop, false); err != nil {
			troubles = append(troubles, err)
		}
	}
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		err := fusefs.Unmount(p.Dir, false)
		if err == nil {
			return false, troubles
		}
		if time.Now().After(end) || !errors.Is(err, unix.EBUSY) {
			if err := fusefs.Unmount(p.Dir, true); err != nil {
				troubles = append(troubles, err)
			}
			return true, troubles
		}
	}
}
