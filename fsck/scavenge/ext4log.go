package scavenge

import (
	"encoding/binary"
	"slices"
)

// journalled are the blocks of which the journal of an ext4 has, or had,
// copies. Mounted with data=journal it has copies of the data of files as well:
// one behind the other as in the file, they look like a place of the disk whose
// own content may be older or missing.
type journalled struct {
	blocks []uint64
	full   bool // there are more than are kept
	data   int  // of them, how often they are blocks of regular files
}

// maxJournalled bounds the blocks that are kept: those of a journal of 4 GiB.
const maxJournalled = 1 << 20

// Tags of a descriptor block with checksums of version 3, which filesystems
// with checksums have (kernel documentation, ext4 data structures, Journal).
const (
	logHeader   = 12
	logTag      = 16
	logUUID     = 16
	logSameUUID = 2
	logLast     = 8
	logFlags    = 15
)

// descriptor takes the tags of a descriptor block.
func (l *journalled) descriptor(e *evidence, b []byte, blocks uint64) error {
	be := binary.BigEndian
	for at := logHeader; at+logTag <= len(b)-4; {
		t := b[at:]
		block, flags := uint64(be.Uint32(t))|uint64(be.Uint32(t[8:]))<<32, be.Uint32(t[4:])
		if flags&^logFlags != 0 || block >= blocks {
			return nil // something else
		}
		if len(l.blocks) >= maxJournalled {
			l.full = true
			return nil
		}
		if len(l.blocks) == cap(l.blocks) {
			grow := max(1024, len(l.blocks))
			if err := e.src.take(int64(grow)*8, "the journal"); err != nil {
				return err
			}
			l.blocks = slices.Grow(l.blocks, grow)
		}
		l.blocks = append(l.blocks, block)
		at += logTag
		if flags&logSameUUID == 0 {
			at += logUUID
		}
		if flags&logLast != 0 {
			return nil
		}
	}
	return nil
}

// sort makes the blocks ready for what follows.
func (l *journalled) sort() {
	slices.Sort(l.blocks)
	l.blocks = slices.Compact(l.blocks)
}

// file counts the blocks that are data of a regular file.
func (l *journalled) file(extents []extent) {
	for _, x := range extents {
		if x.unwritten || x.n > 1<<48 || x.phys > 1<<48 {
			continue
		}
		from, _ := slices.BinarySearch(l.blocks, x.phys)
		to, _ := slices.BinarySearch(l.blocks, x.phys+x.n)
		l.data += to - from
	}
}

func (l *journalled) has(block uint64) bool {
	_, found := slices.BinarySearch(l.blocks, block)
	return found
}

// ofData reports whether the journal has, or had, data of files. Blocks of
// directories that became those of files are few.
func (l *journalled) ofData() bool { return l.full || l.data > len(l.blocks)/8 }
