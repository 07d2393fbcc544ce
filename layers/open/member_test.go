package open_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

func TestMemberOf(t *testing.T) {
	dir := t.TempDir()
	if err := ploop.CreateBundle(context.Background(), dir, ploop.CreateOptions{Size: 1 << 20, ClusterSize: ploop.MinCluster}); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, ploop.RootName)
	if m, err := open.MemberOf(root); err != nil || m == nil || m.Images != 1 || len(m.Children) != 0 {
		t.Errorf("%+v, %v", m, err)
	}
	other := filepath.Join(dir, "other.hds")
	if err := os.WriteFile(other, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if m, err := open.MemberOf(other); err != nil || m != nil {
		t.Errorf("not in the bundle: %+v, %v", m, err)
	}
	if m, err := open.MemberOf(filepath.Join(t.TempDir(), "alone.hds")); err != nil || m != nil {
		t.Errorf("without a descriptor: %+v, %v", m, err)
	}
	if err := os.WriteFile(filepath.Join(dir, ploop.DescriptorName), []byte("<"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := open.MemberOf(root); err == nil {
		t.Error("a descriptor that cannot be read is no error")
	}
}

// TestMemberOfStack: the lower image has the upper one as its child.
func TestMemberOfStack(t *testing.T) {
	imgtest.RequirePloop(t)
	images := imgtest.PloopBundle(t, t.TempDir(), "expanded", 2, 16<<20, 2)
	m, err := open.MemberOf(images[1].Path)
	if err != nil || m == nil || m.Images != 2 || len(m.Children) != 1 || m.Children[0] != images[0].Path {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := open.MemberOf(images[0].Path); err != nil || m == nil || len(m.Children) != 0 {
		t.Errorf("%+v, %v", m, err)
	}
}
