package ploop

import (
	"bytes"
	"context"
	"encoding/binary"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// openFile opens an image of the host.
func openFile(t testing.TB, path string, writable bool) *Image {
	t.Helper()
	f, err := backend.Open(path, backend.Options{Writable: writable})
	if err != nil {
		t.Fatal(err)
	}
	i, err := Open(context.Background(), f, layers.OpenOptions{Path: path, Writable: writable})
	if err != nil {
		_ = f.Close() // the failure of Open is what counts
		t.Fatal(err)
	}
	return i
}

// closeImage closes i and checks that it went well.
func closeImage(t testing.TB, i *Image) {
	t.Helper()
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
}

// readLayer reads what i alone shows; what is not mapped stays as it is in p.
func readLayer(t testing.TB, i *Image, p []byte, off int64) {
	t.Helper()
	ctx := context.Background()
	buf := make([]blockmap.Extent, 0, 16)
	tok := i.readers.Enter(off)
	defer i.readers.Exit(tok)
	for pos, end := off, off+int64(len(p)); pos < end; {
		ext, err := i.Lookup(ctx, pos, end-pos, buf)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range ext {
			if e.Kind == blockmap.Data {
				if _, err := i.Data().ReadAt(p[e.Guest-off:e.End()-off], e.Host); err != nil {
					t.Fatal(err)
				}
			}
			pos = e.End()
		}
	}
}

// stack is images, top first; the last may be raw bytes of a base.
type stack []*Image

// content is what the stack shows, of the top's size.
func (s stack) content(t testing.TB, base []byte) []byte {
	t.Helper()
	size := s[0].Size()
	p := make([]byte, size)
	copy(p, base)
	for k := len(s) - 1; k >= 0; k-- {
		n := min(s[k].Size(), size)
		readLayer(t, s[k], p[:n], 0)
	}
	return p
}

// sameBytes names the first difference.
func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: first difference at %#x: %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

// rawImage crafts an image: header, entries, and clusters clusters of data.
func rawImage(version int, cluster, size int64, entries map[int]uint32, clusters int) []byte {
	h := newHeader(version, cluster, size)
	if len(entries) > 0 {
		h.flags = 0
		h.raw = h.encode()
	}
	b := make([]byte, h.firstData+int64(clusters)*cluster)
	copy(b, h.raw[:])
	for idx, e := range entries {
		binary.LittleEndian.PutUint32(b[headerSize+4*idx:], e)
	}
	for k := h.firstData; k < int64(len(b)); k++ {
		b[k] = byte(k>>9) | 1
	}
	return b
}

// openBytes opens an image held in memory.
func openBytes(b []byte, writable bool) (*Image, *backend.Mem, error) {
	m := backend.NewMemBytes("img.hds", b)
	i, err := Open(context.Background(), m, layers.OpenOptions{Writable: writable})
	return i, m, err
}

func tempPath(t testing.TB, name string) string { return filepath.Join(t.TempDir(), name) }
