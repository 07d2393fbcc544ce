package fsck

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
)

// TestMayBeDump: what a new dump may take the place of.
func TestMayBeDump(t *testing.T) {
	var b bytes.Buffer
	d := Dumped{ID: DumpIdentity{Image: "a", Format: "raw", FileSize: 8192, VirtualSize: 8192, ClusterSize: 512, End: 8192},
		f: backend.NewMemBytes("x", original()), meta: []metaRange{{0, 4096, 1, true}}}
	if err := d.Write(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "dump")
	if err := MayBeDump(path, "a"); err != nil {
		t.Errorf("nothing: %v", err)
	}
	for _, c := range []struct {
		name, image string
		content     []byte
		may         bool
	}{
		{"empty", "a", nil, true},
		{"its own", "a", b.Bytes(), true},
		{"another's", "b", b.Bytes(), false},
		{"an image", "a", original(), false},
		{"only the magic", "a", []byte(dumpMagic), false},
	} {
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := MayBeDump(path, c.image); (err == nil) != c.may {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := MayBeDump("/dev/null", "a"); !errors.Is(err, ErrDump) {
		t.Errorf("a device: %v", err)
	}
}
