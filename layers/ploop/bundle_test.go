package ploop

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
)

// What a creation that was cut short has left is used; an image that holds
// something, or that somebody is making right now, is not touched.
func TestCreateBundleLeftovers(t *testing.T) {
	ctx := context.Background()
	o := CreateOptions{Size: 1 << 20, ClusterSize: MinCluster}
	whole := func(t *testing.T) []byte {
		m := backend.NewMem("m")
		if err := Create(ctx, m, CreateOptions{Size: 64 << 20, ClusterSize: MinCluster}); err != nil {
			t.Fatal(err)
		}
		return m.Bytes()
	}
	used := whole(t)
	used[headerSize] = 1
	for _, c := range []struct {
		name string
		left []byte
		ok   bool
	}{
		{"empty", nil, true},
		{"zeros", make([]byte, 5000), true},
		{"an image without data, of another size", whole(t), true},
		{"an image with an entry", used, false},
		{"something else", []byte("this is mine"), false},
		{"data behind", append(whole(t), 0, 7), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			root := filepath.Join(dir, RootName)
			if err := os.WriteFile(root, c.left, 0o600); err != nil {
				t.Fatal(err)
			}
			err := CreateBundle(ctx, dir, o)
			if c.ok && err != nil || !c.ok && !errors.Is(err, os.ErrExist) {
				t.Errorf("%v", err)
			}
			b, err := os.ReadFile(root)
			if err != nil {
				t.Fatal(err)
			}
			if !c.ok && string(b) != string(c.left) {
				t.Error("the file was changed")
			}
			if _, err := os.Stat(filepath.Join(dir, DescriptorName)); (err == nil) != c.ok {
				t.Errorf("the descriptor: %v", err)
			}
		})
	}
	t.Run("locked", func(t *testing.T) {
		dir := t.TempDir()
		f, err := openRoot(filepath.Join(dir, RootName))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := CreateBundle(ctx, dir, o); !errors.Is(err, backend.ErrInUse) {
			t.Errorf("%v, want ErrInUse", err)
		}
	})
	t.Run("a descriptor that cannot be made", func(t *testing.T) {
		dir := t.TempDir()
		// Its temporary file cannot be made where there are no inodes left;
		// here a directory is in the way.
		if err := os.MkdirAll(filepath.Join(dir, DescriptorName, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := CreateBundle(ctx, dir, o); !errors.Is(err, os.ErrExist) {
			t.Errorf("%v, want ErrExist", err)
		}
		if _, err := os.Stat(filepath.Join(dir, RootName)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s was left: %v", RootName, err)
		}
	})
}
