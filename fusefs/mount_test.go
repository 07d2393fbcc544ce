package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

// open opens a file of the mount for the time of the test.
func open(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func wantErrno(t *testing.T, what string, err error, want unix.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = r.Read(b)
	return b
}

func TestOperations(t *testing.T) {
	imgtest.RequireFuse(t)
	const size = 8<<20 + 512
	dev := newMemDevice(size)
	_, path := mounted(t, dev, Options{FlushAfter: -1})
	f := open(t, path, os.O_RDWR)
	fd := int(f.Fd())

	st, err := f.Stat()
	if err != nil || st.Size() != size || st.Mode() != 0o666 {
		t.Fatalf("stat: %v %v", st, err)
	}
	want := make([]byte, size)
	for i, w := range []struct{ off, n int }{{0, 1}, {4095, 2}, {1 << 20, 3 << 20}, {size - 700, 700}, {12345, 54321}} {
		p := pattern(uint64(i), w.n)
		copy(want[w.off:], p)
		if n, err := f.WriteAt(p, int64(w.off)); n != w.n || err != nil {
			t.Fatalf("write: %d %v", n, err)
		}
	}
	compare := func(when string) {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: buffered content differs (%d bytes, %v)", when, len(got), err)
		}
		dev.set(func() {
			if !bytes.Equal(dev.data, want) {
				t.Fatalf("%s: device content differs", when)
			}
		})
		d := open(t, path, os.O_RDONLY|unix.O_DIRECT)
		buf := imgtest.Aligned(t, 2<<20)
		for off := 0; off < size; {
			n, err := unix.Pread(int(d.Fd()), buf, int64(off))
			if err != nil || n == 0 || !bytes.Equal(buf[:n], want[off:off+n]) {
				t.Fatalf("%s: direct content differs at %d: %d %v", when, off, n, err)
			}
			off += n
		}
	}
	compare("after writing")

	// Direct writes are seen by those who hold the file open for cached I/O.
	d := open(t, path, os.O_RDWR|unix.O_DIRECT)
	buf := imgtest.Aligned(t, 1<<20)
	copy(buf, pattern(77, len(buf)))
	if n, err := d.WriteAt(buf, 4096); n != len(buf) || err != nil {
		t.Fatalf("direct write: %d %v", n, err)
	}
	copy(want[4096:], buf)
	got := make([]byte, len(buf))
	if _, err := f.ReadAt(got, 4096); err != nil || !bytes.Equal(got, buf) {
		t.Fatal("cached read does not see the direct write")
	}
	compare("after direct write")

	// Holes: exact, and seen through the cache.
	if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20+100, 1<<20); err != nil {
		t.Fatal(err)
	}
	clear(want[1<<20+100 : 2<<20+100])
	compare("after punching")
	if err := unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 3, 9); err != nil {
		t.Fatal(err)
	}
	clear(want[3:12])
	if err := unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, size-100, 100); err != nil {
		t.Fatal(err)
	}
	clear(want[size-100:])
	if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, size-4096, 1<<20); err != nil {
		t.Fatal("a hole over the end: ", err)
	}
	clear(want[size-4096:])
	compare("after zeroing")
	wantErrno(t, "zero over the end", unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, size-10, 20), unix.EFBIG)
	wantErrno(t, "allocate", unix.Fallocate(fd, 0, 0, 4096), unix.EOPNOTSUPP)
	wantErrno(t, "collapse", unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096), unix.EOPNOTSUPP)
	wantErrno(t, "insert", unix.Fallocate(fd, unix.FALLOC_FL_INSERT_RANGE, 0, 4096), unix.EOPNOTSUPP)

	// Shared mappings.
	m, err := unix.Mmap(fd, 2<<20, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m, want[2<<20:][:len(m)]) {
		t.Error("the mapping shows something else")
	}
	copy(m[5000:], "mapped")
	copy(want[2<<20+5000:], "mapped")
	if err := errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m)); err != nil {
		t.Error(err)
	}
	compare("after writing through a mapping")

	// The end of the file.
	if n, err := unix.Pwrite(fd, make([]byte, 100), size-40); n != 40 || err != nil {
		t.Errorf("write over the end: %d %v", n, err)
	}
	_, err = unix.Pwrite(fd, make([]byte, 100), size)
	wantErrno(t, "write at the end", err, unix.EFBIG)
	if n, err := unix.Pread(fd, make([]byte, 100), size-40); n != 40 || err != nil {
		t.Errorf("read over the end: %d %v", n, err)
	}

	// The size is fixed.
	if err := f.Truncate(size); err != nil {
		t.Errorf("truncate to the same size: %v", err)
	}
	wantErrno(t, "shrink", f.Truncate(size-1), unix.EPERM)
	wantErrno(t, "shrink to nothing", f.Truncate(0), unix.EPERM)
	wantErrno(t, "grow", f.Truncate(size+1), unix.EFBIG)
	open(t, path, os.O_WRONLY|os.O_TRUNC)
	compare("after O_TRUNC")

	// Metadata that cp -p and install touch.
	for what, err := range map[string]error{
		"chmod": os.Chmod(path, 0o600), "chown": os.Chown(path, os.Getuid(), os.Getgid()),
		"utimes": os.Chtimes(path, time.Now(), time.Now()),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		t.Errorf("after chmod: %v %v", st.Mode(), err)
	}

	// fsync reaches the device.
	if !dev.isDirty() {
		t.Error("nothing to sync: the test proves nothing")
	}
	if err := f.Sync(); err != nil || dev.isDirty() {
		t.Errorf("fsync: %v, dirty %v", err, dev.isDirty())
	}
}

func TestSeekAndBlocks(t *testing.T) {
	imgtest.RequireFuse(t)
	dev := newMemDevice(1 << 20)
	_, path := mounted(t, dev, Options{})
	f := open(t, path, os.O_RDWR)
	for _, off := range []int64{64 << 10, 512 << 10} {
		if _, err := f.WriteAt(make([]byte, 8192), off); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		off    int64
		whence int
		want   int64
	}{
		{0, unix.SEEK_DATA, 64 << 10}, {0, unix.SEEK_HOLE, 0}, {64 << 10, unix.SEEK_HOLE, 72 << 10},
		{70 << 10, unix.SEEK_DATA, 70 << 10}, {72 << 10, unix.SEEK_DATA, 512 << 10},
		{520 << 10, unix.SEEK_HOLE, 520 << 10},
	} {
		if got, err := f.Seek(c.off, c.whence); err != nil || got != c.want {
			t.Errorf("seek %d %d: %d %v, want %d", c.off, c.whence, got, err, c.want)
		}
	}
	_, err := f.Seek(520<<10, unix.SEEK_DATA)
	wantErrno(t, "no more data", err, unix.ENXIO)
	_, err = f.Seek(1<<20, unix.SEEK_HOLE)
	wantErrno(t, "hole at the end", err, unix.ENXIO)

	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Blocks != 32 || st.Size != 1<<20 {
		t.Errorf("blocks %d size %d %v", st.Blocks, st.Size, err)
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 64<<10, 8192); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Blocks != 16 {
		t.Errorf("blocks after punching: %d %v", st.Blocks, err)
	}
}

func TestReadOnly(t *testing.T) {
	imgtest.RequireFuse(t)
	dev := newMemDevice(1 << 20)
	copy(dev.data, "hello")
	dev.readOnly = true
	srv, path := mounted(t, dev, Options{Umask: 0o077})
	_, err := os.OpenFile(path, os.O_RDWR, 0)
	wantErrno(t, "open for writing", err, unix.EROFS)
	wantErrno(t, "truncate", os.Truncate(path, 0), unix.EROFS)
	wantErrno(t, "create", os.WriteFile(srv.Dir()+"/x", nil, 0o600), unix.EROFS)
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o400 {
		t.Errorf("mode %v %v", st.Mode(), err)
	}
	if b, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(b), "hello") || len(b) != 1<<20 {
		t.Errorf("read: %v", err)
	}
	f := open(t, path, os.O_RDONLY)
	if err := f.Sync(); err != nil {
		t.Errorf("fsync of a read-only disk: %v", err)
	}
}

func TestErrnos(t *testing.T) {
	imgtest.RequireFuse(t)
	dev := newMemDevice(1 << 20)
	var reports []string
	srv, path := mounted(t, dev, Options{Report: func(err error) { reports = append(reports, err.Error()) }, FlushAfter: -1})
	_ = srv
	f := open(t, path, os.O_RDWR|unix.O_DIRECT)
	buf := imgtest.Aligned(t, 4096)
	for _, c := range []struct {
		err  error
		want unix.Errno
	}{
		{fmt.Errorf("img: %w", unix.ENOSPC), unix.ENOSPC},
		{&layers.ImageError{Path: "x", Offset: -1, Err: layers.ErrCorrupt}, unix.EIO},
		{fmt.Errorf("%w: %w", layers.ErrCorrupt, unix.ENOSPC), unix.EIO},
		{layers.ErrReadOnly, unix.EROFS},
		{&os.PathError{Op: "write", Path: "x", Err: unix.EDQUOT}, unix.EDQUOT},
		{errors.New("anything"), unix.EIO},
		{unix.ENOSYS, unix.EIO},
		{unix.EBADF, unix.EIO},
	} {
		dev.set(func() { dev.writeErr, dev.readErr, dev.zeroErr, dev.syncErr = c.err, c.err, c.err, c.err })
		for range 2 {
			_, err := f.WriteAt(buf, 0)
			wantErrno(t, fmt.Sprintf("write, %v", c.err), err, c.want)
			_, err = f.ReadAt(buf, 0)
			wantErrno(t, fmt.Sprintf("read, %v", c.err), err, c.want)
			wantErrno(t, fmt.Sprintf("fsync, %v", c.err), f.Sync(), c.want)
			wantErrno(t, fmt.Sprintf("punch, %v", c.err), unix.Fallocate(int(f.Fd()),
				unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096), c.want)
		}
	}
	dev.set(func() { dev.writeErr, dev.readErr, dev.zeroErr, dev.syncErr = nil, nil, nil, nil })
	if n := len(reports); n != 7 { // all but EROFS, each once
		t.Errorf("%d reports: %q", n, reports)
	}
	// The mount is alive, and nothing was switched off for good.
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Error(err)
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err != nil {
		t.Error(err)
	}
}

func TestDirectory(t *testing.T) {
	imgtest.RequireFuse(t)
	dev := newMemDevice(1 << 20)
	srv, _ := mounted(t, dev, Options{Image: "/x/y.qcow2", PID: 4711, Umask: 0o077,
		Partitions: []Partition{{"p1", 4096, 8192}, {"p5", 65536, 65536}}})
	entries, err := os.ReadDir(srv.Dir())
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); err != nil || got != "disk.raw p1 p5" {
		t.Errorf("listing: %q %v", got, err)
	}
	buf := make([]byte, 64)
	n, err := unix.Getxattr(srv.Dir(), XattrPID, buf)
	if err != nil || string(buf[:n]) != "4711" {
		t.Errorf("pid attribute: %q %v", buf[:max(n, 0)], err)
	}
	n, err = unix.Getxattr(srv.Dir(), XattrImage, buf)
	if err != nil || string(buf[:n]) != "/x/y.qcow2" {
		t.Errorf("image attribute: %q %v", buf[:max(n, 0)], err)
	}
	if n, err := unix.Listxattr(srv.Dir(), make([]byte, 256)); err != nil || n != len(XattrPID)+len(XattrImage)+2 {
		t.Errorf("listxattr: %d %v", n, err)
	}
	_, err = unix.Getxattr(srv.Dir(), "user.other", buf)
	wantErrno(t, "no such attribute", err, unix.ENODATA)
	_, err = os.Stat(srv.Dir() + "/nothing")
	wantErrno(t, "no such file", err, unix.ENOENT)
	if err := os.Remove(srv.Dir() + "/disk.raw"); err == nil {
		t.Error("unlink succeeded")
	}
	var sfs unix.Statfs_t
	if err := unix.Statfs(srv.Dir(), &sfs); err != nil || sfs.Blocks != 256 || sfs.Bfree != 256 {
		t.Errorf("statfs: %+v %v", sfs, err)
	}
}

// Two inodes show the same bytes: neither may serve stale pages of the other.
func TestPartitionCoherence(t *testing.T) {
	imgtest.RequireFuse(t)
	dev := newMemDevice(4 << 20)
	srv, path := mounted(t, dev, Options{Partitions: []Partition{{"p1", 1 << 20, 1 << 20}}})
	disk, part := open(t, path, os.O_RDWR), open(t, srv.Dir()+"/p1", os.O_RDWR)
	a, b := make([]byte, 10000), make([]byte, 10000)
	for i := range 20 {
		w, wo, r, ro := disk, int64(1<<20), part, int64(0)
		if i%2 == 1 {
			w, wo, r, ro = part, 0, disk, 1<<20
		}
		if _, err := r.ReadAt(b, ro+5); err != nil { // fill a cache
			t.Fatal(err)
		}
		copy(a, pattern(uint64(i), len(a)))
		if _, err := w.WriteAt(a, wo+5); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadAt(b, ro+5); err != nil || !bytes.Equal(a, b) {
			t.Fatalf("round %d: stale bytes (%v)", i, err)
		}
		if err := unix.Fallocate(int(w.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, wo, 20000); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadAt(b, ro+5); err != nil || !bytes.Equal(b, make([]byte, len(b))) {
			t.Fatalf("round %d: bytes of before the discard (%v)", i, err)
		}
	}
	_, err := unix.Pwrite(int(part.Fd()), a, 1<<20)
	wantErrno(t, "write behind the partition", err, unix.EFBIG)
	if n, err := unix.Pwrite(int(part.Fd()), a, 1<<20-10); n != 10 || err != nil {
		t.Errorf("write over the end of the partition: %d %v", n, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(part.Fd()), &st); err != nil || st.Size != 1<<20 || st.Blocks != 8 {
		t.Errorf("partition: size %d blocks %d %v", st.Size, st.Blocks, err)
	}
}

// What nobody fsyncs is synced soon anyway, and a failure is not forgotten.
func TestBackgroundFlush(t *testing.T) {
	imgtest.RequireFuse(t)
	dev := newMemDevice(1 << 20)
	_, path := mounted(t, dev, Options{FlushAfter: 40 * time.Millisecond})
	f := open(t, path, os.O_RDWR)
	wait := func(what string, done func() bool) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	if _, err := f.WriteAt([]byte("x"), 0); err != nil || !dev.isDirty() {
		t.Fatal(err)
	}
	wait("no background sync", func() bool { return !dev.isDirty() })
	count := func() (n int) { dev.set(func() { n = dev.syncs }); return n }
	n := count()
	time.Sleep(150 * time.Millisecond)
	if count() != n {
		t.Error("syncs although nothing changed")
	}
	dev.set(func() { dev.syncErr = unix.EDQUOT })
	if _, err := f.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	wait("no second sync", func() bool { return count() > n })
	time.Sleep(20 * time.Millisecond)
	dev.set(func() { dev.syncErr = nil })
	wantErrno(t, "fsync after a failed background sync", f.Sync(), unix.EDQUOT)
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
}

func TestShutdown(t *testing.T) {
	imgtest.RequireFuse(t)
	dev := newMemDevice(1 << 20)
	srv, path := mounted(t, dev, Options{FlushAfter: -1})
	f := open(t, path, os.O_RDWR|unix.O_DIRECT)
	buf := imgtest.Aligned(t, 4096)
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	wantErrno(t, "unmount while in use", Unmount(srv.Dir(), false), unix.EBUSY)
	if err := srv.fs.Shutdown(); err != nil || dev.isDirty() {
		t.Fatalf("shutdown: %v, dirty %v", err, dev.isDirty())
	}
	_, err := f.WriteAt(buf, 0)
	wantErrno(t, "write after shutdown", err, unix.EIO)
	wantErrno(t, "fsync after shutdown", f.Sync(), unix.EIO)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
