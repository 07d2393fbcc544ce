package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/holders"
	"github.com/imagestack/imagestack/internal/loopdev"
	"github.com/imagestack/imagestack/internal/mounttab"
)

// unmount is mount-image -u: it detaches the loop devices on the disk, syncs,
// unmounts, and waits until the server has ended. With a dead server it cleans
// up what is left.
func unmount(ctx context.Context, arg string, force bool) error {
	dir, err := mounttab.Resolve(arg)
	if err != nil {
		return err
	}
	m, found, err := mounttab.Find(dir)
	switch {
	case err != nil:
		return err
	case !found:
		return fmt.Errorf("%s: nothing is mounted there", arg)
	case m.Type != "fuse."+fusefs.Type:
		return fmt.Errorf("%s: a filesystem of type %s is mounted there, not by mount-image", arg, m.Type)
	}
	if owner := ownerOf(m); owner != nil {
		loopErr, err := detachLoops(dir, false)
		if err != nil {
			return err
		}
		return errors.Join(loopErr, unmountAs(ctx, owner, dir, force))
	}
	server, dead := findServer(dir)
	defer server.close()

	syncErr, err := detachLoops(dir, dead)
	if err != nil {
		return err
	}
	syncErr = errors.Join(syncErr, syncDisk(dir))
	err = fusefs.Unmount(dir, false)
	if errors.Is(err, unix.EBUSY) {
		if !force && !dead {
			users := strings.Join(holders.Of(dir, 5), ", ")
			if users != "" {
				users = " by " + users
			}
			return cli.WithExit(cli.ExitInUse, cli.WithHint(errors.Join(syncErr, fmt.Errorf("%s: in use%s", arg, users)),
				"end the users, or take the mount away from them with --force"))
		}
		err = fusefs.Unmount(dir, true)
	}
	if err != nil {
		if now, found, findErr := mounttab.Find(dir); findErr != nil || found && now.Dev == m.Dev {
			return errors.Join(syncErr, err)
		}
		// Another mount-image -u was faster. What is promised does not depend
		// on who did it, as long as there is a server to wait for.
		if server == nil && !dead {
			return errors.Join(syncErr, fmt.Errorf("%s: somebody else has just unmounted it", arg))
		}
	}
	return errors.Join(syncErr, server.wait(ctx, dir, force))
}

// unmountAll is unmount for several directories: one that fails does not keep
// the others.
func unmountAll(ctx context.Context, dirs []string, unmount func(ctx context.Context, dir string) error) error {
	if len(dirs) == 1 {
		return unmount(ctx, dirs[0])
	}
	var all []error
	for _, dir := range dirs {
		if err := unmount(ctx, dir); err != nil {
			all = append(all, err)
		}
	}
	return errors.Join(all...)
}

// ownerOf returns the user whose mount this is, when it is one that even root
// cannot look into: FUSE keeps everybody else out unless allow_other is set.
func ownerOf(m mounttab.Mount) *syscall.Credential {
	_, open := m.Option("allow_other")
	uid, _ := m.Option("user_id")
	gid, _ := m.Option("group_id")
	u, errU := strconv.ParseUint(uid, 10, 32)
	g, errG := strconv.ParseUint(gid, 10, 32)
	if open || os.Geteuid() != 0 || errU != nil || errG != nil || u == 0 {
		return nil
	}
	return &syscall.Credential{Uid: uint32(u), Gid: uint32(g)}
}

// unmountAs runs mount-image -u as the owner of the mount.
func unmountAs(ctx context.Context, owner *syscall.Credential, dir string, force bool) error {
	args := []string{"-u", dir}
	if force {
		args = append(args, "--force")
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Credential: owner}
	return said(cmd.Run())
}

// detachLoops detaches the loop devices whose file lies in dir. One that is in
// use is an error and nothing more is done; syncErr means that one was
// detached, but not everything written to it has arrived.
func detachLoops(dir string, dead bool) (syncErr, err error) {
	loops, err := loopdev.Under(dir)
	if err != nil {
		return nil, err
	}
	for _, loop := range loops {
		err := loopdev.Detach(loop, dead)
		switch {
		case errors.Is(err, loopdev.ErrBusy):
			return nil, cli.WithExit(cli.ExitInUse, cli.WithHint(err, "unmount what is on %s first", loop))
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			return nil, cli.WithExit(cli.ExitInUse,
				cli.WithHint(err, "%s is attached to the disk; detach it as root: losetup -d %s", loop, loop))
		}
		syncErr = errors.Join(syncErr, err)
	}
	return syncErr, nil
}

// syncDisk makes everything durable while there is somebody to tell about a
// failure. Not being allowed to open the disk is no failure: the server syncs
// when it is unmounted.
func syncDisk(dir string) error {
	f, err := os.Open(filepath.Join(dir, fusefs.DiskName))
	if err != nil {
		if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ECONNABORTED) ||
			errors.Is(err, unix.ENOENT) { // unmounted by somebody else in this moment
			return nil
		}
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		return fmt.Errorf("the last sync failed, changes may be lost: %w", err)
	}
	return nil
}

// process is the server of a mount; the zero value is none.
type process struct {
	pid   int
	pidfd int
}

// findServer asks the mount for its server. dead means that nobody serves it.
func findServer(dir string) (p *process, dead bool) {
	buf := make([]byte, 32)
	n, err := unix.Getxattr(dir, fusefs.XattrPID, buf)
	if err != nil {
		return nil, errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
	}
	pid, err := strconv.Atoi(string(buf[:n]))
	if err != nil || pid <= 1 {
		return nil, false
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, false // of another pid namespace: nothing to wait for
	}
	return &process{pid, fd}, false
}

func (p *process) close() {
	if p != nil {
		_ = unix.Close(p.pidfd)
	}
}

// forcePatience is how long -u --force waits for a server whose users still
// hold on to the disk.
const forcePatience = 10 * time.Second

// wait returns when the server has ended, with an error when it ended badly.
func (p *process) wait(ctx context.Context, dir string, force bool) error {
	if p == nil {
		return nil
	}
	start := time.Now()
	for {
		fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 100)
		if n > 0 {
			break
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return fmt.Errorf("the server (process %d) has not ended yet: %w", p.pid, err)
		}
		if force && time.Since(start) > forcePatience {
			return cli.WithExit(cli.ExitInUse, fmt.Errorf("%s is unmounted, but the server (process %d) works on for those who use it: %s",
				dir, p.pid, strings.Join(holders.Of(dir, 5), ", ")))
		}
	}
	return p.exit()
}

// exit asks for the exit code, which newer kernels (6.15) tell strangers once
// the process was reaped.
func (p *process) exit() error {
	for range 10 {
		info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
		if err := unix.IoctlPidfdInfo(p.pidfd, &info); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil // an older kernel: the sync before has to do
		}
		if info.Mask&unix.PIDFD_INFO_EXIT != 0 {
			if status := unix.WaitStatus(info.Exit_code); status.ExitStatus() == cli.ExitFailed {
				return errors.New("the server failed to close the image; see the system log")
			}
			return nil
		}
		time.Sleep(2 * time.Millisecond)
	}
	return nil
}
