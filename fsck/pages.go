package fsck

import (
	"slices"

	"github.com/imagestack/imagestack/backend"
)

// pageSize is the unit in which a plan keeps changed bytes.
const pageSize = 4096

// page holds changed bytes and which of its bytes these are.
type page struct {
	data [pageSize]byte
	mask [pageSize / 64]uint64
}

// pageBytes is what a page takes in memory and in the temporary file.
const pageBytes = pageSize + pageSize/8

type pageKey struct {
	no int64
	ph Phase
}

// pageStore keeps the pages of all phases, in memory up to a limit and then in
// an unnamed temporary file.
type pageStore struct {
	limit int64
	temp  func() (backend.File, error)
	mem   map[pageKey]*page
	slots map[pageKey]int64 // places in f of what is not, or not only, in mem
	f     backend.File
	used  int64 // slots in f
	any   [numPhases]bool
}

func newPageStore(limit int64, temp func() (backend.File, error)) pageStore {
	if temp == nil {
		temp = tempFile
	}
	return pageStore{limit: limit, temp: temp, mem: map[pageKey]*page{}, slots: map[pageKey]int64{}}
}

func (s *pageStore) empty() bool { return len(s.mem) == 0 && len(s.slots) == 0 }

func (s *pageStore) close() error {
	s.mem, s.slots = map[pageKey]*page{}, map[pageKey]int64{}
	if s.f == nil {
		return nil
	}
	f := s.f
	s.f = nil
	return f.Close()
}

// get returns the page, or nil when nothing of it is changed.
func (s *pageStore) get(k pageKey) (*page, error) {
	if p := s.mem[k]; p != nil {
		return p, nil
	}
	slot, ok := s.slots[k]
	if !ok {
		return nil, nil
	}
	buf := make([]byte, pageBytes)
	if n, err := s.f.ReadAt(buf, slot*pageBytes); n < len(buf) {
		return nil, err
	}
	p := new(page)
	copy(p.data[:], buf)
	for i := range p.mask {
		for j, b := range buf[pageSize+8*i : pageSize+8*i+8] {
			p.mask[i] |= uint64(b) << (8 * j)
		}
	}
	return p, nil
}

func (s *pageStore) write(ph Phase, off int64, b []byte) error {
	s.any[ph] = s.any[ph] || len(b) > 0
	for len(b) > 0 {
		k := pageKey{off / pageSize, ph}
		in := int(off % pageSize)
		n := min(len(b), pageSize-in)
		p, err := s.get(k)
		if err != nil {
			return err
		}
		if p == nil {
			p = new(page)
		}
		s.mem[k] = p
		copy(p.data[in:], b[:n])
		for i := in; i < in+n; i++ {
			p.mask[i/64] |= 1 << (i % 64)
		}
		b, off = b[n:], off+int64(n)
		if int64(len(s.mem))*pageBytes > s.limit {
			if err := s.spill(); err != nil {
				return err
			}
		}
	}
	return nil
}

// read enters the changed bytes of a phase in b, the content at off.
func (s *pageStore) read(ph Phase, b []byte, off int64) error {
	if !s.any[ph] {
		return nil
	}
	for done := 0; done < len(b); {
		at := off + int64(done)
		in := int(at % pageSize)
		n := min(len(b)-done, pageSize-in)
		p, err := s.get(pageKey{at / pageSize, ph})
		if err != nil {
			return err
		}
		if p != nil {
			for i := in; i < in+n; i++ {
				if p.mask[i/64]&(1<<(i%64)) != 0 {
					b[done+i-in] = p.data[i]
				}
			}
		}
		done += n
	}
	return nil
}

// spill moves all pages to the temporary file.
func (s *pageStore) spill() error {
	if s.f == nil {
		var err error
		if s.f, err = s.temp(); err != nil {
			return err
		}
	}
	buf := make([]byte, pageBytes)
	for k, p := range s.mem {
		slot, ok := s.slots[k]
		if !ok {
			slot = s.used
			s.used++
		}
		copy(buf, p.data[:])
		for i, m := range p.mask {
			for j := range 8 {
				buf[pageSize+8*i+j] = byte(m >> (8 * j))
			}
		}
		if _, err := s.f.WriteAt(buf, slot*pageBytes); err != nil {
			return err
		}
		s.slots[k] = slot
	}
	clear(s.mem)
	return nil
}

// numbers are the pages of a phase in which something is changed, ascending.
func (s *pageStore) numbers(ph Phase) []int64 {
	var all []int64
	for k := range s.mem {
		if k.ph == ph {
			all = append(all, k.no)
		}
	}
	for k := range s.slots {
		if k.ph == ph && s.mem[k] == nil {
			all = append(all, k.no)
		}
	}
	slices.Sort(all)
	return all
}
