package rewrite_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/rewrite"
)

// TestPackedStreams: streams of all lengths, packed byte to byte by QEMU, with
// gaps and with counts of every width, move and shrink; the stack that was
// open meanwhile shows the same.
func TestPackedStreams(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	ctx := t.Context()
	const size = 3 << 20
	for _, o := range []struct {
		options string
		slack   int64 // what the file may be longer than ideal, clusters
	}{
		{"cluster_size=4096", 3}, {"cluster_size=65536", 2}, {"cluster_size=65536,compression_type=zstd", 2},
		{"cluster_size=4096,refcount_bits=2", 40}, {"cluster_size=4096,compat=0.10", 3}, {"cluster_size=16384,extended_l2=on", 2},
	} {
		home := t.TempDir()
		plain, path := filepath.Join(home, "plain"), filepath.Join(home, "image.qcow2")
		b := imgtest.PatternBytes(21, 0, size)
		for off := 0; off < size; off += 4096 { // compressible, each differently
			clear(b[off+(off/4096*379)%4096 : off+4096])
		}
		if err := os.WriteFile(plain, b, 0o600); err != nil {
			t.Fatal(err)
		}
		imgtest.QemuImg(t, "convert", "-q", "-c", "-O", "qcow2", "-o", o.options, plain, path)
		imgtest.QemuIO(t, "qcow2", path, "discard 128k 256k", "write -P 3 512k 64k", "discard 1M 704k", "write -P 4 2M 64k")
		image, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		d := &disk{file: backend.NewMemBytes("image", image)}
		want, err := d.content(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		s, err := d.open(ctx, true, "", 8<<20)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		for off := 0; off < size; off += 1000 { // fills the cache with decompressed clusters
			if _, err := s.ReadAt(ctx, got[off:min(off+1000, size)], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		r, err := rewrite.CompactStack(ctx, s, rewrite.Options{MaxExtra: 256 << 10})
		if err != nil {
			t.Fatalf("%s: %v", o.options, err)
		}
		for off := 0; off < size; off += 1000 {
			if _, err := s.ReadAt(ctx, got[off:min(off+1000, size)], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the open stack shows something else", o.options)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err = d.content(ctx, ""); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: the content has changed, %v", o.options, err)
		}
		if err := d.check(ctx, fsck.Note); err != nil {
			t.Errorf("%s: %v", o.options, err)
		}
		if r.Move == 0 || r.After.Apparent > r.Ideal+o.slack*r.ClusterSize {
			t.Errorf("%s: %d bytes, ideal %d, moved %d", o.options, r.After.Apparent, r.Ideal, r.Move)
		}
		t.Logf("%s: %d -> %d, ideal %d, moved %d", o.options, r.Before.Apparent, r.After.Apparent, r.Ideal, r.Move)
		if err := os.WriteFile(path, d.file.(*backend.Mem).Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		if exit, out := imgtest.QemuCheck(t, path, "qcow2"); exit != 0 {
			t.Errorf("%s: qemu-img check: %d\n%s", o.options, exit, out)
		}
	}
}

// TestManyStreams: a host cluster with more compressed streams than the quick
// way of counting references takes.
func TestManyStreams(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	home := t.TempDir()
	disk, path := filepath.Join(home, "plain"), filepath.Join(home, "image.qcow2")
	b := make([]byte, 8<<20)
	for off := 0; off < len(b); off += 4096 {
		b[off] = byte(1 + off/65536)
	}
	if err := os.WriteFile(disk, b, 0o600); err != nil {
		t.Fatal(err)
	}
	imgtest.QemuImg(t, "convert", "-q", "-c", "-O", "qcow2", disk, path)
	imgtest.QemuIO(t, "qcow2", path, "write -P 3 1M 64k", "write -P 0 4M 2M", "write -P 4 7M 64k")
	content := plain(t, path)
	est := estimated(t, path)
	r := compacted(t, path)
	if r.Steps[1].Bytes != 2<<20 || est.Steps[1] != r.Steps[1] {
		t.Errorf("%+v, estimated %+v", r.Steps[1], est.Steps[1])
	}
	imgtest.SameContent(t, content, plain(t, path))
	if exit, out := imgtest.QemuCheck(t, path, "qcow2"); exit != 0 {
		t.Errorf("qemu-img check: %d\n%s", exit, out)
	}
}
