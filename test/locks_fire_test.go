package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"golang.org/x/sys/unix"
)

var lockStarts = flag.Int("locks.starts", 90, "how many programs TestLocksUnderFire starts, of ours and of QEMU's")

// TestLocksUnderFire starts programs of ours and of QEMU's at once, again and
// again, on one image. A writer puts a value of its own at one place, waits,
// and looks whether it is still there: two writers at a time would see each
// other's. Some are killed. Whoever does not get the image must say so, and in
// the end nothing holds it.
func TestLocksUnderFire(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, format := range []string{"qcow2", "parallels"} {
		t.Run(format, func(t *testing.T) { locksUnderFire(t, format, *lockStarts/2) })
	}
}

type fire struct {
	format, image                string
	started, got, refused, ended atomic.Int64
	killed                       atomic.Int64
	value                        atomic.Int64
	mu                           sync.Mutex
	faults                       []string
}

func (f *fire) fault(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, fmt.Sprintf(format, args...))
}

func locksUnderFire(t *testing.T, format string, starts int) {
	dir := workDir(t)
	f := &fire{format: format, image: filepath.Join(dir, "image."+format)}
	imgtest.QemuImg(t, "create", "-q", "-f", format, f.image, "16M")
	imgtest.QemuIO(t, format, f.image, "write -P 1 0 1M")
	const workers = 5
	var wg sync.WaitGroup
	for w := range workers {
		mnt := mountPoint(t)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			for f.started.Add(1) <= int64(starts) {
				f.one(rng, mnt)
			}
			f.started.Add(-1)
		})
	}
	wg.Wait()
	for _, s := range f.faults {
		t.Error(s)
	}
	if f.got.Load() < int64(starts)/20 || f.refused.Load() < int64(starts)/20 {
		t.Errorf("of %d, %d got the image and %d were refused: the test shows little", starts, f.got.Load(), f.refused.Load())
	}
	// No stale lock: both get it at once, and the kernel knows of none.
	if held := locksOn(t, f.image); held != "" {
		t.Errorf("locks are left:\n%s", held)
	}
	if format == "qcow2" { // after a kill -9 QEMU refuses to write to Parallels images
		if exit, out := imgtest.Try(t, "qemu-io", "-f", format, "-c", "write -P 9 0 4k", f.image); exit != 0 {
			t.Errorf("qemu-io in the end: %d\n%s", exit, out)
		}
	}
	m := mountImage(t, f.image, "-w", "--format", ourFormat(format))
	m.unmount()
	if exit, out := imgtest.QemuCheck(t, f.image, format); exit != 0 && exit != 3 {
		t.Errorf("qemu-img check in the end: %d\n%s", exit, out)
	}
	fmt.Printf("locks: %s: %d programs started: %d got the image, %d were refused, %d killed; %d verified writes, 0 of them with a second writer\n",
		format, f.started.Load(), f.got.Load(), f.refused.Load(), f.killed.Load(), f.ended.Load())
}

func ourFormat(format string) string {
	if format == "parallels" {
		return "ploop"
	}
	return format
}

// one starts one program.
func (f *fire) one(rng *rand.Rand, mnt string) {
	value := byte(1 + f.value.Add(1)%250)
	dwell := 5 + rng.IntN(40)
	switch k := rng.IntN(10); {
	case k < 3:
		f.qemuIO(value, dwell, f.format == "qcow2" && rng.IntN(6) == 0)
	case k < 4:
		f.run("qemu-img", "check", "-f", f.format, f.image)
	case k < 5:
		f.run("qemu-img", "info", "-f", f.format, f.image)
	case k < 6:
		f.run(filepath.Join(binDir, "image-stack"), "info", "--format", ourFormat(f.format), f.image)
	case k < 7:
		f.run(filepath.Join(binDir, "image-stack"), "map", "--format", ourFormat(f.format), f.image)
	default:
		f.mount(mnt, value, dwell)
	}
}

// outcomes: a program works, or says that the image is in use.
func (f *fire) judge(what string, err error, out string) (got bool) {
	if err == nil {
		f.got.Add(1)
		return true
	}
	var exit *exec.ExitError
	ours := strings.HasPrefix(what, binDir)
	busy := errors.As(err, &exit) && (ours && exit.ExitCode() == 3 || !ours && strings.Contains(out, "lock"))
	// Between the header and the close of a writer that QEMU killed or that
	// works, readers see the mark of an open Parallels image: 2 is no fault.
	if !ours && strings.HasSuffix(what, "check") && exit != nil && (exit.ExitCode() == 3 || f.format == "parallels" && exit.ExitCode() == 2) {
		f.got.Add(1)
		return true
	}
	if busy {
		f.refused.Add(1)
		return false
	}
	f.fault("%s: %v\n%s", what, err, out)
	return false
}

func (f *fire) run(name string, args ...string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	f.judge(name+" "+args[0], err, string(out))
}

// place is where all writers write: in the middle of a cluster, and one that
// has to be allocated.
const firePlace = 256 << 10

func (f *fire) qemuIO(value byte, dwell int, kill bool) {
	write := fmt.Sprintf("write -P %d %d 4k", value, firePlace)
	read := fmt.Sprintf("read -P %d %d 4k", value, firePlace)
	args := []string{"-f", f.format, "-c", write, "-c", fmt.Sprintf("sleep %d", dwell), "-c", read}
	if kill {
		args = append(args, "-c", "sigraise 9")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "qemu-io", append(args, f.image)...).CombinedOutput()
	if strings.Contains(string(out), "verification failed") {
		f.fault("qemu-io had a second writer beside it:\n%s", out)
	}
	var exit *exec.ExitError
	if kill && errors.As(err, &exit) && exit.ExitCode() == -1 {
		f.killed.Add(1)
		f.got.Add(1)
		f.ended.Add(1)
		return
	}
	if f.judge("qemu-io", err, string(out)) {
		f.ended.Add(1)
	}
}

// mount writes through mount-image -w.
func (f *fire) mount(mnt string, value byte, dwell int) {
	tool := filepath.Join(binDir, "mount-image")
	log, err := os.CreateTemp("", "log")
	if err != nil {
		f.fault("%v", err)
		return
	}
	defer os.Remove(log.Name())
	defer log.Close()
	cmd := exec.Command(tool, "-w", "--format", ourFormat(f.format), f.image, mnt)
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Run()
	out, _ := os.ReadFile(log.Name())
	if !f.judge(tool, err, string(out)) {
		return
	}
	if err := fireWrite(filepath.Join(mnt, "disk.raw"), value, dwell); err != nil {
		f.fault("mount-image: %v", err)
	} else {
		f.ended.Add(1)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, tool, "-u", mnt).CombinedOutput(); err != nil {
		f.fault("mount-image -u: %v\n%s", err, out)
	}
}

// fireWrite writes a value, waits, and reads it back past the page cache.
func fireWrite(path string, value byte, dwell int) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.WriteAt(bytes.Repeat([]byte{value}, 4096), firePlace); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	time.Sleep(time.Duration(dwell) * time.Millisecond)
	if err := unix.Fadvise(int(file.Fd()), firePlace, 4096, unix.FADV_DONTNEED); err != nil {
		return err
	}
	got := make([]byte, 4096)
	if _, err := file.ReadAt(got, firePlace); err != nil {
		return err
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{value}, 4096)) {
		return fmt.Errorf("had a second writer beside it: %d is %d", value, got[0])
	}
	return nil
}

// locksOn are the kernel's locks on a file.
func locksOn(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("%02x:%02x:%d ", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	var held string
	for line := range strings.Lines(string(locks)) {
		if strings.Contains(line, id) {
			held += line
		}
	}
	return held
}
