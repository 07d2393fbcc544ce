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

// TestInsertFormatCutShort: a format comes to where none was stated. Whatever
// a power cut leaves has a header that can be read, with the old name or the
// new one, and all other extensions; the repair can be made again from there.
func TestInsertFormatCutShort(t *testing.T) {
	sound := linked(t, qcow2.CreateOptions{BackingFile: "was/base.qcow2", BackingFormat: "qcow2"})
	l, err := readLink(backend.NewMemBytes("image", sound))
	if err != nil {
		t.Fatal(err)
	}
	// As QEMU does it: a table of names up to the end of the first sector, and
	// the name of the parent right behind it.
	table := linkExt{0x6803f857, bytes.Repeat([]byte{1}, 512-8-8-l.start)}
	for _, gap := range []int{0, 8, 100} {
		b := bytes.Clone(sound)
		clear(b[l.start:l.cluster])
		n := l.start + copy(b[l.start:], table.marshal(nil)) + 8 // the mark
		if n != 512 {
			t.Fatalf("the mark ends at %d", n)
		}
		n += gap
		copy(b[n:], "was/base.qcow2")
		binary.BigEndian.PutUint64(b[linkOffName:], uint64(n))
		for _, c := range []change{{name: "was/base.qcow2", format: "qcow2"}, {name: "new.raw", format: "raw"}, {name: strings.Repeat("x", 900), format: "parallels"}} {
			changeLink(t, b, c)
			rec := backend.NewRecorder()
			f, err := rec.Wrap(backend.NewMemBytes("image", b))
			if err != nil {
				t.Fatal(err)
			}
			before, err := readLink(f)
			if err != nil {
				t.Fatal(err)
			}
			c.old = before.head
			if _, err := c.make(t.Context(), f, ExecuteOptions{Undo: backend.NewMem("undo"), Name: "image"}); err != nil {
				t.Fatal(err)
			}
			seen := map[string]int{}
			for s := range rec.States(backend.StateOptions{Exhaustive: 6, Random: 50, MaxPerEpoch: 60}) {
				n, err := readLink(s.Files[0])
				switch {
				case err != nil:
					t.Fatalf("gap %d, %.10s: %s: %v", gap, c.name, s, err)
				case !slices.Equal(n.others(), before.others()):
					t.Fatalf("gap %d, %.10s: %s: other extensions", gap, c.name, s)
				case n.name == c.name && n.format == c.format:
					seen["new"]++
				case n.format == "" && (n.name == c.name || n.name == before.name):
					seen["old"]++
					changeLink(t, s.Files[0].Bytes(), change{name: c.name, format: c.format})
				default:
					t.Fatalf("gap %d, %.10s: %s: %q %q", gap, c.name, s, n.name, n.format)
				}
			}
			if seen["old"] < 3 || seen["new"] < 1 {
				t.Errorf("too few states: %v", seen)
			}
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
