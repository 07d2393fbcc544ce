package raw_test

import (
	"bytes"
	"context"
	"errors"
	"math"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/internal/imgtest/maptest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/raw"
)

const name = "image.raw"

func factory() layertest.Factory {
	return layertest.Factory{
		Name: "raw", Granule: 4096, SizeUnit: 1, Opaque: true,
		Create: func(ctx context.Context, dir *layertest.Dir, size int64) error {
			f, err := dir.Open(name, true)
			if err != nil {
				return err
			}
			return errors.Join(raw.Create(ctx, f, size), f.Close())
		},
		Open: func(ctx context.Context, dir *layertest.Dir, writable bool) (layers.Layer, error) {
			f, err := dir.Open(name, writable)
			if err != nil {
				return nil, err
			}
			i, err := raw.Open(ctx, f, layers.OpenOptions{Writable: writable})
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			return i, nil
		},
	}
}

func TestConform(t *testing.T) { layertest.Run(t, factory()) }

func TestEverySyncIsNeeded(t *testing.T) { layertest.RunSyncs(t, factory(), 8) }

func open(t *testing.T, f backend.File, writable bool) *raw.Image {
	t.Helper()
	i, err := raw.Open(context.Background(), f, layers.OpenOptions{Writable: writable})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// TestHolesOfARealFile: what the host's filesystem says is what Lookup says,
// and qemu-img map says the same.
func TestHolesOfARealFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), name)
	imgtest.RawFile(t, path, 5<<20+777, 64<<10, 3)
	want := imgtest.QemuMap(t, "raw", path)
	maptest.Run(t, func(t *testing.T) (blockmap.Map, maptest.Truth) {
		f, err := backend.Open(path, backend.Options{})
		if err != nil {
			t.Fatal(err)
		}
		i := open(t, f, false)
		t.Cleanup(func() {
			if err := i.Close(); err != nil {
				t.Error(err)
			}
		})
		return i, func(guest int64) blockmap.Kind {
			for _, m := range want {
				if guest >= m.Start && guest < m.Start+m.Length && m.Data {
					return blockmap.Data
				}
			}
			return blockmap.Zero
		}
	}, maptest.Rounds(60))
}

// blind is a file that cannot tell its holes, nor punch them, as some
// filesystems; or that takes whole blocks only, as a block device.
type blind struct {
	backend.File
	block int64
}

func (blind) SeekData(int64) (int64, error) { return 0, errors.ErrUnsupported }
func (blind) SeekHole(int64) (int64, error) { return 0, errors.ErrUnsupported }
func (b blind) PunchHole(off, n int64) error {
	switch {
	case b.block == 0:
		return errors.ErrUnsupported
	case (off|n)&(b.block-1) != 0:
		return syscall.EINVAL
	}
	return b.File.PunchHole(off, n)
}
func (b blind) ZeroRange(off, n int64) error { return b.PunchHole(off, n) }

func TestFallbacks(t *testing.T) {
	ctx := context.Background()
	for _, block := range []int64{0, 512, 4096} {
		for _, r := range [][2]int64{{0, 100000}, {1, 99998}, {4096, 8192}, {5, 10}, {4095, 2}, {4095, 4098}, {99000, 1000}, {512, 512}} {
			for _, punch := range []bool{true, false} {
				m := backend.NewMemBytes(name, bytes.Repeat([]byte{7}, 100000))
				i := open(t, blind{m, block}, true)
				ext, err := i.Lookup(ctx, 0, 200000, nil)
				if err != nil || len(ext) != 1 || ext[0].Kind != blockmap.Data || ext[0].Len != 100000 {
					t.Fatalf("%v, %v", ext, err)
				}
				if err := i.ZeroAt(ctx, r[0], r[1], punch, nil); err != nil {
					t.Fatal(err)
				}
				want := bytes.Repeat([]byte{7}, 100000)
				clear(want[r[0] : r[0]+r[1]])
				if !bytes.Equal(m.Bytes(), want) {
					t.Errorf("block %d range %v punch %v: wrong bytes", block, r, punch)
				}
			}
		}
	}
}

// failing fails punching in a way that is no "cannot".
type failing struct{ backend.File }

func (failing) PunchHole(int64, int64) error { return syscall.EIO }

func TestErrorsComeThrough(t *testing.T) {
	ctx := context.Background()
	i := open(t, failing{backend.NewMemBytes(name, make([]byte, 9000))}, true)
	if err := i.ZeroAt(ctx, 0, 9000, true, nil); !errors.Is(err, syscall.EIO) {
		t.Errorf("ZeroAt: %v", err)
	}
	if _, err := raw.Open(ctx, backend.NewMem(name), layers.OpenOptions{Snapshot: "x"}); !errors.Is(err, layers.ErrUnsupported) {
		t.Errorf("snapshot of a raw image: %v", err)
	}
	if err := i.WriteAt(ctx, []byte{1}, 9000, nil); !errors.Is(err, blockmap.ErrRange) {
		t.Errorf("write behind the end: %v", err)
	}
	if err := raw.Create(ctx, backend.NewMem(name), -1); err == nil {
		t.Error("negative size accepted")
	}
}

// TestFailedSyncIsFinal: the second Sync must not claim what the first lost.
func TestFailedSyncIsFinal(t *testing.T) {
	ctx := context.Background()
	f := backend.NewFault(backend.NewMemBytes(name, make([]byte, 9000)))
	i := open(t, f, true)
	f.Inject(backend.Rule{On: backend.OpSync, Err: syscall.EIO})
	first := i.Sync(ctx)
	if !errors.Is(first, syscall.EIO) || !strings.Contains(first.Error(), name) {
		t.Fatalf("Sync: %v", first)
	}
	f.Clear()
	if err := i.Sync(ctx); !errors.Is(err, syscall.EIO) {
		t.Errorf("second Sync: %v", err)
	}
	if err := i.WriteAt(ctx, []byte{1}, 0, nil); !errors.Is(err, syscall.EIO) {
		t.Errorf("WriteAt: %v", err)
	}
	if err := i.Close(); !errors.Is(err, syscall.EIO) {
		t.Errorf("Close: %v", err)
	}
}

func TestDescribe(t *testing.T) {
	ctx := context.Background()
	m := backend.NewMem(name)
	if err := raw.Create(ctx, m, 1<<40+5); err != nil {
		t.Fatal(err)
	}
	i := open(t, m, true)
	if err := i.WriteAt(ctx, make([]byte, 8192), 4096, nil); err != nil {
		t.Fatal(err)
	}
	if err := i.WriteAt(ctx, []byte{1}, 1<<40+4, nil); err != nil {
		t.Fatal(err)
	}
	info, err := i.Describe(ctx)
	if err != nil || info.Format != "raw" || info.VirtualSize != 1<<40+5 || info.UsedClusters != 3 || info.FileSize != 1<<40+5 {
		t.Errorf("%+v, %v", info, err)
	}
	var got []layers.HostRange
	if err := i.WalkHost(ctx, func(r layers.HostRange) error { got = append(got, r); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0] != (layers.HostRange{Off: 4096, Len: 8192, Role: layers.RoleData, Guest: 4096}) || got[1].Off != 1<<40 || got[1].Len != 5 {
		t.Errorf("%+v", got)
	}
	if ext, err := i.Lookup(ctx, 0, math.MaxInt64, nil); err != nil || len(ext) != 1 || ext[0].Kind != blockmap.Zero || ext[0].Len != 4096 {
		t.Errorf("%v, %v", ext, err)
	}
	boom := errors.New("stop")
	if err := i.WalkHost(ctx, func(layers.HostRange) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("error of visit: %v", err)
	}
}
