package fat

import (
	"bytes"
	"encoding/binary"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// Directory entries of 32 bytes.
const (
	entrySize    = 32
	attrLabel    = 0x08
	attrDir      = 0x10
	attrLong     = 0x0f // a part of a long name
	maxPending   = 1 << 20
	rootCapacity = 65536 * entrySize // of a FAT12 or FAT16, whose root has a fixed place
)

// dir is a directory that waits to be read.
type dir struct{ start, parent uint32 }

// walk reads all directories. The first cluster of a file must be named by no
// other, neither an entry of the table nor of a directory, so no directory is
// read twice; and the first two entries of a directory must name it and its
// parent, which shows that the clusters are where they are taken to be.
func (t *table) walk() error {
	pending := []dir{}
	visit := func(self uint32, b []byte, add func(dir)) (end bool, err error) {
		for ; len(b) >= entrySize; b = b[entrySize:] {
			if b[0] == 0 {
				return true, nil
			}
			if b[0] == 0xe5 || b[11]&0x3f == attrLong || b[11]&(attrLabel|attrDir) == attrLabel ||
				bytes.HasPrefix(b, []byte(".          ")) || bytes.HasPrefix(b, []byte("..         ")) {
				continue
			}
			start, size := t.startOf(b), binary.LittleEndian.Uint32(b[28:])
			isDir := b[11]&attrDir != 0
			if start == 0 && size == 0 && !isDir {
				continue
			}
			if err := t.claim(start); err != nil {
				return false, err
			}
			if isDir {
				add(dir{start, self})
			}
		}
		return false, nil
	}
	add := func(d dir) { pending = append(pending, d) }
	if t.bits == 32 {
		if err := t.claim(t.rootCluster); err != nil {
			return err
		}
		add(dir{start: t.rootCluster})
	} else {
		root := make([]byte, min(t.heap-t.tableStart-t.tables*t.tableBytes, rootCapacity))
		if err := freespace.ReadAt(t.r, root, t.tableStart+t.tables*t.tableBytes); err != nil {
			return err
		}
		if _, err := visit(0, root, add); err != nil {
			return err
		}
	}
	b := make([]byte, t.cluster)
	for len(pending) > 0 {
		if len(pending) > maxPending {
			return freespace.Refuse(freespace.TooLarge, "fat: more than %d directories wait to be read", maxPending)
		}
		d := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		self := d.start
		if self == t.rootCluster {
			self = 0 // as its children call it
		}
		for c, first := d.start, true; ; first = false {
			if err := t.ctx.Err(); err != nil {
				return err
			}
			if err := freespace.ReadAt(t.r, b, t.heap+int64(c-2)*t.cluster); err != nil {
				return err
			}
			if first && self != 0 {
				if err := t.checkDots(b, d); err != nil {
					return err
				}
			}
			end, err := visit(self, b, add)
			if err != nil {
				return err
			}
			next, err := t.next(c)
			if err != nil {
				return err
			}
			if end || next == 0 {
				break
			}
			c = next
		}
	}
	return nil
}

// startOf is the first cluster in a directory entry.
func (t *table) startOf(b []byte) uint32 {
	start := uint32(binary.LittleEndian.Uint16(b[26:]))
	if t.bits == 32 {
		start |= uint32(binary.LittleEndian.Uint16(b[20:])) << 16
	}
	return start
}

// claim notes that a file begins with a cluster.
func (t *table) claim(c uint32) error {
	if c < 2 || c-2 >= t.clusters {
		return damaged("a file begins with cluster %d of %d", c, t.clusters)
	}
	word, bit := &t.named[(c-2)/64], uint64(1)<<((c-2)%64)
	if *word&bit != 0 {
		return damaged("cluster %d is part of two files: run fsck.fat", c)
	}
	*word |= bit
	return nil
}

func (t *table) checkDots(b []byte, d dir) error {
	if !bytes.HasPrefix(b, []byte(".          ")) || !bytes.HasPrefix(b[entrySize:], []byte("..         ")) ||
		t.startOf(b) != d.start || t.startOf(b[entrySize:]) != d.parent {
		return damaged("the directory in cluster %d does not begin with itself and its parent %d", d.start, d.parent)
	}
	return nil
}

// next is the cluster behind c, 0 at the end of a file. It ends: check has
// seen that no two entries name the same cluster, and no entry names a first.
func (t *table) next(c uint32) (uint32, error) {
	var b [4]byte
	n := int64(t.bits+7) / 8
	at := int64(c) * int64(t.bits) / 8
	for i := range n { // an entry of 12 bits may begin in one page and end in the next
		p, err := t.window.Bytes(at+i, 1)
		if err != nil {
			return 0, err
		}
		b[i] = p[0]
	}
	e := binary.LittleEndian.Uint32(b[:])
	ones := uint32(1)<<min(t.bits, 28) - 1
	if t.bits == 12 {
		e >>= c % 2 * 4
	}
	switch e &= ones; {
	case e >= ones-7:
		return 0, nil
	case e < 2 || e-2 >= t.clusters:
		return 0, damaged("the directory's cluster %d is followed by %#x", c, e)
	}
	return e, nil
}
