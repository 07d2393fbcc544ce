package qcow2

import (
	"context"
	"fmt"
	"math/bits"
	"strconv"

	"github.com/imagestack/imagestack/layers"
)

// Describe implements layers.Layer. It reads the whole map.
func (img *Image) Describe(ctx context.Context) (layers.Info, error) {
	h, err := img.header()
	if err != nil {
		return layers.Info{}, err
	}
	info := layers.Info{
		Path:        img.o.Path,
		Format:      "qcow2",
		Version:     int(h.Version),
		VirtualSize: img.size,
		ClusterSize: img.clusterSize,
		DataFile:    h.DataFile(),
		Flags:       h.flags(),
		Details:     h.details(),
	}
	p := img.Parent()
	info.Backing, info.BackingFormat = p.Name, p.Format
	if info.FileSize, err = img.f.Size(); err != nil {
		return info, img.errorf(-1, "", nil, err)
	}
	if info.AllocatedSize, err = img.f.Allocated(); err != nil {
		return info, img.errorf(-1, "", nil, err)
	}
	if err := img.countClusters(ctx, &info); err != nil {
		return info, err
	}
	if h.NbSnapshots > 0 {
		_, err := img.eachSnapshot(ctx, h, func(s *snapshotEntry) error {
			info.Snapshots = append(info.Snapshots, layers.Snapshot{
				ID: s.id, Name: s.name, VirtualSize: int64(s.diskSize), VMStateSize: int64(s.vmState),
				Time: int64(s.sec), Current: img.snapshot != "" && s.id == img.snapshot,
			})
			return nil
		})
		if err != nil {
			return info, err
		}
	}
	if h.bitmapsValid() {
		err := img.eachBitmap(ctx, h, func(b *bitmapEntry) error {
			info.Bitmaps = append(info.Bitmaps, layers.Bitmap{Name: b.name, Granularity: 1 << b.granularity, Flags: b.flagNames()})
			return nil
		})
		if err != nil {
			return info, err
		}
	}
	return info, nil
}

// countClusters counts the guest clusters of the disk by what is recorded. All
// L1 entries are looked at before the first L2 table is read.
func (img *Image) countClusters(ctx context.Context, info *layers.Info) error {
	tables, used := tableCount{img: img}, int64(0)
	err := img.eachTableOfDisk(ctx, func(_, at int64, entry uint64) error {
		used++
		_, err := tables.next(at, entry)
		return err
	})
	if err != nil {
		return err
	}
	if most := img.o.MaxTables; most > 0 && used > most>>img.clusterBits {
		info.Uncounted = true
		return nil
	}
	return img.eachTableOfDisk(ctx, func(i, at int64, entry uint64) error {
		table, err := img.checkL1(at, entry)
		if err != nil {
			return err
		}
		return img.eachL2(ctx, table, i*img.l2Span, func(guest int64, e *l2Entry) error {
			switch {
			case guest >= img.size: // VM state
			case e.mapped():
				info.UsedClusters++
				if e.isPacked {
					info.PackedClusters++
				}
			case e.zero != 0:
				info.ZeroClusters++
			}
			return nil
		})
	})
}

// eachTableOfDisk calls do for the L1 entries that name a table and are not of
// the VM state.
func (img *Image) eachTableOfDisk(ctx context.Context, do func(i, at int64, entry uint64) error) error {
	return img.eachL1(ctx, func(i, at int64, entry uint64) error {
		if entry&^entryCopied == 0 || img.size == 0 || i > img.l1Index(img.size-1) {
			return nil
		}
		return do(i, at, entry)
	})
}

// flags are the feature bits that are set, by QEMU's names where it has some.
func (h *Header) flags() []string {
	var flags []string
	add := func(set bool, name string) {
		if set {
			flags = append(flags, name)
		}
	}
	add(h.Dirty(), "dirty")
	add(h.Corrupt(), "corrupt")
	add(h.LazyRefs(), "lazy-refcounts")
	add(h.ExtendedL2(), "extended-l2")
	add(h.HasDataFile(), "external-data-file")
	add(h.HasDataFile() && h.RawDataFile(), "data-file-raw")
	add(h.extension(extBitmaps) != nil && !h.bitmapsValid(), "bitmaps-stale")
	h.unknownBits(1, "compatible", h.Compatible&^compatLazyRefcounts, add)
	h.unknownBits(2, "autoclear", h.Autoclear&^autoclearKnown, add)
	return flags
}

// unknownBits adds the bits of a feature bitmap that this package does not
// know, by the name that the image has for them or by number.
func (h *Header) unknownBits(bitmap uint8, which string, set uint64, add func(bool, string)) {
	for ; set != 0; set &= set - 1 {
		bit := uint8(bits.TrailingZeros64(set))
		name := h.featureName(bitmap, bit)
		if name == "" {
			name = fmt.Sprintf("%s-bit-%d", which, bit)
		}
		add(true, name)
	}
}

// details use the keys of qemu-img's format-specific information.
func (h *Header) details() map[string]string {
	compat := "1.1"
	if h.Version == 2 {
		compat = "0.10"
	}
	return map[string]string{
		"compat":           compat,
		"compression-type": h.Compression().String(),
		"lazy-refcounts":   strconv.FormatBool(h.LazyRefs()),
		"refcount-bits":    strconv.Itoa(1 << h.RefcountOrder),
		"corrupt":          strconv.FormatBool(h.Corrupt()),
		"extended-l2":      strconv.FormatBool(h.ExtendedL2()),
	}
}
