package qcow2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

func createFile(t testing.TB, path string, o CreateOptions) {
	t.Helper()
	f, err := backend.Open(path, backend.Options{Writable: true, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Create(context.Background(), f, o); err != nil {
		t.Fatal(err)
	}
}

// beside makes a file of n zero bytes in the directory of path.
func beside(t testing.TB, path, name string, n int) {
	t.Helper()
	if name == "" {
		return
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), name), make([]byte, n), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCreate: what Create makes is consistent for every cluster size and
// refcount width, and QEMU finds it so for a part of them (all would take a
// minute).
func TestCreate(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for bits := minClusterBits; bits <= maxClusterBits; bits++ {
		for order := 0; order <= maxRefcountOrder; order++ {
			o := CreateOptions{Size: 1 << 30, ClusterSize: 1 << bits, RefcountBits: 1 << order}
			switch (bits + order) % 4 {
			case 0:
				o.Size = 1<<30 + 1 // not even of a sector
			case 1:
				o.LazyRefcounts, o.CompressionType = true, Zstd
			case 2:
				o.ExtendedL2 = bits >= minExtendedL2Bits
			case 3:
				o.BackingFile, o.BackingFormat = "below.raw", "raw"
			}
			t.Run(fmt.Sprintf("%d/%d", o.ClusterSize, o.RefcountBits), func(t *testing.T) {
				t.Parallel()
				path := filepath.Join(t.TempDir(), "c.qcow2")
				beside(t, path, o.BackingFile, 0)
				createFile(t, path, o)
				img := openRO(t, path, layers.OpenOptions{})
				if img.Size() != o.Size || img.Granule() != o.ClusterSize {
					t.Errorf("size %d cluster %d", img.Size(), img.Granule())
				}
				walkMatchesRefcounts(t, img)
				all, err := lookupAll(img)
				if err != nil || len(all) != 1 {
					t.Errorf("map %v, %v", all, err)
				}
				if bits%4 == 1 || order == bits%7 {
					if code, out := imgtest.QemuCheck(t, path, "qcow2"); code != 0 {
						t.Errorf("check: %d\n%s", code, out)
					}
				}
				img.Close()
				if order == bits%7 && o.BackingFile == "" && o.Size%512 == 0 {
					imgtest.QemuIO(t, "qcow2", path, "write -q -P 7 123456 98765", "read -q -P 7 123456 98765")
					if code, out := imgtest.QemuCheck(t, path, "qcow2"); code != 0 {
						t.Errorf("check after writing: %d\n%s", code, out)
					}
				}
			})
		}
	}
}

// TestCreateOthers: version 2, data files, the largest and the smallest.
func TestCreateOthers(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for name, o := range map[string]CreateOptions{
		"v2":         {Size: 1 << 30, Version: 2},
		"v2-backing": {Size: 1 << 30, Version: 2, ClusterSize: 512, BackingFile: "b", BackingFormat: "raw"},
		"empty":      {Size: 0},
		"one":        {Size: 1},
		"64TiB":      {Size: 64 << 40},
		"largest":    {Size: 1<<61 - 512, ClusterSize: 2 << 20},
		"l1-32MiB":   {Size: 128 << 30, ClusterSize: 512, RefcountBits: 64},
		"data":       {Size: 1 << 20, DataFile: "c.data"},
		"data-raw":   {Size: 1 << 20, DataFile: "c.data", DataFileRaw: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "c.qcow2")
			beside(t, path, o.BackingFile, 0)
			if o.DataFile != "" {
				beside(t, path, o.DataFile, int(o.Size))
				o.DataFile = filepath.Join(dir, o.DataFile) // QEMU takes it relative to where it runs
			}
			createFile(t, path, o)
			img := openRO(t, path, layers.OpenOptions{})
			walkMatchesRefcounts(t, img)
			if code, out := imgtest.QemuCheck(t, path, "qcow2"); code != 0 {
				t.Errorf("check: %d\n%s", code, out)
			}
			info, err := img.Describe(context.Background())
			if err != nil || info.Backing != o.BackingFile || info.BackingFormat != o.BackingFormat || info.DataFile != o.DataFile {
				t.Errorf("info %+v, %v", info, err)
			}
			if o.DataFile != "" {
				imgtest.QemuIO(t, "qcow2", path, "write -q -P 7 1000 98765", "write -q -z 64k 64k")
				sameAsQemu(t, path)
			}
		})
	}
}

// TestCreateRefuses: what cannot be made is refused before the file changes.
func TestCreateRefuses(t *testing.T) {
	for name, o := range map[string]CreateOptions{
		"cluster":        {ClusterSize: 3 << 10},
		"small cluster":  {ClusterSize: 256},
		"large cluster":  {ClusterSize: 4 << 20},
		"version":        {Version: 4},
		"refcount":       {RefcountBits: 3},
		"refcount v2":    {RefcountBits: 8, Version: 2},
		"zstd v2":        {CompressionType: Zstd, Version: 2},
		"extl2 8K":       {ExtendedL2: true, ClusterSize: 8 << 10},
		"size":           {Size: -1},
		"too large":      {Size: 1 << 62, ClusterSize: 2 << 20},
		"too large 512":  {Size: 129 << 30, ClusterSize: 512},
		"no format":      {BackingFile: "x"},
		"format alone":   {BackingFormat: "raw"},
		"raw without":    {DataFileRaw: true},
		"raw backing":    {DataFile: "d", DataFileRaw: true, BackingFile: "x", BackingFormat: "raw"},
		"long name":      {BackingFile: string(make([]byte, 1024)), BackingFormat: "raw"},
		"header too big": {ClusterSize: 512, BackingFile: string(make([]byte, 500)), BackingFormat: "raw"},
		"compression":    {CompressionType: 2},
	} {
		f := backend.NewMemBytes("old", []byte("precious"))
		if err := Create(context.Background(), f, o); !errors.Is(err, layers.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
		if string(f.Bytes()) != "precious" {
			t.Errorf("%s: the file was changed", name)
		}
	}
}

// fixedFile cannot be truncated, as a block device.
type fixedFile struct{ backend.File }

func (f fixedFile) Truncate(int64) error { return errors.ErrUnsupported }

func TestCreateOnDevice(t *testing.T) {
	junk := imgtest.PatternBytes(3, 0, 4<<20)
	f := fixedFile{backend.NewMemBytes("dev", junk)}
	if err := Create(context.Background(), f, CreateOptions{Size: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	img, err := Open(context.Background(), f, layers.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if all, err := lookupAll(img); err != nil || len(all) != 1 {
		t.Errorf("map %v, %v", all, err)
	}
	walkMatchesRefcounts(t, img)
	small := fixedFile{backend.NewMemBytes("dev", junk[:100<<10])}
	if err := Create(context.Background(), small, CreateOptions{Size: 1 << 30}); !errors.Is(err, layers.ErrUnsupported) {
		t.Errorf("small device: %v", err)
	}
}
