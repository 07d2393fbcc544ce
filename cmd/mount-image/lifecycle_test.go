package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/loopdev"
	"github.com/imagestack/imagestack/layers/open"
)

// foreground starts mount-image -f and waits until the disk answers.
func foreground(t *testing.T, args ...string) (cmd *exec.Cmd, stderr *bytes.Buffer) {
	t.Helper()
	cmd = command(append([]string{"-f"}, args...)...)
	stderr = new(bytes.Buffer)
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dir := args[len(args)-1]
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	imgtest.Eventually(t, "the mount", func() bool { _, err := os.Stat(disk(dir)); return err == nil })
	return cmd, stderr
}

// writeDisk writes to the disk without syncing.
func writeDisk(t *testing.T, dir string, data []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(disk(dir), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

// holds checks the content of an image at a place, through qemu-img.
func holds(t *testing.T, path string, data []byte, off int64) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	imgtest.QemuRaw(t, "qcow2", path, out)
	got, err := os.ReadFile(out)
	if err != nil || !bytes.Equal(got[off:off+int64(len(data))], data) {
		t.Errorf("the image does not hold what was written (%v)", err)
	}
	if exit, out := imgtest.QemuCheck(t, path, "qcow2"); exit != 0 && exit != 3 {
		t.Errorf("qemu-img check: %d %s", exit, out)
	}
}

func TestSignals(t *testing.T) {
	t.Parallel()
	data := imgtest.PatternBytes(5, 0, 1<<20)
	for _, c := range []struct {
		sig  unix.Signal
		exit int
	}{{unix.SIGTERM, 0}, {unix.SIGINT, 130}} {
		_, path := qcow2Image(t)
		dir := mountDir(t)
		cmd, stderr := foreground(t, "-w", path, dir)
		writeDisk(t, dir, data, 4096)
		if err := cmd.Process.Signal(c.sig); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != c.exit {
			t.Errorf("%v: exit %d\n%s", c.sig, got, stderr)
		}
		unmounted(t, dir)
		holds(t, path, data, 4096)
	}
}

// A user of the mount cannot keep the server from ending.
func TestSignalWhileBusy(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	dir := mountDir(t)
	cmd, stderr := foreground(t, "-w", path, dir)
	f, err := os.OpenFile(disk(dir), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := imgtest.PatternBytes(6, 0, 100000)
	if _, err := f.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr)
	}
	unmounted(t, dir)
	if _, err := f.WriteAt(data, 0); err == nil {
		t.Error("writing to nobody succeeds")
	}
	holds(t, path, data, 0)
}

// Whoever unmounts, the server closes the image and ends.
func TestForeignUnmount(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	dir := mountDir(t)
	cmd, stderr := foreground(t, "-w", path, dir)
	data := imgtest.PatternBytes(8, 0, 100000)
	writeDisk(t, dir, data, 1<<20)
	if os.Geteuid() == 0 {
		imgtest.Umount(t, dir)
	} else {
		imgtest.Run(t, "fusermount3", "-u", dir)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr)
	}
	holds(t, path, data, 1<<20)
}

func TestUnmountBusy(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	dir := mountDir(t)
	want(t, 0, "-w", path, dir)
	f, err := os.OpenFile(disk(dir), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.Close()
		if isMountedQuiet(dir) { // the test has failed
			runCmd(t, command("-u", "--force", dir))
		}
	})
	o := want(t, 3, "-u", dir)
	contains(t, "busy", o.stderr, "in use by", "--force")
	server := serverOf(t, dir)
	// With --force the user keeps what it has until it lets go.
	released := make(chan struct{})
	go func() {
		defer close(released)
		for isMountedQuiet(dir) {
			time.Sleep(10 * time.Millisecond)
		}
		_, err = f.WriteAt([]byte("late"), 0)
		_ = f.Close()
	}()
	want(t, 0, "-u", "--force", dir)
	<-released
	if err != nil {
		t.Errorf("late write: %v", err)
	}
	unmounted(t, dir)
	if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(server.pidfd), Events: unix.POLLIN}}, 0); n != 1 {
		t.Error("-u has returned before the server")
	}
	holds(t, path, []byte("late"), 0)
}

func isMountedQuiet(dir string) bool {
	st, err := os.ReadFile("/proc/self/mountinfo")
	return err == nil && strings.Contains(string(st), " "+dir+" ")
}

// After kill -9 what was fsynced is there, and -u clears the place, loop
// device included.
func TestKilled(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	for _, loop := range []bool{false, true} {
		dir := mountDir(t)
		args := []string{"-w", path, dir}
		if loop {
			if os.Geteuid() != 0 {
				continue
			}
			args = append([]string{"--loop"}, args...)
		}
		want(t, 0, args...)
		data := imgtest.PatternBytes(11, 0, 3<<20)
		f, err := os.OpenFile(disk(dir), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(data, 2<<20); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		server := serverOf(t, dir)
		if err := unix.Kill(server.pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(server.pidfd), Events: unix.POLLIN}}, 10000); err != nil {
			t.Fatal(err)
		}
		imgtest.Eventually(t, "the end of the connection", func() bool {
			_, err := f.Stat()
			_, err2 := f.ReadAt(make([]byte, 4096), 0)
			return err != nil || err2 != nil
		})
		// Even with a user that still holds on to the dead mount.
		if !loop {
			_ = f.Close()
		}
		o := want(t, 1, path, dir)
		contains(t, "mounting over a dead mount", o.stderr, "-u "+dir)
		want(t, 0, "-u", dir)
		_ = f.Close()
		unmounted(t, dir)
		holds(t, path, data, 2<<20)
	}
}

// failingDisk is a disk whose sync fails when it is told to.
type failingDisk struct {
	fusefs.Device
	fail atomic.Bool
}

func (d *failingDisk) Sync(ctx context.Context) error {
	if d.fail.Load() {
		return unix.EIO
	}
	return d.Device.Sync(ctx)
}

// When the last sync fails, -u says so and exits 1. The image lies on a disk
// of our own making.
func TestFinalSyncFails(t *testing.T) {
	raw := rawImage(t)
	stack, err := open.Open(t.Context(), raw, open.Options{Writable: true, Format: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	defer stack.Close()
	bad := &failingDisk{Device: stack}
	fs, err := fusefs.New(bad, fusefs.Options{FlushAfter: -1, UID: uint32(os.Geteuid())})
	if err != nil {
		t.Fatal(err)
	}
	below := mountDir(t)
	srv, err := fusefs.Mount(below, fs, fusefs.MountOptions{Source: "bad"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		bad.fail.Store(false)
		if err := srv.Unmount(); err != nil {
			t.Error(err)
			_ = srv.Detach()
		}
	}()
	dir := mountDir(t)
	want(t, 0, "-w", "--format", "raw", disk(below), dir)
	writeDisk(t, dir, []byte("lost"), 0)
	bad.fail.Store(true)
	o := want(t, 1, "-u", dir)
	contains(t, "failed sync", o.stderr, "sync failed")
	unmounted(t, dir)
}

// mount(8), the command line and /etc/fstab. It looks for programs in the
// system's directories only, so this happens in a name space where one of them
// holds ours.
func TestMount8(t *testing.T) {
	t.Parallel()
	imgtest.RequireRoot(t)
	imgtest.RequireFuse(t)
	imgtest.Require(t, "mount", "mount.fuse3", "unshare")
	raw, path := qcow2Image(t)
	dir := t.TempDir()
	tool := "#!/bin/sh\n" + toolEnv + "=1 exec '" + os.Args[0] + "' \"$@\"\n"
	fstab := path + " " + dir + "/m fuse.mount-image defaults,noauto,nofail,_netdev,x-systemd.automount,scratch,allow_other,uid=1234,umask=027 0 0\n"
	for name, text := range map[string]string{"bin/mount-image": tool, "fstab": fstab, "m/.keep": ""} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script := `set -eu
image=$1 raw=$2 dir=$3
mount --bind "$dir/bin" /usr/local/sbin
options() { sed -n "s|^$image $dir/m fuse.mount-image \\([^ ]*\\).*|\\1|p" /proc/self/mounts; }
mount -t fuse.mount-image "$image" "$dir/m" -o ro,noexec,nosuid,nodev
options
cmp "$raw" "$dir/m/disk.raw"
umount "$dir/m"
# The server of an unmounted image may take a moment to let go of it.
mount -t fuse.mount-image "$image" "$dir/m" || { sleep 1; mount -t fuse.mount-image "$image" "$dir/m"; }
options
mount-image -u "$dir/m"
mount -T "$dir/fstab" "$dir/m"
options
stat -c '%u %a' "$dir/m/disk.raw"
mount-image -u "$dir/m"
mount -t fuse.mount-image "$image" "$dir/m" -o nonsense 2>&1 || echo exit $?
mount -t fuse.mount-image "${image}x" "$dir/m" 2>&1 || echo exit $?
`
	cmd := exec.Command("unshare", "-m", "sh", "-c", script, "sh", path, raw, dir)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin")
	o := runCmd(t, cmd)
	common := "relatime,user_id=0,group_id=0,default_permissions"
	expect := "ro,nosuid,nodev,noexec," + common + ",max_read=1048576\n" +
		"rw,nosuid,nodev," + common + ",max_read=1048576\n" +
		"rw,nosuid,nodev," + common + ",allow_other,max_read=1048576\n1234 640\n" +
		"mount-image: unknown mount option \"nonsense\"\nmount-image: try: mount-image --help\nexit 2\n" +
		"mount-image: stat " + path + "x: no such file or directory\nexit 1\n"
	if o.exit != 0 || o.stdout != expect {
		t.Errorf("exit %d\n%s%s\nwant\n%s", o.exit, o.stdout, o.stderr, expect)
	}
}

// An ordinary user, through fusermount3; root then unmounts what it cannot
// even look into.
func TestUnprivileged(t *testing.T) {
	t.Parallel()
	imgtest.RequireRoot(t)
	imgtest.RequireFuse(t)
	imgtest.Require(t, "setpriv", "unshare", "fusermount3", "mknod")
	_, path := qcow2Image(t)
	home, err := os.MkdirTemp("", "imagestack-user")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(home)
	imgtest.Run(t, "cp", path, home+"/disk.qcow2")
	imgtest.Run(t, "cp", os.Args[0], home+"/mount-image")
	imgtest.Run(t, "mkdir", home+"/m")
	imgtest.Run(t, "chown", "-R", "65534:65534", home)
	imgtest.Run(t, "chmod", "755", home, home+"/mount-image")
	// In a name space of its own, where /dev/fuse is open to everybody as on
	// most systems, and where nothing can stay behind.
	script := `set -eu
cd "$1"
mknod -m 666 fuse c 10 229
mount --bind fuse /dev/fuse
nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
nobody ./mount-image -w disk.qcow2 m
nobody sh -c 'printf hello | dd of=m/disk.raw conv=notrunc status=none'
nobody stat -c '%U %a %s' m/disk.raw
if cat m/disk.raw >/dev/null 2>&1; then echo root may look; fi
nobody ./mount-image -u m
nobody ./mount-image -o allow_root disk.qcow2 m && echo allow_root without user_allow_other
nobody ./mount-image -o dev,suid,noexec disk.qcow2 m
grep -o 'ro,nosuid,nodev,noexec' /proc/self/mounts | head -1
nobody head -c 5 m/disk.raw; echo
./mount-image -u m
if grep "$1" /proc/self/mounts | grep fuse.mount; then echo still mounted; fi
`
	cmd := exec.Command("unshare", "-m", "sh", "-c", script, "sh", home)
	cmd.Env = append(os.Environ(), toolEnv+"=1", "LC_ALL=C")
	o := runCmd(t, cmd)
	if expect := "nobody 600 50331648\nro,nosuid,nodev,noexec\nhello\n"; o.exit != 0 || o.stdout != expect {
		t.Errorf("exit %d\n%s%s", o.exit, o.stdout, o.stderr)
	}
	holds(t, home+"/disk.qcow2", []byte("hello"), 0)
}

// Of many who mount on one directory at once, one succeeds.
func TestMountRace(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	dir := mountDir(t)
	exits := make(chan outcome)
	const n = 6
	for range n {
		go func() {
			cmd := command(path, dir)
			var errOut bytes.Buffer
			cmd.Stderr = &errOut
			_ = cmd.Run()
			exits <- outcome{exit: cmd.ProcessState.ExitCode(), stderr: errOut.String()}
		}()
	}
	won := 0
	for range n {
		switch o := <-exits; o.exit {
		case 0:
			won++
		case 3:
		default:
			t.Errorf("exit %d %s", o.exit, o.stderr)
		}
	}
	if won != 1 {
		t.Errorf("%d have won", won)
	}
	want(t, 0, "-u", dir)
	unmounted(t, dir)
}

// Nobody listens to what is printed: an error, and no mount without a server.
func TestBrokenStdout(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	dir := mountDir(t)
	for _, flags := range [][]string{{"--json"}, {"-f", "--json"}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Close()
		cmd := command(append(flags, path, dir)...)
		cmd.Stdout = w
		err = cmd.Run()
		_ = w.Close()
		if cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("%q: %v", flags, err)
		}
		unmounted(t, dir)
	}
}

// A loop device that is not ours to detach is left alone, and said so.
func TestForeignLoop(t *testing.T) {
	t.Parallel()
	imgtest.RequireLoop(t)
	_, path := qcow2Image(t)
	dir := mountDir(t)
	want(t, 0, path, dir)
	// Attached by somebody else: -u detaches it all the same.
	loop, err := loopdev.Attach(disk(dir), loopdev.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	hold, err := os.OpenFile(loop, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	o := want(t, 3, "-u", dir)
	contains(t, "claimed", o.stderr, loop, "in use")
	if err := hold.Close(); err != nil {
		t.Fatal(err)
	}
	if err := loopdev.Detach("/dev/loop-no-such", false); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such device: %v", err)
	}
	want(t, 0, "-u", dir)
	unmounted(t, dir)
}
