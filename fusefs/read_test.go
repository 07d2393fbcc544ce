package fusefs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// The read path must not allocate, whatever the size of the request.
func TestReadDoesNotAllocate(t *testing.T) {
	dev := newMemDevice(4 << 20)
	fs, err := New(dev, Options{FlushAfter: -1, Partitions: []Partition{{"p1", 4096, 2 << 20}}})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for _, ino := range []uint64{inoDisk, inoDisk + 1} {
		for _, n := range []uint32{512, 4096, 1 << 20} {
			in := &fuse.ReadIn{Offset: 4096, Size: n}
			in.NodeId = ino
			allocs := testing.AllocsPerRun(200, func() {
				res, st := fs.Read(nil, in, buf[:n])
				if st != fuse.OK {
					t.Fatal(st)
				}
				if data, st := res.Bytes(buf[:n]); st != fuse.OK || &data[0] != &buf[0] || len(data) != int(n) {
					t.Fatal("the reply is not the buffer")
				}
				res.Done()
			})
			if allocs != 0 && !imgtest.RaceEnabled {
				t.Errorf("inode %d, %d bytes: %v allocations per read", ino, n, allocs)
			}
		}
	}
}

// Many goroutines work on their own stripes, buffered and direct, and compare
// with what they know; in the end everything is compared.
func TestParallelModel(t *testing.T) {
	imgtest.RequireFuse(t)
	const workers, stripe = 8, 1 << 20
	dev := newMemDevice(workers * stripe)
	_, path := mounted(t, dev, Options{})
	model := make([]byte, workers*stripe)
	var wg sync.WaitGroup
	for w := range workers {
		flags := os.O_RDWR
		if w%2 == 0 {
			flags |= unix.O_DIRECT
		}
		f := open(t, path, flags)
		buf := imgtest.Aligned(t, 256<<10)
		mine := model[w*stripe : (w+1)*stripe]
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 7))
			for i := range 300 {
				off := r.Int64N(stripe/512) * 512
				n := min(512*(1+r.Int64N(int64(len(buf)/512))), stripe-off)
				at := int64(w*stripe) + off
				var err error
				switch op := r.IntN(10); {
				case op < 4:
					for j := range buf[:n] {
						buf[j] = byte(i + j + w)
					}
					copy(mine[off:], buf[:n])
					_, err = f.WriteAt(buf[:n], at)
				case op < 5:
					clear(mine[off : off+n])
					err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, n)
				case op < 6:
					clear(mine[off : off+n])
					err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE, at, n)
				default:
					_, err = f.ReadAt(buf[:n], at)
					if err == nil && !bytes.Equal(buf[:n], mine[off:off+n]) {
						err = fmt.Errorf("wrong bytes")
					}
				}
				if err != nil {
					t.Errorf("worker %d step %d at %d+%d: %v", w, i, at, n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, model) {
		t.Errorf("content differs at the end (%v)", err)
	}
}

func TestSectionBounds(t *testing.T) {
	dev := newMemDevice(1 << 20)
	for _, c := range []struct{ off, n int64 }{{-1, 1}, {0, 1<<20 + 1}, {1 << 20, 1}, {1 << 62, 1 << 62}, {5, -1}} {
		if _, err := Section(dev, c.off, c.n); err == nil {
			t.Errorf("section %d+%d accepted", c.off, c.n)
		}
	}
	if _, err := New(dev, Options{Partitions: []Partition{{"p1", 0, 5}, {"p1", 5, 5}}}); err == nil {
		t.Error("two files of one name accepted")
	}
}
