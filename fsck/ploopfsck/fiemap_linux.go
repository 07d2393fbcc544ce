package ploopfsck

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
)

// holeSource finds the holes of a host file, asked in ascending order.
type holeSource interface {
	// next returns the first hole at or behind at; io.EOF when there is none
	// in front of the end.
	next(at int64) (start, end int64, err error)
	close() error
}

// newHoleSource prefers FIEMAP: SEEK_HOLE takes a block that was reserved and
// never written for data once somebody has read it, ploop's check does not.
func newHoleSource(f backend.File, size int64) holeSource {
	if m := newExtentMap(f, size); m != nil {
		return m
	}
	return seeker{f, size}
}

// seeker asks SEEK_HOLE.
type seeker struct {
	f    backend.File
	size int64
}

func (seeker) close() error { return nil }

func (s seeker) next(at int64) (start, end int64, err error) {
	start, err = s.f.SeekHole(at)
	if err == nil && start >= s.size {
		err = io.EOF
	}
	if err != nil {
		return 0, 0, err
	}
	end, err = s.f.SeekData(start)
	if errors.Is(err, io.EOF) {
		end, err = s.size, nil
	}
	return start, max(end, start+1), err
}

// The FIEMAP call (Linux Documentation/filesystems/fiemap.rst): a head of 32
// bytes and records of 56.
const (
	fsIocFiemap     = 0xc020660b
	fiemapSync      = 1     // flag: write out first
	fiemapLast      = 1     // extent: the last one
	fiemapUnwritten = 0x800 // extent: reserved only
	fiemapHead      = 32
	fiemapRecord    = 56
	fiemapRecords   = 512
)

// extentMap asks FIEMAP.
type extentMap struct {
	f    *os.File
	size int64
	buf  []byte
	at   int64 // the records in buf begin there
	n    int   // records in buf
	k    int   // the next one
	last bool  // no records behind those in buf
}

// newExtentMap returns nil for files that are not on a filesystem that can.
func newExtentMap(f backend.File, size int64) *extentMap {
	dev, ino, ok := backend.IDOf(f)
	if !ok {
		return nil
	}
	h, err := os.Open(f.Name())
	if err != nil {
		return nil
	}
	var st unix.Stat_t
	m := &extentMap{f: h, size: size, buf: make([]byte, fiemapHead+fiemapRecords*fiemapRecord)}
	if unix.Fstat(int(h.Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Dev != dev || st.Ino != ino || m.load(0, fiemapSync) != nil {
		_ = h.Close() // opened for reading
		return nil
	}
	return m
}

func (m *extentMap) close() error { return m.f.Close() }

// load reads the records of the extents that end behind at.
func (m *extentMap) load(at int64, flags uint32) error {
	clear(m.buf[:fiemapHead])
	le.PutUint64(m.buf[0:], uint64(at))
	le.PutUint64(m.buf[8:], uint64(max(m.size-at, 1)))
	le.PutUint32(m.buf[16:], flags)
	le.PutUint32(m.buf[24:], fiemapRecords)
	// The buffer is on the heap, where nothing moves, and kept alive below.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, m.f.Fd(), fsIocFiemap, reflect.ValueOf(m.buf).Pointer())
	runtime.KeepAlive(m.buf)
	if errno != 0 {
		return fmt.Errorf("%s: extents: %w", m.f.Name(), syscall.Errno(errno))
	}
	m.at, m.k, m.n = at, 0, int(min(le.Uint32(m.buf[20:]), fiemapRecords))
	m.last = m.n < fiemapRecords
	return nil
}

// written returns the first written extent that ends behind at.
func (m *extentMap) written(at int64) (start, end int64, err error) {
	for {
		for ; m.k < m.n; m.k++ {
			r := m.buf[fiemapHead+m.k*fiemapRecord:]
			start, end = int64(le.Uint64(r)), int64(le.Uint64(r)+le.Uint64(r[16:]))
			flags := le.Uint32(r[40:])
			if flags&fiemapLast != 0 {
				m.last = true
			}
			m.at = max(m.at, end)
			if end > at && flags&fiemapUnwritten == 0 {
				return start, end, nil
			}
		}
		if m.last || m.at >= m.size {
			return m.size, m.size, nil
		}
		if err := m.load(max(m.at, at), 0); err != nil {
			return 0, 0, err
		}
	}
}

func (m *extentMap) next(at int64) (start, end int64, err error) {
	for at < m.size {
		from, to, err := m.written(at)
		if err != nil {
			return 0, 0, err
		}
		if from > at {
			return at, min(from, m.size), nil
		}
		at = to
	}
	return 0, 0, io.EOF
}
