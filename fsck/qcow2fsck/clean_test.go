package qcow2fsck

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// shapes are ways to make clean images; each is a list of commands in which
// IMG is the image and SRC a raw file with content.
var shapes = map[string][]string{
	"v3":            {"create -f qcow2 IMG 8M", "io write -P 1 0 1M", "io write -P 2 3M 100k", "io write -z 5M 1M", "io write -P 9 8380416 8192"},
	"v2":            {"create -f qcow2 -o compat=0.10 IMG 8M", "io write -P 1 0 1M", "io discard 0 256k"},
	"512":           {"create -f qcow2 -o cluster_size=512 IMG 2M", "io write -P 1 0 1M", "io write -P 1 1500k 1k"},
	"4k":            {"convert -f raw -O qcow2 -o cluster_size=4k SRC IMG"},
	"2m":            {"convert -f raw -O qcow2 -o cluster_size=2M SRC IMG"},
	"odd size":      {"create -f qcow2 IMG 1000k", "io write -P 1 900k 100k"},
	"empty":         {"create -f qcow2 IMG 1T"},
	"size 0":        {"create -f qcow2 IMG 0"},
	"refcount 1":    {"create -f qcow2 -o cluster_size=4k,refcount_bits=1 IMG 8M", "io write -P 1 0 3M"},
	"refcount 4":    {"create -f qcow2 -o cluster_size=4k,refcount_bits=4 IMG 8M", "io write -P 1 0 3M", "snapshot -c a IMG", "io write -P 2 1M 8k"},
	"refcount 8":    {"create -f qcow2 -o cluster_size=4k,refcount_bits=8 IMG 8M", "io write -P 1 0 3M", "snapshot -c a IMG", "io write -P 2 1M 8k"},
	"refcount 64":   {"create -f qcow2 -o cluster_size=4k,refcount_bits=64 IMG 8M", "io write -P 1 0 3M", "snapshot -c a IMG", "io write -P 2 1M 8k"},
	"extl2":         {"create -f qcow2 -o extended_l2=on,cluster_size=128k IMG 16M", "io write -P 1 0 4k", "io write -P 1 1M 300k", "io write -z 1M 8k", "io write -P 3 9M 512"},
	"extl2 convert": {"convert -f raw -O qcow2 -o extended_l2=on,cluster_size=16k SRC IMG"},
	"compressed":    {"convert -c -f raw -O qcow2 SRC IMG", "io write -P 1 0 100k"},
	"zstd":          {"convert -c -f raw -O qcow2 -o compression_type=zstd SRC IMG"},
	"compressed snapshot": {"convert -c -f raw -O qcow2 -o cluster_size=16k SRC IMG", "snapshot -c a IMG", "io write -P 1 0 100k",
		"snapshot -c b IMG", "io discard 1M 1M", "snapshot -d a IMG"},
	"snapshots":     {"create -f qcow2 IMG 8M", "io write -P 1 0 1M", "snapshot -c a IMG", "io write -P 2 512k 1M", "snapshot -c b IMG", "snapshot -a a IMG", "io write -P 5 7M 64k"},
	"v2 snapshots":  {"create -f qcow2 -o compat=0.10 IMG 8M", "io write -P 1 0 1M", "snapshot -c a IMG", "io write -P 2 512k 1M"},
	"resized":       {"create -f qcow2 -o cluster_size=4k IMG 8M", "io write -P 1 0 8M", "snapshot -c a IMG", "resize IMG 40M", "io write -P 3 39M 1M"},
	"shrunk":        {"create -f qcow2 -o cluster_size=4k IMG 40M", "io write -P 1 0 40M", "resize --shrink IMG 8M"},
	"bitmaps":       {"create -f qcow2 IMG 64M", "io write -P 1 0 1M", "bitmap --add IMG one", "bitmap --add -g 64k IMG two", "io write -P 2 4M 1M", "bitmap --disable IMG two"},
	"luks":          {"create --object secret,id=s,data=abc -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 IMG 8M"},
	"many tables":   {"create -f qcow2 -o cluster_size=512 IMG 64M", "io write -P 1 0 1M", "io write -P 1 60M 2M", "snapshot -c a IMG", "snapshot -c b IMG", "io write -P 3 60M 1M", "snapshot -d a IMG"},
	"lazy":          {"create -f qcow2 -o lazy_refcounts=on IMG 8M", "io write -P 1 0 1M"},
	"prealloc":      {"create -f qcow2 -o preallocation=metadata IMG 8M", "io write -P 1 0 1M"},
	"falloc":        {"create -f qcow2 -o preallocation=falloc,extended_l2=on IMG 8M", "io write -P 1 0 100k"},
	"backing":       {"create -f qcow2 -F raw -b SRC IMG", "io write -P 1 0 100k", "io write -z 1M 1M"},
	"data file":     {"create -f qcow2 -o data_file=IMG.data IMG 8M", "io write -P 1 0 1M", "io write -P 1 3M 1M"},
	"raw data file": {"create -f qcow2 -o data_file=IMG.data,data_file_raw=on IMG 8M", "io write -P 1 0 1M"},
}

// source is a raw file with data, zeros and what compresses well.
func source(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "src.raw")
	b := make([]byte, 6<<20)
	imgtest.Pattern(b[1<<20:3<<20], 1, 0)
	for i := 3 << 20; i < 5<<20; i++ {
		b[i] = byte(i / 997)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// makeShape builds the image of a shape.
func makeShape(t testing.TB, dir string, commands []string) string {
	t.Helper()
	src := source(t, dir)
	img := filepath.Join(dir, "image")
	r := strings.NewReplacer("IMG", img, "SRC", src)
	var io []string
	flush := func() {
		if len(io) > 0 {
			imgtest.QemuIO(t, "qcow2", img, io...)
			io = nil
		}
	}
	for _, c := range commands {
		if rest, ok := strings.CutPrefix(c, "io "); ok {
			io = append(io, rest)
			continue
		}
		flush()
		imgtest.QemuImg(t, strings.Fields(r.Replace(c))...)
	}
	flush()
	return img
}

// TestClean: what programs of the trade write has no findings, and the numbers
// are those of qemu-img check.
func TestClean(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for name, commands := range shapes {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			img := makeShape(t, dir, commands)
			for _, memory := range []int64{0, 1} {
				o := options(dir)
				o.Data, o.Memory = true, memory
				f := openMem(t, img)
				rep := checkFile(t, f, o, fsck.DecideAll, nil)
				if len(rep.Counts) > 0 {
					t.Fatalf("findings:\n%s", list(rep))
				}
				if want := openMem(t, img); string(want.Bytes()) != string(f.Bytes()) {
					t.Fatal("the file has changed")
				}
				if name == "luks" {
					continue // QEMU wants the key
				}
				_, out := imgtest.Try(t, "qemu-img", "check", "--output=json", "-f", "qcow2", img)
				for _, field := range []struct {
					key string
					n   int64
				}{
					{"image-end-offset", rep.Stats.ImageEnd}, {"total-clusters", rep.Stats.TotalClusters},
					{"allocated-clusters", rep.Stats.AllocatedClusters}, {"fragmented-clusters", rep.Stats.FragmentedClusters},
					{"compressed-clusters", rep.Stats.CompressedClusters},
				} {
					has := strings.Contains(out, fmt.Sprintf("%q: %d,", field.key, field.n)) || strings.Contains(out, fmt.Sprintf("%q: %d\n", field.key, field.n))
					if !has && !(field.n == 0 && !strings.Contains(out, field.key)) {
						t.Errorf("memory %d: %s: %d; qemu-img check:\n%s", memory, field.key, field.n, out)
					}
				}
			}
		})
	}
}
