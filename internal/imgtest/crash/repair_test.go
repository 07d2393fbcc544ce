package crash_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest/crash"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
)

// damaged are images for repairs, by the format and what the guest must see
// after it.
type damaged struct {
	format string
	make   setup
	want   []byte
	decide fsck.Decide // nil: all
}

// damage changes the bytes of an image; what the guest sees must come back.
func damage(s setup, how ...func(b []byte) []byte) (*damaged, error) {
	img, err := s(0)
	if err != nil {
		return nil, err
	}
	dir := layertest.NewDir(func(string) (backend.File, error) { return img.Files[crash.ImageFile].Clone(), nil })
	f, err := dir.Open(crash.ImageFile, true)
	if err != nil {
		return nil, err
	}
	sess := crash.Session{Image: img, Dir: dir}
	want, err := sess.Content(context.Background(), "")
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return &damaged{format: img.Format, want: want, make: blank(changed(s, func(b []byte) []byte {
		for _, h := range how {
			b = h(b)
		}
		return b
	}))}, nil
}

const undoFile = "undo"

// repair is image-fsck -y on one file.
func (d *damaged) repair(ctx context.Context, s *crash.Session) error {
	name := undoFile
	if s.Again {
		name = undoFile + ".1"
	}
	f, err := s.Dir.Open(crash.ImageFile, true)
	if err != nil {
		return err
	}
	undo, err := s.Dir.Open(name, true)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	c, err := fsck.CheckerFor(d.format)
	if err != nil {
		return err
	}
	decide := d.decide
	if decide == nil {
		decide = fsck.DecideAll
	}
	_, err = fsck.Repair(ctx, c, f, fsck.RepairOptions{
		Options: fsck.Options{Parallel: 1}, Decide: decide,
		Undo:    func() (backend.File, error) { return undo, nil },
		Execute: fsck.ExecuteOptions{Lost: lost{s.Dir}},
	})
	return errors.Join(err, undo.Close(), f.Close())
}

// lost keeps what a repair quarantines beside the image.
type lost struct{ dir *layertest.Dir }

func (l lost) Create(name string) (backend.File, string, error) {
	f, err := l.dir.Open("lost."+name, true)
	return f, name, err
}
func (l lost) Remove(string) error { return errors.ErrUnsupported } // none fails before its first change
func (l lost) Sync() error         { return nil }

// judge: undone, the image is what it was before, bit for bit; repaired again
// it is clean, and nothing of the guest is lost.
func (d *damaged) judge(ctx context.Context, st *crash.State) error {
	if err := d.takenBack(ctx, st); err != nil {
		return err
	}
	if st.Done {
		if err := d.whole(ctx, st); err != nil {
			return fmt.Errorf("the repair is done: %w", err)
		}
	}
	if err := st.Again(ctx); err != nil {
		return fmt.Errorf("repaired again: %w", err)
	}
	if err := d.whole(ctx, st); err != nil {
		return fmt.Errorf("repaired again: %w", err)
	}
	return nil
}

// takenBack: undone, the image is what it was before, bit for bit; what was put
// aside is whole as soon as the image changes; and what was done is durable.
func (d *damaged) takenBack(ctx context.Context, st *crash.State) error {
	was := st.Image().Files[crash.ImageFile]
	now, undo := st.Files[crash.ImageFile], st.Files[undoFile]
	back := now.Clone()
	switch _, err := fsck.ApplyUndo(ctx, undo.Clone(), back, fsck.UndoOptions{}); {
	case errors.Is(err, fsck.ErrNothingToUndo):
	case err != nil:
		return fmt.Errorf("undo: %w", err)
	}
	if back.Hash() != was.Hash() {
		return errors.New("undone, the image is not what it was")
	}
	for name, m := range st.Files {
		if strings.HasPrefix(name, "lost.") && now.Hash() != was.Hash() && m.Hash() != st.Final(name).Hash() {
			return fmt.Errorf("the image has changed, and %s is not whole", name)
		}
	}
	if st.Done {
		if now.Hash() != st.Final(crash.ImageFile).Hash() {
			return errors.New("the repair is done, but not durably")
		}
	}
	return nil
}

// whole: the image is sound, and the guest sees what it saw before the damage.
func (d *damaged) whole(ctx context.Context, st *crash.State) error {
	if err := crash.CheckDir(ctx, d.format, st.Dir); err != nil {
		return err
	}
	s := crash.Session{Image: image(d.format, nil), Dir: st.Dir}
	got, err := s.Content(ctx, "")
	if err != nil {
		return err
	}
	if !bytes.Equal(got, d.want) {
		return errors.New("the guest does not see what it saw before the damage")
	}
	return nil
}

// repaired is the image after a repair, with the undo file.
func (d *damaged) repaired(uint64) (*crash.Image, error) {
	img, err := d.make(0)
	if err != nil {
		return nil, err
	}
	files := map[string]*backend.Mem{crash.ImageFile: img.Files[crash.ImageFile].Clone(), undoFile: backend.NewMem(undoFile)}
	dir := layertest.NewDir(func(name string) (backend.File, error) {
		if m := files[name]; m != nil {
			return m, nil
		}
		return backend.NewMem(name), nil
	})
	if err := d.repair(context.Background(), &crash.Session{Dir: dir}); err != nil {
		return nil, err
	}
	return &crash.Image{Files: files}, nil
}

func undoRepair(ctx context.Context, s *crash.Session) error {
	f, err := s.Dir.Open(crash.ImageFile, true)
	if err != nil {
		return err
	}
	undo, err := s.Dir.Open(undoFile, false)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	_, err = fsck.ApplyUndo(ctx, undo, f, fsck.UndoOptions{})
	return errors.Join(err, undo.Close(), f.Close())
}

// undoneJudge: taking back can be done again and is then complete.
func (d *damaged) undoneJudge(ctx context.Context, st *crash.State) error {
	img, err := d.make(0)
	if err != nil {
		return err
	}
	was := img.Files[crash.ImageFile].Hash()
	if st.Done && st.Files[crash.ImageFile].Hash() != was {
		return errors.New("undone, but not durably")
	}
	if err := st.Again(ctx); err != nil {
		return err
	}
	if st.Files[crash.ImageFile].Hash() != was {
		return errors.New("undone again, the image is not what it was")
	}
	return nil
}

// twice makes BAT entry b name the cluster of entry a as well; the data that b
// had is a leak then. Both entries had the same bytes.
func twice(a, b int) func([]byte) []byte {
	return func(p []byte) []byte {
		copy(p[64+4*b:][:4], p[64+4*a:][:4])
		return p
	}
}

// badCounts makes the counts of the first refcount block zero from cluster n
// on.
func badCounts(n int) func([]byte) []byte {
	return func(p []byte) []byte {
		table := binary.BigEndian.Uint64(p[48:])
		block := binary.BigEndian.Uint64(p[table:])
		clear(p[block+uint64(2*n) : block+4096])
		return p
	}
}

// l2Of is where the first L2 table lies.
func l2Of(p []byte) uint64 {
	l1 := binary.BigEndian.Uint64(p[40:])
	return binary.BigEndian.Uint64(p[l1:]) & 0x00fffffffffffe00
}

// alone is an image in a directory of its own.
func alone(format string, m *backend.Mem) (*layertest.Dir, *crash.Session) {
	dir := layertest.NewDir(func(string) (backend.File, error) { return m.Clone(), nil })
	_, _ = dir.Open(crash.ImageFile, true) // of memory
	return dir, &crash.Session{Image: image(format, nil), Dir: dir}
}

// notCopied clears the COPIED flags of the first L2 table.
func notCopied(p []byte) []byte {
	l2 := l2Of(p)
	for i := l2; i < l2+4096; i += 8 {
		p[i] &= 0x7f
	}
	return p
}
