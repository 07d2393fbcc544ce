package freespace

import "io"

// Window reads single numbers and bits of something large through pages, of
// which it keeps the last 256: 1 MiB. It is not safe for concurrent use.
type Window struct {
	r     io.ReaderAt
	size  int64
	pages [256]page
}

type page struct {
	number int64 // plus one; 0 is none
	b      []byte
}

const pageBytes = 4096

// NewWindow makes a window on the bytes [0, size) of r.
func NewWindow(r io.ReaderAt, size int64) *Window { return &Window{r: r, size: size} }

// page is a page; the last may be short.
func (w *Window) page(number int64) ([]byte, error) {
	p := &w.pages[number%int64(len(w.pages))]
	n := min(pageBytes, w.size-number*pageBytes)
	if n <= 0 {
		return nil, io.ErrUnexpectedEOF
	}
	if p.number != number+1 {
		if p.b == nil {
			p.b = make([]byte, pageBytes)
		}
		p.number = 0
		if err := ReadAt(w.r, p.b[:n], number*pageBytes); err != nil {
			return nil, err
		}
		p.number = number + 1
	}
	return p.b[:n], nil
}

// Bytes are the n bytes from off, which must lie in one page.
func (w *Window) Bytes(off int64, n int64) ([]byte, error) {
	b, err := w.page(off / pageBytes)
	if err != nil {
		return nil, err
	}
	if off %= pageBytes; off+n > int64(len(b)) {
		return nil, io.ErrUnexpectedEOF
	}
	return b[off : off+n], nil
}

// Ones reports whether the bits at to at+n are all set. The lowest bit of a
// byte comes first.
func (w *Window) Ones(at, n int64) (bool, error) {
	const per = pageBytes * 8
	for end := at + n; at < end; {
		number := at / per
		b, err := w.page(number)
		if err != nil {
			return false, err
		}
		base := number * per
		to := min(end, base+per)
		if to-base > int64(len(b))*8 {
			return false, io.ErrUnexpectedEOF
		}
		if _, zeros := NextZeros(b, uint64(at-base), uint64(to-base)); zeros > 0 {
			return false, nil
		}
		at = to
	}
	return true, nil
}
