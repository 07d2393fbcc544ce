package ploop

import (
	"context"
	"fmt"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// TestCloseIsOrdered: an image taken over after a crash, with a ragged tail,
// is not marked as closed before its length is right; and after Close it is
// marked. Both hold in every state that a power cut leaves, and each of the
// two syncs is needed for it.
func TestCloseIsOrdered(t *testing.T) {
	ctx := context.Background()
	b := append(put32(offInUse, inUseOpen)(sample(2)), 1, 2, 3)
	rec := backend.NewRecorder()
	f, err := rec.Wrap(backend.NewMemBytes("img.hds", b))
	if err != nil {
		t.Fatal(err)
	}
	i, err := Open(ctx, f, layers.OpenOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	last := rec.SyncCalls()
	examine := func(ignore int) error {
		for s := range rec.States(backend.StateOptions{IgnoreSync: ignore}) {
			b := s.Files[0].Bytes()
			h, err := parseHeader(b, "cut")
			if err != nil {
				return err
			}
			if h.inUse == inUseClosed && int64(len(b))%h.cluster != 0 {
				return fmt.Errorf("%s: closed with a length of %d", s, len(b))
			}
			if s.Completed == last && h.inUse != inUseClosed {
				return fmt.Errorf("%s: Close has returned but the image is in use", s)
			}
		}
		return nil
	}
	if err := examine(0); err != nil {
		t.Error(err)
	}
	for _, ignore := range []int{last - 1, last} {
		if examine(ignore) == nil {
			t.Errorf("nothing notices when sync %d of %d is left out", ignore, last)
		}
	}
}

// TestExtensionIsGoneBeforeTheFirstChange: no state holds both a changed BAT
// and the offset of an extension that no longer describes the image.
func TestExtensionIsGoneBeforeTheFirstChange(t *testing.T) {
	ctx := context.Background()
	b := withExtension(sample(2))
	rec := backend.NewRecorder()
	f, err := rec.Wrap(backend.NewMemBytes("img.hds", b))
	if err != nil {
		t.Fatal(err)
	}
	i, err := Open(ctx, f, layers.OpenOptions{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := i.WriteAt(ctx, []byte{1, 2, 3}, 5, bytesBelow(nil)); err != nil {
		t.Fatal(err)
	}
	closeImage(t, i)
	examine := func(ignore int) error {
		for s := range rec.States(backend.StateOptions{IgnoreSync: ignore}) {
			got := s.Files[0].Bytes()
			h, err := parseHeader(got, "cut")
			if err != nil {
				return err
			}
			if h.extension != 0 && string(got[k64:2*k64]) != string(b[k64:2*k64]) {
				return fmt.Errorf("%s: data changed under the extension", s)
			}
		}
		return nil
	}
	if err := examine(0); err != nil {
		t.Error(err)
	}
	if examine(1) == nil {
		t.Error("nothing notices when the first sync is left out")
	}
}
