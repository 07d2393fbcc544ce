package fsck

import (
	"context"
	"path/filepath"
	"sync"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

// borrowed is a file that somebody else closes.
type borrowed struct{ backend.File }

func (borrowed) Close() error { return nil }

// evidenceCache is the memory for tables while the guest is read, in bytes.
const evidenceCache = 16 << 20

// evidence is what the guest's own metadata says of the top image: the
// function for Options.GuestFree. The guest is read, through all layers as
// they are now, when the first question comes, which it seldom does. Where
// anything is in the way nothing is known.
func (r *runner) evidence(ctx context.Context, s *Stack, res *ImageResult, h *holder) func(off, n int64) bool {
	free := sync.OnceValue(func() *blockmap.Set {
		set := new(blockmap.Set)
		st, closeAll := s.assemble(ctx, res, h, r.o.Open)
		defer closeAll()
		if st == nil {
			return set
		}
		rep, err := guestfs.Free(ctx, st.ReaderAt(ctx), st.Size(), guestfs.Options{})
		if err != nil {
			return set
		}
		for _, f := range rep.Free {
			set.Add(f.Off, f.Len)
		}
		return set
	})
	return func(off, n int64) bool { return free().Contains(off, n) }
}

// assemble makes a stack of the files that are open and locked already; nil
// when that cannot be done.
func (s *Stack) assemble(ctx context.Context, res *ImageResult, h *holder, o open.Options) (*layers.Stack, func()) {
	var pile []layers.Layer
	var close []func() error
	closeAll := func() {
		for _, c := range close {
			_ = c() // opened for reading
		}
	}
	cache := layers.NewCache(evidenceCache)
	if s.trace.Err != nil {
		return nil, closeAll
	}
	for _, img := range s.trace.Images {
		f := h.find(img.Path)
		if f == nil {
			return nil, closeAll
		}
		rel, err := open.NewRelated(img.Path, o)
		if err != nil {
			return nil, closeAll
		}
		close = append(close, rel.Close)
		lo := layers.OpenOptions{Path: img.Path, Cache: cache, OpenFile: func(name string, _ bool) (backend.File, error) {
			f, _, err := rel.Open("data file", name)
			return f, err
		}}
		var l layers.Layer
		switch img.Format {
		case "qcow2":
			l, err = qcow2.Open(ctx, borrowed{f}, lo)
		case "ploop":
			l, err = ploop.Open(ctx, borrowed{f}, lo)
		default:
			l, err = raw.Open(ctx, borrowed{f}, lo)
		}
		if err != nil {
			return nil, closeAll
		}
		close = append([]func() error{l.Close}, close...)
		pile = append(pile, l)
	}
	st, err := layers.NewStack(pile, layers.StackOptions{Cache: cache})
	if err != nil {
		return nil, closeAll
	}
	close = append([]func() error{st.Close}, close[len(pile):]...) // the layers are its own now
	return st, closeAll
}

// find is the open file at path, nil when it is not one of the image's.
func (h *holder) find(path string) backend.File {
	if f := h.files[filepath.Clean(path)]; f != nil {
		return f
	}
	return nil
}
