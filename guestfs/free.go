package guestfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Options say what may be judged. The zero value is the cautious choice.
type Options struct {
	// Gaps admits what no partition covers, but never the first and the last
	// MiB of the disk, nor anything inside an extended partition. Boot code
	// and leftovers of older partitions may lie there.
	Gaps bool
	// Swap admits the pages of swap areas. Their content is lost, which
	// matters only for a guest whose memory was saved.
	Swap bool
	// MinRange is the length in bytes of the shortest range worth keeping;
	// 0 keeps all.
	MinRange int64
	// MaxRanges bounds the ranges held in memory, 16 bytes each; 0 means
	// DefaultMaxRanges. When there are more the shortest are forgotten.
	MaxRanges int
}

// DefaultMaxRanges is 16 MiB of ranges.
const DefaultMaxRanges = 1 << 20

// Report is the answer of Free.
type Report struct {
	// Free are the ranges proven free: byte offsets on the disk, ascending,
	// disjoint, neighbours joined.
	Free []blockmap.Range
	// Areas are the parts of the disk that were looked at.
	Areas []Area
	// Dropped are bytes of judged areas that are missing in Free because all
	// areas together have more than Options.MaxRanges ranges.
	Dropped int64
}

// Bytes is the number of free bytes.
func (r *Report) Bytes() int64 {
	n := int64(0)
	for _, f := range r.Free {
		n += f.Len
	}
	return n
}

// Area is a part of the disk: a partition, the whole disk when it has none, a
// logical volume, the gaps.
type Area struct {
	// Name is "disk", "p2" for partition 2, "p2/vg/root" for a logical
	// volume, "p2/unallocated" for its volume group's free extents, or "gaps".
	// Partition 2 is the first of those that the group has.
	Name string
	// Where is the place on the disk in bytes. A logical volume of several
	// pieces, and the gaps, have an Off of -1.
	Where blockmap.Range
	Type  string // ext4, xfs, btrfs, swap, lvm2, …; "" is unknown
	// Refusal is why nothing here is called free; nil when it was judged.
	Refusal *freespace.Refusal
	// Free is the number of bytes proven free here. Dropped are bytes that
	// are free as well, in ranges too short to be kept.
	Free, Dropped int64
	Info          freespace.Info
}

// Free finds the bytes of the disk [0, size) of r that are proven free. What
// cannot be judged, also for a failing read, is reported in its Area. The only
// error is that of ctx.
func Free(ctx context.Context, r io.ReaderAt, size int64, o Options) (*Report, error) {
	if o.MaxRanges <= 0 {
		o.MaxRanges = DefaultMaxRanges
	}
	j := &judge{ctx: ctx, o: o, report: &Report{}}
	err := j.disk(r, size)
	if err == nil {
		err = j.lvm(r)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	j.suspended()
	j.report.Free = join(j.report.Free)
	return j.report, nil
}

// suspended withdraws everything when a Linux guest waits in a swap area to be
// resumed: its memory may have blocks in use that no journal knows yet.
func (j *judge) suspended() {
	areas := j.report.Areas
	i := slices.IndexFunc(areas, func(a Area) bool { return a.Type == "hibernation" })
	if i < 0 {
		return
	}
	why := freespace.Refuse(freespace.InUse, "the guest is hibernated in %s: start it and shut it down", areas[i].Name)
	for k := range areas {
		if a := &areas[k]; a.Refusal == nil {
			a.Refusal, a.Free, a.Dropped = freespace.AsRefusal(why), 0, 0
		}
	}
	j.report.Free, j.report.Dropped = nil, 0
}

type judge struct {
	ctx    context.Context
	o      Options
	report *Report
	pvs    []pv
}

// refuse adds an area of which nothing is free. It returns err when that is
// the context's.
func (j *judge) refuse(a Area, err error) error {
	if a.Refusal = freespace.AsRefusal(err); a.Refusal == nil {
		return err
	}
	j.report.Areas = append(j.report.Areas, a)
	return nil
}

func (j *judge) disk(r io.ReaderAt, size int64) error {
	whole := Area{Name: "disk", Where: blockmap.Range{Len: size}}
	if size <= 0 {
		return j.refuse(whole, freespace.Refuse(freespace.UnknownType, "the disk is empty"))
	}
	parts, err := Partitions(j.ctx, r, size)
	switch {
	case errors.Is(err, ErrDamaged):
		return j.refuse(whole, freespace.Refuse(freespace.Damaged, "%v", err))
	case err != nil:
		return j.refuse(whole, err)
	case len(parts) == 0:
		return j.area(whole, r, flat(0))
	}
	found, err := signatures(r, size)
	if err != nil {
		return j.refuse(whole, err)
	}
	if len(found) > 0 {
		return j.refuse(whole, freespace.Refuse(freespace.Ambiguous, "the disk has partitions, and %s directly on it", found[0].name))
	}
	for _, p := range parts {
		if p.Container {
			continue
		}
		a := Area{Name: fmt.Sprintf("p%d", p.Number), Where: blockmap.Range{Off: p.Start, Len: p.Size}}
		if err := j.area(a, io.NewSectionReader(r, p.Start, p.Size), flat(p.Start)); err != nil {
			return err
		}
	}
	if j.o.Gaps {
		return j.gaps(r, size, parts)
	}
	return nil
}

// place turns a range of an area into ranges of the disk.
type place func(off, n int64, add func(blockmap.Range))

// flat is the place of an area in one piece.
func flat(start int64) place {
	return func(off, n int64, add func(blockmap.Range)) { add(blockmap.Range{Off: start + off, Len: n}) }
}

// area judges one area, whose bytes r reads from 0.
func (j *judge) area(a Area, r io.ReaderAt, at place) error {
	size := a.Where.Len
	found, err := signatures(r, size)
	if err != nil {
		return j.refuse(a, err)
	}
	switch {
	case len(found) == 0:
		return j.refuse(a, freespace.Refuse(freespace.UnknownType, "no filesystem of a known type"))
	case len(found) > 1:
		a.Type = found[0].name
		return j.refuse(a, freespace.Refuse(freespace.Ambiguous, "signatures of %s and %s", found[0].name, found[1].name))
	}
	f := found[0]
	a.Type = f.name
	switch {
	case f.name == "lvm2":
		return j.addPV(a)
	case f.read == nil:
		return j.refuse(a, freespace.Refuse(freespace.NotJudged, "%s is not judged", f.name))
	case f.name == "swap" && !j.o.Swap:
		return j.refuse(a, freespace.Refuse(freespace.NotAsked, "swap areas are only judged on request"))
	}
	c := freespace.NewCollector(j.o.MaxRanges, j.o.MinRange)
	a.Info, err = f.read(j.ctx, r, size, func(off, n int64) error {
		if off < 0 || n > size-off {
			return freespace.Refuse(freespace.Damaged, "free range %d+%d outside of %d bytes", off, n, size)
		}
		return c.Add(off, n)
	})
	if err != nil {
		return j.refuse(a, err)
	}
	j.accept(a, c, at)
	return nil
}

// accept adds a judged area.
func (j *judge) accept(a Area, c *freespace.Collector, at place) {
	for _, r := range c.Ranges() {
		a.Free += r.Len
		at(r.Off, r.Len, func(d blockmap.Range) { j.report.Free = append(j.report.Free, d) })
	}
	a.Dropped = c.Dropped()
	j.report.Areas = append(j.report.Areas, a)
	if len(j.report.Free) > j.o.MaxRanges {
		j.report.Free, _ = freespace.Longest(j.report.Free, j.o.MaxRanges, func(r blockmap.Range) { j.report.Dropped += r.Len })
	}
}

// join sorts ranges and joins neighbours. The areas do not overlap, but a byte
// that two of them called free would still be counted once.
func join(ranges []blockmap.Range) []blockmap.Range {
	slices.SortFunc(ranges, func(a, b blockmap.Range) int { return cmp.Compare(a.Off, b.Off) })
	out := ranges[:0]
	for _, r := range ranges {
		if k := len(out) - 1; k >= 0 && out[k].End() >= r.Off {
			out[k].Len = max(out[k].End(), r.End()) - out[k].Off
			continue
		}
		out = append(out, r)
	}
	return out
}
