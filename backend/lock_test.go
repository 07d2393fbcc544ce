package backend

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// lockBytesOf returns the byte ranges that /proc/locks lists for the file, of
// all holders together, sorted: "OFDLCK READ 100-101".
func lockBytesOf(t *testing.T, path string) []string {
	t.Helper()
	var st unix.Stat_t
	ok(t, unix.Stat(path, &st))
	id := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	locks := must(os.ReadFile("/proc/locks"))(t)
	var out []string
	for line := range strings.Lines(string(locks)) {
		w := strings.Fields(line)
		if len(w) == 8 && w[5] == id {
			out = append(out, fmt.Sprintf("%s %s %s-%s", w[1], w[3], w[6], w[7]))
		}
	}
	slices.Sort(out)
	return out
}

func open(t *testing.T, path string, writable bool) *osFile {
	t.Helper()
	f := must(Open(path, Options{Writable: writable}))(t)
	t.Cleanup(func() { f.Close() })
	return f.(*osFile)
}

func qcow2(t *testing.T) string {
	t.Helper()
	imgtest.Require(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "10M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// qemuHold keeps the image open in a qemu-io process until stop is called.
func qemuHold(t *testing.T, path string, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command("qemu-io", append(args, path)...)
	in := must(cmd.StdinPipe())(t)
	outPipe := must(cmd.StdoutPipe())(t)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	ok(t, cmd.Start())
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			in.Close()
			cmd.Wait()
		}
	}
	t.Cleanup(func() { cmd.Process.Kill(); stop() })
	// The prompt comes when the image is open.
	p := make([]byte, 64)
	if n, err := outPipe.Read(p); err != nil || !strings.Contains(string(p[:n]), "qemu-io>") {
		t.Fatalf("qemu-io said %q, %v, %s", p[:n], err, errOut.String())
	}
	go func() { _, _ = io.Copy(io.Discard, outPipe) }()
	return stop
}

var writerShape = []string{"OFDLCK READ 100-101", "OFDLCK READ 103-103", "OFDLCK READ 201-201", "OFDLCK READ 203-203"}
var readerShape = []string{"OFDLCK READ 100-100", "OFDLCK READ 201-201", "OFDLCK READ 203-203"}

func TestLockShape(t *testing.T) {
	path := qcow2(t)
	for _, c := range []struct {
		name         string
		args         []string
		use, unshare Perm
		want         []string
	}{
		{"reader", []string{"-r"}, ReaderUse, ReaderUnshare, readerShape},
		{"writer", nil, WriterUse, WriterUnshare, writerShape},
	} {
		stop := qemuHold(t, path, c.args...)
		if got := lockBytesOf(t, path); !slices.Equal(got, c.want) {
			t.Errorf("qemu %s holds %q, want %q", c.name, got, c.want)
		}
		stop()
		f := open(t, path, false)
		ok(t, f.Lock(c.use, c.unshare))
		if got := lockBytesOf(t, path); !slices.Equal(got, c.want) {
			t.Errorf("our %s holds %q, want %q", c.name, got, c.want)
		}
		ok(t, f.Unlock())
		if got := lockBytesOf(t, path); got != nil {
			t.Errorf("after Unlock %q", got)
		}
	}
}

func TestLockAgainstQemu(t *testing.T) {
	path := qcow2(t)
	f := open(t, path, true)

	stop := qemuHold(t, path)
	for _, l := range [][2]Perm{{ReaderUse, ReaderUnshare}, {WriterUse, WriterUnshare}} {
		err := f.Lock(l[0], l[1])
		wantErr(t, err, ErrInUse)
		if !strings.Contains(err.Error(), path) {
			t.Errorf("%q does not name the file", err)
		}
	}
	if got := lockBytesOf(t, path); !slices.Equal(got, writerShape) {
		t.Errorf("a refused lock left %q", got)
	}
	stop()

	stop = qemuHold(t, path, "-r")
	wantErr(t, f.Lock(WriterUse, WriterUnshare), ErrInUse)
	ok(t, f.Lock(ReaderUse, ReaderUnshare)) // readers share
	// An upgrade that is refused leaves the reader's lock.
	wantErr(t, f.Lock(WriterUse, WriterUnshare), ErrInUse)
	stop()
	if got := lockBytesOf(t, path); !slices.Equal(got, readerShape) {
		t.Errorf("a refused upgrade left %q", got)
	}

	qemu := func(want bool, name string, args ...string) {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		// qemu-io exits 0 or 1 but always says it.
		refused := err != nil || strings.Contains(string(out), "Failed to get")
		if refused == want {
			t.Errorf("%s %v: %v: %s", name, args, err, out)
		}
	}
	qemu(true, "qemu-img", "info", path)
	qemu(false, "qemu-img", "check", "-r", "all", path)
	qemu(false, "qemu-io", "-c", "write 0 64k", path)
	ok(t, f.Lock(WriterUse, WriterUnshare)) // upgrade
	qemu(false, "qemu-img", "info", path)
	qemu(true, "qemu-img", "info", "-U", path)
	qemu(false, "qemu-io", "-c", "write 0 64k", path)
	ok(t, f.Lock(ReaderUse, ReaderUnshare)) // downgrade
	if got := lockBytesOf(t, path); !slices.Equal(got, readerShape) {
		t.Errorf("after the downgrade %q", got)
	}
	qemu(true, "qemu-img", "info", path)
	ok(t, f.Close())
	qemu(true, "qemu-io", "-c", "write 0 64k", path)
}

// TestLockMatrix compares every pair of requests with the rule itself.
func TestLockMatrix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	ok(t, os.WriteFile(path, []byte("x"), 0o666))
	a, b := open(t, path, true), open(t, path, false)
	for x := range 256 {
		if x%5 != 0 && x%16 != 0 { // a sample
			continue
		}
		use, unshare := Perm(x&15), Perm(x>>4)
		ok(t, a.Lock(use, unshare))
		for y := range 256 {
			use2, unshare2 := Perm(y&15), Perm(y>>4)
			err := b.Lock(use2, unshare2)
			if conflict := use&unshare2 != 0 || use2&unshare != 0; conflict {
				wantErr(t, err, ErrInUse)
			} else {
				ok(t, err)
			}
			ok(t, b.Unlock())
		}
		ok(t, a.Unlock())
	}
	if got := lockBytesOf(t, path); got != nil {
		t.Errorf("left over: %q", got)
	}
	wantErr(t, a.Lock(1<<5, 0), unix.EINVAL)
}

// TestLockForeign: a plain fcntl write lock over the file is a conflict, too.
func TestLockForeign(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	ok(t, os.WriteFile(path, []byte("x"), 0o666))
	a, b := open(t, path, true), open(t, path, true)
	l := unix.Flock_t{Type: unix.F_WRLCK}
	ok(t, a.control(func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) }))
	wantErr(t, b.Lock(ReaderUse, ReaderUnshare), ErrInUse)
	if got := lockBytesOf(t, path); len(got) != 1 {
		t.Errorf("left over: %q", got)
	}
	ok(t, a.Close())
	ok(t, b.Lock(ReaderUse, ReaderUnshare))
}

func TestPermString(t *testing.T) {
	if s := (PermWrite | PermResize).String(); s != "write, resize" {
		t.Error(s)
	}
	if s := Perm(0).String() + Perm(128).String(); s != "noneunknown" {
		t.Error(s)
	}
}

// ploopStart starts Debian's ploop, which crashes on short environments.
func ploopStart(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	imgtest.RequireRoot(t)
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	imgtest.Require(t, "ploop")
	cmd := exec.Command("ploop", args...)
	cmd.Env = append(os.Environ(), "PAD="+strings.Repeat("0", 8000))
	ok(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 2000 {
		if done() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("waited in vain until %s", what)
}

// TestPloopWaitsForUs: while we hold the lock, ploop waits; then it goes on.
func TestPloopWaitsForUs(t *testing.T) {
	dir := t.TempDir()
	xml := filepath.Join(dir, "DiskDescriptor.xml")
	ok(t, ploopStart(t, "init", "-s", "4M", "-t", "none", "-v", "1", filepath.Join(dir, "root.hds")).Wait())
	before := must(os.ReadFile(xml))(t)
	lock := must(LockDescriptor(xml))(t)
	cmd := ploopStart(t, "snapshot", xml)
	waiting := func() bool {
		return strings.Contains(string(must(os.ReadFile("/proc/locks"))(t)),
			fmt.Sprintf("-> FLOCK  ADVISORY  WRITE %d ", cmd.Process.Pid))
	}
	waitFor(t, "ploop waits for our lock", waiting)
	if !bytes.Equal(before, must(os.ReadFile(xml))(t)) {
		t.Error("ploop did not respect the lock")
	}
	ok(t, lock.Close())
	ok(t, cmd.Wait())
	if bytes.Equal(before, must(os.ReadFile(xml))(t)) {
		t.Error("ploop did nothing after the lock was free")
	}
	ok(t, must(LockDescriptor(xml))(t).Close())
}

// TestPloopHoldsLock: a FIFO in place of the image keeps ploop in open(2) with
// the lock in its hand while we try.
func TestPloopHoldsLock(t *testing.T) {
	dir := t.TempDir()
	xml, image := filepath.Join(dir, "DiskDescriptor.xml"), filepath.Join(dir, "root.hds")
	ok(t, ploopStart(t, "init", "-s", "4M", "-t", "none", "-v", "1", image).Wait())
	ok(t, os.Remove(image))
	ok(t, unix.Mkfifo(image, 0o600))
	cmd := ploopStart(t, "snapshot", xml)
	held := func() bool {
		var st unix.Stat_t
		return unix.Stat(xml+".lck", &st) == nil && strings.Contains(string(must(os.ReadFile("/proc/locks"))(t)),
			fmt.Sprintf(": FLOCK  ADVISORY  WRITE %d %02x:%02x:%d ", cmd.Process.Pid,
				unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino))
	}
	waitFor(t, "ploop holds its lock", held)
	for range 2 {
		_, err := LockDescriptor(xml)
		wantErr(t, err, ErrInUse)
		_, err = LockDescriptorShared(xml)
		wantErr(t, err, ErrInUse)
		if !held() {
			t.Fatal("ploop gave up too early to show anything")
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
	ok(t, must(LockDescriptor(xml))(t).Close())
}

func TestLockDescriptor(t *testing.T) {
	dir := t.TempDir()
	xml := filepath.Join(dir, "DiskDescriptor.xml")
	a := must(LockDescriptorShared(xml))(t)
	b := must(LockDescriptorShared(xml))(t)
	_, err := LockDescriptor(xml)
	wantErr(t, err, ErrInUse)
	ok(t, a.Close())
	ok(t, b.Close())
	ok(t, must(LockDescriptor(xml))(t).Close())

	lck := xml + ".lck"
	ok(t, os.Remove(lck))
	ok(t, os.Symlink(filepath.Join(dir, "elsewhere"), lck))
	_, err = LockDescriptor(xml)
	wantErr(t, err, unix.ELOOP)
	if _, err := os.Stat(filepath.Join(dir, "elsewhere")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a link was followed: %v", err)
	}
	ok(t, os.Remove(lck))
	ok(t, unix.Mkfifo(lck, 0o600))
	_, err = LockDescriptor(xml)
	wantErr(t, err, unix.EINVAL)
	_, err = LockDescriptor(filepath.Join(dir, "no", "DiskDescriptor.xml"))
	wantErr(t, err, os.ErrNotExist)
}

// A second descriptor of the same description, as a forked child has until its
// exec, does not hold the locks of a file that was closed.
func TestCloseGivesUpLocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	first, err := Open(path, Options{Writable: true, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := LockerOf(first).Lock(WriterUse, WriterUnshare); err != nil {
		t.Fatal(err)
	}
	child := -1
	err = WithDescriptor(first, func(fd int) (err error) {
		child, err = unix.Dup(fd)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(child)
	second, err := Open(path, Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := LockerOf(second).Lock(WriterUse, WriterUnshare); !errors.Is(err, ErrInUse) {
		t.Fatalf("while it is open: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := LockerOf(second).Lock(WriterUse, WriterUnshare); err != nil {
		t.Errorf("after it was closed: %v", err)
	}
}
