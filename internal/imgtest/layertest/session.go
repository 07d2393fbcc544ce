package layertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

type blockMap = blockmap.Map

func stack() string { return string(debug.Stack()) }

func allStacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

// Below is a layers.Below over bytes that must never change.
type Below struct {
	content []byte
	before  []byte
	grain   int64 // IsZero knows whole grains only; 0: it knows nothing
	fail    func() error
}

// NewBelow shows content. IsZero knows grains (in bytes, 1 or more) that are
// zeros as a whole; with 0 it never knows.
func NewBelow(content []byte, grain int64) *Below {
	return &Below{content: content, before: slices.Clone(content), grain: grain}
}

func zeroBelow() *Below { return NewBelow(nil, 1) }

// ReadAt implements layers.Below.
func (b *Below) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.fail != nil {
		if err := b.fail(); err != nil {
			return err
		}
	}
	clear(p)
	if off < int64(len(b.content)) {
		copy(p, b.content[off:])
	}
	return nil
}

// IsZero implements layers.Below.
func (b *Below) IsZero(ctx context.Context, off, n int64) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if b.fail != nil {
		if err := b.fail(); err != nil {
			return false, err
		}
	}
	size := int64(len(b.content))
	if off >= size {
		return true, nil
	}
	if b.grain == 0 {
		return false, nil
	}
	from := off / b.grain * b.grain
	to := min((off+n+b.grain-1)/b.grain*b.grain, size)
	return backend.IsZero(b.content[from:to]), nil
}

func (b *Below) unchanged() error {
	if !bytes.Equal(b.content, b.before) {
		return errors.New("the layer below was changed")
	}
	return nil
}

// drawBelow makes a random layer below: none, short, as long as the top,
// longer; data, zeros and both.
func drawBelow(d draw, f Factory, size int64) *Below {
	if f.Opaque {
		return zeroBelow()
	}
	var n int64
	switch d("below", 0, 3) {
	case 0:
		return zeroBelow()
	case 1:
		n = d("below length", 1, size)
	case 2:
		n = size
	case 3:
		n = size + f.Granule + 100
	}
	content := make([]byte, n)
	imgtest.Pattern(content, 0xb, 0)
	for range d("holes below", 0, 3) {
		at := d("hole at", 0, n-1)
		clear(content[at:min(n, at+d("hole length", 1, 4*f.Granule))])
	}
	return NewBelow(content, []int64{0, 1, 512, f.Granule, 4 * f.Granule}[d("below knows zeros by", 0, 4)])
}

// sizeFor is a virtual size of about n clusters, not a whole number of them
// where the format permits.
func sizeFor(f Factory, n int64) int64 {
	return max((n*f.Granule-f.Granule/3)/f.unit(), 1) * f.unit()
}

func drawSize(d draw, f Factory) int64 {
	limit := min(max(40*f.Granule, 256<<10), 4<<20)
	switch d("size kind", 0, 3) {
	case 0:
		limit = min(limit, 3*f.Granule)
	case 1:
		return max(limit/f.Granule*f.Granule/f.unit(), 1) * f.unit()
	}
	return d("size", 1, max(limit/f.unit(), 1)) * f.unit()
}

// session is an image that is open for writing, with the bytes it must show.
type session struct {
	f     Factory
	dir   *Dir
	size  int64
	below *Below
	e     layers.Editor
	model []byte
	log   []string
	tag   uint64 // of the last write
}

func newSession(f Factory, size int64, below *Below) (*session, error) {
	return newSessionIn(f, NewMemDir(), size, below)
}

func newSessionIn(f Factory, dir *Dir, size int64, below *Below) (*session, error) {
	ctx := context.Background()
	if err := f.Create(ctx, dir, size); err != nil {
		return nil, fmt.Errorf("create %d bytes: %w", size, err)
	}
	if err := dir.misuse(true); err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	s := &session{f: f, dir: dir, size: size, below: below, model: f.shows(size, below)}
	return s, s.open()
}

func (s *session) open() error {
	e, err := openEditor(s.f, s.dir)
	if err != nil {
		return s.errorf("open for writing: %w", err)
	}
	s.e = e
	if got := e.Size(); got != s.size {
		return s.errorf("the image has %d bytes, made with %d", got, s.size)
	}
	return nil
}

func openEditor(f Factory, dir *Dir) (layers.Editor, error) {
	l, err := f.Open(context.Background(), dir, true)
	if err != nil {
		return nil, err
	}
	e, ok := l.(layers.Editor)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%T is no layers.Editor", l), l.Close())
	}
	return e, nil
}

// errorf adds what was done so far.
func (s *session) errorf(format string, args ...any) error {
	return fmt.Errorf("%s, %d bytes, below %d bytes: %w\nafter:\n%s", s.f.Name, s.size, len(s.below.content), fmt.Errorf(format, args...), s.trace())
}

func (s *session) trace() string { return strings.Join(s.log, "\n") }

func (s *session) note(format string, args ...any) {
	s.log = append(s.log, fmt.Sprintf(format, args...))
}

// write stores the pattern tag at off and checks that the editor leaves p
// alone and does not keep it.
func (s *session) write(off, n int64, tag uint64) error {
	s.note("write %d +%d", off, n)
	p := make([]byte, n)
	if tag != 0 {
		imgtest.Pattern(p, tag, off)
	}
	return s.writeBytes(p, off)
}

func (s *session) writeBytes(p []byte, off int64) error {
	keep := slices.Clone(p)
	if err := s.e.WriteAt(context.Background(), p, off, s.below); err != nil {
		return err
	}
	if !bytes.Equal(p, keep) {
		return fmt.Errorf("WriteAt(%d, +%d) changed its argument", off, len(p))
	}
	copy(s.model[off:], p)
	for i := range p {
		p[i] = ^p[i] // must not reach the image any more
	}
	return nil
}

func (s *session) zero(off, n int64, punch bool) error {
	s.note("zero %d +%d punch %v", off, n, punch)
	if err := s.e.ZeroAt(context.Background(), off, n, punch, s.below); err != nil {
		return err
	}
	clear(s.model[off : off+n])
	return nil
}

func (s *session) sync() error {
	s.note("sync")
	return s.e.Sync(context.Background())
}

// span draws a range of the disk that loves borders; it is not empty.
func (s *session) span(d draw) (off, n int64) { return span(d, s.size, s.f.Granule) }

func span(d draw, size, gran int64) (off, n int64) {
	near := []int64{0, 0, 0, 1, -1, 512, -512, 511}
	switch d("at", 0, 2) {
	case 0:
		off = d("cluster", 0, size/gran)*gran + near[d("near", 0, 7)]
	case 1:
		off = d("sector", 0, size/512) * 512
	default:
		off = d("byte", 0, size-1)
	}
	off = min(max(off, 0), size-1)
	switch d("length", 0, 4) {
	case 0:
		n = d("bytes", 1, 700)
	case 1:
		n = d("sectors", 1, 8) * 512
	case 2:
		n = d("clusters", 1, 6)*gran + near[d("near", 0, 7)]
	case 3: // to a border
		n = (off/gran+d("borders", 1, 5))*gran - off
	default:
		n = d("any", 1, 3*gran)
	}
	return off, min(max(n, 1), size-off)
}

// randomChange is one random write or zeroing.
func (s *session) randomChange(d draw) error {
	off, n := s.span(d)
	var err error
	switch d("change", 0, 7) {
	case 0:
		err = s.write(off, n, 0)
	case 1:
		err = s.zero(off, n, false)
	case 2, 3:
		err = s.zero(off, n, true)
	default:
		s.tag++
		err = s.write(off, n, s.tag)
	}
	if err != nil {
		return s.errorf("%w", err)
	}
	return nil
}

// compare reads [off, off+n) of l and compares it with want (want[0] is byte
// off).
func compare(l layers.Layer, below layers.Below, want []byte, off int64) error {
	got := make([]byte, len(want))
	if err := ReadLayer(context.Background(), l, below, got, off); err != nil {
		return err
	}
	return firstDifference(got, want, off)
}

func firstDifference(got, want []byte, off int64) error {
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range want {
		if got[i] != want[i] {
			end := i
			for end < len(want) && got[end] != want[end] {
				end++
			}
			return fmt.Errorf("byte %d (and %d more) is %#02x, want %#02x", off+int64(i), end-i-1, got[i], want[i])
		}
	}
	return nil
}

func (s *session) check() error {
	if err := compare(s.e, s.below, s.model, 0); err != nil {
		return s.errorf("content: %w", err)
	}
	return nil
}

func (s *session) close() error {
	s.note("close")
	if err := s.e.Close(); err != nil {
		return s.errorf("close: %w", err)
	}
	if err := s.dir.misuse(true); err != nil {
		return s.errorf("%w", err)
	}
	return nil
}

// checkReadOnly opens the image in dir for reading and compares it.
func (s *session) checkReadOnly(dir *Dir) error {
	l, err := s.f.Open(context.Background(), dir, false)
	if err != nil {
		return s.errorf("open for reading: %w", err)
	}
	if err := compare(l, s.below, s.model, 0); err != nil {
		return s.errorf("content, opened for reading: %w", errors.Join(err, l.Close()))
	}
	if err := l.Close(); err != nil {
		return s.errorf("close, opened for reading: %w", err)
	}
	if err := dir.misuse(true); err != nil {
		return s.errorf("opened for reading: %w", err)
	}
	return nil
}

// finish closes the image and checks all that can be checked of it then.
func (s *session) finish() error {
	if err := s.check(); err != nil {
		return err
	}
	if err := s.close(); err != nil {
		return err
	}
	if err := s.checkReadOnly(s.dir); err != nil {
		return err
	}
	if s.f.Inspect != nil {
		if err := s.f.Inspect(context.Background(), s.dir); err != nil {
			return s.errorf("inspection: %w", err)
		}
	}
	return s.below.unchanged()
}

var extentPool = sync.Pool{New: func() any { b := make([]blockmap.Extent, 0, 32); return &b }}

// ReadLayer fills p with what l shows at off, with below under it: the
// reference for all readers, in which everything that can be checked is.
func ReadLayer(ctx context.Context, l layers.Layer, below layers.Below, p []byte, off int64) error {
	if e, ok := l.(layers.Editor); ok && e.Readers() != nil {
		token := e.Readers().Enter(off)
		defer e.Readers().Exit(token)
	}
	buf := extentPool.Get().(*[]blockmap.Extent)
	defer extentPool.Put(buf)
	for len(p) > 0 {
		list, err := l.Lookup(ctx, off, int64(len(p)), (*buf)[:0])
		if err != nil {
			return fmt.Errorf("lookup %d +%d: %w", off, len(p), err)
		}
		for _, x := range list {
			if x.Guest != off || x.Len < 1 || x.Len > int64(len(p)) {
				return fmt.Errorf("lookup %d +%d: extent %+v", off, len(p), x)
			}
			if err := readExtent(ctx, l, below, x, p[:x.Len]); err != nil {
				return fmt.Errorf("read %+v: %w", x, err)
			}
			off += x.Len
			p = p[x.Len:]
		}
	}
	return nil
}

func readExtent(ctx context.Context, l layers.Layer, below layers.Below, x blockmap.Extent, p []byte) error {
	switch x.Kind {
	case blockmap.Unmapped:
		return below.ReadAt(ctx, p, x.Guest)
	case blockmap.Zero:
		clear(p)
		return nil
	case blockmap.Data:
		n, err := l.Data().ReadAt(p, x.Host)
		if n == len(p) && errors.Is(err, io.EOF) {
			err = nil
		}
		return err
	case blockmap.Packed:
		return l.Unpack(ctx, x, x.Guest%l.Granule(), p)
	}
	return fmt.Errorf("unknown kind %v", x.Kind)
}
