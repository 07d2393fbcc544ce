package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

// openRO opens the image at path for reading, data files beside it allowed.
func openRO(t testing.TB, path string, o layers.OpenOptions) *Image {
	t.Helper()
	img, err := tryOpen(t, path, o)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func tryOpen(t testing.TB, path string, o layers.OpenOptions) (*Image, error) {
	t.Helper()
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o.Path = path
	o.OpenFile = func(name string, writable bool) (backend.File, error) {
		return backend.Open(filepath.Join(filepath.Dir(path), filepath.Base(name)), backend.Options{Writable: writable})
	}
	img, err := Open(context.Background(), f, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	t.Cleanup(func() { img.Close() })
	return img, nil
}

// lookupAll is the whole map of img, one extent per place.
func lookupAll(img *Image) ([]blockmap.Extent, error) {
	var all []blockmap.Extent
	buf := make([]blockmap.Extent, 0, 64)
	for pos := int64(0); pos < img.Size(); {
		got, err := img.Lookup(context.Background(), pos, img.Size()-pos, buf[:0])
		if err != nil {
			return nil, err
		}
		for _, e := range got {
			if n := len(all); n > 0 && all[n-1].Joins(e) {
				all[n-1].Len += e.Len
			} else {
				all = append(all, e)
			}
		}
		pos = got[len(got)-1].End()
	}
	return all, nil
}

// readAll is the content of img; below is what shines through, nil for zeros.
func readAll(img *Image, below []byte) ([]byte, error) {
	out := make([]byte, img.Size())
	copy(out, below)
	all, err := lookupAll(img)
	if err != nil {
		return nil, err
	}
	cluster := make([]byte, img.Granule())
	for _, e := range all {
		dst := out[e.Guest:e.End()]
		switch e.Kind {
		case blockmap.Zero:
			clear(dst)
		case blockmap.Data:
			if n, err := img.Data().ReadAt(dst, e.Host); n != len(dst) {
				return nil, fmt.Errorf("extent %+v: %w", e, err)
			}
		case blockmap.Packed:
			if err := img.Unpack(context.Background(), e, 0, cluster); err != nil {
				return nil, err
			}
			copy(dst, cluster[e.Guest%img.Granule():])
		}
	}
	return out, nil
}

// mapLine is an extent in the terms that qemu-img map and Lookup share.
type mapLine struct {
	start, length int64
	kind          blockmap.Kind
	host          int64 // Data only
}

// joinLines makes neighbours that could be one into one.
func joinLines(lines []mapLine) []mapLine {
	var out []mapLine
	for _, l := range lines {
		if n := len(out); n > 0 && out[n-1].kind == l.kind && (l.kind != blockmap.Data || out[n-1].host+out[n-1].length == l.host) {
			out[n-1].length += l.length
		} else {
			out = append(out, l)
		}
	}
	return out
}

func ourMap(t testing.TB, img *Image) []mapLine {
	t.Helper()
	all, err := lookupAll(img)
	if err != nil {
		t.Fatal(err)
	}
	var lines []mapLine
	for _, e := range all {
		l := mapLine{e.Guest, e.Len, e.Kind, 0}
		if e.Kind == blockmap.Data {
			l.host = e.Host
		}
		lines = append(lines, l)
	}
	return joinLines(lines)
}

// qemuMap is what qemu-img map says of the layer at path alone.
func qemuMap(t testing.TB, path string) []mapLine {
	t.Helper()
	var lines []mapLine
	for _, e := range imgtest.QemuMap(t, "", imgtest.Chain(imgtest.Image{Path: path, Format: "qcow2"})) {
		l := mapLine{start: e.Start, length: e.Length}
		switch {
		case e.Data && e.Offset != nil:
			l.kind, l.host = blockmap.Data, *e.Offset
		case e.Data:
			l.kind = blockmap.Packed
		case e.Present:
			l.kind = blockmap.Zero
		}
		lines = append(lines, l)
	}
	return joinLines(lines)
}

// sameAsQemu compares content and map of the layer at path with QEMU's, and
// the references with the reference counts.
func sameAsQemu(t *testing.T, path string) {
	t.Helper()
	img := openRO(t, path, layers.OpenOptions{})
	raw := filepath.Join(t.TempDir(), "raw")
	imgtest.QemuRaw(t, "", imgtest.Chain(imgtest.Image{Path: path, Format: "qcow2"}), raw)
	want, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(raw)
	got, err := readAll(img, nil)
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, got, want)
	walkMatchesRefcounts(t, img)
	ours, theirs := ourMap(t, img), qemuMap(t, path)
	if fmt.Sprint(ours) != fmt.Sprint(theirs) {
		t.Errorf("map differs:\n ours %v\n qemu %v", ours, theirs)
	}
}

func sameBytes(t testing.TB, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d bytes, want %d", len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %#x is %#x, want %#x", i, got[i], want[i])
		}
	}
}

// payload is a file of n bytes that neither repeat nor resist compression.
func payload(t testing.TB, path string, seed uint64, n int) string {
	t.Helper()
	b := imgtest.PatternBytes(seed, 0, n)
	for i := range b {
		if i/64%3 != 0 {
			b[i] = byte(i / 512)
		}
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
