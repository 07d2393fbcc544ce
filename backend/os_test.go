package backend

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	ok(t, unix.Mkfifo(fifo, 0o666))
	sock := filepath.Join(dir, "sock")
	fd := must(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0))(t)
	defer unix.Close(fd)
	ok(t, unix.Bind(fd, &unix.SockaddrUnix{Name: sock}))
	for _, path := range []string{fifo, sock, dir, "/dev/null", "/dev/zero"} {
		for _, o := range []Options{{}, {Writable: true}, {Writable: true, Create: true}} {
			done := make(chan error, 1)
			go func() {
				f, err := Open(path, o)
				if err == nil {
					f.Close()
				}
				done <- err
			}()
			select {
			case err := <-done:
				if err == nil || !strings.Contains(err.Error(), path) {
					t.Errorf("%s %+v: %v", path, o, err)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("%s %+v hangs", path, o)
			}
		}
	}
	for _, o := range []Options{{Create: true}, {Exclusive: true}, {Writable: true, Exclusive: true}} {
		_, err := Open(filepath.Join(dir, "x"), o)
		wantErr(t, err, unix.EINVAL)
	}
	if _, err := os.Stat(filepath.Join(dir, "x")); !errors.Is(err, os.ErrNotExist) {
		t.Error("a refused open made a file")
	}
}

func TestOpenOptions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	_, err := Open(path, Options{})
	wantErr(t, err, os.ErrNotExist)
	f := must(Open(path, Options{Writable: true, Create: true, Exclusive: true}))(t)
	write(t, f, []byte("kept"), 0)
	if f.Name() != path {
		t.Errorf("name %q", f.Name())
	}
	ok(t, f.Close())
	_, err = Open(path, Options{Writable: true, Create: true, Exclusive: true})
	wantErr(t, err, os.ErrExist)
	f = must(Open(path, Options{Writable: true, Create: true}))(t)
	same(t, content(t, f), []byte("kept"))
	defer f.Close()

	r := must(Open(path, Options{}))(t)
	defer r.Close()
	if _, err := r.WriteAt([]byte("x"), 0); err == nil {
		t.Error("wrote through a read-only file")
	}
	if err := r.PunchHole(0, 1); err == nil {
		t.Error("punched a read-only file")
	}
	if err := r.Truncate(0); err == nil {
		t.Error("truncated a read-only file")
	}
	same(t, content(t, r), []byte("kept"))

	// The descriptor must not leak into programs that we start.
	var flags int
	ok(t, r.(*osFile).control(func(fd int) (err error) {
		flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		return err
	}))
	if flags&unix.FD_CLOEXEC == 0 {
		t.Error("not close-on-exec")
	}

	link := path + ".link"
	ok(t, os.Symlink(path, link))
	l := must(Open(link, Options{}))(t)
	defer l.Close()
	d1, i1, ok1 := IDOf(f)
	d2, i2, ok2 := IDOf(l)
	if d1 != d2 || i1 != i2 || !ok1 || !ok2 || i1 == 0 {
		t.Errorf("identities %d:%d and %d:%d", d1, i1, d2, i2)
	}
	if _, _, has := IDOf(NewMem("m")); has {
		t.Error("a Mem has an identity")
	}
	if LockerOf(f) == nil || LockerOf(NewMem("m")) != nil {
		t.Error("LockerOf")
	}
}

func TestNewFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	f := must(os.Create(path))(t)
	b := must(NewFile(f))(t)
	write(t, b, []byte("x"), 5)
	ok(t, b.Close())
	if _, err := f.Stat(); err == nil {
		t.Error("Close left the adopted descriptor open")
	}
	f = must(os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0))(t)
	defer f.Close()
	_, err := NewFile(f) // pwrite on O_APPEND ignores the offset
	wantErr(t, err, unix.EINVAL)
	r, w, err := os.Pipe()
	ok(t, err)
	defer r.Close()
	defer w.Close()
	if _, err := NewFile(r); err == nil {
		t.Error("adopted a pipe")
	}
}

// TestAllocations pins that a request on the hot path allocates nothing.
func TestAllocations(t *testing.T) {
	f := openTemp(t, t.TempDir(), Options{})
	write(t, f, pattern(1<<20, 1), 0)
	p := make([]byte, 4096)
	bufs := [][]byte{make([]byte, 1024), make([]byte, 1024), make([]byte, 1024)}
	for name, op := range map[string]func() (int, error){
		"ReadAt":   func() (int, error) { return f.ReadAt(p, 8192) },
		"WriteAt":  func() (int, error) { return f.WriteAt(p, 8192) },
		"ReadvAt":  func() (int, error) { return f.ReadvAt(bufs, 8192) },
		"WritevAt": func() (int, error) { return f.WritevAt(bufs, 8192) },
	} {
		if n := testing.AllocsPerRun(200, func() {
			if _, err := op(); err != nil {
				t.Fatal(err)
			}
		}); n != 0 && !imgtest.RaceEnabled {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
	m := NewMem("mem")
	write(t, m, pattern(1<<20, 1), 0)
	if n := testing.AllocsPerRun(200, func() { _, _ = m.ReadAt(p, 100) }); n != 0 {
		t.Errorf("ReadAt of a Mem allocates %v times", n)
	}
}

// TestDirectIsDirect: the descriptor has O_DIRECT, and what was written
// through it is what a buffered reader sees, and the other way round.
func TestDirectIsDirect(t *testing.T) {
	f := openTemp(t, t.TempDir(), Options{Direct: true})
	var flags int
	ok(t, f.(*osFile).control(func(fd int) (err error) {
		flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		return err
	}))
	if flags&unix.O_DIRECT == 0 {
		t.Fatal("no O_DIRECT")
	}
	buffered := must(Open(f.Name(), Options{Writable: true}))(t)
	defer buffered.Close()
	want := pattern(3<<20+17, 1)
	write(t, f, want[:100], 0)
	write(t, f, want[100:2<<20+3], 100)
	write(t, f, want[2<<20+3:], 2<<20+3)
	same(t, content(t, buffered), want)
	copy(want[5000:], "buffered")
	write(t, buffered, []byte("buffered"), 5000)
	same(t, content(t, f), want)
}

// TestDirectWriteBehindEnd: the file ends where the unaligned write ends.
func TestDirectWriteBehindEnd(t *testing.T) {
	f := openTemp(t, t.TempDir(), Options{Direct: true})
	write(t, f, []byte("abc"), 10001)
	if s := must(f.Size())(t); s != 10004 {
		t.Errorf("size %d", s)
	}
	write(t, f, pattern(4096, 1), 8192)
	if s := must(f.Size())(t); s != 12288 {
		t.Errorf("size %d", s)
	}
}

// loopDevice attaches an image of size bytes and returns the device and the
// image.
func loopDevice(t *testing.T, size int64) (dev, image string) {
	t.Helper()
	imgtest.RequireLoop(t)
	image = filepath.Join(t.TempDir(), "loop.img")
	ok(t, os.WriteFile(image, nil, 0o666))
	ok(t, os.Truncate(image, size))
	out, err := exec.Command("losetup", "-f", "--show", image).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	return dev, image
}

func TestBlockDevice(t *testing.T) {
	const size = 4 << 20
	dev, image := loopDevice(t, size)
	for _, direct := range []bool{false, true} {
		f := must(Open(dev, Options{Writable: true, Direct: direct}))(t)
		if s := must(f.Size())(t); s != size {
			t.Errorf("size %d", s)
		}
		if a := must(f.Allocated())(t); a != size {
			t.Errorf("allocated %d", a)
		}
		want := pattern(size, 7)
		write(t, f, want, 0)
		copy(want[513:], "unaligned")
		write(t, f, []byte("unaligned"), 513)
		same(t, content(t, f), want)

		if n, err := f.WriteAt(pattern(8192, 1), size-4096); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("across the end: %d, %v", n, err)
		}
		copy(want[size-4096:], content(t, f)[size-4096:])
		if n, err := f.WriteAt([]byte("12345"), size-3); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("unaligned across the end: %d, %v", n, err)
		}
		copy(want[size-3:], content(t, f)[size-3:])

		ok(t, f.Truncate(size))
		wantErr(t, f.Truncate(size+1), unix.EINVAL)
		wantErr(t, f.Truncate(size-1), unix.EINVAL)

		ok(t, f.PunchHole(1<<20+7, 1<<20-100))
		clear(want[1<<20+7 : 2<<20-93])
		ok(t, f.PunchHole(100, 50))
		clear(want[100:150])
		ok(t, f.ZeroRange(3<<20+1, 4000))
		clear(want[3<<20+1 : 3<<20+4001])
		ok(t, f.PunchHole(size-10, 1000))
		clear(want[size-10:])
		wantErr(t, f.ZeroRange(size-10, 11), unix.EINVAL)
		same(t, content(t, f), want)
		ok(t, f.Sync())
		same(t, must(os.ReadFile(image))(t), want)

		if at, err := f.SeekData(1<<20 + 4096); at != 1<<20+4096 || err != nil {
			t.Errorf("SeekData %d, %v", at, err)
		}
		if at, err := f.SeekHole(5); at != size || err != nil {
			t.Errorf("SeekHole %d, %v", at, err)
		}
		if _, err := f.SeekData(size); err != io.EOF {
			t.Errorf("SeekData at the end: %v", err)
		}
		if n, err := f.CopyRange(f, 0, 2<<20, 100001); n != 100001 || err != nil {
			t.Errorf("copy: %d, %v", n, err)
		}
		copy(want[2<<20:], want[:100001])
		same(t, content(t, f), want)
		other := openTemp(t, t.TempDir(), Options{})
		if n, err := other.CopyRange(f, 511, 0, 100001); n != 100001 || err != nil {
			t.Errorf("copy out: %d, %v", n, err)
		}
		same(t, content(t, other), want[511:511+100001])

		// Claimed: nobody else may have it for writing, everybody may read.
		_, err := Open(dev, Options{Writable: true})
		wantErr(t, err, ErrInUse)
		r := must(Open(dev, Options{}))(t)
		d1, i1, _ := IDOf(f)
		d2, i2, _ := IDOf(r)
		if d1 != d2 || i1 != i2 || i1 != 0 {
			t.Errorf("identities %d:%d and %d:%d", d1, i1, d2, i2)
		}
		ok(t, r.Close())
		ok(t, f.(Locker).Lock(WriterUse, WriterUnshare))
		ok(t, f.Close())
	}
}

// TestVectorShort: a call that transfers less than asked for (the kernel's
// limit is 0x7ffff000 bytes) or is interrupted is continued where it stopped.
func TestVectorShort(t *testing.T) {
	f := openTemp(t, t.TempDir(), Options{})
	defer func(r, w func(int, [][]byte, int64) (int, error)) { preadv, pwritev = r, w }(preadv, pwritev)
	calls := 0
	less := func(do func(int, [][]byte, int64) (int, error)) func(int, [][]byte, int64) (int, error) {
		return func(fd int, bufs [][]byte, off int64) (int, error) {
			if calls++; calls%3 == 0 {
				return -1, unix.EINTR
			}
			return do(fd, cut(bufs, calls%49+1), off)
		}
	}
	preadv, pwritev = less(preadv), less(pwritev)
	want := pattern(1000, 1)
	parts := func(p []byte) [][]byte { return [][]byte{p[:1], p[1:1], p[1:20], p[20:500], p[500:]} }
	calls = 0
	if n, err := f.WritevAt(parts(want), 3); n != len(want) || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	same(t, content(t, f)[3:], want)
	got := make([]byte, len(want))
	calls = 0
	if n, err := f.ReadvAt(parts(got), 3); n != len(want) || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	same(t, got, want)
	if calls < 20 {
		t.Errorf("only %d calls", calls)
	}
}

// TestDirectExcludes: while an unaligned write is between its reading and its
// writing, nothing else may change the file, or it would bring old bytes back;
// nor may Size see the file before it is cut to its length.
func TestDirectExcludes(t *testing.T) {
	f := openTemp(t, t.TempDir(), Options{Direct: true})
	o := f.(*osFile)
	write(t, f, pattern(1<<16, 1), 0)
	src := openTemp(t, t.TempDir(), Options{})
	write(t, src, pattern(1<<16, 2), 0)
	page := (*o.direct.pool.Get().(*[]byte))[:4096]
	for name, op := range map[string]func() error{
		"aligned write":   func() error { _, err := f.WriteAt(page, 4096); return err },
		"unaligned write": func() error { _, err := f.WriteAt(page[:7], 3); return err },
		"punch":           func() error { return f.PunchHole(8192, 4096) },
		"zero":            func() error { return f.ZeroRange(8192, 4096) },
		"truncate":        func() error { return f.Truncate(1 << 17) },
		"copy":            func() error { _, err := f.CopyRange(src, 0, 0, 4096); return err },
		"size":            func() error { _, err := f.Size(); return err },
	} {
		o.direct.mu.Lock()
		done := make(chan error, 1)
		go func() { done <- op() }()
		select {
		case err := <-done:
			t.Errorf("%s did not wait (%v)", name, err)
			o.direct.mu.Unlock()
		case <-time.After(20 * time.Millisecond):
			o.direct.mu.Unlock()
			ok(t, <-done)
		}
	}
	// Two unaligned writes exclude each other: see TestConcurrent.
}
