package guestfs

import (
	"io"
	"strings"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/guestfs/lvm"
)

// lvm judges a physical volume: the extents that no logical volume has, and
// each logical volume as an area of its own. A physical volume inside of a
// logical one is not looked into.
func (j *judge) lvm(a Area, r io.ReaderAt, at place) error {
	if strings.Contains(a.Name, "/") {
		return j.refuse(a, freespace.Refuse(freespace.NotJudged, "a physical volume in a logical volume"))
	}
	pv, err := lvm.Read(j.ctx, r, a.Where.Len)
	if err != nil {
		return j.refuse(a, err)
	}
	free := a
	free.Name, free.Where = a.Name+"/unallocated", blockmap.Range{Off: -1}
	free.Info = freespace.Info{UUID: pv.UUID, Label: pv.VG, BlockSize: pv.ExtentSize}
	c := freespace.NewCollector(j.o.MaxRanges, j.o.MinRange)
	for _, f := range pv.Free {
		free.Where.Len += f.Len
		if err := c.Add(f.Off, f.Len); err != nil {
			return j.refuse(a, err)
		}
	}
	j.accept(free, c, at)
	for i := range pv.LVs {
		lv := &pv.LVs[i]
		area := Area{Name: a.Name + "/" + pv.VG + "/" + lv.Name, Where: blockmap.Range{Off: -1, Len: lv.Size}}
		if lv.Refusal != nil {
			if err := j.refuse(area, lv.Refusal); err != nil {
				return err
			}
			continue
		}
		if len(lv.Pieces) == 1 {
			area.Where.Off = a.Where.Off + lv.Pieces[0].At
		}
		err := j.area(area, lv.ReaderAt(r), func(off, n int64, add func(blockmap.Range)) {
			lv.Place(off, n, func(off, n int64) { at(off, n, add) })
		})
		if err != nil {
			return err
		}
	}
	return nil
}
