package guesttest

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
)

// Recorded is a fuzz target that changes numbers of recorded filesystems, whose
// checksums are then made right again. Whatever becomes of them, the reader
// judges or refuses, and calls nothing free below lowest, where its superblock
// is, or outside.
func Recorded(f *testing.F, guests []*mutate.Guest, read freespace.Reader, lowest int64) {
	for i, g := range guests {
		for n := range g.Fields() {
			f.Add(byte(i), []byte{0, byte(n >> 8), byte(n), byte(n), byte(3 * n)})
		}
		f.Add(byte(i), []byte{1, 0, 3, 0, 3})
	}
	f.Fuzz(func(t *testing.T, which byte, script []byte) {
		s := guests[int(which)%len(guests)].Damage(script)
		c := freespace.NewCollector(1<<16, 1)
		if _, err := read(t.Context(), s, s.Size(), c.Add); err != nil {
			if freespace.AsRefusal(err) == nil {
				t.Errorf("no refusal: %v", err)
			}
			return
		}
		last := int64(-1)
		for _, r := range c.Ranges() {
			if r.Off <= last || r.Len <= 0 || r.Off > s.Size()-r.Len || r.Off < lowest {
				t.Fatalf("range %+v behind %d on %d bytes", r, last, s.Size())
			}
			last = r.End()
		}
	})
}

// Edits is a fuzz target that changes bytes of an image where a reader looks
// at it. The image is too large to be an input itself: an input is a list of
// edits of 5 bytes, a place among those that are looked at and what to add
// there. block is the part of the image with a checksum of its own around a
// place, and fix makes that right again; both may be nil.
//
// The reader must neither panic nor call anything free that is outside.
func Edits(f *testing.F, image []byte, read freespace.Reader, block func(at int64) (off, n int64), fix func(block []byte)) {
	size := int64(len(image))
	tr := &Traced{R: bytes.NewReader(image)}
	if _, _, err := JudgeAt(tr, size, read); err != nil {
		f.Fatal(err)
	}
	seen := slices.Collect(tr.Seen.Ranges())
	total := tr.Seen.Len()
	f.Add([]byte{0, 0, 0, 0, 1})
	f.Add([]byte{0, 0, 1, 0, 0x80, 0, 1, 0, 0, 0xff, 200, 7, 0, 0, 4})
	f.Fuzz(func(t *testing.T, edits []byte) {
		type saved struct {
			off int64
			b   []byte
		}
		var undo []saved
		for ; len(edits) >= 5 && len(undo) < 16; edits = edits[5:] {
			k := int64(binary.LittleEndian.Uint32(edits)) % total
			i := 0
			for k >= seen[i].Len {
				k -= seen[i].Len
				i++
			}
			at := seen[i].Off + k
			off, n := at, int64(1)
			if block != nil {
				off, n = block(at)
			}
			undo = append(undo, saved{off, bytes.Clone(image[off : off+n])})
			image[at] += edits[4]
			if fix != nil {
				fix(image[off : off+n])
			}
		}
		got, _, err := JudgeAt(bytes.NewReader(image), size, read)
		for r := range got.Ranges() {
			if err == nil && (r.Off < 0 || r.End() > size) {
				t.Errorf("free outside: %v", r)
			}
		}
		for _, u := range slices.Backward(undo) {
			copy(image[u.off:], u.b)
		}
	})
}
