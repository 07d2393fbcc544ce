package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"golang.org/x/sys/unix"
)

// addLayer puts an empty layer on a pile and returns its new top.
func addLayer(t *testing.T, f format, image string) string {
	t.Helper()
	if f.name == "ploop" {
		imgtest.PloopRun(t, "snapshot", filepath.Join(image, "DiskDescriptor.xml"))
		return image
	}
	top := fmt.Sprintf("%s-%d.qcow2", strings.TrimSuffix(image, ".qcow2"), time.Now().UnixNano())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", filepath.Base(image), "-F", "qcow2", top)
	return top
}

// TestDiskModel changes a disk at random through the page cache, past it and
// by fallocate, in three layers one after the other, and compares every answer
// with a plain array of bytes; in the end QEMU must read the same.
func TestDiskModel(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img")
	const size = 24<<20 + 512*3 // a last cluster that is not whole
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			size := int64(size)
			if f.name == "ploop" {
				size = 24 << 20 // ploop's tool makes whole clusters
			}
			dir := workDir(t)
			image := f.create(t, dir, size, false)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			d := &diskModel{rng: rand.New(rand.NewPCG(seed, 0)), want: make([]byte, size)}
			for layer := range 3 {
				if layer > 0 {
					image = addLayer(t, f, image)
				}
				d.run(t, image, 400)
				f.check(t, image, false)
				raw := filepath.Join(dir, "qemu.raw")
				imgtest.QemuRaw(t, "", imgtest.Chain(f.chain(t, image)...), raw)
				got, err := os.ReadFile(raw)
				if err != nil {
					t.Fatal(err)
				}
				wantBytes(t, fmt.Sprintf("what QEMU reads with %d layers", layer+1), got, d.want)
				if t.Failed() {
					return
				}
			}
		})
	}
}

// diskModel is what a disk must hold.
type diskModel struct {
	rng   *rand.Rand
	want  []byte
	flags []string // of mount-image
}

func (d *diskModel) run(t *testing.T, image string, steps int) {
	t.Helper()
	m := mountImage(t, image, append(d.flags, "-w")...)
	cached, err := os.OpenFile(m.file(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer cached.Close()
	direct, err := os.OpenFile(m.file(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	for step := range steps {
		f, how := cached, "cached"
		off, n := d.span(1)
		if d.rng.IntN(2) == 0 {
			f, how = direct, "direct"
			off, n = d.span(512)
		}
		what := fmt.Sprintf("step %d, %s, [%d, %d)", step, how, off, off+n)
		part := d.want[off : off+n]
		switch d.rng.IntN(6) {
		case 0, 1:
			p := make([]byte, n)
			imgtest.Pattern(p, d.rng.Uint64(), off)
			_, err = f.WriteAt(p, off)
			copy(part, p)
		case 2:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
			clear(part)
		case 3:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE, off, n)
			clear(part)
		case 4:
			if d.rng.IntN(8) == 0 {
				err = f.Sync()
			} else {
				d.seekHole(t, cached, off)
			}
		case 5: // zeros that are written, not punched
			_, err = f.WriteAt(make([]byte, n), off)
			clear(part)
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		// Both ways of reading, around the place that was touched.
		for _, r := range []*os.File{cached, direct} {
			from := max(0, off-4096) &^ 511
			p := make([]byte, min(int64(len(d.want)), off+n+4096)-from)
			if _, err := r.ReadAt(p, from); err != nil {
				t.Fatalf("%s: reading: %v", what, err)
			}
			if !bytes.Equal(p, d.want[from:][:len(p)]) {
				wantBytes(t, what+fmt.Sprintf(", read back from %d through %v", from, r == direct), p, d.want[from:][:len(p)])
				t.FailNow()
			}
		}
	}
	direct.Close()
	cached.Close()
	m.unmount()
}

// span picks a range whose ends are multiples of grain: small or large, often
// on the edges of clusters.
func (d *diskModel) span(grain int64) (off, n int64) {
	size := int64(len(d.want))
	off = d.rng.Int64N(size)
	n = 1 + d.rng.Int64N([]int64{4096, 70 << 10, 1500 << 10, 4 << 20}[d.rng.IntN(4)])
	if edge := int64(64 << 10); d.rng.IntN(3) == 0 {
		off &^= edge - 1
		n = (n + edge - 1) &^ (edge - 1)
	}
	off -= off % grain
	n = min((n+grain-1)/grain*grain, size-off)
	return off, n
}

// seekHole: what is called a hole must read as zeros.
func (d *diskModel) seekHole(t *testing.T, f *os.File, off int64) {
	t.Helper()
	fd := int(f.Fd())
	hole, err := unix.Seek(fd, off, unix.SEEK_HOLE)
	if err != nil {
		t.Fatalf("SEEK_HOLE from %d: %v", off, err)
	}
	end, err := unix.Seek(fd, hole, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		end, err = int64(len(d.want)), nil
	}
	if err != nil {
		t.Fatalf("SEEK_DATA from %d: %v", hole, err)
	}
	if bytes.ContainsFunc(d.want[hole:end], func(r rune) bool { return r != 0 }) {
		t.Fatalf("[%d, %d) is called a hole and holds data", hole, end)
	}
}
