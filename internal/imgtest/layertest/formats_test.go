package layertest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

// scripts is small: the formats' own tests run more over fewer kinds of
// images. For long runs there is -layertest.times.
const scripts = 8

// create makes a file of dir with a format's Create.
func create(dir *layertest.Dir, name string, f func(backend.File) error) error {
	file, err := dir.Open(name, true)
	if err != nil {
		return err
	}
	return errors.Join(f(file), file.Close())
}

// open opens a file of dir with a format's Open, which leaves the file to the
// caller when it fails.
func open[L layers.Layer](dir *layertest.Dir, name string, writable bool, f func(backend.File) (L, error)) (layers.Layer, error) {
	file, err := dir.Open(name, writable)
	if err != nil {
		return nil, err
	}
	l, err := f(file)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return l, nil
}

// rawFactory makes raw images: no clusters, no layer below.
func rawFactory() layertest.Factory {
	const name = "image.raw"
	return layertest.Factory{
		Name: "raw", Granule: 4096, SizeUnit: 1, Opaque: true,
		Create: func(ctx context.Context, dir *layertest.Dir, size int64) error {
			return create(dir, name, func(f backend.File) error { return raw.Create(ctx, f, size) })
		},
		Open: func(ctx context.Context, dir *layertest.Dir, writable bool) (layers.Layer, error) {
			return open(dir, name, writable, func(f backend.File) (*raw.Image, error) {
				return raw.Open(ctx, f, layers.OpenOptions{Writable: writable})
			})
		},
	}
}

func ploopFactory(version int, cluster int64) layertest.Factory {
	const name = "image.hds"
	return layertest.Factory{
		Name: fmt.Sprintf("ploop v%d %dK", version, cluster>>10), Granule: cluster, Scripts: scripts,
		Create: func(ctx context.Context, dir *layertest.Dir, size int64) error {
			return create(dir, name, func(f backend.File) error {
				return ploop.Create(ctx, f, ploop.CreateOptions{Size: size, ClusterSize: cluster, Version: version})
			})
		},
		Open: func(ctx context.Context, dir *layertest.Dir, writable bool) (layers.Layer, error) {
			return open(dir, name, writable, func(f backend.File) (*ploop.Image, error) {
				return ploop.Open(ctx, f, layers.OpenOptions{Writable: writable})
			})
		},
		Check: func(t testing.TB, dir *layertest.Dir, crashed bool) {
			imgtest.RequirePloop(t)
			if crashed {
				return // marked as in use, which both programs mind: the kit's own look is all
			}
			// Exit 0 is also given for what was repaired: the text tells.
			exit, out := imgtest.PloopCheck(t, dir.Path(name))
			if exit != 0 {
				t.Errorf("ploop check: exit %d\n%s", exit, out)
			}
		},
		Read: func(t testing.TB, dir *layertest.Dir, below, out string) {
			imgtest.Require(t, "qemu-img")
			chain := []imgtest.Image{{Path: dir.Path(name), Format: "parallels"}}
			if below != "" {
				chain = append(chain, imgtest.Image{Path: below, Format: "raw"})
			}
			imgtest.QemuRaw(t, "", imgtest.Chain(chain...), out)
		},
	}
}

// qcow2Options is a kind of qcow2 image.
type qcow2Options struct {
	qcow2.CreateOptions
	cache int64 // bytes, 0 for the default
}

const (
	qcow2File = "image.qcow2"
	dataFile  = "data.raw"
)

func qcow2Factory(name string, o qcow2Options) layertest.Factory {
	return layertest.Factory{
		Name: "qcow2 " + name, Granule: o.ClusterSize, Scripts: scripts,
		KeepsPlace: o.DataFileRaw, Opaque: o.DataFileRaw,
		Create: func(ctx context.Context, dir *layertest.Dir, size int64) error {
			if o.DataFile != "" {
				if err := create(dir, dataFile, func(f backend.File) error {
					if !o.DataFileRaw {
						return nil
					}
					return raw.Create(ctx, f, size)
				}); err != nil {
					return err
				}
			}
			return create(dir, qcow2File, func(f backend.File) error {
				with := o.CreateOptions
				with.Size = size
				return qcow2.Create(ctx, f, with)
			})
		},
		Open: func(ctx context.Context, dir *layertest.Dir, writable bool) (layers.Layer, error) {
			oo := layers.OpenOptions{Writable: writable, OpenFile: func(_ string, writable bool) (backend.File, error) {
				return dir.Open(dataFile, writable)
			}}
			if o.cache > 0 {
				oo.Cache = layers.NewCache(o.cache)
			}
			return open(dir, qcow2File, writable, func(f backend.File) (*qcow2.Image, error) { return qcow2.Open(ctx, f, oo) })
		},
		Check: func(t testing.TB, dir *layertest.Dir, crashed bool) {
			imgtest.Require(t, "qemu-img")
			exit, out := imgtest.Try(t, "qemu-img", "check", node(t, dir, o, ""))
			if exit != 0 && !(crashed && exit == 3) {
				t.Errorf("qemu-img check: exit %d\n%s", exit, out)
			}
		},
		Read: func(t testing.TB, dir *layertest.Dir, below, out string) {
			imgtest.Require(t, "qemu-img")
			imgtest.QemuRaw(t, "", node(t, dir, o, below), out)
		},
	}
}

// node names a qcow2 image with a raw layer below for QEMU. The name of a data
// file would be relative to the directory that the test runs in.
func node(t testing.TB, dir *layertest.Dir, o qcow2Options, below string) string {
	t.Helper()
	n := map[string]any{
		"driver": "qcow2", "backing": nil,
		"file": map[string]any{"driver": "file", "filename": dir.Path(qcow2File)},
	}
	if below != "" {
		n["backing"] = map[string]any{"driver": "raw", "file": map[string]any{"driver": "file", "filename": below}}
	}
	if o.DataFile != "" {
		n["data-file"] = map[string]any{"driver": "file", "filename": dir.Path(dataFile)}
	}
	ref, err := json.Marshal(n)
	if err != nil {
		t.Fatal(err)
	}
	return "json:" + string(ref)
}

func formats() []layertest.Factory {
	type c = qcow2.CreateOptions
	return []layertest.Factory{
		rawFactory(),
		ploopFactory(1, 32<<10),
		ploopFactory(2, 32<<10),
		ploopFactory(2, 128<<10),
		qcow2Factory("v3 64K", qcow2Options{CreateOptions: c{ClusterSize: 64 << 10}}),
		qcow2Factory("v3 4K", qcow2Options{CreateOptions: c{ClusterSize: 4096}}),
		qcow2Factory("v3 512", qcow2Options{CreateOptions: c{ClusterSize: 512}}),
		qcow2Factory("v3 512, smallest cache", qcow2Options{CreateOptions: c{ClusterSize: 512}, cache: 1}),
		qcow2Factory("v2 4K", qcow2Options{CreateOptions: c{ClusterSize: 4096, Version: 2}}),
		qcow2Factory("refcounts of 1 bit", qcow2Options{CreateOptions: c{ClusterSize: 4096, RefcountBits: 1}}),
		qcow2Factory("refcounts of 64 bits", qcow2Options{CreateOptions: c{ClusterSize: 1024, RefcountBits: 64}}),
		qcow2Factory("lazy refcounts", qcow2Options{CreateOptions: c{ClusterSize: 4096, LazyRefcounts: true}}),
		qcow2Factory("extended L2", qcow2Options{CreateOptions: c{ClusterSize: 16 << 10, ExtendedL2: true}}),
		qcow2Factory("data file", qcow2Options{CreateOptions: c{ClusterSize: 4096, DataFile: "data.raw"}}),
		qcow2Factory("raw data file", qcow2Options{CreateOptions: c{ClusterSize: 4096, DataFile: "data.raw", DataFileRaw: true}}),
	}
}

// TestFormats is the one suite over every format that can be written.
func TestFormats(t *testing.T) {
	for _, f := range formats() {
		t.Run(f.Name, func(t *testing.T) { layertest.Run(t, f) })
	}
}

// TestStacks piles up all formats.
func TestStacks(t *testing.T) { layertest.RunStacks(t, formats(), 40) }

// TestSyncs: every sync of a commit is one whose absence a power cut shows. A
// sync without new entries is needed only where a script wrote in place before
// it, so it takes some scripts. That of closeEditor makes lowered reference
// counts durable: without it space leaks, which is no loss.
func TestSyncs(t *testing.T) {
	for _, f := range formats() {
		switch f.Name {
		case "qcow2 v3 4K", "qcow2 v2 4K", "qcow2 extended L2", "qcow2 data file":
			t.Run(f.Name, func(t *testing.T) { layertest.RunSyncs(t, f, 30, "closeEditor") })
		}
	}
}
