package layertest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"syscall"

	"github.com/imagestack/imagestack/backend"
)

// Dir is the place where a Factory keeps the files of one image: a name space
// of files in memory, on disk, or wrapped by a recorder. Whoever opens a file
// gets a handle of his own, which knows whether it may write and whether it is
// closed, and through which a Hook sees (and can spoil) every access.
type Dir struct {
	mu     sync.Mutex
	files  map[string]backend.File
	make   func(name string) (backend.File, error)
	path   string
	hook   Hook
	count  int
	open   int      // handles not closed yet
	crimes []string // what no user of a file may do
}

// Access is one operation on a file of a Dir.
type Access struct {
	Index  int // counts all accesses of the Dir since the Hook was set
	File   string
	Op     string // read, write, sync, truncate, punch, zero, copy, seek
	Off, N int64  // for truncate, Off is the new length
	Grows  bool   // reaches behind the end of the file
}

func (a Access) String() string {
	return fmt.Sprintf("access %d: %s %s [%d,+%d)", a.Index, a.File, a.Op, a.Off, a.N)
}

// changes reports whether the access changes the file.
func (a Access) changes() bool { return a.Op != "read" && a.Op != "seek" && a.Op != "sync" }

// Verdict is what a Hook does to an access. The zero value lets it pass.
type Verdict struct {
	Err   error // the access fails
	Short bool  // a write that fails has written its first half
	Lie   bool  // the access is not done and reports success
}

// Hook sees each access before it is done. It may be called concurrently.
type Hook func(Access) Verdict

// NewMemDir is a Dir in memory.
func NewMemDir() *Dir {
	return NewDir(func(name string) (backend.File, error) { return backend.NewMem(name), nil })
}

// NewOSDir is a Dir in an existing directory, for checkers that need paths.
func NewOSDir(path string) *Dir {
	d := NewDir(func(name string) (backend.File, error) {
		return backend.Open(filepath.Join(path, name), backend.Options{Writable: true, Create: true})
	})
	d.path = path
	return d
}

// NewDir is a Dir whose files newFile makes when they are first opened.
func NewDir(newFile func(name string) (backend.File, error)) *Dir {
	return &Dir{files: make(map[string]backend.File), make: newFile}
}

// Path is the path of a file of a NewOSDir.
func (d *Dir) Path(name string) string { return filepath.Join(d.path, name) }

// Open returns a handle for the named file. Writable handles make the file
// when it is missing. Closing the handle leaves the file in the Dir.
func (d *Dir) Open(name string, writable bool) (backend.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.files[name]
	if f == nil {
		if !writable {
			return nil, fmt.Errorf("%s: %w", name, os.ErrNotExist)
		}
		var err error
		if f, err = d.make(name); err != nil {
			return nil, err
		}
		d.files[name] = f
	}
	d.open++
	return &handle{d: d, f: f, name: name, writable: writable}, nil
}

// SetHook makes h see every access from now on; nil ends that.
func (d *Dir) SetHook(h Hook) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hook, d.count = h, 0
}

// Copy is a Dir in memory with the present content of d.
func (d *Dir) Copy() (*Dir, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := NewMemDir()
	for name, f := range d.files {
		b, err := content(f)
		if err != nil {
			return nil, err
		}
		c.files[name] = backend.NewMemBytes(name, b)
	}
	return c, nil
}

// Save writes the files of d into a directory.
func (d *Dir) Save(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, f := range d.files {
		b, err := content(f)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(path, name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func content(f backend.File) ([]byte, error) {
	n, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}

// Allocated is the storage in use by all files.
func (d *Dir) Allocated() (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var sum int64
	for _, f := range d.files {
		n, err := f.Allocated()
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// Close closes the files themselves.
func (d *Dir) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var err error
	for _, f := range d.files {
		err = errors.Join(err, f.Close())
	}
	return err
}

// misuse returns what handles were used for that is never allowed: a change
// through a read-only handle, use or a second close of a closed one, and, when
// all must be closed, how many are not.
func (d *Dir) misuse(allClosed bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.crimes) > 0 {
		sort.Strings(d.crimes)
		return fmt.Errorf("misuse of files: %s", d.crimes[0])
	}
	if allClosed && d.open != 0 {
		return fmt.Errorf("misuse of files: %d handles are left open", d.open)
	}
	return nil
}

// handle is one opening of a file.
type handle struct {
	d        *Dir
	f        backend.File
	name     string
	writable bool
	closed   bool
}

var _ backend.File = (*handle)(nil)

func (h *handle) before(op string, off, n int64) (Verdict, error) {
	a := Access{File: h.name, Op: op, Off: off, N: n}
	if op == "write" || op == "copy" || op == "truncate" {
		if size, err := h.f.Size(); err == nil {
			a.Grows = off+n > size
		}
	}
	h.d.mu.Lock()
	hook := h.d.hook
	a.Index = h.d.count
	h.d.count++
	if h.closed {
		h.d.crimes = append(h.d.crimes, a.String()+" after Close")
		h.d.mu.Unlock()
		return Verdict{}, os.ErrClosed
	}
	if a.changes() {
		if !h.writable {
			h.d.crimes = append(h.d.crimes, a.String()+" on a file opened for reading")
			h.d.mu.Unlock()
			return Verdict{}, syscall.EBADF
		}
	}
	h.d.mu.Unlock()
	if hook == nil {
		return Verdict{}, nil
	}
	v := hook(a)
	return v, v.Err
}

func total(bufs [][]byte) (n int64) {
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

func (h *handle) ReadAt(p []byte, off int64) (int, error) {
	if _, err := h.before("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	return h.f.ReadAt(p, off)
}

func (h *handle) ReadvAt(bufs [][]byte, off int64) (int, error) {
	if _, err := h.before("read", off, total(bufs)); err != nil {
		return 0, err
	}
	return h.f.ReadvAt(bufs, off)
}

func (h *handle) WriteAt(p []byte, off int64) (int, error) {
	v, err := h.before("write", off, int64(len(p)))
	switch {
	case err != nil && v.Short && len(p) > 1:
		n, werr := h.f.WriteAt(p[:len(p)/2], off)
		return n, errors.Join(werr, err)
	case err != nil:
		return 0, err
	case v.Lie:
		return len(p), nil
	}
	return h.f.WriteAt(p, off)
}

func (h *handle) WritevAt(bufs [][]byte, off int64) (int, error) {
	v, err := h.before("write", off, total(bufs))
	switch {
	case err != nil && v.Short && len(bufs) > 0:
		n, werr := h.f.WriteAt(bufs[0][:len(bufs[0])/2], off)
		return n, errors.Join(werr, err)
	case err != nil:
		return 0, err
	case v.Lie:
		return int(total(bufs)), nil
	}
	return h.f.WritevAt(bufs, off)
}

func (h *handle) Size() (int64, error)      { return h.f.Size() }
func (h *handle) Allocated() (int64, error) { return h.f.Allocated() }
func (h *handle) Name() string              { return h.f.Name() }

// do is an access that has neither a buffer nor a partial result.
func (h *handle) do(op string, off, n int64, f func() error) error {
	v, err := h.before(op, off, n)
	if err != nil || v.Lie {
		return err
	}
	return f()
}

func (h *handle) Truncate(size int64) error {
	return h.do("truncate", size, 0, func() error { return h.f.Truncate(size) })
}

func (h *handle) Sync() error { return h.do("sync", 0, 0, h.f.Sync) }

func (h *handle) PunchHole(off, n int64) error {
	return h.do("punch", off, n, func() error { return h.f.PunchHole(off, n) })
}

func (h *handle) ZeroRange(off, n int64) error {
	return h.do("zero", off, n, func() error { return h.f.ZeroRange(off, n) })
}

func (h *handle) CopyRange(src backend.File, srcOff, off, n int64) (int64, error) {
	v, err := h.before("copy", off, n)
	if err != nil {
		return 0, err
	}
	if v.Lie {
		return n, nil
	}
	if s, ok := src.(*handle); ok {
		if _, err := s.before("read", srcOff, n); err != nil {
			return 0, err
		}
		src = s.f
	}
	return h.f.CopyRange(src, srcOff, off, n)
}

func (h *handle) SeekData(off int64) (int64, error) {
	if _, err := h.before("seek", off, 0); err != nil {
		return 0, err
	}
	return h.f.SeekData(off)
}

func (h *handle) SeekHole(off int64) (int64, error) {
	if _, err := h.before("seek", off, 0); err != nil {
		return 0, err
	}
	return h.f.SeekHole(off)
}

func (h *handle) Close() error {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if h.closed {
		h.d.crimes = append(h.d.crimes, h.name+": closed twice")
		return os.ErrClosed
	}
	h.closed = true
	h.d.open--
	return nil
}
