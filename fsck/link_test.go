package fsck

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// linked is an image that names a parent.
func linked(t testing.TB, o qcow2.CreateOptions) []byte {
	t.Helper()
	m := backend.NewMem("image")
	o.Size = 1 << 20
	if err := qcow2.Create(t.Context(), m, o); err != nil {
		t.Fatal(err)
	}
	return m.Bytes()
}

// others are the extensions but that of the format.
func (l *link) others() (out []string) {
	for _, e := range l.exts {
		if e.typ != linkExtFormat {
			out = append(out, string(binary.BigEndian.AppendUint32(nil, e.typ))+string(e.data))
		}
	}
	return out
}

// changeLink makes the change in memory and checks what it has to leave alone.
func changeLink(t testing.TB, b []byte, c change) {
	t.Helper()
	f := backend.NewMemBytes("image", b)
	l, err := readLink(f)
	if err != nil {
		return
	}
	c.old = l.head
	undo := backend.NewMem("undo")
	if _, err := c.make(t.Context(), f, ExecuteOptions{Undo: undo, Name: "image"}); err != nil {
		if !errors.Is(err, ErrNoRoom) {
			t.Fatal(err)
		}
		if !bytes.Equal(f.Bytes(), b) {
			t.Fatal("refused, and changed")
		}
		return
	}
	n, err := readLink(f)
	if err != nil {
		t.Fatalf("%v\n%x", err, f.Bytes()[:200])
	}
	if c.name == "" && l.marked {
		c.format = l.format
	}
	if n.name != c.name || n.format != c.format || !slices.Equal(n.others(), l.others()) {
		t.Fatalf("%q %q, want %q %q; extensions %q, want %q", n.name, n.format, c.name, c.format, n.others(), l.others())
	}
	got := f.Bytes()
	if !bytes.Equal(got[:8], b[:8]) || !bytes.Equal(got[20:l.start], b[20:l.start]) || !bytes.Equal(got[min(l.cluster, len(b)):len(b)], b[min(l.cluster, len(b)):]) {
		t.Fatal("other fields, or what is behind the header, have changed")
	}
	if _, err := ApplyUndo(t.Context(), undo, f, UndoOptions{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.Bytes(), b) {
		t.Fatal("not taken back")
	}
}

func TestChangeLink(t *testing.T) {
	long := strings.Repeat("dir/", 200) + "base"
	for _, o := range []qcow2.CreateOptions{
		{BackingFile: "was/base.qcow2", BackingFormat: "qcow2"}, {BackingFile: "b", BackingFormat: "raw"},
		{BackingFile: long, BackingFormat: "qcow2"}, {BackingFile: "b", BackingFormat: "raw", ClusterSize: 512},
	} {
		b := linked(t, o)
		for _, c := range []change{
			{name: "base.qcow2", format: "qcow2"}, {name: o.BackingFile, format: "parallels"}, {name: long, format: o.BackingFormat}, {},
		} {
			changeLink(t, b, c)
		}
	}
}

// TestChangeLinkCutShort: after a power cut the image names the old parent or
// the new one, in a header that can be read, unless the extensions become
// longer; and it can be taken back.
func TestChangeLinkCutShort(t *testing.T) {
	for _, c := range []change{{name: "base.qcow2", format: "qcow2"}, {name: "was/base.qcow2", format: "raw"}, {name: "was/base.qcow2", format: "parallels"}, {format: "qcow2"}} {
		b := linked(t, qcow2.CreateOptions{BackingFile: "was/base.qcow2", BackingFormat: "qcow2"})
		rec := backend.NewRecorder()
		f, err := rec.Wrap(backend.NewMemBytes("image", b))
		if err != nil {
			t.Fatal(err)
		}
		undo, err := rec.Wrap(backend.NewMem("undo"))
		if err != nil {
			t.Fatal(err)
		}
		l, err := readLink(f)
		if err != nil {
			t.Fatal(err)
		}
		c.old = l.head
		if _, err := c.make(t.Context(), f, ExecuteOptions{Undo: undo, Name: "image"}); err != nil {
			t.Fatal(err)
		}
		old, changed := 0, 0
		for s := range rec.States(backend.StateOptions{Exhaustive: 5, Random: 30, MaxPerEpoch: 20}) {
			n, err := readLink(s.Files[0])
			switch {
			case err != nil && c.format == "parallels": // longer
			case err != nil:
				t.Fatalf("%s: %v", s, err)
			case n.name == "was/base.qcow2" && n.format == "qcow2":
				old++
			case n.name == c.name && n.format == c.format:
				changed++
			case c.format == "parallels":
			default:
				t.Fatalf("%s: %q %q", s, n.name, n.format)
			}
			if _, err := ApplyUndo(t.Context(), s.Files[1], s.Files[0], UndoOptions{}); err != nil && !errors.Is(err, ErrNothingToUndo) {
				t.Fatalf("%s: %v", s, err)
			}
			if !bytes.Equal(s.Files[0].Bytes(), b) {
				t.Fatalf("%s: not what it was", s)
			}
		}
		if old < 2 || changed < 1 {
			t.Errorf("too few states: %d old, %d changed", old, changed)
		}
	}
}

func FuzzLink(f *testing.F) {
	f.Add(linked(f, qcow2.CreateOptions{BackingFile: "was/base.qcow2", BackingFormat: "qcow2"})[:600], "new", "raw")
	f.Add(linked(f, qcow2.CreateOptions{BackingFile: "b", BackingFormat: "raw", ClusterSize: 512})[:600], strings.Repeat("x", 300), "")
	f.Fuzz(func(t *testing.T, b []byte, name, format string) {
		if name == "" {
			format = ""
		}
		changeLink(t, b, change{name: name, format: format})
	})
}
