package crash_test

import (
	"context"
	"crypto/md5"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/crash"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

// setup is how an image is made.
type setup = func(seed uint64) (*crash.Image, error)

// once makes the image at the first call only; it is copied for each use.
func once(make func() (*crash.Image, error)) setup {
	var o sync.Once
	var img *crash.Image
	var err error
	return func(uint64) (*crash.Image, error) {
		o.Do(func() { img, err = make() })
		return img, err
	}
}

func image(format string, m *backend.Mem) *crash.Image {
	return &crash.Image{Format: format, Files: map[string]*backend.Mem{crash.ImageFile: m}}
}

// lowered puts bytes under an image: data with zeros between.
func lowered(s setup, size int64) setup {
	return func(seed uint64) (*crash.Image, error) {
		img, err := s(seed)
		if err != nil {
			return nil, err
		}
		with := *img
		with.Below = imgtest.PatternBytes(77, 0, int(size))
		for at := int64(0); at < size; at += 12 << 10 {
			clear(with.Below[at:min(at+4<<10, size)])
		}
		return &with, nil
	}
}

// qcow2New is an empty qcow2 image.
func qcow2New(o qcow2.CreateOptions) setup {
	return once(func() (*crash.Image, error) {
		m := backend.NewMem(crash.ImageFile)
		img := image("qcow2", m)
		if o.DataFile != "" {
			img.Files[o.DataFile] = backend.NewMem(o.DataFile)
			if o.DataFileRaw {
				if err := raw.Create(context.Background(), img.Files[o.DataFile], o.Size); err != nil {
					return nil, err
				}
			}
		}
		return img, qcow2.Create(context.Background(), m, o)
	})
}

// ploopNew is an empty ploop image.
func ploopNew(version int, size int64) setup {
	return once(func() (*crash.Image, error) {
		m := backend.NewMem(crash.ImageFile)
		return image("ploop", m), ploop.Create(context.Background(), m, ploop.CreateOptions{Size: size, ClusterSize: ploop.MinCluster, Version: version})
	})
}

// keeping is a file whose Close leaves it open, for one that is used again.
type keeping struct{ backend.File }

func (keeping) Close() error { return nil }

// filled writes to the image what do does, before the recording.
func filled(s setup, do func(e layers.Editor, rng *rand.Rand) error) setup {
	return func(seed uint64) (*crash.Image, error) {
		img, err := s(seed)
		if err != nil {
			return nil, err
		}
		with := *img
		with.Files = map[string]*backend.Mem{}
		for name, m := range img.Files {
			with.Files[name] = m.Clone()
		}
		ctx := context.Background()
		o := layers.OpenOptions{Writable: true, OpenFile: func(name string, _ bool) (backend.File, error) {
			return keeping{with.Files[name]}, nil
		}}
		var e layers.Editor
		switch f := (keeping{with.Files[crash.ImageFile]}); img.Format {
		case "qcow2":
			e, err = qcow2.Open(ctx, f, o)
		case "ploop":
			e, err = ploop.Open(ctx, f, o)
		case "raw":
			e, err = raw.Open(ctx, f, o)
		}
		if err != nil {
			return nil, err
		}
		return &with, errors.Join(do(e, rand.New(rand.NewPCG(seed, 3))), e.Close())
	}
}

// half fills every second stretch of the disk.
func half(stretch int64) func(e layers.Editor, rng *rand.Rand) error {
	return func(e layers.Editor, rng *rand.Rand) error {
		for off := int64(0); off < e.Size(); off += 2 * stretch {
			n := min(stretch, e.Size()-off)
			if err := e.WriteAt(context.Background(), imgtest.PatternBytes(5, off, int(n)), off, layertest.NewBelow(nil, 1)); err != nil {
				return err
			}
		}
		return nil
	}
}

// same fills the first n bytes with one value.
func same(n int64) func(e layers.Editor, rng *rand.Rand) error {
	return func(e layers.Editor, _ *rand.Rand) error {
		p := make([]byte, n)
		for i := range p {
			p[i] = 0x5a
		}
		return e.WriteAt(context.Background(), p, 0, layertest.NewBelow(nil, 1))
	}
}

// qcow2ByQemu is an image that qemu-img makes and commands of qemu-io fill. A
// command that begins with "img " is one of qemu-img, in which FILE stands for
// the image.
func qcow2ByQemu(t testing.TB, options, size string, commands ...string) setup {
	imgtest.Require(t, "qemu-img", "qemu-io")
	return once(func() (*crash.Image, error) {
		path := filepath.Join(t.TempDir(), "made.qcow2")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, size)
		var snapshots []string
		for _, c := range commands {
			switch {
			case len(c) > 9 && c[:9] == "snapshot ":
				imgtest.QemuImg(t, "snapshot", "-c", c[9:], path)
				snapshots = append(snapshots, c[9:])
			case len(c) > 5 && c[:5] == "drop ":
				imgtest.QemuImg(t, "snapshot", "-d", c[5:], path)
				snapshots = slices.DeleteFunc(snapshots, func(s string) bool { return s == c[5:] })
			case len(c) > 7 && c[:7] == "bitmap ":
				imgtest.QemuImg(t, "bitmap", "--add", path, c[7:])
			case len(c) > 6 && c[:6] == "crash ":
				imgtest.Try(t, "qemu-io", "-f", "qcow2", "-c", c[6:], "-c", "flush", "-c", "sigraise 9", path)
			default:
				imgtest.QemuIO(t, "qcow2", path, c)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		img := image("qcow2", backend.NewMemBytes(crash.ImageFile, b))
		img.Snapshots = snapshots
		return img, nil
	})
}

// nearTableGrowth is an image of the smallest clusters and the widest counts
// whose next allocations need a larger refcount table.
func nearTableGrowth() setup {
	const size = 3 << 20
	return once(func() (*crash.Image, error) {
		s := filled(qcow2New(qcow2.CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 64}), func(e layers.Editor, _ *rand.Rand) error {
			// 64 blocks of 64 clusters of 512 bytes fit into a table of one
			// cluster; some of them are the tables.
			for off := int64(0); ; off += 2048 {
				if n, err := e.Data().Size(); err != nil || n >= 64*64*512-20<<10 {
					return err
				}
				p := imgtest.PatternBytes(9, off, 2048)
				if err := e.WriteAt(context.Background(), p, off, layertest.NewBelow(nil, 1)); err != nil {
					return err
				}
			}
		})
		img, err := s(0)
		if err != nil {
			return nil, err
		}
		if n := binary.BigEndian.Uint32(img.Files[crash.ImageFile].Bytes()[56:]); n != 1 {
			return nil, fmt.Errorf("the refcount table has %d clusters", n)
		}
		return img, nil
	})
}

// changed is an image with its bytes changed.
func changed(s setup, change func(b []byte) []byte) setup {
	return func(seed uint64) (*crash.Image, error) {
		img, err := s(seed)
		if err != nil {
			return nil, err
		}
		with := *img
		with.Files = map[string]*backend.Mem{}
		for name, m := range img.Files {
			with.Files[name] = m
		}
		with.Files[crash.ImageFile] = backend.NewMemBytes(crash.ImageFile, change(img.Files[crash.ImageFile].Bytes()))
		return &with, nil
	}
}

// inUse marks a ploop image as open, with a piece of a cluster behind its end:
// what a crash of another program leaves.
func inUse(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[44:], 0x746F6E59)
	return append(b, make([]byte, 1000)...)
}

// withExtension appends a format extension with a dirty bitmap, as a program
// leaves it that keeps the bitmap up to date (facts: ploop format, section
// "format extension").
func withExtension(b []byte) []byte {
	const cluster = ploop.MinCluster
	le := binary.LittleEndian
	at := len(b)
	ext := make([]byte, 2*cluster)
	le.PutUint64(ext, 0xAB234CEF23DCEA87)
	p := ext[24:]
	le.PutUint64(p, 0x20385FAE252CB34A)
	le.PutUint32(p[16:], 40)
	p = p[24:]
	le.PutUint64(p, le.Uint64(b[36:]))
	copy(p[8:24], "0123456789abcdef")
	le.PutUint32(p[24:], 128)
	le.PutUint32(p[28:], 1)
	le.PutUint64(p[32:], uint64(at+cluster)/512)
	sum := md5.Sum(ext[24:cluster])
	copy(ext[8:], sum[:])
	for i := range ext[cluster:] {
		ext[cluster+i] = 0xaa
	}
	b = append(b, ext...)
	le.PutUint64(b[56:], uint64(at)/512)
	le.PutUint32(b[44:], 0x312e3276)
	return b
}
