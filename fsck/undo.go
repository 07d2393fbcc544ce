package fsck

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
)

// The undo file. All numbers are little-endian, all checksums CRC-32C.
//
// An undo file belongs to one run of a repair on one file and holds one
// section for each round of it. A section is written with state 0 and synced,
// then its state becomes 1 and is synced, and only then is the image changed:
// of a section in state 0 nothing has been done, and it is ignored; one in
// state 1 that cannot be read is an error. Sections begin at multiples of 512
// (zeros fill the gap), so that a power cut cannot tear a header.
//
//	section header, 512 bytes
//	  0  8   magic "IMGSUNDO"
//	  8  4   version, 1
//	  12 4   number of the section, from 0
//	  16 8   length of the image before
//	  24 8   length of the image after
//	  32 8   modification time of the image before, nanoseconds since 1970, 0 = not known
//	  40 32  SHA-256 of the first 4096 bytes of the image before (all, if it is shorter)
//	  72 4   sector size of the checksums below, 512
//	  76 4   block size, 65536: no record crosses a multiple of it
//	  80 2   length of the image's base name, at most 255
//	  82     the name
//	  504 4  state, 1 = complete
//	  508 4  checksum of bytes 0 to 507
//	record, ascending by offset
//	  0  1   kind: 1 = bytes, 2 = a hole (zeros without storage), 3 = end
//	  1  1   n, the number of lists of checksums
//	  2  2   0
//	  4  4   length in bytes (end: 0)
//	  8  8   offset in the image (end: the number of records before it)
//	  16 4   checksum of bytes 0 to 15 and of everything that follows 20
//	  20     the bytes (kind 1 only), then n lists: one checksum for each sector
//	         of the record as it is after a phase that changes it
//
// Of what is cut off, behind the length after, holes have no record: they are
// there again when the file is cut to that length and then made longer.
//
// The lists are what lets ApplyUndo refuse an image that somebody else has
// changed since: each sector must be as before, or as after one of the phases.
const (
	undoMagic      = "IMGSUNDO"
	undoVersion    = 1
	undoHeaderSize = 512
	undoRecordSize = 20
	undoBlock      = 64 << 10
	sector         = 512
	headSize       = 4096

	recBytes = 1
	recHole  = 2
	recEnd   = 3
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crcOf(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// Errors of ApplyUndo.
var (
	// ErrUndo: not an undo file, or a damaged one.
	ErrUndo = errors.New("not a valid undo file")
	// ErrNothingToUndo: the repair was stopped before it changed anything.
	ErrNothingToUndo = errors.New("nothing to undo: the repair had not begun to change the image")
	// ErrChanged: the image is not what the repair left; a later repair, with
	// an undo file of its own, or another program has changed it.
	ErrChanged = errors.New("the image has been changed since the repair")
)

// undoSection is the header of a section.
type undoSection struct {
	number   uint32
	oldSize  int64
	newSize  int64
	mtime    int64
	head     [sha256.Size]byte
	name     string
	complete bool
	off, end int64 // of its records in the undo file, the end record included
}

func (s *undoSection) marshal() []byte {
	b := make([]byte, undoHeaderSize)
	copy(b, undoMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], undoVersion)
	le.PutUint32(b[12:], s.number)
	le.PutUint64(b[16:], uint64(s.oldSize))
	le.PutUint64(b[24:], uint64(s.newSize))
	le.PutUint64(b[32:], uint64(s.mtime))
	copy(b[40:], s.head[:])
	le.PutUint32(b[72:], sector)
	le.PutUint32(b[76:], undoBlock)
	name := s.name[:min(len(s.name), 255)]
	le.PutUint16(b[80:], uint16(len(name)))
	copy(b[82:], name)
	if s.complete {
		le.PutUint32(b[504:], 1)
	}
	le.PutUint32(b[508:], crcOf(b[:508]))
	return b
}

func (s *undoSection) unmarshal(b []byte) error {
	le := binary.LittleEndian
	if len(b) < undoHeaderSize || string(b[:8]) != undoMagic {
		return fmt.Errorf("%w: wrong magic", ErrUndo)
	}
	if le.Uint32(b[508:]) != crcOf(b[:508]) {
		return fmt.Errorf("%w: wrong checksum of a section header", ErrUndo)
	}
	if v := le.Uint32(b[8:]); v != undoVersion {
		return fmt.Errorf("%w: version %d, only %d is known", ErrUndo, v, undoVersion)
	}
	s.number = le.Uint32(b[12:])
	s.oldSize = int64(le.Uint64(b[16:]))
	s.newSize = int64(le.Uint64(b[24:]))
	s.mtime = int64(le.Uint64(b[32:]))
	copy(s.head[:], b[40:])
	n := le.Uint16(b[80:])
	if s.oldSize < 0 || s.newSize < 0 || le.Uint32(b[72:]) != sector || le.Uint32(b[76:]) != undoBlock || n > 255 {
		return fmt.Errorf("%w: values of a section header", ErrUndo)
	}
	s.name = string(b[82 : 82+n])
	s.complete = le.Uint32(b[504:]) == 1
	return nil
}

// undoRecord is the old content of a range.
type undoRecord struct {
	off, n int64
	hole   bool
	data   []byte   // without hole
	crcs   []uint32 // lists, one after the other
}

// zeroBlock is the content of holes.
var zeroBlock [undoBlock]byte

// unread tells a file that the system cannot read from one that is damaged or
// too short.
func unread(err error) bool {
	var errno unix.Errno
	return errors.As(err, &errno)
}

// content is what the range held.
func (r *undoRecord) content() []byte {
	if r.hole {
		return zeroBlock[:r.n]
	}
	return r.data
}

func (r *undoRecord) sectors() int { return int((r.n + sector - 1) / sector) }

// marshal appends the record to b.
func (r *undoRecord) marshal(b []byte) []byte {
	start := len(b)
	le := binary.LittleEndian
	kind := byte(recBytes)
	if r.hole {
		kind = recHole
	}
	lists := 0
	if n := r.sectors(); n > 0 {
		lists = len(r.crcs) / n
	}
	b = append(b, kind, byte(lists), 0, 0)
	b = le.AppendUint32(b, uint32(r.n))
	b = le.AppendUint64(b, uint64(r.off))
	b = append(b, 0, 0, 0, 0)
	b = append(b, r.data...)
	for _, c := range r.crcs {
		b = le.AppendUint32(b, c)
	}
	sealRecord(b[start:])
	return b
}

func marshalEnd(records int64) []byte {
	b := make([]byte, undoRecordSize)
	b[0] = recEnd
	binary.LittleEndian.PutUint64(b[8:], uint64(records))
	sealRecord(b)
	return b
}

func sealRecord(b []byte) {
	binary.LittleEndian.PutUint32(b[16:], recordCRC(b))
}

func recordCRC(b []byte) uint32 {
	return crc32.Update(crcOf(b[:16]), castagnoli, b[undoRecordSize:])
}

// undoReader reads the records of a section.
type undoReader struct {
	r    *bufio.Reader
	buf  []byte
	at   int64 // in the undo file
	last int64 // end of the record before
	n    int64 // records
}

func newUndoReader(f io.ReaderAt, off, end int64) *undoReader {
	return &undoReader{r: bufio.NewReaderSize(io.NewSectionReader(f, off, end-off), 256<<10), at: off}
}

// next returns the next record, valid until the call after, or nil at the end
// record of the section.
func (u *undoReader) next() (*undoRecord, error) {
	bad := func(why string) error { return fmt.Errorf("%w: record at %#x: %s", ErrUndo, u.at, why) }
	u.buf = append(u.buf[:0], make([]byte, undoRecordSize)...)
	if _, err := io.ReadFull(u.r, u.buf); unread(err) {
		return nil, err
	} else if err != nil {
		return nil, bad("cut off")
	}
	le := binary.LittleEndian
	kind, lists := u.buf[0], int64(u.buf[1])
	r := &undoRecord{off: int64(le.Uint64(u.buf[8:])), n: int64(le.Uint32(u.buf[4:])), hole: kind == recHole}
	size := int64(0)
	switch kind {
	case recEnd:
		if r.n != 0 || lists != 0 || r.off != u.n {
			return nil, bad("wrong end")
		}
	case recBytes, recHole:
		if r.n == 0 || r.n > undoBlock || r.off < u.last || r.off > math.MaxInt64-undoBlock ||
			r.off/undoBlock != (r.off+r.n-1)/undoBlock || r.off%sector != 0 || lists > int64(numPhases) {
			return nil, bad("impossible range")
		}
		size = 4 * lists * int64(r.sectors())
		if kind == recBytes {
			size += r.n
		}
	default:
		return nil, bad("unknown kind")
	}
	u.buf = append(u.buf, make([]byte, size)...)
	if _, err := io.ReadFull(u.r, u.buf[undoRecordSize:]); unread(err) {
		return nil, err
	} else if err != nil {
		return nil, bad("cut off")
	}
	if le.Uint32(u.buf[16:]) != recordCRC(u.buf) {
		return nil, bad("wrong checksum")
	}
	u.at += int64(len(u.buf))
	if kind == recEnd {
		return nil, nil
	}
	u.n++
	u.last = r.off + r.n
	body := u.buf[undoRecordSize:]
	if kind == recBytes {
		r.data, body = body[:r.n], body[r.n:]
	}
	for ; len(body) > 0; body = body[4:] {
		r.crcs = append(r.crcs, le.Uint32(body))
	}
	return r, nil
}

// readSections finds the complete sections of an undo file and checks every
// record.
func readSections(f backend.File) ([]undoSection, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	var all []undoSection
	for at := int64(0); at < size; {
		b := make([]byte, undoHeaderSize)
		n, err := f.ReadAt(b, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if backend.IsZero(b[:n]) {
			break // grown, but never written before a crash
		}
		s := undoSection{off: at + undoHeaderSize}
		if err := s.unmarshal(b[:n]); err != nil {
			return nil, err
		}
		if s.number != uint32(len(all)) {
			return nil, fmt.Errorf("%w: section %d where %d should be", ErrUndo, s.number, len(all))
		}
		if !s.complete {
			break
		}
		u := newUndoReader(f, s.off, size)
		for {
			r, err := u.next()
			if err != nil {
				return nil, err
			}
			if r == nil {
				break
			}
		}
		s.end = (u.at + sector - 1) &^ (sector - 1)
		all = append(all, s)
		at = s.end
	}
	return all, nil
}

// headOf is the SHA-256 of the first bytes of a file.
func headOf(f io.ReaderAt) ([sha256.Size]byte, error) {
	b := make([]byte, headSize)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return [sha256.Size]byte{}, err
	}
	return sha256.Sum256(b[:n]), nil
}
