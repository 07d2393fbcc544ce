package fsck

import (
	"bytes"
	"fmt"
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
// not in the undo file, not when it is taken back.
func TestHolesCostNothing(t *testing.T) {
	const size, page = 1 << 34, 4096
	f, undo := backend.NewMem("image"), backend.NewMem("undo")
	if _, err := f.WriteAt(bytes.Repeat([]byte("x"), page), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	p, err := NewPlan(f, PlanOptions{})
	if err != nil {
		t.Fatal(err)
	}
	lost := LostDir(filepath.Join(t.TempDir(), "lost"))
	if err := p.SetSize(page); err != nil {
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
	if err := unix.Stat(name, &st); err != nil || st.Size != size-page || st.Blocks > 64 {
		t.Errorf("%d bytes in %d blocks, %v", st.Size, st.Blocks, err)
	}
	if n, err := undo.Size(); err != nil || n > size/undoBlock*undoRecordSize+2*undoHeaderSize+undoBlock {
		t.Errorf("an undo file of %d bytes, %v", n, err)
	}
	if _, err := ApplyUndo(t.Context(), undo, f, UndoOptions{}); err != nil {
		t.Fatal(err)
	}
	if n, err := f.Size(); err != nil || n != size {
		t.Errorf("%d bytes, %v", n, err)
	}
}
