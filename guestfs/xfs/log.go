package xfs

import (
	"context"
	"encoding/binary"
	"hash/crc32"
	"io"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

// The log (XFS Algorithms and Data Structures, Journaling Log) is a ring of
// blocks of 512 bytes. Each begins with the number of the cycle in which it was
// written; in a record's header that is the second word.
const (
	logBlock        = 512
	logMagic        = 0xfeedbabe
	logCycleSize    = 32 << 10 // bytes of a record for each block of its header
	maxRecord       = 256 << 10
	logHeaderSize   = 328
	logHeaderSize32 = 324 // as 32-bit kernels computed its checksum
	opUnmount       = 0x20
)

var errDirty = freespace.Refuse(freespace.NotClean, "xfs: the log does not end with an unmount record: mount and unmount the filesystem")

// logShape is what one look at all of the log finds.
type logShape struct {
	blocks         int64
	head           int64 // the block behind the last one written
	before, behind int64 // the last record headers before the head and in the rest; -1 is none
}

// checkLog refuses a filesystem unless the last record of its log says that it
// was unmounted. XFS has no other clean flag.
//
// The end of the log is where the cycle number falls by one. A log whose
// numbers look otherwise anywhere, as torn writes leave them, is not clean.
func (s *super) checkLog(ctx context.Context, r io.ReaderAt) error {
	ag, at := s.split(s.logStart)
	l := io.NewSectionReader(r, s.groupStart(ag)+int64(at)*s.blockSize, int64(s.logBlocks)*s.blockSize)
	shape, err := readShape(ctx, l)
	if err != nil {
		return err
	}
	last := shape.before
	if last < 0 {
		last = shape.behind // the record goes around the end of the ring
	}
	if last < 0 {
		return errDirty
	}
	return s.checkUnmount(l, shape, last)
}

func readShape(ctx context.Context, l *io.SectionReader) (logShape, error) {
	shape := logShape{blocks: l.Size() / logBlock, head: -1, before: -1, behind: -1}
	be := binary.BigEndian
	buf := make([]byte, 1<<20)
	var first uint32
	for start := int64(0); start < shape.blocks; start += int64(len(buf)) / logBlock {
		if err := ctx.Err(); err != nil {
			return shape, err
		}
		b := buf[:min(int64(len(buf)), (shape.blocks-start)*logBlock)]
		if err := freespace.ReadAt(l, b, start*logBlock); err != nil {
			return shape, err
		}
		for i := int64(0); i*logBlock < int64(len(b)); i++ {
			w := b[i*logBlock:]
			cycle, header := be.Uint32(w), false
			if cycle == logMagic {
				cycle, header = be.Uint32(w[4:]), true
			}
			n := start + i
			if n == 0 {
				if first = cycle; first == 0 {
					return shape, errDirty
				}
			}
			if shape.head < 0 && cycle == first-1 {
				shape.head = n
			}
			switch {
			case shape.head < 0 && cycle == first:
				if header {
					shape.before = n
				}
			case shape.head >= 0 && cycle == first-1:
				if header {
					shape.behind = n
				}
			default:
				return shape, errDirty
			}
		}
	}
	if shape.head < 0 {
		shape.head = 0 // every block is of one cycle
	}
	return shape, nil
}

// checkUnmount checks that the record whose header is in block last ends at
// the head and is an unmount record.
func (s *super) checkUnmount(l *io.SectionReader, shape logShape, last int64) error {
	be := binary.BigEndian
	h := make([]byte, logBlock)
	if err := freespace.ReadAt(l, h, last*logBlock); err != nil {
		return err
	}
	version, length, size := be.Uint32(h[8:]), int64(be.Uint32(h[12:])), int64(be.Uint32(h[320:]))
	if version != 1 && version != 2 || (version == 2) != s.logV2 || length <= 0 || length > maxRecord || size > maxRecord {
		return errDirty
	}
	if [16]byte(h[304:320]) != s.uuid {
		return damaged("the log is that of filesystem %s", uuidString([16]byte(h[304:320])))
	}
	headers := int64(1)
	if version == 2 && size > logCycleSize {
		headers = (size + logCycleSize - 1) / logCycleSize
	}
	total := headers + (length+logBlock-1)/logBlock
	if total > shape.blocks || (last+total)%shape.blocks != shape.head || be.Uint32(h[40:]) != 1 {
		return errDirty
	}
	if lsn := be.Uint64(h[16:]); lsn != uint64(be.Uint32(h[4:]))<<32|uint64(last) {
		return damaged("the last log record, in block %d, has the number %#x", last, lsn)
	}
	record := make([]byte, total*logBlock)
	for i := range total {
		if err := freespace.ReadAt(l, record[i*logBlock:][:logBlock], (last+i)%shape.blocks*logBlock); err != nil {
			return err
		}
	}
	if err := s.checkRecordSum(record, headers, length); err != nil {
		return err
	}
	op := record[headers*logBlock:]
	if op[9]&opUnmount == 0 {
		return errDirty
	}
	return nil
}

// checkRecordSum compares the checksum of a record, which covers its headers
// and its data as they are on the disk. Tools leave it zero.
func (s *super) checkRecordSum(record []byte, headers, length int64) error {
	want := binary.LittleEndian.Uint32(record[32:])
	if want == 0 || !s.v5 {
		return nil
	}
	var got uint32
	for _, n := range []int{logHeaderSize, logHeaderSize32} {
		got = sum(record[:n], 32)
		for i := int64(1); i < headers; i++ {
			got = crc32.Update(got, castagnoli, record[i*logBlock:][:260])
		}
		got = crc32.Update(got, castagnoli, record[headers*logBlock:][:length])
		if got == want {
			return nil
		}
	}
	return freespace.Refuse(freespace.BadChecksum, "xfs: last record of the log: checksum %#x, computed %#x", want, got)
}
