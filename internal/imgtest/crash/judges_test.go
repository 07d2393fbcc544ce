package crash_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest/crash"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

func rawNew(size int64) setup {
	return once(func() (*crash.Image, error) {
		m := backend.NewMem(crash.ImageFile)
		return image("raw", m), raw.Create(context.Background(), m, size)
	})
}

// bytesOf are the first n bytes of the image that a power cut left.
func bytesOf(st *crash.State, n int) []byte {
	p := make([]byte, n)
	_, _ = st.Files[crash.ImageFile].ReadAt(p, 0) // shorter is zeros
	return p
}

// bitmapsJudge: changed bytes never stand beside a bit that calls the bitmaps
// consistent.
func bitmapsJudge(ctx context.Context, st *crash.State) error {
	const autoclear = 88
	s := crash.Session{Image: st.Image(), Dir: st.Dir}
	now, err := s.Content(ctx, "")
	if err != nil {
		return err
	}
	if binary.BigEndian.Uint64(bytesOf(st, 104)[autoclear:]) != 0 && !bytes.Equal(now, st.Session().First()) {
		return errors.New("the guest has changed, and the bitmaps are said to know it")
	}
	return st.Standard(ctx)
}

// dirtyJudge: the mark stays until the counts are right, and no content is
// lost. What the counts are while it stays does not matter.
func dirtyJudge(ctx context.Context, st *crash.State) error {
	const incompatible, dirty = 72, 1
	if binary.BigEndian.Uint64(bytesOf(st, 104)[incompatible:])&dirty == 0 {
		return st.Standard(ctx)
	}
	s := crash.Session{Image: st.Image(), Dir: st.Dir}
	now, err := s.Content(ctx, "")
	if err != nil {
		return err
	}
	return errors.Join(st.Session().Allowed(now, st.Completed), st.Rerun(ctx))
}

// extensionJudge: the extension is gone before what it describes changes.
func extensionJudge(ctx context.Context, st *crash.State) error {
	const extension = 56
	s := crash.Session{Image: st.Image(), Dir: st.Dir}
	now, err := s.Content(ctx, "")
	if err != nil {
		return err
	}
	if binary.LittleEndian.Uint64(bytesOf(st, 64)[extension:]) != 0 && !bytes.Equal(now, st.Session().First()) {
		return errors.New("the guest has changed under the extension")
	}
	return closedJudge(ctx, st)
}

// closedJudge is for all of ploop: an image that says that it was closed has a proper length, and
// says so when Close has returned.
func closedJudge(ctx context.Context, st *crash.State) error {
	const mark, open, cluster = 44, 0x746F6E59, 32 << 10
	size, err := st.Files[crash.ImageFile].Size()
	if err != nil {
		return err
	}
	switch inUse := binary.LittleEndian.Uint32(bytesOf(st, 64)[mark:]) == open; {
	case !inUse && size%cluster != 0:
		return fmt.Errorf("closed with a length of %d", size)
	case inUse && st.Done:
		return errors.New("Close has returned, but the image is in use")
	}
	return st.Standard(ctx)
}

// nothing is an empty file, whose format is none yet.
func nothing(uint64) (*crash.Image, error) { return image("", backend.NewMem(crash.ImageFile)), nil }

// blank is an image that is not read as such.
func blank(s setup) setup {
	return func(seed uint64) (*crash.Image, error) {
		img, err := s(seed)
		if err != nil {
			return nil, err
		}
		with := *img
		with.Format = ""
		return &with, nil
	}
}

func create(format string, o qcow2.CreateOptions) func(context.Context, *crash.Session) error {
	return func(ctx context.Context, s *crash.Session) error {
		f, err := s.Dir.Open(crash.ImageFile, true)
		if err != nil {
			return err
		}
		if format == "qcow2" {
			return errors.Join(qcow2.Create(ctx, f, o), f.Close())
		}
		return errors.Join(ploop.Create(ctx, f, ploop.CreateOptions{Size: o.Size, ClusterSize: o.ClusterSize}), f.Close())
	}
}

// createdJudge: no image, the old one untouched, or the whole new one, of the
// given size; that one once Create has returned, and when it is called again.
func createdJudge(format string, size int64) func(context.Context, *crash.State) error {
	return func(ctx context.Context, st *crash.State) error {
		if err := created(ctx, st, format, size, st.Done); err != nil {
			return err
		}
		if err := st.Again(ctx); err != nil {
			return err
		}
		return created(ctx, st, format, size, true)
	}
}

func created(ctx context.Context, st *crash.State, format string, size int64, must bool) error {
	s := crash.Session{Image: image(format, nil), Dir: st.Dir}
	now, old := st.Files[crash.ImageFile], st.Image().Files[crash.ImageFile]
	if !must && now.Hash() == old.Hash() {
		return nil
	}
	l, err := s.Open(ctx, false, "")
	if errors.Is(err, layers.ErrFormat) && !must {
		if head := bytesOf(st, 64); qcow2.Probe(head) || ploop.Probe(head) {
			return fmt.Errorf("looks like an image: %w", err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if l.Size() != size {
		err = fmt.Errorf("a disk of %d bytes", l.Size())
	}
	p := make([]byte, 64<<10)
	err = errors.Join(err, layertest.ReadLayer(ctx, l, layertest.NewBelow(nil, 1), p, size-int64(len(p))), l.Close())
	if err != nil {
		return err
	}
	return crash.CheckDir(ctx, format, st.Dir)
}
