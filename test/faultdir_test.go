package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/faultfs"
	"golang.org/x/sys/unix"
)

// faultDir is a directory whose files can fail: where tools see it, and what
// lies below.
func faultDir(t *testing.T) (fs *faultfs.FS, dir, below string) {
	t.Helper()
	imgtest.RequireRoot(t)
	imgtest.RequireFuse(t)
	below, dir = workDir(t), mountPoint(t)
	fs, err := faultfs.Mount(below, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		fs.Set(nil)
		for range 500 {
			if err = fs.Unmount(); err == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Error(err)
	})
	return fs, dir, below
}

// noNames refuses every change of a name, as a directory without write
// permission does.
func noNames(o faultfs.Op) faultfs.Verdict {
	switch o.Kind {
	case faultfs.Create, faultfs.Mkdir, faultfs.Remove, faultfs.Rename:
		return faultfs.Verdict{Err: unix.EACCES}
	}
	return faultfs.Verdict{}
}

// TestDirectoryWithoutWrite: what needs no new file works in a directory in
// which none can be made; what does need one says so and changes nothing.
func TestDirectoryWithoutWrite(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	fs, dir, below := faultDir(t)
	place := t.TempDir()
	smallBundle(t, below)
	t.Run("image", func(t *testing.T) { qcow2Snapshot(t, below) })
	t.Run("damaged", func(t *testing.T) { damaged("qcow2", "l2-duplicate").Build(t, below) })
	for _, c := range []struct {
		name string
		exit int
		says string // of a failure
		may  []string
		args []string
	}{
		{"info", 0, "", nil, []string{"image-stack", "info", dir}},
		{"map", 0, "", nil, []string{"image-stack", "map", filepath.Join(dir, "top.qcow2")}},
		{"check", 0, "", nil, []string{"image-fsck", "-n", filepath.Join(dir, "root.hds")}},
		{"dump", fsck.ExitOperational, dir, nil, []string{"image-fsck", "--dump", filepath.Join(dir, "dump"), filepath.Join(dir, "top.qcow2")}},
		{"dump elsewhere", 0, "", nil, []string{"image-fsck", "--dump", filepath.Join(place, "dump"), filepath.Join(dir, "top.qcow2")}},
		{"repair", fsck.ExitOperational | fsck.ExitUncorrected, "--undo names another place", nil, []string{"image-fsck", "-y", filepath.Join(dir, "image")}},
		{"repair, undo elsewhere, lost+found", fsck.ExitOperational | fsck.ExitUncorrected, "lost+found", nil,
			[]string{"image-fsck", "-y", "--undo", filepath.Join(place, "undo"), filepath.Join(dir, "image")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			was, err := files(below)
			if err != nil {
				t.Fatal(err)
			}
			fs.Set(noNames)
			o := runTool(t, c.args[0], c.args[1:]...)
			fs.Set(nil)
			if o.exit != c.exit {
				t.Errorf("exit %d, want %d\n%s%s", o.exit, c.exit, o.stdout, o.stderr)
			}
			if c.says != "" && (!strings.Contains(o.stderr, c.says) || !strings.Contains(o.stderr, "permission denied")) {
				t.Errorf("it does not say %q and why:\n%s", c.says, o.stderr)
			}
			now, err := files(below)
			if err != nil {
				t.Fatal(err)
			}
			for name, b := range now {
				if was[name] != b {
					t.Errorf("%s was changed", name)
				}
			}
		})
	}
	t.Run("mount -w", func(t *testing.T) {
		fs.Set(noNames)
		m := mountImage(t, filepath.Join(dir, "top.qcow2"), "-w")
		writeRange(t, m.file(), 0, imgtest.PatternBytes(9, 0, 4096))
		m.unmount()
		fs.Set(nil)
		checkQcow2(t, filepath.Join(below, "top.qcow2"), false)
	})
	t.Run("mount --scratch", func(t *testing.T) {
		mnt := mountPoint(t)
		fs.Set(noNames)
		defer fs.Set(nil)
		cmd := exec.Command(filepath.Join(binDir, "mount-image"), "--scratch", filepath.Join(dir, "top.qcow2"), mnt)
		cmd.Env = append(os.Environ(), "TMPDIR="+dir)
		out, _ := cmd.CombinedOutput() // the exit code is looked at
		if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "permission denied") || !strings.Contains(string(out), dir) {
			t.Errorf("in a TMPDIR without write permission: exit %d\n%s", cmd.ProcessState.ExitCode(), out)
		}
		if left := mountsUnder(mnt); len(left) > 0 {
			t.Errorf("mounted: %q", left)
		}
	})
}

// TestHungBackend: a disk under the image that does not answer. Nobody waits
// for ever who asks with force, and a signal is not forgotten.
func TestHungBackend(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	fs, dir, below := faultDir(t)
	qcow2Snapshot(t, below)
	image := filepath.Join(dir, "top.qcow2")
	hang := func() (reached <-chan struct{}, answer func()) {
		hung, until := make(chan struct{}, 1000), make(chan struct{})
		fs.Set(func(o faultfs.Op) faultfs.Verdict {
			if o.Kind != faultfs.Read {
				return faultfs.Verdict{}
			}
			hung <- struct{}{}
			return faultfs.Verdict{Hang: until}
		})
		return hung, func() { fs.Set(nil); close(until) }
	}
	for _, c := range []struct {
		exit int
		args []string
	}{{fsck.ExitCancelled, []string{"image-fsck", "-n", image}}, {130, []string{"image-stack", "map", image}}} {
		t.Run(c.args[0]+" is interrupted", func(t *testing.T) {
			reached, answer := hang()
			cmd := exec.Command(filepath.Join(binDir, c.args[0]), c.args[1:]...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			<-reached
			if err := cmd.Process.Signal(unix.SIGINT); err != nil {
				t.Error(err)
			}
			// Nothing ends a process inside of a system call that waits for a
			// disk; it ends as soon as the disk answers.
			time.Sleep(300 * time.Millisecond)
			answer()
			_ = cmd.Wait() // the exit code is looked at
			if got := cmd.ProcessState.ExitCode(); got != c.exit {
				t.Errorf("exit %d, want %d", got, c.exit)
			}
		})
	}
	t.Run("mount -u --force", func(t *testing.T) {
		m := mountImage(t, image, "-w")
		reached, answer := hang()
		reader := make(chan error, 1)
		go func() {
			_, err := os.ReadFile(m.file())
			reader <- err
		}()
		<-reached
		m.abort()
		ended(t, reader)
		answer()
		checkQcow2(t, filepath.Join(below, "top.qcow2"), true)
	})
}

// TestShrinkingUnderWriter: a file that another program cuts off under a
// writable mount is not written to any more. A write behind its new end would
// make it long again, with zeros where there was data, and look well.
func TestShrinkingUnderWriter(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := workDir(t)
	for _, format := range []string{"raw", "qcow2", "parallels"} {
		t.Run(format, func(t *testing.T) {
			image := filepath.Join(dir, "image."+format)
			imgtest.QemuImg(t, "create", "-q", "-f", format, image, "16M")
			imgtest.QemuIO(t, format, image, "write -P 5 0 8M")
			m := mountImage(t, image, "-w", "--format", ourFormat(format))
			f, err := os.OpenFile(m.file(), os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			write := func(off int64) error {
				_, err := f.WriteAt(imgtest.PatternBytes(1, off, 4096), off)
				return errors.Join(err, f.Sync())
			}
			if err := write(1 << 20); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(image, 4<<20); err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{7 << 20, 1 << 20, 12 << 20} {
				if err := write(off); !errors.Is(err, unix.EIO) {
					t.Errorf("writing at %d: %v, want EIO", off, err)
				}
			}
			if got := make([]byte, 4); true {
				if _, err := f.ReadAt(got, 2<<20); err != nil {
					t.Errorf("reading what is left: %v", err)
				}
				wantBytes(t, "what is left", got, []byte{5, 5, 5, 5})
			}
			f.Close()
			o := runTool(t, "mount-image", "-u", m.dir)
			if o.exit != 1 {
				t.Errorf("-u: exit %d, want 1\n%s", o.exit, o.stderr)
			}
			if st, err := os.Stat(image); err != nil || st.Size() > 4<<20 {
				t.Errorf("the file is %d bytes long: it was written to (%v)", st.Size(), err)
			}
		})
	}
}
