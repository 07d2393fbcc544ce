// Package loopdev attaches files to loop devices and detaches them.
//
// Design note. A device is configured in one step (LOOP_CONFIGURE, Linux 5.8),
// so that nobody sees it half set up; whoever loses the race for a free device
// takes the next. The file is opened with O_DIRECT, and the device does direct
// I/O: pages are then cached once, by the guest's filesystem. Detaching first
// claims the device exclusively, because the kernel otherwise answers 0 and
// keeps a busy device until its last user has gone.
package loopdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/mounttab"
)

// ErrBusy reports that a device is mounted or otherwise claimed.
var ErrBusy = errors.New("the loop device is in use")

// Options of Attach.
type Options struct {
	ReadOnly   bool
	SectorSize uint32 // bytes; 0 means 512
}

// attempts bounds the race for a free device.
const attempts = 100

// Attach attaches the file to a free loop device, looks for partitions on it,
// and returns the path of the device.
func Attach(path string, o Options) (string, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("loop device: %w", err)
	}
	defer ctl.Close()
	mode := os.O_RDWR
	flags := uint32(unix.LO_FLAGS_DIRECT_IO | unix.LO_FLAGS_PARTSCAN)
	if o.ReadOnly {
		mode = os.O_RDONLY
		flags |= unix.LO_FLAGS_READ_ONLY
	}
	file, err := os.OpenFile(path, mode|unix.O_DIRECT, 0)
	if err != nil {
		return "", fmt.Errorf("loop device: %w", err)
	}
	defer file.Close()
	config := unix.LoopConfig{Fd: uint32(file.Fd()), Size: max(o.SectorSize, 512)}
	config.Info.Flags = flags
	copy(config.Info.File_name[:len(config.Info.File_name)-1], path)

	for try := range attempts {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", fmt.Errorf("no free loop device: %w", err)
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		err = configure(name, &config)
		switch {
		case err == nil:
			return name, nil
		case errors.Is(err, unix.EBUSY):
			continue // somebody was quicker
		case errors.Is(err, unix.ENOENT) && try < attempts/2:
			time.Sleep(10 * time.Millisecond) // its node is still being made
		default:
			return "", fmt.Errorf("%s: attaching %s: %w", name, path, err)
		}
	}
	return "", fmt.Errorf("loop device: lost the race for a free one %d times: %w", attempts, unix.EBUSY)
}

func configure(name string, config *unix.LoopConfig) error {
	dev, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	return unix.IoctlLoopConfigure(int(dev.Fd()), config)
}

// Detach makes what was written to the device durable and detaches it. A
// device in use gives an error that wraps ErrBusy and says who uses it.
//
// With dead set the file behind the device is known to be gone, and it does
// not matter that it cannot be synced.
func Detach(name string, dead bool) error {
	dev, err := claim(name)
	if err != nil {
		return err
	}
	if _, err := unix.IoctlLoopGetStatus64(int(dev.Fd())); errors.Is(err, unix.ENXIO) {
		return dev.Close() // somebody else was quicker
	}
	syncErr := unix.Fsync(int(dev.Fd()))
	if dead {
		syncErr = nil
	}
	err = unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0)
	_ = dev.Close()
	if err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detaching %s: %w", name, err)
	}
	if err := waitDetached(name); err != nil {
		return err
	}
	if syncErr != nil {
		return fmt.Errorf("%s: sync: %w", name, syncErr)
	}
	return nil
}

// claim opens the device exclusively. Device managers look at new devices for
// a moment; they are waited for.
func claim(name string) (*os.File, error) {
	var err error
	for wait := time.Millisecond; wait < 500*time.Millisecond; wait *= 2 {
		var dev *os.File
		dev, err = os.OpenFile(name, os.O_RDONLY|unix.O_EXCL, 0)
		if err == nil {
			return dev, nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
		if users := Users(name); len(users) > 0 {
			return nil, fmt.Errorf("%s: %w: %s", name, ErrBusy, strings.Join(users, ", "))
		}
		time.Sleep(wait)
	}
	return nil, fmt.Errorf("%s: %w", name, ErrBusy)
}

// waitDetached waits until the device has let go of its file: the kernel
// detaches when the last opener closes.
func waitDetached(name string) error {
	path := sysBlock + "/" + filepath.Base(name) + "/loop/backing_file"
	for wait := time.Millisecond; wait < 2*time.Second; wait *= 2 {
		if _, err := os.Stat(path); err != nil {
			return nil
		}
		time.Sleep(wait)
	}
	return fmt.Errorf("%s: %w: another program keeps it open", name, ErrBusy)
}

const sysBlock = "/sys/block"

// Under returns the loop devices whose file is dir or lies below it.
func Under(dir string) ([]string, error) {
	files, err := filepath.Glob(sysBlock + "/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // detached meanwhile
		}
		backing := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), " (deleted)")
		if strings.HasPrefix(backing, dir+"/") {
			names = append(names, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(f))))
		}
	}
	slices.Sort(names)
	return names, nil
}

// Users tells what uses the device or a partition of it: mount points, swap,
// and devices built on it.
func Users(name string) []string {
	base := filepath.Base(name)
	dirs, _ := filepath.Glob(sysBlock + "/" + base + "/" + base + "p*")
	dirs = append(dirs, sysBlock+"/"+base)
	mounts, _ := mounttab.Read()
	swaps, _ := os.ReadFile("/proc/swaps")
	var users []string
	for _, dir := range dirs {
		number, err := os.ReadFile(dir + "/dev")
		if err != nil {
			continue
		}
		for _, m := range mounts {
			if m.Dev == strings.TrimSpace(string(number)) || m.Source == "/dev/"+filepath.Base(dir) {
				users = append(users, "mounted on "+m.Dir)
			}
		}
		if strings.Contains(string(swaps), "/dev/"+filepath.Base(dir)+" ") {
			users = append(users, "used as swap")
		}
		holders, _ := os.ReadDir(dir + "/holders")
		for _, h := range holders {
			users = append(users, "held by "+h.Name())
		}
	}
	slices.Sort(users)
	return slices.Compact(users)
}
