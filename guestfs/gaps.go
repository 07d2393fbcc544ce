package guestfs

import (
	"io"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
)

// gapMargin is what is left alone at both ends of the disk: boot loaders and
// partition tables live there.
const gapMargin = 1 << 20

// gaps adds what no partition covers. With a GPT only its usable sectors
// count, so that a table in an unusual place is kept.
func (j *judge) gaps(r io.ReaderAt, size int64, parts []Partition) error {
	a := Area{Name: "gaps", Where: blockmap.Range{Off: -1}, Type: "gaps"}
	low, high, err := usable(r, size)
	if err != nil {
		return j.refuse(a, err)
	}
	low, high = max(low, gapMargin), min(high, size-gapMargin)
	var used blockmap.Set
	for _, p := range parts {
		used.Add(p.Start, p.Size)
	}
	c := freespace.NewCollector(j.o.MaxRanges, j.o.MinRange)
	if low < high {
		for g := range used.Gaps(low, high-low) {
			a.Where.Len += g.Len
			if err := c.Add(g.Off, g.Len); err != nil {
				return j.refuse(a, err)
			}
		}
	}
	j.accept(a, c, flat(0))
	return nil
}

// usable is the part of the disk that its partition table gives to partitions,
// in bytes.
func usable(r io.ReaderAt, size int64) (low, high int64, err error) {
	head := make([]byte, mbrSector)
	if err := readFull(r, head, 0); err != nil {
		return 0, 0, err
	}
	if table, ok := parseMBR(head); !ok || !table.protective() {
		return 0, size, nil
	}
	for _, sector := range []int64{512, 4096} {
		h, there, err := readGPTHeader(r, size, sector, 1)
		if err != nil || !there {
			continue
		}
		return int64(h.first) * sector, int64(h.last+1) * sector, nil
	}
	return 0, 0, freespace.Refuse(freespace.Damaged, "the first GPT header is not readable: gaps are not judged")
}
