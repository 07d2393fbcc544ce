package e2e

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// movable makes an image of 16 MiB of zeros in front of 16 MiB of data.
func movable(t *testing.T, format string) string {
	t.Helper()
	image := filepath.Join(workDir(t), "a."+format)
	imgtest.QemuImg(t, "create", "-q", "-f", format, image, "64M")
	imgtest.QemuIO(t, format, image, "write -P 0 0 16M", "write -P 7 16M 16M", "write -P 8 40M 64k")
	return image
}

func readMovable(t *testing.T, format, image string) {
	t.Helper()
	imgtest.QemuIO(t, format, image, "read -P 0 0 16M", "read -P 7 16M 16M", "read -P 8 40M 64k", "read -P 0 48M 16M")
}

// stopCompact runs image-compact until a part of the tail has moved, and sends
// it a signal. It returns the exit code (-1 when it was killed) and stderr.
func stopCompact(t *testing.T, image string, sig os.Signal) (int, string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(binDir, "image-compact"), "--progress=plain", "--max-extra=2M", "--rate-limit=8M/s", image)
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stuck := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer stuck.Stop()
	var said strings.Builder
	sent := false
	for lines := bufio.NewScanner(pipe); lines.Scan(); {
		said.WriteString(lines.Text() + "\n")
		if !sent && strings.HasPrefix(lines.Text(), "tail: 20%") {
			sent = true
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // the exit code says it
	if !sent {
		t.Fatalf("the tail never moved\n%s", said.String())
	}
	return cmd.ProcessState.ExitCode(), said.String()
}

// TestCompactStopped: Ctrl-C stops at a consistent point, says how to go on,
// and that works; and so it does after a kill.
func TestCompactStopped(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, format := range []string{"qcow2", "parallels"} {
		for _, how := range []string{"--resume", "--abandon"} {
			for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
				t.Run(format+"/"+sig.String()+"/"+how, func(t *testing.T) {
					t.Parallel()
					compactStopped(t, format, how, sig)
				})
			}
		}
	}
}

func compactStopped(t *testing.T, format, how string, sig syscall.Signal) {
	image := movable(t, format)
	code, said := stopCompact(t, image, sig)
	if sig != syscall.SIGKILL {
		if code != 128+int(sig) || !strings.Contains(said, "image-compact --resume --max-extra 2097152 --rate-limit 8388608 "+image) || !strings.Contains(said, "--abandon") {
			t.Errorf("exit %d\n%s", code, said)
		}
		if exit, out := imgtest.QemuCheck(t, image, format); exit != 0 && exit != 3 {
			t.Errorf("qemu-img check: exit %d\n%s", exit, out)
		}
	}
	if o := wantExit(t, 1, "image-compact", image); !strings.Contains(o.stderr, "--resume") {
		t.Errorf("begun again: %s", o.stderr)
	}
	if o := wantExit(t, 0, "image-compact", "-n", image); !strings.Contains(o.stdout, "interrupted") {
		t.Errorf("estimated: %s", o.stdout)
	}
	if sig != syscall.SIGKILL || format == "qcow2" { // a killed ploop image is marked as in use
		readMovable(t, format, image)
	}
	d := compactJSON(t, how, image)
	if (d.Action == "resume") != (how == "--resume") {
		t.Errorf("%+v", d)
	}
	if _, err := os.Stat(image + ".compact"); err == nil {
		t.Error("the record was left")
	}
	if exit, out := imgtest.QemuCheck(t, image, format); exit != 0 {
		t.Errorf("qemu-img check: exit %d\n%s", exit, out)
	}
	readMovable(t, format, image)
	if how == "--abandon" {
		d = compactJSON(t, image)
	}
	if d.After == nil || d.After.Apparent > 19<<20 {
		t.Errorf("%+v", d)
	}
	readMovable(t, format, image)
}

// TestCompactInterruptedCopy: of an interrupted --to nothing is left.
func TestCompactInterruptedCopy(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	image := movable(t, "qcow2")
	before := imgtest.SHA256File(t, image)
	cmd := exec.Command(filepath.Join(binDir, "image-compact"), "--to", image+".new", "--rate-limit=4M", image)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 500 {
		if _, err := os.Stat(image + ".new.part.compact"); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // the exit code says it
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit %d", code)
	}
	entries, err := os.ReadDir(filepath.Dir(image))
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v: want the image alone", entries, err)
	}
	if imgtest.SHA256File(t, image) != before {
		t.Error("the image was changed")
	}
}

// TestCompactLayers: a lower layer is worked on when it is named, and the disk
// stays the same, also in a bundle.
func TestCompactLayers(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := workDir(t)
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", base, "64M")
	imgtest.QemuIO(t, "qcow2", base, "write -P 0 0 4M", "write -P 3 4M 4M", "write -P 4 16M 4M")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
	imgtest.QemuIO(t, "qcow2", top, "write -P 5 4M 1M", "write -P 0 16M 1M")
	show := func() string {
		raw := filepath.Join(dir, "raw")
		imgtest.QemuRaw(t, "qcow2", top, raw)
		return imgtest.SHA256File(t, raw)
	}
	before, topBefore := show(), imgtest.SHA256File(t, top)
	wantExit(t, 1, "image-compact", "--layer", "2", top)
	d := compactJSON(t, "--layer", "1", top)
	if d.step("zeros") != 4<<20 || show() != before || imgtest.SHA256File(t, top) != topBefore {
		t.Errorf("%+v", d)
	}
	checkQcow2(t, top, false)

	bundle := workDir(t)
	images := imgtest.PloopBundle(t, bundle, "expanded", 2, 64<<20, 2)
	write := func(path string, seed uint64, off int64, args ...string) {
		t.Helper()
		m := mountImage(t, path, append([]string{"-w"}, args...)...)
		defer m.unmount()
		data := make([]byte, 4<<20)
		if seed != 0 {
			imgtest.Pattern(data, seed, off)
		}
		f, err := os.OpenFile(m.file(), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(data, off)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	write(images[1].Path, 1, 0, "--format", "ploop")
	write(images[1].Path, 2, 16<<20, "--format", "ploop")
	write(images[1].Path, 0, 8<<20, "--format", "ploop")
	write(bundle, 3, 18<<20)
	m := mountImage(t, bundle)
	content := imgtest.SHA256File(t, m.file())
	m.unmount()
	upper := imgtest.SHA256File(t, images[0].Path)
	if d := compactJSON(t, "--layer", "1", bundle); d.step("zeros") != 4<<20 {
		t.Errorf("a snapshot of a bundle: %+v", d)
	}
	m = mountImage(t, bundle)
	if imgtest.SHA256File(t, m.file()) != content || imgtest.SHA256File(t, images[0].Path) != upper {
		t.Error("the bundle shows something else")
	}
	m.unmount()
	wantExit(t, 0, "image-fsck", "-n", bundle)
	for _, img := range images {
		if exit, out := imgtest.PloopCheck(t, img.Path); exit != 0 {
			t.Errorf("ploop check: exit %d\n%s", exit, out)
		}
	}
	// By itself it would be the base of the other.
	wantExit(t, 1, "image-compact", images[1].Path)
}

// TestCompactTrimmed: a ploop image whose guest was trimmed is mostly leaks. It
// is worked on when the guest proves that the map is whole.
func TestCompactTrimmed(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "fstrim", "e2fsck")
	image := createPloop(t, workDir(t), 256<<20, false)
	m := mountImage(t, image, "-w", "--loop")
	imgtest.Run(t, "mkfs.ext4", "-q", "-F", m.loop)
	mnt, umount := mountGuest(t, m.loop, "rw")
	kept := imgtest.PatternBytes(5, 0, 8<<20)
	writePattern(t, filepath.Join(mnt, "gone"), 4, 120<<20)
	writePattern(t, filepath.Join(mnt, "kept"), 5, 8<<20)
	imgtest.Run(t, "sync", "-f", mnt)
	if err := os.Remove(filepath.Join(mnt, "gone")); err != nil {
		t.Fatal(err)
	}
	imgtest.Run(t, "fstrim", mnt)
	umount()
	m.unmount()
	d := compactJSON(t, image)
	if d.step("leaks") > 0 && d.After.Apparent > 40<<20 || d.After.Apparent > 60<<20 {
		t.Errorf("%+v", d)
	}
	checkPloop(t, image, false)
	m = mountImage(t, image, "--loop")
	imgtest.Run(t, "e2fsck", "-fn", m.loop)
	mnt, umount = mountGuest(t, m.loop, "ro")
	got, err := os.ReadFile(filepath.Join(mnt, "kept"))
	if err != nil {
		t.Error(err)
	}
	wantBytes(t, "what was kept", got, kept)
	umount()
	m.unmount()
}

// TestCompactPeakSpace: moving into holes that the host has given back takes no
// more space than --max-extra says.
func TestCompactPeakSpace(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := workDir(t)
	image := filepath.Join(dir, "a.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", image, "256M")
	imgtest.QemuIO(t, "qcow2", image, "write -P 3 0 64M", "write -P 7 64M 64M")
	imgtest.QemuIO(t, "qcow2", image, "discard 0 64M")
	taken := func() (n int64) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if st, err := e.Info(); err == nil { // it may have gone
				n += st.Sys().(*syscall.Stat_t).Blocks * 512
			}
		}
		return n
	}
	before := taken()
	const limit = 16 << 20
	cmd := exec.Command(filepath.Join(binDir, "image-compact"), "--max-extra=16M", "--rate-limit=100M/s", image)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	peak, err, done := before, error(nil), false
	for !done {
		peak = max(peak, taken())
		select {
		case err = <-ended:
			done = true
		case <-time.After(2 * time.Millisecond):
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if extra := peak - before; extra > limit || extra == 0 {
		t.Errorf("%d bytes more than before at the peak, want some and at most %d", extra, limit)
	}
	st, err := os.Stat(image)
	if err != nil || st.Size() > 66<<20 {
		t.Errorf("%d bytes long, %v", st.Size(), err)
	}
	imgtest.QemuIO(t, "qcow2", image, "read -P 7 64M 64M")
}

// TestCompactWithoutRoot: whoever may write the image may compact it.
func TestCompactWithoutRoot(t *testing.T) {
	imgtest.RequireRoot(t) // to become somebody else
	imgtest.Require(t, "setpriv", "qemu-img", "qemu-io")
	image := movable(t, "qcow2")
	tool := filepath.Join(binDir, "image-compact")
	for dir := filepath.Dir(image); len(dir) > len(os.TempDir()); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const nobody = 65534
	for _, path := range []string{image, filepath.Dir(image)} {
		if err := os.Chown(path, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	imgtest.Run(t, "chmod", "a+rx", filepath.Dir(binDir), binDir)
	imgtest.Run(t, "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", tool, "--sandbox=require", image)
	readMovable(t, "qcow2", image)
	if st, err := os.Stat(image); err != nil || st.Size() > 19<<20 {
		t.Errorf("%d bytes long, %v", st.Size(), err)
	}
}
