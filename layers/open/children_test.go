package open_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// kinship is what an image is to another one.
type kinship int

const (
	isNone kinship = iota
	isChild
	isUnclear
)

// TestChildrenThatCannotBeOpened: an image is seen to stand on another one also
// when this program cannot open it; and of one with a header that does not say,
// that it does not.
func TestChildrenThatCannotBeOpened(t *testing.T) {
	dir := t.TempDir()
	base := newQcow2(t, dir, "base", qcow2.CreateOptions{})
	patch := func(off int64, b ...byte) func(*os.File) error {
		return func(f *os.File) error {
			_, err := f.WriteAt(b, off)
			return err
		}
	}
	cut := func(n int64) func(*os.File) error { return func(f *os.File) error { return f.Truncate(n) } }
	for _, c := range []struct {
		name string
		hurt func(*os.File) error
		want kinship
	}{
		{"LUKS", patch(32, 0, 0, 0, 2), isChild},
		{"AES", patch(32, 0, 0, 0, 1), isChild},
		{"an unknown feature", patch(72, 0x80), isChild},
		{"external data file", patch(79, 4), isChild},
		{"version 1", patch(4, 0, 0, 0, 1), isChild},
		{"version 9", patch(4, 0, 0, 0, 9), isChild},
		{"L1 table between clusters", patch(47, 1), isChild},
		{"L1 table of all sizes", patch(36, 0xff, 0xff, 0xff, 0xff), isChild},
		{"clusters of 2^255", patch(20, 0, 0, 0, 255), isChild},
		{"name out of the file", patch(8, 0, 0, 0, 0, 0, 0x1f), isUnclear},
		{"name at 2^63", patch(8, 0x80), isUnclear},
		{"name of 4 GiB", patch(16, 0xff), isUnclear},
		{"cut off in the header", cut(18), isUnclear},
		{"no magic number", patch(0, 0), isNone},
	} {
		path := newQcow2(t, dir, "child", qcow2.CreateOptions{BackingFile: "base", BackingFormat: "qcow2"})
		if kin, err := open.LookForChildren(t.Context(), base); err != nil || !slices.Equal(kin.Children, []string{path}) || kin.Unclear != nil {
			t.Fatalf("undamaged: %+v, %v", kin, err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err == nil {
			err = errors.Join(c.hurt(f), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := open.Open(t.Context(), path, open.Options{Format: "qcow2"}); err == nil {
			t.Errorf("%s: the control: it can be opened", c.name)
		}
		kin, err := open.LookForChildren(t.Context(), base)
		var want open.Kin
		switch c.want {
		case isChild:
			want.Children = []string{path}
		case isUnclear:
			want.Unclear = []string{path}
		}
		if err != nil || !slices.Equal(kin.Children, want.Children) || !slices.Equal(kin.Unclear, want.Unclear) {
			t.Errorf("%s: %+v, %v", c.name, kin, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	// One whose data file is really there.
	data := filepath.Join(dir, "data")
	if err := os.WriteFile(data, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	path := newQcow2(t, dir, "child", qcow2.CreateOptions{BackingFile: "base", BackingFormat: "qcow2", DataFile: "data"})
	if all, err := open.Children(t.Context(), base); err != nil || !slices.Equal(all, []string{path}) {
		t.Errorf("with a data file: %q, %v", all, err)
	}
}
