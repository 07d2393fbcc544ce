package fsck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
)

// What entries of a hostile image name again and again is kept once: the files
// that take it are bounded in number and length, and nothing is left out.
func TestLostIsBounded(t *testing.T) {
	old := original()
	size := int64(len(old))
	for _, step := range []int64{1, size / 8} { // many pieces, and long ones
		f := backend.NewMemBytes("image", old)
		p := phased(t, f)
		for i := range int64(3 * maxLostFiles) {
			off := i * step % size
			if err := p.Quarantine(Lost{Guest: i << 16, Host: off, Len: min(step, size-off)}); err != nil {
				t.Fatal(err)
			}
		}
		lost := &memLost{}
		if _, err := p.Execute(t.Context(), ExecuteOptions{Undo: backend.NewMem("undo"), Lost: lost}); err != nil {
			t.Fatal(err)
		}
		sum := 0
		for _, k := range lost.files {
			sum += len(k.Bytes())
		}
		if n := len(lost.files); n > maxLostFiles+1 || sum > 3*int(size) {
			t.Errorf("%d files of %d bytes together", n, sum)
		}
		rest := lost.files[LostRest]
		if rest == nil {
			t.Fatal("where is the rest?")
		}
		for i := range int64(3 * maxLostFiles) {
			off := i * step % size
			want := old[off:min(off+step, size)]
			if own := lost.files[fmt.Sprintf("guest-%#012x.host-%#012x", i<<16, off)]; own != nil && bytes.Equal(own.Bytes(), want) {
				continue
			}
			if got := rest.Bytes(); int64(len(got)) < off+int64(len(want)) || !bytes.Equal(got[off:off+int64(len(want))], want) {
				t.Fatalf("piece %d, at %d, is nowhere", i, off)
			}
		}
	}
}

// A hole that is cut off costs neither reading nor space: not in lost+found,
// not in the undo file, not when it is taken back. What is in the middle of it
// comes back, and what somebody else has put there since is noticed.
func TestHolesCostNothing(t *testing.T) {
	const size, page = 1 << 34, 4096
	f, undo := backend.NewMem("image"), backend.NewMem("undo")
	content := bytes.Repeat([]byte("x"), page)
	for _, off := range []int64{0, size/2 + 5*page} {
		if _, err := f.WriteAt(content, off); err != nil {
			t.Fatal(err)
		}
	}
	truncate(t, f, size)
	p, err := NewPlan(f, PlanOptions{})
	if err != nil {
		t.Fatal(err)
	}
	lost := LostDir(filepath.Join(t.TempDir(), "lost"))
	if err := p.SetSize(page + 100); err != nil {
		t.Fatal(err)
	}
	if err := p.Quarantine(Lost{Guest: -1, Host: page, Len: size - page}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Execute(t.Context(), ExecuteOptions{Undo: undo, Lost: lost}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	name := filepath.Join(string(lost), Lost{Guest: -1, Host: page}.Name())
	if err := unix.Stat(name, &st); err != nil || st.Size != size-page || st.Blocks > 4*undoBlock/512 {
		t.Errorf("%d bytes in %d blocks, %v", st.Size, st.Blocks, err)
	}
	if n, err := undo.Size(); err != nil || n > 4*undoBlock {
		t.Errorf("an undo file of %d bytes, %v", n, err)
	}
	for _, at := range []int64{page + 100, page + 700, size / 4, size/2 + 3*page, size/2 + 20*page, size - 1} {
		g := f.Clone()
		writeAt(t, g, at)
		if _, err := ApplyUndo(t.Context(), undo, g, UndoOptions{}); !errors.Is(err, ErrChanged) {
			t.Errorf("somebody has written at %#x: %v", at, err)
		}
		if _, err := ApplyUndo(t.Context(), undo, g, UndoOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
		if n, err := g.Allocated(); err != nil || n > 20*page {
			t.Errorf("%#x: %d bytes are allocated, %v", at, n, err)
		}
	}
	for range 2 {
		if _, err := ApplyUndo(t.Context(), undo, f, UndoOptions{}); err != nil {
			t.Fatal(err)
		}
		n, err := f.Size()
		used, aerr := f.Allocated()
		if err != nil || aerr != nil || n != size || used > 20*page {
			t.Errorf("%d bytes, %d allocated, %v, %v", n, used, err, aerr)
		}
		got := make([]byte, page)
		if _, err := f.ReadAt(got, size/2+5*page); err != nil || !bytes.Equal(got, content) {
			t.Errorf("what was in the middle is not as it was: %v", err)
		}
	}
}

// stopping cancels when the second file is made.
type stopping struct {
	LostDir
	n    int
	stop context.CancelFunc
}

func (s *stopping) Create(name string) (backend.File, string, error) {
	if s.n++; s.n == 2 {
		s.stop()
	}
	return s.LostDir.Create(name)
}

// A repair that ends before its first change leaves nothing in lost+found: a
// disk of the host that was full is as full as before, and no fuller.
func TestLostOfNothing(t *testing.T) {
	old := original()
	for _, why := range []string{"undo", "interrupted", "theirs"} {
		dir := LostDir(filepath.Join(t.TempDir(), "lost"))
		ctx, cancel := context.WithCancel(t.Context())
		store := &stopping{LostDir: dir, stop: func() {}}
		image, undo := backend.NewMemBytes("image", old), backend.NewFault(backend.NewMem("undo"))
		left := 0
		switch why {
		case "interrupted":
			store.stop = cancel
		case "theirs":
			left = 1
			if err := errors.Join(os.Mkdir(string(dir), 0o700), os.WriteFile(filepath.Join(string(dir), "mine"), nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			fallthrough
		default:
			undo.Inject(backend.Rule{On: backend.OpWrite, Nth: 1})
		}
		p := phased(t, image)
		for i := range int64(4) {
			if err := p.Quarantine(Lost{Guest: -1, Host: i * 4096, Len: 4096}); err != nil {
				t.Fatal(err)
			}
		}
		undone, err := p.Execute(ctx, ExecuteOptions{Undo: undo, Lost: store})
		if !undone || err == nil || store.n < 2 || !bytes.Equal(image.Bytes(), old) {
			t.Errorf("%s: %v %v, %d files", why, undone, err, store.n)
		}
		names, err := os.ReadDir(string(dir))
		if len(names) != left || left == 0 && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: left behind: %v, %v", why, names, err)
		}
		cancel()
	}
}

// Pieces that are the same are kept once, and those for which no name is left
// come into the file of the rest.
func TestLostNames(t *testing.T) {
	old := original()
	f := backend.NewMemBytes("image", old)
	p := phased(t, f)
	for range maxLostNames + 100 {
		if err := p.Quarantine(Lost{Guest: 65536, Host: 4096, Len: 8192}); err != nil {
			t.Fatal(err)
		}
	}
	again := Lost{Guest: 0, Host: 7 * 4096, Len: 4096}
	if err := p.Quarantine(again); err != nil {
		t.Fatal(err)
	}
	dir := LostDir(filepath.Join(t.TempDir(), "lost"))
	if err := os.Mkdir(string(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range maxLostNames + 1 {
		name := again.Name()
		if i > 0 {
			name = fmt.Sprintf("%s.%d", name, i)
		}
		if err := os.WriteFile(filepath.Join(string(dir), name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Execute(t.Context(), ExecuteOptions{Undo: backend.NewMem("undo"), Lost: dir}); err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir(string(dir))
	if err != nil || len(names) != maxLostNames+1+2 {
		t.Errorf("%d files, %v", len(names), err)
	}
	rest, err := os.ReadFile(filepath.Join(string(dir), LostRest))
	if err != nil || !bytes.Equal(rest[7*4096:], old[7*4096:8*4096]) || !backend.IsZero(rest[:7*4096]) {
		t.Errorf("%d bytes of the rest, %v", len(rest), err)
	}
}

// A link where the directory should be is not followed.
func TestLostLink(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	lost := LostDir(filepath.Join(dir, "lost"))
	if err := os.Symlink(elsewhere, string(lost)); err != nil {
		t.Fatal(err)
	}
	if f, _, err := lost.Create("x"); err == nil {
		_ = f.Close()
		t.Error("followed")
	} else if errors.Is(err, fs.ErrExist) {
		t.Errorf("not to be mistaken for a name that is taken: %v", err)
	}
	if names, err := os.ReadDir(elsewhere); err != nil || len(names) != 0 {
		t.Errorf("%v, %v", names, err)
	}
}
