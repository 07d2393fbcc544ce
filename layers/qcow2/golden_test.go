package qcow2

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

var update = flag.Bool("update", false, "write testdata/*.golden")

// goldenImages are made by testdata/make.sh.
var goldenImages = []string{"v3", "v2", "zstd", "extl2", "data"}

// golden is the content of a gzipped file of testdata.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// openBytes opens an image in memory; its data file is that of testdata.
func openBytes(t testing.TB, b []byte, o layers.OpenOptions) (*Image, error) {
	o.OpenFile = func(name string, writable bool) (backend.File, error) {
		return backend.NewMemBytes(name, golden(t, name)), nil
	}
	return Open(context.Background(), backend.NewMemBytes("image", b), o)
}

// portrait is all that the read side tells of an image.
func portrait(t *testing.T, img *Image) string {
	t.Helper()
	var b bytes.Buffer
	info, err := img.Describe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	info.AllocatedSize = 0 // depends on where the image lies
	for i := range info.Snapshots {
		info.Snapshots[i].Time = 0 // depends on when it was made
	}
	js, err := json.MarshalIndent(info, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&b, "%s\n", js)
	for _, l := range ourMap(t, img) {
		fmt.Fprintf(&b, "%10d %10d %-8v %d\n", l.start, l.length, l.kind, l.host)
	}
	content, err := readAll(img, nil)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&b, "sha256 %x\n", sha256.Sum256(content))
	var refs []string
	err = img.WalkHost(context.Background(), func(r layers.HostRange) error {
		refs = append(refs, fmt.Sprintf("%10d %10d %v guest %d snapshot %q\n", r.Off, r.Len, r.Role, r.Guest, r.Snapshot))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(refs)
	for _, r := range refs {
		b.WriteString(r)
	}
	return b.String()
}

func TestGolden(t *testing.T) {
	for _, name := range goldenImages {
		t.Run(name, func(t *testing.T) {
			img, err := openBytes(t, golden(t, name+".qcow2"), layers.OpenOptions{Path: name})
			if err != nil {
				t.Fatal(err)
			}
			got := portrait(t, img)
			walkMatchesRefcounts(t, img)
			path := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s differs:\n%s", path, got)
			}
		})
	}
}

// TestGoldenQemu holds the golden images against QEMU.
func TestGoldenQemu(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	files := map[string][]byte{"data.data": golden(t, "data.data")}
	for _, name := range goldenImages {
		files[name+".qcow2"] = golden(t, name+".qcow2")
	}
	t.Chdir(t.TempDir()) // QEMU looks for the data file where it runs
	for name, b := range files {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range goldenImages {
		t.Run(name, func(t *testing.T) { sameAsQemu(t, name+".qcow2") })
	}
}
