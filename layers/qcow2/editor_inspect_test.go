package qcow2

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
)

// inspect compares the reference counts of an image that is at rest with the
// references that its metadata holds. A count that is too low is always an
// error, one that is too high only when leaks are not allowed. The COPIED
// flags of the active map must be exact.
func inspect(ctx context.Context, f backend.File, leaks bool) error {
	return inspectWith(ctx, f, leaks, nil)
}

// inspectWith is inspect for images with a data file, which open opens.
func inspectWith(ctx context.Context, f backend.File, leaks bool, open func(string, bool) (backend.File, error)) error {
	img, err := Open(ctx, f, layers.OpenOptions{OpenFile: open})
	if err != nil {
		return err
	}
	if img.external {
		defer img.data.Close()
	}
	refs := map[int64]uint64{}
	err = img.WalkHost(ctx, func(h layers.HostRange) error {
		for c := h.Off >> img.clusterBits; c < (h.Off+h.Len)>>img.clusterBits; c++ {
			refs[c]++
		}
		return nil
	})
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	r := newRefcounts(img)
	if err := r.load(); err != nil {
		return err
	}
	for c := int64(0); c <= size>>img.clusterBits; c++ {
		n, err := r.get(c)
		if err != nil {
			return err
		}
		if n < refs[c] || n > refs[c] && !leaks {
			return fmt.Errorf("cluster %d is referenced %d times and counted %d times", c, refs[c], n)
		}
	}
	return checkCopied(img, r, leaks)
}

// checkCopied checks the COPIED flags. With leaks a count may be higher than
// the flag says, as it is for qemu-img check.
func checkCopied(img *Image, r *refcounts, leaks bool) error {
	ed := &editor{img: img, ref: r}
	if img.external {
		return nil
	}
	for guest := int64(0); guest < img.size; guest += img.clusterSize {
		s, err := ed.look(guest)
		if err != nil {
			return err
		}
		if s.table == 0 {
			continue
		}
		for what, x := range map[string]struct {
			off    int64
			copied bool
		}{"L1": {s.table, s.owned}, "L2": {int64(s.e.host), s.e.copied}} {
			if what == "L2" && !s.e.hasHost || s.e.isPacked {
				continue
			}
			n, err := r.get(x.off >> img.clusterBits)
			if err != nil {
				return err
			}
			if x.copied != (n == 1) {
				return fmt.Errorf("%s entry of %#x: COPIED is %v, the count %d", what, guest, x.copied, n)
			}
		}
	}
	return nil
}

// conform is the Factory of the conformance kit for images made with o.
func conform(o CreateOptions) layertest.Factory {
	const name = "image.qcow2"
	return layertest.Factory{
		Name: fmt.Sprintf("qcow2 v%d, clusters of %d, refcounts of %d", o.Version, o.ClusterSize, o.RefcountBits), Granule: o.ClusterSize,
		Create: func(ctx context.Context, dir *layertest.Dir, size int64) error {
			f, err := dir.Open(name, true)
			if err != nil {
				return err
			}
			o := o
			o.Size = size
			err = Create(ctx, f, o)
			if err == nil && o.DataFile != "" {
				var d backend.File
				if d, err = dir.Open(o.DataFile, true); err == nil {
					err = errors.Join(d.Truncate(size), d.Sync(), d.Close())
				}
			}
			return errors.Join(err, f.Close())
		},
		Open: func(ctx context.Context, dir *layertest.Dir, writable bool) (layers.Layer, error) {
			f, err := dir.Open(name, writable)
			if err != nil {
				return nil, err
			}
			img, err := Open(ctx, f, layers.OpenOptions{Writable: writable, OpenFile: func(n string, w bool) (backend.File, error) {
				return dir.Open(filepath.Base(n), w)
			}})
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			return img, nil
		},
		Inspect: func(ctx context.Context, dir *layertest.Dir) error {
			f, err := dir.Open(name, false)
			if err != nil {
				return err
			}
			open := func(n string, w bool) (backend.File, error) { return dir.Open(filepath.Base(n), w) }
			return errors.Join(inspectWith(ctx, f, true, open), f.Close())
		},
	}
}
