package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers/ploop"
)

// makeImages makes one image of each kind in the working directory.
func makeImages(t *testing.T) []string {
	t.Helper()
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
	if err := os.WriteFile("a.raw", make([]byte, 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("bundle", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := ploop.CreateBundle(t.Context(), "bundle", ploop.CreateOptions{Size: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	return []string{"a.raw", "top.qcow2", "bundle", filepath.Join("bundle", "root.hds")}
}
