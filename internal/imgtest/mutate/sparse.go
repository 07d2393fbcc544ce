package mutate

import (
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/imagestack/imagestack/backend"
)

// unit is what a Sparse keeps or leaves out, in bytes.
const unit = 1024

// Sparse is an image in memory of which only the units that are not zeros are
// kept. It is an io.ReaderAt. One that was made by Clone shares the units of
// its origin, which must not change any more.
type Sparse struct {
	size   int64
	own    map[int64]*[unit]byte
	origin map[int64]*[unit]byte
}

// NewSparse is an image of size bytes, all zeros.
func NewSparse(size int64) *Sparse {
	return &Sparse{size: size, own: map[int64]*[unit]byte{}}
}

// ReadSparse records the image in r.
func ReadSparse(r io.ReaderAt, size int64) (*Sparse, error) {
	s := NewSparse(size)
	b := make([]byte, 1<<20)
	for at := int64(0); at < size; at += int64(len(b)) {
		n, err := r.ReadAt(b[:min(int64(len(b)), size-at)], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		for i := 0; i < n; i += unit {
			if part := b[i:min(i+unit, n)]; !backend.IsZero(part) {
				s.Put(at+int64(i), part)
			}
		}
	}
	return s, nil
}

// Size is the length in bytes.
func (s *Sparse) Size() int64 { return s.size }

// Clone is a copy that can be changed.
func (s *Sparse) Clone() *Sparse {
	origin := s.own
	if s.origin != nil {
		origin = maps.Clone(s.origin)
		maps.Copy(origin, s.own)
	}
	return &Sparse{size: s.size, own: map[int64]*[unit]byte{}, origin: origin}
}

func (s *Sparse) unit(n int64) *[unit]byte {
	if u := s.own[n]; u != nil {
		return u
	}
	return s.origin[n]
}

// ReadAt implements io.ReaderAt.
func (s *Sparse) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= s.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), s.size-off))
	for done := 0; done < n; {
		at := off + int64(done)
		in := int(at % unit)
		q := p[done:min(n, done+unit-in)]
		if u := s.unit(at / unit); u != nil {
			copy(q, u[in:])
		} else {
			clear(q)
		}
		done += len(q)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Bytes are n bytes from off; zeros where the image has none.
func (s *Sparse) Bytes(off int64, n int) []byte {
	b := make([]byte, n)
	if off >= 0 {
		_, _ = s.ReadAt(b, off) // what lies behind the end stays zeros
	}
	return b
}

// Put changes bytes; what lies outside of the image is left out.
func (s *Sparse) Put(off int64, p []byte) {
	for done := 0; done < len(p); {
		at := off + int64(done)
		if at < 0 || at >= s.size {
			return
		}
		in := int(at % unit)
		n := int(min(int64(min(len(p)-done, unit-in)), s.size-at))
		u := s.own[at/unit]
		if u == nil {
			u = new([unit]byte)
			if old := s.origin[at/unit]; old != nil {
				*u = *old
			}
			s.own[at/unit] = u
		}
		copy(u[in:], p[done:done+n])
		done += n
	}
}

// Place puts another image at an offset.
func (s *Sparse) Place(off int64, o *Sparse) {
	for _, part := range []map[int64]*[unit]byte{o.origin, o.own} {
		for n, u := range part {
			s.Put(off+n*unit, u[:min(unit, o.size-n*unit)])
		}
	}
}

// WriteFile writes the image with holes.
func (s *Sparse) WriteFile(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	for _, part := range []map[int64]*[unit]byte{s.origin, s.own} {
		for n, u := range part {
			if _, err := f.WriteAt(u[:min(unit, s.size-n*unit)], n*unit); err != nil {
				return errors.Join(err, f.Close())
			}
		}
	}
	return errors.Join(f.Truncate(s.size), f.Close())
}

// Save writes the image in the form that load reads: gzip of the size, and
// then the number and the content of every unit.
func (s *Sparse) Save(w io.Writer) error {
	z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err != nil {
		return err
	}
	b := binary.LittleEndian.AppendUint64(nil, uint64(s.size))
	for _, n := range slices.Sorted(maps.Keys(s.own)) {
		b = binary.LittleEndian.AppendUint32(b, uint32(n))
		b = append(b, s.own[n][:]...)
	}
	_, err = z.Write(b)
	return errors.Join(err, z.Close())
}

func load(r io.Reader) (*Sparse, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, err
	}
	var head [8]byte
	if _, err := io.ReadFull(z, head[:]); err != nil {
		return nil, err
	}
	s := NewSparse(int64(binary.LittleEndian.Uint64(head[:])))
	for {
		var n [4]byte
		if _, err := io.ReadFull(z, n[:]); errors.Is(err, io.EOF) {
			return s, nil
		} else if err != nil {
			return nil, err
		}
		u := new([unit]byte)
		if _, err := io.ReadFull(z, u[:]); err != nil {
			return nil, err
		}
		s.own[int64(binary.LittleEndian.Uint32(n[:]))] = u
	}
}
