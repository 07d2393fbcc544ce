package backend

import (
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"maps"
	"math"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// memMax is the largest length of a Mem, so that sums cannot overflow.
const memMax = 1 << 62

// MemPage is the allocation unit of a Mem in bytes.
const MemPage = 4096

// memChunk is the number of pages that one entry of a Mem's map covers.
const memChunk = 256

// page is one page of a Mem. Its content may change only through the Mem
// whose token it carries; for everybody else it is shared and constant.
type page struct {
	owner *byte
	hash  atomic.Uint64 // of data and index, 0 = not known
	data  [MemPage]byte
}

type chunk struct {
	owner *byte
	pages [memChunk]*page
}

// Mem is a sparse file in memory, for tests and for throw-away layers. Holes
// are real: what was never written, or was punched by whole pages of 4096
// bytes, takes no memory, is reported by SeekHole and not counted by
// Allocated. Clone is cheap: pages are shared until one side changes them.
//
// Sync does nothing and Close frees nothing: the content stays readable
// through Bytes and Clone. Operations after Close return fs.ErrClosed.
type Mem struct {
	mu     sync.RWMutex
	name   string
	size   int64
	chunks map[int64]*chunk
	pages  int64
	token  *byte // identifies the chunks and pages that belong to us alone
	closed bool
}

// NewMem returns an empty Mem. name is for messages.
func NewMem(name string) *Mem {
	return &Mem{name: name, chunks: map[int64]*chunk{}, token: new(byte)}
}

// NewMemBytes returns a Mem that holds a copy of data. Pages that are zero
// are holes.
func NewMemBytes(name string, data []byte) *Mem {
	m := NewMem(name)
	for off := 0; off < len(data); off += MemPage {
		p := data[off:min(off+MemPage, len(data))]
		if !IsZero(p) {
			copy(m.own(int64(off) / MemPage).data[:], p)
		}
	}
	m.size = int64(len(data))
	return m
}

// Clone returns a copy that shares unchanged pages. It also works after Close.
func (m *Mem) Clone() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.token = new(byte) // nothing belongs to us alone any more
	return &Mem{name: m.name, size: m.size, chunks: maps.Clone(m.chunks), pages: m.pages, token: new(byte)}
}

// Bytes returns a copy of the whole content, which has to fit into memory.
func (m *Mem) Bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	b := make([]byte, m.size)
	m.read(b, 0)
	return b
}

func (m *Mem) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: m.name, Err: err}
}

func (m *Mem) check(op string, off, n int64) error {
	if m.closed {
		return m.fail(op, fs.ErrClosed)
	}
	if off < 0 || n < 0 || n > math.MaxInt64-off {
		return m.fail(op, unix.EINVAL)
	}
	return nil
}

func (m *Mem) get(index int64) *page {
	if c := m.chunks[index/memChunk]; c != nil {
		return c.pages[index%memChunk]
	}
	return nil
}

// own returns the page with that index for changing.
func (m *Mem) own(index int64) *page {
	c := m.chunks[index/memChunk]
	if c == nil {
		c = &chunk{owner: m.token}
		m.chunks[index/memChunk] = c
	} else if c.owner != m.token {
		d := *c
		d.owner = m.token
		c = &d
		m.chunks[index/memChunk] = c
	}
	p := c.pages[index%memChunk]
	switch {
	case p == nil:
		p = &page{owner: m.token}
		c.pages[index%memChunk] = p
		m.pages++
	case p.owner != m.token:
		p = &page{owner: m.token, data: p.data}
		c.pages[index%memChunk] = p
	}
	p.hash.Store(0)
	return p
}

// drop makes the page with that index a hole.
func (m *Mem) drop(index int64) {
	c := m.chunks[index/memChunk]
	if c == nil || c.pages[index%memChunk] == nil {
		return
	}
	if c.owner != m.token {
		d := *c
		d.owner = m.token
		c = &d
		m.chunks[index/memChunk] = c
	}
	c.pages[index%memChunk] = nil
	m.pages--
}

// dropFrom makes holes of the pages [from, to). Its cost follows what is
// allocated, not the length of the range.
func (m *Mem) dropFrom(from, to int64) {
	if from >= to {
		return
	}
	if (to-from)/memChunk > int64(len(m.chunks)) {
		for ci := range m.chunks {
			m.dropIn(ci, from, to)
		}
		return
	}
	for ci := from / memChunk; ci <= (to-1)/memChunk; ci++ {
		m.dropIn(ci, from, to)
	}
}

func (m *Mem) dropIn(ci, from, to int64) {
	lo, hi := max(from, ci*memChunk), min(to, (ci+1)*memChunk)
	for i := lo; i < hi; i++ {
		m.drop(i)
	}
	if c := m.chunks[ci]; c != nil && c.pages == ([memChunk]*page{}) {
		delete(m.chunks, ci)
	}
}

func (m *Mem) read(p []byte, off int64) {
	for len(p) > 0 {
		in := off % MemPage
		n := min(int64(len(p)), MemPage-in)
		if pg := m.get(off / MemPage); pg != nil {
			copy(p[:n], pg.data[in:])
		} else {
			clear(p[:n])
		}
		p = p[n:]
		off += n
	}
}

func (m *Mem) write(p []byte, off int64) {
	m.size = max(m.size, off+int64(len(p)))
	for len(p) > 0 {
		n := copy(m.own(off / MemPage).data[off%MemPage:], p)
		p = p[n:]
		off += int64(n)
	}
}

// zero clears [off, off+n) inside allocated pages; with alloc it allocates the
// others.
func (m *Mem) zero(off, n int64, alloc bool) {
	for n > 0 {
		in := off % MemPage
		c := min(n, MemPage-in)
		if alloc || m.get(off/MemPage) != nil {
			clear(m.own(off / MemPage).data[in : in+c])
		}
		off += c
		n -= c
	}
}

// ReadAt is File.
func (m *Mem) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	n := min(int64(len(p)), max(m.size-off, 0))
	m.read(p[:n], off)
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// ReadvAt is File.
func (m *Mem) ReadvAt(bufs [][]byte, off int64) (int, error) {
	done := 0
	for _, p := range bufs {
		n, err := m.ReadAt(p, off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// WriteAt is File.
func (m *Mem) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if off+int64(len(p)) > memMax {
		return 0, m.fail("write", unix.EFBIG)
	}
	if len(p) > 0 { // writing nothing does not make a file longer
		m.write(p, off)
	}
	return len(p), nil
}

// WritevAt is File.
func (m *Mem) WritevAt(bufs [][]byte, off int64) (int, error) {
	done := 0
	for _, p := range bufs {
		n, err := m.WriteAt(p, off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// Size is File.
func (m *Mem) Size() (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.size, m.check("size", 0, 0)
}

// Allocated is File.
func (m *Mem) Allocated() (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.pages * MemPage, m.check("stat", 0, 0)
}

// Truncate is File.
func (m *Mem) Truncate(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check("truncate", size, 0); err != nil {
		return err
	}
	if size > memMax {
		return m.fail("truncate", unix.EFBIG)
	}
	if size < m.size {
		keep := (size + MemPage - 1) / MemPage
		m.zero(size, min(keep*MemPage, m.size)-size, false)
		m.dropFrom(keep, (m.size+MemPage-1)/MemPage)
	}
	m.size = size
	return nil
}

// Sync is File; memory has nothing more durable.
func (m *Mem) Sync() error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.check("sync", 0, 0)
}

// PunchHole is File.
func (m *Mem) PunchHole(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check("punch hole", off, n); err != nil {
		return err
	}
	// The last page goes whole when the range reaches the end of the file.
	end := off + n
	if end >= m.size {
		end = (m.size + MemPage - 1) / MemPage * MemPage
	}
	if n == 0 || off >= end {
		return nil
	}
	first, last := (off+MemPage-1)/MemPage, end/MemPage
	if first > last {
		m.zero(off, end-off, false)
		return nil
	}
	m.zero(off, first*MemPage-off, false)
	m.zero(last*MemPage, end-last*MemPage, false)
	m.dropFrom(first, last)
	return nil
}

// ZeroRange is File.
func (m *Mem) ZeroRange(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check("zero range", off, n); err != nil {
		return err
	}
	if off+n > m.size {
		return m.fail("zero range", fmt.Errorf("%d+%d is behind the end %d (%w)", off, n, m.size, unix.EINVAL))
	}
	m.zero(off, n, true)
	return nil
}

// CopyRange is File. Overlapping ranges of the same file are EINVAL.
func (m *Mem) CopyRange(src File, srcOff, off, n int64) (int64, error) {
	if err := checkCopy(src, srcOff, off, n); err != nil {
		return 0, m.fail("copy", err)
	}
	if src == File(m) && overlap(srcOff, off, n) {
		return 0, m.fail("copy", fmt.Errorf("ranges overlap (%w)", unix.EINVAL))
	}
	return copyLoop(m, src, srcOff, off, n)
}

// SeekData is File.
func (m *Mem) SeekData(off int64) (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check("seek", off, 0); err != nil {
		return 0, err
	}
	if off >= m.size {
		return 0, io.EOF
	}
	index := off / MemPage
	ci, in := index/memChunk, index%memChunk
	for {
		if c := m.chunks[ci]; c != nil {
			for ; in < memChunk; in++ {
				if c.pages[in] != nil {
					at := max(off, (ci*memChunk+in)*MemPage)
					if at >= m.size {
						return 0, io.EOF
					}
					return at, nil
				}
			}
		}
		next := int64(math.MaxInt64)
		for i := range m.chunks {
			if i > ci {
				next = min(next, i)
			}
		}
		if next == math.MaxInt64 {
			return 0, io.EOF
		}
		ci, in = next, 0
	}
}

// SeekHole is File.
func (m *Mem) SeekHole(off int64) (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check("seek", off, 0); err != nil {
		return 0, err
	}
	if off >= m.size {
		return 0, io.EOF
	}
	index := off / MemPage
	for m.get(index) != nil && index*MemPage < m.size {
		index++
	}
	return min(max(off, index*MemPage), m.size), nil
}

// Name is File.
func (m *Mem) Name() string { return m.name }

// Close is File.
func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.check("close", 0, 0)
	m.closed = true
	return err
}

var hashSeed = maphash.MakeSeed()

// Hash is a hash of length and content, equal for equal content whatever is a
// hole. It differs from one process to the next. Pages that did not change
// since the last call are not read again.
func (m *Mem) Hash() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	var h maphash.Hash
	h.SetSeed(hashSeed)
	writeUint64(&h, uint64(m.size))
	sum := h.Sum64()
	for ci, c := range m.chunks {
		for in, p := range c.pages {
			if p == nil {
				continue
			}
			ph := p.hash.Load()
			if ph == 0 {
				ph = hashPage(ci*memChunk+int64(in), p.data[:])
				p.hash.Store(ph)
			}
			if ph != zeroPage {
				sum += ph
			}
		}
	}
	return sum
}

// zeroPage stands for the hash of a page of zeros, which counts as a hole.
const zeroPage = 1

func hashPage(index int64, data []byte) uint64 {
	if IsZero(data) {
		return zeroPage
	}
	var h maphash.Hash
	h.SetSeed(hashSeed)
	writeUint64(&h, uint64(index))
	h.Write(data)
	return max(h.Sum64(), 2)
}

func writeUint64(h *maphash.Hash, v uint64) {
	var b [8]byte
	for i := range b {
		b[i] = byte(v >> (8 * i))
	}
	h.Write(b[:])
}
