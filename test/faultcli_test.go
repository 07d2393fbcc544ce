package e2e

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"golang.org/x/sys/unix"
)

// abort is -u --force of a mount that does not answer.
func (m *mounted) abort() {
	t := m.t
	t.Helper()
	o := runTool(t, "mount-image", "-u", "--force", m.dir)
	if o.exit != 1 || !strings.Contains(o.stderr, "may be lost") || o.took > 40*time.Second {
		t.Errorf("-u --force: exit %d after %v\n%s", o.exit, o.took, o.stderr)
	}
	if left := mountsUnder(m.dir); len(left) > 0 {
		t.Errorf("still mounted: %q", left)
	}
}

// ended waits for the end of a read of a mount that was aborted.
func ended(t *testing.T, reader <-chan error) {
	t.Helper()
	select {
	case err := <-reader:
		if err == nil {
			t.Error("a read of what does not answer succeeded")
		}
	case <-time.After(5 * time.Second):
		t.Error("a reader still waits")
	}
}

// TestForceHungServer: a server that does not answer is got rid of with -u
// --force, in bounded time, and whoever waited for it gets an error: at once,
// or over io_uring when the server goes on.
func TestForceHungServer(t *testing.T) {
	imgtest.RequireRoot(t)
	for _, transport := range []string{"dev", "uring"} {
		t.Run(transport, func(t *testing.T) {
			if transport == "uring" {
				imgtest.RequireURing(t)
			}
			image := createQcow2(t, workDir(t), 16<<20, false)
			m := mountImage(t, image, "-w", "--transport", transport)
			server := serverPID(t, m.dir)
			imgtest.Stop(t, server)
			reader := make(chan error, 1)
			go func() {
				_, err := os.ReadFile(m.file())
				reader <- err
			}()
			time.Sleep(100 * time.Millisecond)
			m.abort()
			if transport == "dev" {
				ended(t, reader)
			}
			if err := unix.Kill(server, unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			if transport == "uring" {
				ended(t, reader)
			}
			for range 500 { // the server goes, and with it its lock
				if unix.Kill(server, 0) != nil {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			second := mountImage(t, image, "-w")
			second.unmount()
			checkQcow2(t, image, true)
		})
	}
}

// TestShrinkingImage: a file that becomes shorter while it is mounted is an
// error for who reads what is gone, and nothing else.
func TestShrinkingImage(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := workDir(t)
	for _, format := range []string{"raw", "qcow2", "parallels"} {
		t.Run(format, func(t *testing.T) {
			image := filepath.Join(dir, "image."+format)
			imgtest.QemuImg(t, "create", "-q", "-f", format, image, "16M")
			imgtest.QemuIO(t, format, image, "write -P 5 0 8M")
			m := mountImage(t, image, "--format", ourFormat(format))
			st, err := os.Stat(image)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(image, min(st.Size(), 8<<20)/2); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(m.file())
			if err != nil {
				t.Fatal(err)
			}
			// Of a raw disk that the kernel reads by itself this is the end.
			if n, err := f.ReadAt(make([]byte, 4096), 7<<20); !errors.Is(err, unix.EIO) && !(format == "raw" && n == 0 && errors.Is(err, io.EOF)) {
				t.Errorf("reading what is gone: %d bytes, %v, want EIO", n, err)
			}
			wantBytes(t, "what is left", readRange(t, m.file(), 1<<20, 4), []byte{5, 5, 5, 5})
			f.Close()
			m.unmount()
		})
	}
}

// TestFullTMPDIR: a throw-away layer that cannot grow is ENOSPC for the
// writer; reads go on, and the image is untouched.
func TestFullTMPDIR(t *testing.T) {
	imgtest.RequireRoot(t)
	imgtest.RequireFuse(t)
	work := workDir(t)
	image := createQcow2(t, work, 64<<20, false)
	imgtest.QemuIO(t, "qcow2", image, "write -P 5 0 1M")
	before := imgtest.SHA256File(t, image)
	tmp := mountPoint(t)
	imgtest.Run(t, "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp)
	defer imgtest.Umount(t, tmp)
	mnt := mountPoint(t)
	cmd := exec.Command(filepath.Join(binDir, "mount-image"), "--scratch", image, mnt)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mount-image --scratch: %v\n%s", err, out)
	}
	m := &mounted{t: t, dir: mnt}
	f, err := os.OpenFile(m.file(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < 64<<20 && err == nil; off += 1 << 20 {
		_, err = f.WriteAt(imgtest.PatternBytes(1, off, 1<<20), off)
		err = errors.Join(err, f.Sync())
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("filling it: %v, want ENOSPC", err)
	}
	f.Close()
	wantBytes(t, "what was written", readRange(t, m.file(), 0, 4096), imgtest.PatternBytes(1, 0, 4096))
	m.unmount()
	if imgtest.SHA256File(t, image) != before {
		t.Error("the image was changed")
	}
}
