package layertest

import (
	"context"
	"errors"
	"fmt"

	"github.com/imagestack/imagestack/internal/imgtest/maptest"
)

// checkModel runs a random script of changes, syncs, reads and reopenings and
// compares the image with a plain byte array.
func checkModel(f Factory, d draw) error {
	size := drawSize(d, f)
	s, err := newSession(f, size, drawBelow(d, f, size))
	if err != nil {
		return err
	}
	for range d("steps", 1, 40) {
		if err := s.step(d); err != nil {
			return err
		}
	}
	if found := maptest.Check(s.e, nil, maptest.Rounds(5)); len(found) > 0 {
		return s.errorf("block map: %v", found[0])
	}
	return s.finish()
}

func (s *session) step(d draw) error {
	switch d("step", 0, 11) {
	default:
		return s.randomChange(d)
	case 0:
		if err := s.sync(); err != nil {
			return s.errorf("sync: %w", err)
		}
	case 1:
		off, n := s.span(d)
		s.note("read %d +%d", off, n)
		if err := compare(s.e, s.below, s.model[off:off+n], off); err != nil {
			return s.errorf("read %d +%d: %w", off, n, err)
		}
	case 2: // close without a sync
		if err := s.close(); err != nil {
			return err
		}
		if d("look", 0, 1) == 0 {
			if err := s.checkReadOnly(s.dir); err != nil {
				return err
			}
		}
		return s.open()
	case 3: // as after SIGKILL: all that was written is in the file
		if err := s.sync(); err != nil {
			return s.errorf("sync: %w", err)
		}
		return s.abandoned(d("open for writing", 0, 1) == 0)
	}
	return nil
}

// abandoned checks a copy of the image as it is now, not closed, which has to
// show everything that was synced.
func (s *session) abandoned(writable bool) error {
	dir, err := s.dir.Copy()
	if err != nil {
		return err
	}
	if err := s.checkReadOnly(dir); err != nil {
		return fmt.Errorf("synced, not closed: %w", err)
	}
	if !writable {
		return nil
	}
	e, err := openEditor(s.f, dir)
	if err != nil {
		return s.errorf("synced, not closed, open for writing: %w", err)
	}
	err = compare(e, s.below, s.model, 0)
	if err = errors.Join(err, e.Close()); err != nil {
		return s.errorf("synced, not closed, opened for writing: %w", err)
	}
	return s.checkReadOnly(dir)
}

// checkBelowFails: an error of the layer below comes through, changes nothing
// and is forgotten.
func checkBelowFails(f Factory, d draw) error {
	if f.Opaque {
		return nil
	}
	size := sizeFor(f, 12)
	content := make([]byte, size)
	for i := range content {
		content[i] = byte(1 + i%200)
	}
	s, err := newSession(f, size, NewBelow(content, 1))
	if err != nil {
		return err
	}
	broken := errors.New("the layer below fails")
	for range d("rounds", 1, 8) {
		if err := s.randomChange(d); err != nil {
			return err
		}
		off, n := s.span(d)
		calls, failAt := int64(0), d("fail at", 0, 2)
		s.below.fail = func() error {
			if calls++; calls > failAt {
				return broken
			}
			return nil
		}
		s.note("write %d +%d while below fails", off, n)
		p := make([]byte, n)
		for i := range p {
			p[i] = 0xff
		}
		err := s.e.WriteAt(context.Background(), p, off, s.below)
		s.below.fail = nil
		got := make([]byte, size)
		if rerr := ReadLayer(context.Background(), s.e, s.below, got, 0); rerr != nil {
			return s.errorf("read: %w", rerr)
		}
		switch {
		case err == nil:
			copy(s.model[off:], p)
		case !errors.Is(err, broken):
			return s.errorf("write while below fails: %w, want the error of the layer below", err)
		default: // old or new, per byte
			for i := off; i < off+n; i++ {
				if got[i] == 0xff {
					s.model[i] = 0xff
				}
			}
		}
		if err := firstDifference(got, s.model, 0); err != nil {
			return s.errorf("after an error of the layer below: %w", err)
		}
	}
	return s.finish()
}
