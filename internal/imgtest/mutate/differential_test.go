package mutate_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
	"github.com/imagestack/imagestack/layers/open"
)

// seeds are small images that QEMU made, of every kind of cluster.
func seeds(f *testing.F) (formats []string, images [][]byte) {
	imgtest.Require(f, "qemu-img", "qemu-io")
	dir := f.TempDir()
	add := func(format, driver, options string, commands ...string) {
		path := filepath.Join(dir, "seed")
		args := []string{"create", "-q", "-f", driver}
		if options != "" {
			args = append(args, "-o", options)
		}
		imgtest.QemuImg(f, append(args, path, "512k")...)
		imgtest.QemuIO(f, driver, path, commands...)
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		formats, images = append(formats, format), append(images, b)
	}
	fill := []string{"write -P 1 0 20k", "write -P 2 64k 70k", "write -z 200k 32k"}
	packed := append(fill, "write -c -P 3 256k 64k")
	add("qcow2", "qcow2", "cluster_size=4096", packed...)
	add("qcow2", "qcow2", "cluster_size=512", fill...)
	add("qcow2", "qcow2", "cluster_size=4096,compat=0.10", packed...)
	add("qcow2", "qcow2", "cluster_size=16k,extended_l2=on", packed...)
	add("qcow2", "qcow2", "cluster_size=4096,compression_type=zstd", packed...)
	add("ploop", "parallels", "cluster_size=32768", fill[:2]...)
	return formats, images
}

// FuzzDifferential damages fields of images. Where QEMU and we both read a
// disk, we read the same. What QEMU refuses to open or to read, we do not read
// either, but for the exceptions named in the target.
func FuzzDifferential(f *testing.F) {
	formats, images := seeds(f)
	for i := range images {
		// Few: each starts QEMU twice, and all of them come before the fuzzing.
		for _, k := range []byte{0, 7} {
			f.Add(byte(i), []byte{0, k, k, 3 * k, 0, 40 + k, 6, k})
		}
	}
	f.Fuzz(func(t *testing.T, seed byte, script []byte) {
		n := int(seed) % len(images)
		b := mutate.Apply(formats[n], images[n], script)
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		ours, err := read(path, formats[n])
		if errors.Is(err, errLarge) {
			return
		}
		theirs, status := readByQemu(t, path, formats[n])
		switch {
		case status == refused && err == nil && !excepted(t, formats[n], b, images[n], ours):
			t.Errorf("QEMU does not read this image, and we read it silently")
		case status == good && err == nil && !same(ours, theirs):
			t.Errorf("read differently: %d bytes and %d bytes", len(ours), len(theirs))
		}
	})
}

const most = 4 << 20

var errLarge = errors.New("too large to compare")

func read(path, format string) ([]byte, error) {
	ctx := context.Background()
	s, err := open.Open(ctx, path, open.Options{Format: format, CacheSize: 1 << 20})
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.Close() }() // read only
	if s.Size() > most {
		return nil, errLarge
	}
	p := make([]byte, s.Size())
	n, err := s.ReadAt(ctx, p, 0)
	if errors.Is(err, io.EOF) || n == len(p) {
		err = nil
	}
	return p, err
}

type verdict int

const (
	good verdict = iota
	refused
	unknown // it took too long, crashed, or the disk is too large
)

func readByQemu(t *testing.T, path, format string) ([]byte, verdict) {
	if format == "ploop" {
		format = "parallels"
	}
	out := path + ".raw"
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "prlimit", "--fsize=8388608", "--as=2147483648", "qemu-img", "convert", "-f", format, "-O", "raw", path, out)
	err := cmd.Run()
	if ctx.Err() != nil || cmd.ProcessState.ExitCode() < 0 {
		return nil, unknown
	}
	if err != nil {
		return nil, refused
	}
	st, err := os.Stat(out)
	if err != nil || st.Size() > most {
		return nil, unknown
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b, good
}

// same compares disks. QEMU shows whole sectors only, we show every byte.
func same(a, b []byte) bool {
	n := min(len(a), len(b))
	return bytes.Equal(a[:n], b[:n]) && max(len(a), len(b))-n < 512
}

// unused are header fields that reading the disk does not need, so that we
// read images whose values in them QEMU refuses: the refcount table and the
// snapshot table (which are read when an image is changed, a snapshot is asked
// for, or image-fsck runs) and the autoclear bits (which a reader ignores).
var unused = map[string][][2]int{"qcow2": {{48, 72}, {88, 96}}, "ploop": {{56, 64}}}

// excepted reports whether QEMU reads the same as we do once what reading does
// not use is as it was.
func excepted(t *testing.T, format string, b, was, ours []byte) bool {
	b = bytes.Clone(b)
	for _, u := range unused[format] {
		copy(b[u[0]:u[1]], was[u[0]:u[1]])
	}
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	theirs, status := readByQemu(t, path, format)
	return status == unknown || status == good && same(ours, theirs)
}
