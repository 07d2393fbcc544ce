package backend

import (
	"bytes"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// impl is one way to make an empty, writable File.
type impl struct {
	name string
	make func(t *testing.T) File
}

func must[T any](v T, err error) func(t tb) T {
	return func(t tb) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func openTemp(t *testing.T, dir string, o Options) File {
	t.Helper()
	o.Writable, o.Create = true, true
	f, err := Open(filepath.Join(dir, "image"), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// shmDir is a directory in tmpfs.
func shmDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "backend-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func implementations() []impl {
	return []impl{
		{"os", func(t *testing.T) File { return openTemp(t, t.TempDir(), Options{}) }},
		{"tmpfs", func(t *testing.T) File { return openTemp(t, shmDir(t), Options{}) }},
		{"direct", func(t *testing.T) File { return openTemp(t, t.TempDir(), Options{Direct: true}) }},
		{"direct 4096", func(t *testing.T) File { // as where statx(2) says nothing
			f := openTemp(t, t.TempDir(), Options{Direct: true})
			f.(*osFile).direct.unit, f.(*osFile).direct.mem = 4096, 4096
			return f
		}},
		{"mem", func(t *testing.T) File { return NewMem("mem") }},
		{"fault", func(t *testing.T) File { return NewFault(NewMem("mem")) }},
		{"fault over os", func(t *testing.T) File { return NewFault(openTemp(t, t.TempDir(), Options{})) }},
		{"fault tracking", func(t *testing.T) File {
			f := NewFault(NewMem("mem"))
			f.Inject(Rule{On: OpSync, Nth: 1 << 30, DropUnsynced: true})
			return f
		}},
		{"recorder", func(t *testing.T) File { return must(NewRecorder().Wrap(NewMem("mem")))(t) }},
		{"recorder over os", func(t *testing.T) File {
			return must(NewRecorder().Wrap(openTemp(t, t.TempDir(), Options{})))(t)
		}},
	}
}

func each(t *testing.T, test func(t *testing.T, im impl, f File)) {
	for _, im := range implementations() {
		t.Run(im.name, func(t *testing.T) { test(t, im, im.make(t)) })
	}
}

func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7+i>>8) ^ seed | 1
	}
	return p
}

func content(t tb, f File) []byte {
	t.Helper()
	size := must(f.Size())(t)
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n != len(b) || err != nil && err != io.EOF {
		t.Fatalf("reading all %d bytes: %d, %v", size, n, err)
	}
	return b
}

func write(t tb, f File, p []byte, off int64) {
	t.Helper()
	if n, err := f.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
}

func ok(t tb, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t tb, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Fatalf("error is %v, want %v", err, class)
	}
}

func same(t tb, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%d bytes, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
		}
	}
}

func TestReadEnd(t *testing.T) {
	each(t, func(t *testing.T, _ impl, f File) {
		data := pattern(10000, 3)
		write(t, f, data, 0)
		p := make([]byte, 100)
		if n, err := f.ReadAt(p, 9950); n != 50 || err != io.EOF || !bytes.Equal(p[:50], data[9950:]) {
			t.Fatalf("across the end: %d, %v", n, err)
		}
		for _, off := range []int64{10000, 10001, 1 << 40} {
			if n, err := f.ReadAt(p, off); n != 0 || err != io.EOF {
				t.Fatalf("at %d: %d, %v", off, n, err)
			}
			if n, err := f.ReadvAt([][]byte{p[:3], p[3:]}, off); n != 0 || err != io.EOF {
				t.Fatalf("vectored at %d: %d, %v", off, n, err)
			}
		}
		if n, err := f.ReadAt(p, 9900); n != 100 || err != nil && err != io.EOF {
			t.Fatalf("up to the end: %d, %v", n, err)
		}
		if n, err := f.ReadvAt([][]byte{p[:30], nil, p[30:]}, 9960); n != 40 || err != io.EOF || !bytes.Equal(p[:40], data[9960:]) {
			t.Fatalf("vectored across the end: %d, %v", n, err)
		}
	})
}

func TestBadRange(t *testing.T) {
	each(t, func(t *testing.T, _ impl, f File) {
		write(t, f, pattern(5000, 1), 0)
		p := make([]byte, 10)
		if _, err := f.ReadAt(p, -1); err == nil {
			t.Error("read at -1")
		}
		if _, err := f.WriteAt(p, -1); err == nil {
			t.Error("write at -1")
		}
		if _, err := f.ReadvAt([][]byte{p, p}, -1); err == nil {
			t.Error("readv at -1")
		}
		if _, err := f.WritevAt([][]byte{p, p}, -1); err == nil {
			t.Error("writev at -1")
		}
		for _, r := range [][2]int64{{-1, 5}, {0, -1}, {math.MaxInt64, 2}} {
			wantErr(t, f.PunchHole(r[0], r[1]), unix.EINVAL)
			wantErr(t, f.ZeroRange(r[0], r[1]), unix.EINVAL)
			_, err := f.CopyRange(f, r[0], 4000, r[1])
			wantErr(t, err, unix.EINVAL)
			_, err = f.CopyRange(f, 4000, r[0], r[1])
			wantErr(t, err, unix.EINVAL)
		}
		wantErr(t, f.Truncate(-1), unix.EINVAL)
		wantErr(t, f.ZeroRange(4999, 2), unix.EINVAL)
		if _, err := f.SeekData(-1); err == nil || err == io.EOF {
			t.Errorf("seek to -1: %v", err)
		}
		same(t, content(t, f), pattern(5000, 1))
	})
}

func TestVectors(t *testing.T) {
	each(t, func(t *testing.T, _ impl, f File) {
		// More buffers than one call takes, among them empty ones.
		var bufs [][]byte
		var want []byte
		for i := range 2500 {
			p := pattern(i%37, byte(i))
			bufs = append(bufs, p)
			want = append(want, p...)
		}
		if n, err := f.WritevAt(bufs, 777); n != len(want) || err != nil {
			t.Fatalf("wrote %d of %d, %v", n, len(want), err)
		}
		same(t, content(t, f), append(make([]byte, 777), want...))
		var back [][]byte
		for i := range 2500 {
			back = append(back, make([]byte, (i*5)%37))
		}
		total := 0
		for _, p := range back {
			total += len(p)
		}
		n, err := f.ReadvAt(back, 777)
		if n != min(total, len(want)) || n < total && err != io.EOF {
			t.Fatalf("read %d, %v", n, err)
		}
		same(t, bytes.Join(back, nil)[:n], want[:n])
		if n, err := f.WritevAt(nil, 1<<20); n != 0 || err != nil {
			t.Fatalf("no buffers: %d, %v", n, err)
		}
		if n, err := f.WritevAt([][]byte{nil, {}}, 1<<20); n != 0 || err != nil {
			t.Fatalf("empty buffers: %d, %v", n, err)
		}
		if size := must(f.Size())(t); size != int64(777+len(want)) {
			t.Fatalf("writing nothing made it %d long", size)
		}
	})
}

func TestTruncate(t *testing.T) {
	each(t, func(t *testing.T, _ impl, f File) {
		data := pattern(20000, 9)
		write(t, f, data, 0)
		ok(t, f.Truncate(5001))
		ok(t, f.Truncate(9000))
		same(t, content(t, f), append(bytes.Clone(data[:5001]), make([]byte, 9000-5001)...))
		ok(t, f.Truncate(0))
		if a := must(f.Allocated())(t); a != 0 {
			t.Errorf("%d bytes allocated in an empty file", a)
		}
		ok(t, f.Truncate(1<<40))
		if s := must(f.Size())(t); s != 1<<40 {
			t.Errorf("size %d", s)
		}
		if a := must(f.Allocated())(t); a > 64<<10 {
			t.Errorf("%d bytes allocated for a hole", a)
		}
		write(t, f, []byte{1}, 1<<40)
		if s := must(f.Size())(t); s != 1<<40+1 {
			t.Errorf("size %d", s)
		}
	})
}

func TestHoles(t *testing.T) {
	each(t, func(t *testing.T, _ impl, f File) {
		const K = 64 << 10
		write(t, f, pattern(K, 1), 2*K)
		write(t, f, pattern(K, 2), 5*K)
		ok(t, f.Truncate(8*K))
		ok(t, f.Sync())
		for _, c := range []struct{ off, data, hole int64 }{
			{0, 2 * K, 0}, {K, 2 * K, K}, {2 * K, 2 * K, 3 * K}, {2*K + 10, 2*K + 10, 3 * K},
			{3 * K, 5 * K, 3 * K}, {6*K - 1, 6*K - 1, 6 * K}, {6 * K, -1, 6 * K}, {8*K - 1, -1, 8*K - 1},
			{8 * K, -1, -1}, {9 * K, -1, -1},
		} {
			for whence, want := range []int64{c.data, c.hole} {
				seek := f.SeekData
				if whence == 1 {
					seek = f.SeekHole
				}
				got, err := seek(c.off)
				if want < 0 {
					if err != io.EOF {
						t.Errorf("seek %d from %d: %d, %v; want EOF", whence, c.off, got, err)
					}
				} else if got != want || err != nil {
					t.Errorf("seek %d from %d: %d, %v; want %d", whence, c.off, got, err, want)
				}
			}
		}
		before := must(f.Allocated())(t)
		if before < 2*K {
			t.Errorf("%d bytes allocated for %d of data", before, 2*K)
		}
		ok(t, f.PunchHole(5*K, K))
		ok(t, f.Sync())
		if after := must(f.Allocated())(t); before-after != K {
			t.Errorf("allocated %d before and %d after punching %d", before, after, K)
		}
		if at, err := f.SeekData(3 * K); err != io.EOF {
			t.Errorf("data at %d, %v after punching", at, err)
		}
		// Unaligned: only whole blocks go, the edges become zeros.
		want := content(t, f)
		ok(t, f.PunchHole(2*K+100, K-200))
		clear(want[2*K+100 : 3*K-100])
		same(t, content(t, f), want)
		ok(t, f.PunchHole(2*K+10, 20))
		clear(want[2*K+10 : 2*K+30])
		same(t, content(t, f), want)
		// Around and behind the end: the length stays.
		ok(t, f.PunchHole(7*K, 100*K))
		ok(t, f.PunchHole(100*K, K))
		ok(t, f.PunchHole(K, 0))
		same(t, content(t, f), want)
	})
}

func TestZeroRange(t *testing.T) {
	each(t, func(t *testing.T, im impl, f File) {
		want := pattern(40000, 4)
		write(t, f, want, 0)
		ok(t, f.Sync())
		before := must(f.Allocated())(t)
		err := f.ZeroRange(1000, 30000)
		if im.name == "tmpfs" {
			wantErr(t, err, errors.ErrUnsupported)
			same(t, content(t, f), want)
			return
		}
		ok(t, err)
		clear(want[1000:31000])
		same(t, content(t, f), want)
		ok(t, f.Sync())
		if a := must(f.Allocated())(t); a < before {
			t.Errorf("allocated fell from %d to %d", before, a)
		}
		ok(t, f.ZeroRange(39000, 1000))
		ok(t, f.ZeroRange(40000, 0))
		clear(want[39000:])
		same(t, content(t, f), want)
	})
}

func TestCopyRange(t *testing.T) {
	for _, from := range implementations() {
		each(t, func(t *testing.T, to impl, dst File) {
			t.Run("from "+from.name, func(t *testing.T) {
				src := from.make(t)
				data := pattern(700000, 5)
				write(t, src, data, 0)
				ok(t, dst.Truncate(0))
				n, err := dst.CopyRange(src, 1001, 3003, 600001)
				if n != 600001 || err != nil {
					t.Fatalf("copied %d, %v", n, err)
				}
				same(t, content(t, dst), append(make([]byte, 3003), data[1001:601002]...))
				n, err = dst.CopyRange(src, 699000, 0, 5000)
				if n != 1000 || err != io.ErrUnexpectedEOF {
					t.Fatalf("across the end of the source: %d, %v", n, err)
				}
				if n, err := dst.CopyRange(src, 0, 0, 0); n != 0 || err != nil {
					t.Fatalf("nothing: %d, %v", n, err)
				}
			})
		})
	}
	each(t, func(t *testing.T, _ impl, f File) {
		want := pattern(100000, 6)
		write(t, f, want, 0)
		_, err := f.CopyRange(f, 0, 100, 1000)
		wantErr(t, err, unix.EINVAL)
		same(t, content(t, f), want)
		if n, err := f.CopyRange(f, 10, 50000, 40000); n != 40000 || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		copy(want[50000:], want[10:40010])
		same(t, content(t, f), want)
	})
}

func TestWriteZeros(t *testing.T) {
	each(t, func(t *testing.T, _ impl, f File) {
		write(t, f, []byte{7}, 0)
		ok(t, WriteZeros(f, 1, 3<<20))
		ok(t, f.Sync())
		if s := must(f.Size())(t); s != 3<<20+1 {
			t.Errorf("size %d", s)
		}
		if a := must(f.Allocated())(t); a < 3<<20 {
			t.Errorf("%d bytes allocated", a)
		}
		if at, err := f.SeekHole(0); at != 3<<20+1 || err != nil {
			t.Errorf("hole at %d, %v", at, err)
		}
	})
}

func TestClosed(t *testing.T) {
	each(t, func(t *testing.T, _ impl, f File) {
		write(t, f, []byte{1}, 0)
		ok(t, f.Close())
		p := []byte{0}
		_, err := f.ReadAt(p, 0)
		wantErr(t, err, os.ErrClosed)
		_, err = f.WriteAt(p, 0)
		wantErr(t, err, os.ErrClosed)
		_, err = f.ReadvAt([][]byte{p, p}, 0)
		wantErr(t, err, os.ErrClosed)
		_, err = f.Size()
		wantErr(t, err, os.ErrClosed)
		wantErr(t, f.Truncate(0), os.ErrClosed)
		wantErr(t, f.Sync(), os.ErrClosed)
		wantErr(t, f.PunchHole(0, 1), os.ErrClosed)
		_, err = f.SeekData(0)
		wantErr(t, err, os.ErrClosed)
	})
}

// TestConcurrent: writers of neighbouring, unaligned ranges must not undo one
// another (a read-modify-write could), and readers see old or new bytes.
func TestConcurrent(t *testing.T) {
	each(t, func(t *testing.T, _ impl, f File) {
		const workers, part, rounds = 4, 1500, 30
		ok(t, f.Truncate(workers*part+100))
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				p := bytes.Repeat([]byte{byte(w + 1)}, part)
				q := make([]byte, part)
				for range rounds {
					if _, err := f.WriteAt(p, int64(w*part)); err != nil {
						t.Error(err)
					}
					if _, err := f.ReadAt(q, int64(w*part)); err != nil || !bytes.Equal(p, q) {
						t.Errorf("worker %d lost its bytes (%v)", w, err)
						return
					}
					if _, err := f.SeekData(0); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
	})
}

// tb is what testing.T and rapid.T have in common.
type tb interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
	Errorf(string, ...any)
}
