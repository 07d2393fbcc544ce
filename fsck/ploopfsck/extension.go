package ploopfsck

import (
	"bytes"
	"crypto/md5"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
)

// The format extension (QEMU docs/interop/parallels.txt): one cluster with a
// magic, the MD5 of its rest, and elements up to a magic of 0.
const (
	extMagic    = 0xab234cef23dcea87
	extHead     = 8 + md5.Size
	elementHead = 24 // magic u64, flags u64, size u32, 0

	bitmapMagic = 0x20385fae252cb34a
	bitmapHead  = 32 // size u64, id [16], granularity u32, entries u32
)

// extension are the clusters of a format extension that stays.
type extension struct {
	at    int64   // byte offset, 0 for none
	slots []int64 // sorted: its own cluster and those of its bitmaps
}

func (e *extension) has(slot int64) bool { return e.next(slot) == slot }

// next is the first of its slots at or behind slot.
func (e *extension) next(slot int64) int64 {
	if i, _ := slices.BinarySearch(e.slots, slot); i < len(e.slots) {
		return e.slots[i]
	}
	return math.MaxInt64
}

// last is the highest slot, -1 without any.
func (e *extension) last() int64 {
	if len(e.slots) == 0 {
		return -1
	}
	return e.slots[len(e.slots)-1]
}

// extProblem is what is wrong with an extension.
type extProblem struct {
	code  *fsck.Code
	off   int64
	field string
	value any
	text  string
}

// checkExtension reads the format extension. An extension that is dropped by
// the repair, or refused, owns no clusters any more... unless the repair is not
// wanted: then what is known of it counts as used, and is no leak.
func (c *check) checkExtension() error {
	v := c.changed.u64(offExtension)
	if v == 0 {
		return nil
	}
	field := "m_FormatExtensionOffset"
	if v > math.MaxInt64/sectorSize || !c.extFits(int64(v)*sectorSize) {
		if v <= math.MaxInt64 && c.extFits(int64(v)) && c.extSound(int64(v)) {
			if c.report(fsck.Finding{Code: codeExtBytes, Place: fsck.Place{Offset: offExtension, Field: field, Value: v}, Text: "is in bytes",
				Fix: &fsck.Fix{Text: "divide it by 512", Level: fsck.Preen}}) {
				c.changed.put64(offExtension, v/sectorSize)
			}
			v /= sectorSize
		} else {
			return c.misplaced(v)
		}
	}
	c.ext.at = int64(v) * sectorSize
	p, err := c.parseExtension(c.ext.at)
	slices.Sort(c.ext.slots)
	if err != nil {
		c.unreadable(c.ext.at, "format extension", err)
		c.ext.slots = slices.Compact(c.ext.slots)
		return nil
	}
	if p == nil {
		for i := 1; i < len(c.ext.slots); i++ {
			if c.ext.slots[i] == c.ext.slots[i-1] {
				p = &extProblem{codeExtShared, c.ext.slots[i] * c.cluster, "dirty bitmap l1", uint64(c.ext.slots[i]), "two parts of the extension on one cluster"}
				break
			}
		}
	}
	if p == nil && c.changed.u32(offInUse) != inUseV21 {
		p = &extProblem{codeExtStale, offInUse, "m_DiskInUse", c.changed.u32(offInUse), "the extension was not written with the image"}
	}
	c.ext.slots = slices.Compact(c.ext.slots)
	if p == nil {
		return nil
	}
	return c.dropExtension(c.ext.at, *p, fsck.Preen)
}

// misplaced handles an extension at v sectors, which is no place of a cluster.
// One that is sound there all the same, which its checksum proves, gets a
// cluster of its own; what else is there is kept.
func (c *check) misplaced(v uint64) error {
	p := extProblem{codeExtOffset, offExtension, "m_FormatExtensionOffset", v, "is no place of a cluster in the file"}
	if v > math.MaxInt64/sectorSize || int64(v)*sectorSize >= c.eof {
		return c.dropExtension(0, p, fsck.Preen)
	}
	at := int64(v) * sectorSize
	if at > c.eof-c.cluster || c.changed.u32(offInUse) != inUseV21 || !c.extSound(at) || !c.canAllocate(1) {
		return c.dropExtension(at, p, fsck.Preen)
	}
	// The clusters of its bitmaps are known only when it is in its place.
	c.doubtful()
	lost := c.guestAt(at, c.cluster)
	if !c.report(fsck.Finding{Code: p.code, Place: fsck.Place{Offset: p.off, Field: p.field, Value: p.value}, Guest: lost,
		Text: "is no place of a cluster, but a sound extension is there",
		Fix:  &fsck.Fix{Text: "move it into a cluster of its own", Level: fsck.Full, Loses: lost}}) {
		return nil
	}
	to, err := c.allocate()
	if err == nil {
		err = c.plan.Copy(to, at, c.cluster)
	}
	if err != nil {
		return err
	}
	c.changed.put64(offExtension, uint64(to/sectorSize))
	return nil
}

// guestAt are the parts of the disk that are stored in [at, at+n) of the file,
// as far as a finding names them.
func (c *check) guestAt(at, n int64) []blockmap.Range {
	var idx []int64
	for _, r := range c.ownersOf(func(slot int64) bool { return slot*c.cluster < at+n && (slot+1)*c.cluster > at }) {
		idx = append(idx, r.idx)
	}
	return c.ranges(idx)
}

// ownersOf are entries, ascending, whose clusters are among the wanted ones.
func (c *check) ownersOf(wanted func(slot int64) bool) (owners []run) {
	// What cannot be read is reported by the walk that follows.
	_ = c.walk(func(p *part, r run) {
		for k := int64(0); r.bad == nil && k < r.count; k++ {
			if wanted(c.slot(r.entry)+k) && len(p.runs) < maxShared {
				p.runs = append(p.runs, run{idx: r.idx + k, count: 1, entry: r.entry + uint32(k*c.step)})
			}
		}
	}, func(p *part) error {
		owners = append(owners, p.runs[:min(len(p.runs), max(0, maxShared-len(owners)))]...)
		return nil
	})
	return owners
}

// dropExtension reports the problem; the fix forgets the extension knowingly:
// its offset, and so the owner of its clusters. lost are parts of the disk that
// it may have overwritten.
func (c *check) dropExtension(at int64, p extProblem, level fsck.Level, lost ...blockmap.Range) error {
	if c.doubt {
		level = fsck.Full // with another header it might be sound
	}
	if !c.report(fsck.Finding{Code: p.code, Place: fsck.Place{Offset: p.off, Field: p.field, Value: p.value}, Text: p.text, Guest: lost,
		Fix: &fsck.Fix{Text: "drop the extension", Level: level, Loses: lost}}) {
		return nil
	}
	if at > 0 {
		if err := c.keep(-1, at, c.cluster); err != nil {
			return err
		}
	}
	c.changed.put64(offExtension, 0)
	if c.changed.u32(offInUse) == inUseV21 {
		c.changed.put32(offInUse, 0)
	}
	c.ext = extension{}
	return nil
}

// extFits reports whether a cluster for the extension can be at byte at.
func (c *check) extFits(at int64) bool {
	return at%c.cluster == 0 && at >= c.firstData && at <= c.eof-c.cluster
}

// extSound reports whether a valid extension is at byte at.
func (c *check) extSound(at int64) bool {
	sum, magic, want, err := c.extSum(at)
	return err == nil && magic == extMagic && bytes.Equal(sum, want)
}

// extSum reads the extension in pieces.
func (c *check) extSum(at int64) (sum []byte, magic uint64, want []byte, err error) {
	buf := make([]byte, min(c.cluster, 1<<20))
	h := md5.New()
	for pos := int64(0); pos < c.cluster; pos += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), c.cluster-pos)]
		if err := c.read(b, at+pos); err != nil {
			return nil, 0, nil, err
		}
		if pos == 0 {
			magic, want = le.Uint64(b), bytes.Clone(b[8:extHead])
			b = b[extHead:]
		}
		h.Write(b)
	}
	return h.Sum(nil), magic, want, nil
}

// parseExtension enters the clusters of the extension at byte at into c.ext
// and returns the first thing that is wrong with it.
func (c *check) parseExtension(at int64) (*extProblem, error) {
	c.ext.slots = append(c.ext.slots, at/c.cluster)
	sum, magic, want, err := c.extSum(at)
	if err != nil {
		return nil, err
	}
	if magic != extMagic {
		return &extProblem{codeExtMagic, at, "magic", magic, "is wrong"}, nil
	}
	if !bytes.Equal(sum, want) {
		return &extProblem{codeExtSum, at + 8, "checksum", fmt.Sprintf("%x", want), fmt.Sprintf("should be %x", sum)}, nil
	}
	var head [elementHead]byte
	for pos := int64(extHead); pos+elementHead <= c.cluster; {
		if err := c.read(head[:], at+pos); err != nil {
			return nil, err
		}
		magic, n := le.Uint64(head[:]), int64(le.Uint32(head[16:]))
		if magic == 0 {
			return nil, nil
		}
		data := pos + elementHead
		if n > c.cluster-data {
			return &extProblem{codeExtElement, at + pos + 16, "size", uint32(n), "reaches behind the extension"}, nil
		}
		if magic == bitmapMagic {
			if p, err := c.parseBitmap(at+data, n); p != nil || err != nil {
				return p, err
			}
		}
		pos = data + (n+7)&^7
	}
	return nil, nil
}

// parseBitmap looks at the dirty bitmap in the n bytes at off.
func (c *check) parseBitmap(off, n int64) (*extProblem, error) {
	bad := func(at int64, field string, v any, text string) *extProblem {
		return &extProblem{codeExtBitmap, off + at, "dirty bitmap " + field, v, text}
	}
	if n < bitmapHead {
		return bad(0, "element", n, "is too short"), nil
	}
	var head [bitmapHead]byte
	if err := c.read(head[:], off); err != nil {
		return nil, err
	}
	granularity, count := int64(le.Uint32(head[24:])), int64(le.Uint32(head[28:]))
	if granularity == 0 || granularity&(granularity-1) != 0 {
		return bad(24, "granularity", uint32(granularity), "is not a power of two"), nil
	}
	if count > (n-bitmapHead)/8 {
		return bad(28, "l1_size", uint32(count), "reaches behind the element"), nil
	}
	var buf [4096]byte
	for k := int64(0); k < count; {
		b := buf[:min(int64(len(buf)), 8*(count-k))]
		if err := c.read(b, off+bitmapHead+8*k); err != nil {
			return nil, err
		}
		for ; len(b) > 0; b, k = b[8:], k+1 {
			v := le.Uint64(b)
			if v <= 1 {
				continue // all clear, all set
			}
			if v > math.MaxInt64/sectorSize || !c.extFits(int64(v)*sectorSize) {
				return bad(bitmapHead+8*k, "l1", v, "is no place of a cluster in the file"), nil
			}
			if int64(len(c.ext.slots)) > max(c.o.Budget()/64, 1024) {
				return nil, errors.New("too many dirty bitmaps for the memory allowed")
			}
			c.ext.slots = append(c.ext.slots, int64(v)*sectorSize/c.cluster)
		}
	}
	return nil, nil
}
