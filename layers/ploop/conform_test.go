package ploop_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
)

const imageName = "image.hds"

// factory makes images of 32 KiB clusters.
func factory(version int) layertest.Factory {
	return layertest.Factory{
		Name: "ploop", Granule: ploop.MinCluster,
		Create: func(ctx context.Context, dir *layertest.Dir, size int64) error {
			f, err := dir.Open(imageName, true)
			if err != nil {
				return err
			}
			o := ploop.CreateOptions{Size: size, ClusterSize: ploop.MinCluster, Version: version}
			return errors.Join(ploop.Create(ctx, f, o), f.Close())
		},
		Open: func(ctx context.Context, dir *layertest.Dir, writable bool) (layers.Layer, error) {
			f, err := dir.Open(imageName, writable)
			if err != nil {
				return nil, err
			}
			i, err := ploop.Open(ctx, f, layers.OpenOptions{Writable: writable})
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			return i, nil
		},
		Check: check,
		Read: func(t testing.TB, dir *layertest.Dir, below, out string) {
			imgtest.Require(t, "qemu-img")
			chain := []imgtest.Image{{Path: dir.Path(imageName), Format: "parallels"}}
			if below != "" {
				chain = append(chain, imgtest.Image{Path: below, Format: "raw"})
			}
			imgtest.QemuRaw(t, "", imgtest.Chain(chain...), out)
		},
		Inspect: func(ctx context.Context, dir *layertest.Dir) error {
			f, err := dir.Open(imageName, false)
			if err != nil {
				return err
			}
			i, err := ploop.Open(ctx, f, layers.OpenOptions{})
			if err != nil {
				return errors.Join(err, f.Close())
			}
			seen := map[int64]int64{}
			err = i.WalkHost(ctx, func(r layers.HostRange) error {
				for at := r.Off; r.Role == layers.RoleData && at < r.Off+r.Len; at += i.Granule() {
					if _, dup := seen[at]; dup {
						return errors.New("two entries share a cluster")
					}
					seen[at] = r.Guest
				}
				return nil
			})
			return errors.Join(err, closedRight(ctx, i), i.Close())
		},
	}
}

// check asks ploop and QEMU. After a power cut the mark of an open image is to
// be cleared and holes in unreferenced slots are to be filled; nothing else may
// be wrong.
func check(t testing.TB, dir *layertest.Dir, crashed bool) {
	imgtest.Require(t, "qemu-img")
	path := dir.Path(imageName)
	f, err := backend.Open(path, backend.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	// The check looks at host extents, which exist once synced.
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	before := imgtest.SHA256File(t, path)
	args := []string{"check", "-f", "-c", path}
	if crashed {
		args = []string{"check", "-f", "-c", "-d", "-S", path}
	}
	// Free slots inside the file are reported and allowed.
	if exit, out := imgtest.Ploop(t, args...); exit != 0 {
		t.Errorf("ploop check: exit %d\n%s", exit, out)
	}
	if !crashed && imgtest.SHA256File(t, path) != before {
		t.Error("ploop check repaired something")
	}
	if exit, out := imgtest.QemuCheck(t, path, "parallels"); exit != 0 {
		t.Errorf("qemu-img check: exit %d\n%s", exit, out)
	}
}

// closedRight: whoever finds an image that is not marked as in use relies on
// its length and on CIF_Empty.
func closedRight(ctx context.Context, i *ploop.Image) error {
	info, err := i.Describe(ctx)
	if err != nil || slices.Contains(info.Flags, "in-use") {
		return err
	}
	if info.FileSize%info.ClusterSize != 0 {
		return fmt.Errorf("closed with a length of %d", info.FileSize)
	}
	if slices.Contains(info.Flags, "empty") != (info.UsedClusters == 0) {
		return fmt.Errorf("closed with flags %v and %d clusters", info.Flags, info.UsedClusters)
	}
	return nil
}

func TestConformV1(t *testing.T) {
	f := factory(1)
	f.Scripts = 6
	layertest.Run(t, f)
}

func TestConformV2(t *testing.T) {
	f := factory(2)
	f.Scripts = 30
	layertest.Run(t, f)
}

// TestEverySyncIsNeeded is the negative control of the power-cut check. The
// sync of Close before the header is for files with a ragged tail, which these
// scripts do not make: TestCloseIsOrdered is its control.
func TestEverySyncIsNeeded(t *testing.T) { layertest.RunSyncs(t, factory(2), 12, ".finish ") }
