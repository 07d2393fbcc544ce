package e2e

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// holder is a program of QEMU that holds an image until the test lets go.
type holder struct {
	name string
	hold func(t *testing.T, format, image string) (release func())
}

var holders = []holder{{"qemu-io", holdQemuIO}, {"qemu-nbd", holdQemuNBD}}

func holdQemuIO(t *testing.T, format, image string) func() {
	t.Helper()
	cmd := exec.Command("qemu-io", "-f", format, image)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// It has opened the image when it answers a command.
	if _, err := io.WriteString(stdin, "length\n"); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 1)
	if _, err := stdout.Read(answer); err != nil {
		t.Fatalf("qemu-io does not answer: %v", err)
	}
	return func() {
		stdin.Close()
		_, _ = io.Copy(io.Discard, stdout)
		_ = cmd.Wait()
	}
}

func holdQemuNBD(t *testing.T, format, image string) func() {
	t.Helper()
	socket := filepath.Join(workDir(t), "s")
	cmd := exec.Command("qemu-nbd", "-f", format, "-t", "-k", socket, image)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
	}
}

// TestHeldByOthers: an image that a program of QEMU writes to is exit 3, with
// nothing mounted; once let go, it can be used.
func TestHeldByOthers(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img", "qemu-io", "qemu-nbd")
	for _, format := range []string{"qcow2", "parallels"} {
		for _, h := range holders {
			t.Run(format+"/"+h.name, func(t *testing.T) {
				image := filepath.Join(workDir(t), "image."+format)
				imgtest.QemuImg(t, "create", "-q", "-f", format, image, "16M")
				release := h.hold(t, format, image)
				for _, flags := range [][]string{{}, {"-w"}, {"--scratch"}} {
					mnt := mountPoint(t)
					o := runTool(t, "mount-image", append(flags, image, mnt)...)
					if o.exit == 0 {
						runTool(t, "mount-image", "-u", mnt)
					}
					if o.exit != 3 || !strings.Contains(o.stderr, image) {
						t.Errorf("mount-image %q on an image in use: exit %d, want 3\n%s", flags, o.exit, o.stderr)
					}
				}
				release()
				if format == "parallels" { // qemu-io closed it, and the mark is gone
					imgtest.QemuIO(t, format, image, "length")
				}
				m := mountImage(t, image, "-w")
				m.unmount()
			})
		}
	}
}

// TestHeldByUs: while an image is mounted for writing QEMU gets it neither for
// reading nor for writing; while it is mounted for reading QEMU may read.
func TestHeldByUs(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, format := range []string{"qcow2", "parallels"} {
		t.Run(format, func(t *testing.T) {
			image := filepath.Join(workDir(t), "image."+format)
			imgtest.QemuImg(t, "create", "-q", "-f", format, image, "16M")
			reads := func() (int, string) { return imgtest.Try(t, "qemu-img", "info", "-f", format, image) }
			writes := func() (int, string) {
				return imgtest.Try(t, "qemu-io", "-f", format, "-c", "write 0 4k", image)
			}

			m := mountImage(t, image, "-w")
			for what, try := range map[string]func() (int, string){"reading": reads, "writing": writes} {
				if exit, out := try(); exit == 0 || !strings.Contains(out, "lock") {
					t.Errorf("QEMU %s what we write: exit %d\n%s", what, exit, out)
				}
			}
			wantExit(t, 3, "mount-image", "-w", image, mountPoint(t))
			wantExit(t, 3, "mount-image", image, mountPoint(t))
			m.unmount()

			m = mountImage(t, image)
			if exit, out := reads(); exit != 0 {
				t.Errorf("QEMU reading what we read: exit %d\n%s", exit, out)
			}
			if exit, out := writes(); exit == 0 || !strings.Contains(out, "lock") {
				t.Errorf("QEMU writing what we read: exit %d\n%s", exit, out)
			}
			second := mountImage(t, image)
			second.unmount()
			m.unmount()
			if exit, out := writes(); exit != 0 {
				t.Errorf("QEMU writing what nobody holds: exit %d\n%s", exit, out)
			}
		})
	}
}
