package guestfs

import (
	"crypto/sha256"
	"io"
	"strings"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/guestfs/lvm"
)

// pv is a physical volume that waits for the others of its group.
type pv struct {
	area   Area
	volume *lvm.Volume
}

// addPV notes a physical volume. One inside of a logical volume is not looked
// into.
func (j *judge) addPV(a Area) error {
	if strings.Contains(a.Name, "/") {
		return j.refuse(a, freespace.Refuse(freespace.NotJudged, "a physical volume in a logical volume"))
	}
	j.pvs = append(j.pvs, pv{area: a})
	return nil
}

// lvm judges the volume groups of the disk: the extents that no logical volume
// has, and each logical volume as an area of its own. The areas of a group
// are named after the first of its physical volumes.
func (j *judge) lvm(r io.ReaderAt) error {
	var order [][sha256.Size]byte
	groups := map[[sha256.Size]byte][]pv{}
	for _, p := range j.pvs {
		v, err := lvm.Open(j.ctx, r, p.area.Where)
		if err != nil {
			if err := j.refuse(p.area, err); err != nil {
				return err
			}
			continue
		}
		p.volume = v
		k := v.Key()
		if len(groups[k]) == 0 {
			order = append(order, k)
		}
		groups[k] = append(groups[k], p)
	}
	for _, k := range order {
		if err := j.lvmGroup(r, groups[k]); err != nil {
			return err
		}
	}
	return nil
}

func (j *judge) lvmGroup(r io.ReaderAt, pvs []pv) error {
	var volumes []*lvm.Volume
	for _, p := range pvs {
		volumes = append(volumes, p.volume)
	}
	group, err := lvm.Decode(j.ctx, r, volumes)
	if err != nil {
		for _, p := range pvs {
			if err := j.refuse(p.area, err); err != nil {
				return err
			}
		}
		return nil
	}
	first := pvs[0].area
	free := Area{Name: first.Name + "/unallocated", Where: blockmap.Range{Off: -1}, Type: first.Type}
	free.Info = freespace.Info{UUID: group.ID, Label: group.Name, BlockSize: group.ExtentSize}
	c := freespace.NewCollector(j.o.MaxRanges, j.o.MinRange)
	for _, f := range group.Free {
		free.Where.Len += f.Len
		if err := c.Add(f.Off, f.Len); err != nil {
			return j.refuse(free, err)
		}
	}
	j.accept(free, c, flat(0))
	for i := range group.LVs {
		lv := &group.LVs[i]
		area := Area{Name: first.Name + "/" + group.Name + "/" + lv.Name, Where: blockmap.Range{Off: -1, Len: lv.Size}}
		if lv.Refusal != nil {
			if err := j.refuse(area, lv.Refusal); err != nil {
				return err
			}
			continue
		}
		if len(lv.Pieces) == 1 {
			area.Where.Off = lv.Pieces[0].At
		}
		err := j.area(area, lv.ReaderAt(r), func(off, n int64, add func(blockmap.Range)) {
			lv.Place(off, n, func(at, n int64) { add(blockmap.Range{Off: at, Len: n}) })
		})
		if err != nil {
			return err
		}
	}
	return nil
}
