package fsck

import (
	"context"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// checkChildren looks in the image's directory for images that stand on it.
func (s *Stack) checkChildren(ctx context.Context, sink Sink) error {
	if len(s.trace.Images) == 0 || namesBundle(s.path) {
		return nil
	}
	top := s.trace.Images[0].Path
	st, err := os.Stat(top)
	if err != nil || !st.Mode().IsRegular() {
		return nil // a device has no siblings
	}
	return siblings(filepath.Dir(top), func(path string, sib os.FileInfo, head []byte) {
		if !qcow2.Probe(head) || os.SameFile(st, sib) {
			return
		}
		name := parentOf(ctx, path)
		if base, err := os.Stat(resolveIn(path, name)); name != "" && err == nil && os.SameFile(st, base) {
			sink.Report(Finding{Code: codeTopIsBase, Text: path + " names this image as its parent", Place: Place{File: top, Offset: -1}})
		}
	})
}

// parentOf is the parent that a qcow2 image names, "" if there is none or the
// image does not open.
func parentOf(ctx context.Context, path string) string {
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return ""
	}
	img, err := qcow2.Open(ctx, f, layers.OpenOptions{Path: path, Cache: layers.NewCache(0)})
	if err != nil {
		_ = f.Close() // opened for reading
		return ""
	}
	defer img.Close()
	return img.Parent().Name
}
