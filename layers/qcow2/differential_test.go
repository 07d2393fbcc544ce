package qcow2

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers"
)

// TestReadsWhatQemuWrote compares, for images that QEMU made, the content and
// the map with what QEMU reads.
func TestReadsWhatQemuWrote(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	type config struct {
		name    string
		cluster int
		opts    string
		kinds   string // of writes: z zero, c compressed
	}
	cases := []config{
		{"v3-512", 512, "", "zc"},
		{"v3-1k-rc1", 1 << 10, "refcount_bits=1", "zc"},
		{"v3-4k-rc8", 4 << 10, "refcount_bits=8", "zc"},
		{"v3-64k", 64 << 10, "", "zc"},
		{"v3-64k-rc64-lazy", 64 << 10, "refcount_bits=64,lazy_refcounts=on", "zc"},
		{"v3-2m", 2 << 20, "", "zc"},
		{"v2-512", 512, "compat=0.10", "c"},
		{"v2-64k", 64 << 10, "compat=0.10", "c"},
		{"v2-2m", 2 << 20, "compat=0.10", "c"},
		{"zstd-512", 512, "compression_type=zstd", "zc"},
		{"zstd-64k", 64 << 10, "compression_type=zstd", "zc"},
		{"zstd-2m", 2 << 20, "compression_type=zstd", "zc"},
		{"extl2-16k", 16 << 10, "extended_l2=on", "zc"},
		{"extl2-64k-zstd", 64 << 10, "extended_l2=on,compression_type=zstd", "zc"},
		{"extl2-2m-rc4", 2 << 20, "extended_l2=on,refcount_bits=4", "zc"},
		{"data-4k", 4 << 10, "data_file=DATA", "z"},
		{"data-64k-extl2", 64 << 10, "data_file=DATA,extended_l2=on", "z"},
		{"data-raw-64k", 64 << 10, "data_file=DATA,data_file_raw=on", "z"},
		{"prealloc-64k", 64 << 10, "preallocation=metadata", "z"},
		{"falloc-16k-extl2", 16 << 10, "preallocation=falloc,extended_l2=on", "z"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "image.qcow2")
			opts := strings.ReplaceAll(c.opts, "DATA", filepath.Join(dir, "image.data"))
			cs := c.cluster
			// A size that ends within a cluster and within a sector's reach.
			size := min(40*cs, 20<<20) + cs/2 + 512
			size &^= 511
			o := fmt.Sprintf("cluster_size=%d", cs)
			if opts != "" {
				o += "," + opts
			}
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", o, path, fmt.Sprint(size))
			src := payload(t, filepath.Join(dir, "payload"), 7, cs)
			var cmds []string
			add := func(format string, args ...any) { cmds = append(cmds, fmt.Sprintf(format, args...)) }
			end := size / cs * cs // the partial cluster
			add("write -q -P 17 0 %d", cs)
			add("write -q -P 18 %d %d", cs, 2*cs)
			add("write -q -P 19 %d 512", 4*cs)
			add("write -q -s %s %d %d", src, 5*cs, cs)
			packedEnd := strings.Contains(c.kinds, "c") && c.name[:2] != "v2"
			if !packedEnd {
				add("write -q -P 20 %d %d", end, size-end)
			}
			add("write -q -P 21 %d %d", end-cs-512, cs)
			if strings.Contains(c.kinds, "z") {
				add("write -q -z %d %d", cs, cs)
				add("write -q -z -u %d %d", 2*cs, cs)
				if c.name[0] != 'd' {
					add("write -q -z %d 512", 5*cs)
				}
			}
			add("discard -q %d %d", 0, cs)
			if strings.Contains(c.kinds, "c") {
				add("write -q -c -s %s %d %d", src, 6*cs, cs)
				add("write -q -c -P 3 %d %d", 7*cs, cs)
				if packedEnd {
					add("write -q -c -P 5 %d %d", end, size-end)
				}
			}
			if c.opts != "" && strings.Contains(c.opts, "extended_l2") {
				add("write -q -P 31 %d %d", 3*cs+cs/32*7, cs/32*3)
				add("write -q -z %d %d", 3*cs+cs/32*12, cs/32*8)
				add("write -q -P 33 %d %d", 3*cs+cs/32*14, cs/32)
				add("discard -q %d %d", 3*cs+cs/32*7, cs/32)
			}
			imgtest.QemuIO(t, "qcow2", path, cmds...)
			sameAsQemu(t, path)
		})
	}
}

// TestRandomQemu compares images after random changes by QEMU, with a
// snapshot in the middle.
func TestRandomQemu(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for i, o := range []string{
		"cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=4k,compat=0.10",
		"cluster_size=16k,extended_l2=on", "cluster_size=32k,extended_l2=on,compression_type=zstd", "cluster_size=2M",
	} {
		t.Run(o, func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(uint64(i), 99))
			path := filepath.Join(t.TempDir(), "random.qcow2")
			const size = 5<<20 + 3*512
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", o, path, fmt.Sprint(size))
			for half := range 2 {
				var cmds []string
				for range 60 {
					n := 512 * (1 + r.IntN(1<<r.IntN(10)))
					off := 512 * r.IntN((size-n)/512+1)
					switch r.IntN(5) {
					case 0:
						cmds = append(cmds, fmt.Sprintf("write -q -z %d %d", off, n))
					case 1:
						cmds = append(cmds, fmt.Sprintf("write -q -z -u %d %d", off, n))
					case 2:
						cmds = append(cmds, fmt.Sprintf("discard -q %d %d", off, n))
					default:
						cmds = append(cmds, fmt.Sprintf("write -q -P %d %d %d", 1+r.IntN(255), off, n))
					}
				}
				imgtest.QemuIO(t, "qcow2", path, cmds...)
				sameAsQemu(t, path)
				if half == 0 {
					imgtest.QemuImg(t, "snapshot", "-c", "middle", path)
				}
			}
		})
	}
}

// TestConvertedCompressed: the compressed data of the last cluster of the
// file ends with the file, not with its sector.
func TestConvertedCompressed(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	payload(t, raw, 11, 3<<20+5*512)
	for _, o := range []string{"cluster_size=512", "cluster_size=64k", "cluster_size=2M", "cluster_size=4k,compression_type=zstd", "cluster_size=2M,compression_type=zstd,extended_l2=on", "compat=0.10"} {
		path := filepath.Join(dir, "c.qcow2")
		imgtest.QemuImg(t, "convert", "-c", "-O", "qcow2", "-o", o, raw, path)
		t.Run(o, func(t *testing.T) {
			sameAsQemu(t, path)
			img := openRO(t, path, layers.OpenOptions{})
			info, err := img.Describe(context.Background())
			if err != nil || info.PackedClusters == 0 {
				t.Errorf("%d packed clusters, %v", info.PackedClusters, err)
			}
		})
	}
}

// TestSnapshots reads internal snapshots by id and by name, one of them of
// another disk size.
func TestSnapshots(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, o := range []string{"cluster_size=64k", "cluster_size=4k,extended_l2=off,refcount_bits=8", "cluster_size=64k,compat=0.10", "cluster_size=16k,extended_l2=on"} {
		t.Run(o, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "s.qcow2")
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", o, path, "3M")
			imgtest.QemuIO(t, "qcow2", path, "write -q -P 1 0 1M", "write -q -c -P 2 1M 64k")
			imgtest.QemuImg(t, "snapshot", "-c", "first", path)
			imgtest.QemuIO(t, "qcow2", path, "write -q -P 3 100k 300k", "discard -q 512k 128k")
			imgtest.QemuImg(t, "snapshot", "-c", "2nd", path)
			imgtest.QemuIO(t, "qcow2", path, "write -q -P 4 0 2M")
			if !strings.Contains(o, "0.10") {
				imgtest.QemuImg(t, "resize", "-q", path, "5M")
				imgtest.QemuIO(t, "qcow2", path, "write -q -P 5 4M 64k")
			}
			sameAsQemu(t, path)
			raw := filepath.Join(dir, "raw")
			for _, which := range []string{"first", "2nd", "1", "2"} {
				imgtest.QemuImg(t, "convert", "-l", which, "-O", "raw", path, raw)
				want, err := os.ReadFile(raw)
				if err != nil {
					t.Fatal(err)
				}
				img := openRO(t, path, layers.OpenOptions{Snapshot: which})
				got, err := readAll(img, nil)
				if err != nil {
					t.Fatal(err)
				}
				if img.Size() != 3<<20 {
					t.Errorf("snapshot %s: size %d", which, img.Size())
				}
				// QEMU shows a snapshot in the active disk size.
				sameBytes(t, got, want[:len(got)])
			}
			_, err := tryOpen(t, path, layers.OpenOptions{Snapshot: "third"})
			wantImageError(t, err, layers.ErrFormat, "snapshot")
			if err == nil || !strings.Contains(err.Error(), "1 (first), 2 (2nd)") {
				t.Errorf("error does not name what exists: %v", err)
			}
			img := openRO(t, path, layers.OpenOptions{})
			info, err := img.Describe(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if len(info.Snapshots) != 2 || info.Snapshots[0].Name != "first" || info.Snapshots[1].ID != "2" || info.Snapshots[0].VirtualSize != 3<<20 {
				t.Errorf("snapshots %+v", info.Snapshots)
			}
			walkMatchesRefcounts(t, img)
		})
	}
}

// TestBacking: the parent is stated, unmapped ranges show it, also behind its
// end.
func TestBacking(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for _, o := range []string{"cluster_size=64k", "cluster_size=64k,extended_l2=on", "compat=0.10", "cluster_size=512"} {
		t.Run(o, func(t *testing.T) {
			dir := t.TempDir()
			base, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "top.qcow2")
			imgtest.RawFile(t, base, 1<<20, 4<<10, 5)
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", o, top, "1536k")
			imgtest.QemuIO(t, "qcow2", top, "write -q -P 9 100k 30k", "write -q -z 256k 128k", "discard -q 512k 64k")
			sameAsQemu(t, top)
			img := openRO(t, top, layers.OpenOptions{})
			if p := img.Parent(); p.Name != "base.raw" || p.Format != "raw" {
				t.Errorf("parent %+v", p)
			}
			below, err := os.ReadFile(base)
			if err != nil {
				t.Fatal(err)
			}
			got, err := readAll(img, below)
			if err != nil {
				t.Fatal(err)
			}
			raw := filepath.Join(dir, "out")
			imgtest.QemuRaw(t, "qcow2", top, raw)
			want, err := os.ReadFile(raw)
			if err != nil {
				t.Fatal(err)
			}
			sameBytes(t, got, want)
		})
	}
}

// TestBackingFormatIsNotGuessed: without the extension Format is empty.
func TestBackingFormatIsNotGuessed(t *testing.T) {
	h := Header{Version: 2, ClusterBits: 16, HeaderLength: headerLengthV2, RefcountOrder: 4, BackingOffset: 1, BackingName: "x"}
	b, err := h.marshal()
	if err != nil {
		t.Fatal(err)
	}
	p, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	if got := (&Image{hdr: *p}).Parent(); got != (layers.Parent{Name: "x"}) {
		t.Errorf("parent %+v", got)
	}
}

// TestZeroSize: an image of no bytes opens and answers zeros.
func TestZeroSize(t *testing.T) {
	imgtest.Require(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "zero.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "0")
	img := openRO(t, path, layers.OpenOptions{})
	got, err := img.Lookup(context.Background(), 0, 100, nil)
	if err != nil || len(got) != 1 || got[0] != (blockmap.Extent{Len: 100, Kind: blockmap.Zero}) || img.Size() != 0 {
		t.Errorf("%v, %v", got, err)
	}
}
