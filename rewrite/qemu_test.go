package rewrite_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/rewrite"
)

// qemuImage makes an image with qemu-img and random commands of qemu-io:
// plain, compressed and zero clusters, snapshots taken and deleted, bitmaps.
func qemuImage(t testing.TB, options string, size int64, rng *rand.Rand) (path string, snapshots []string) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	path = filepath.Join(t.TempDir(), "image.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
	kinds := 1
	for round := range 3 {
		var commands []string
		for range 6 {
			off := rng.Int64N(size-4096) &^ 4095
			n := min(4096*(1+rng.Int64N(40)), size-off)
			switch k := rng.IntN(6); k {
			case 0, 1:
				commands = append(commands, fmt.Sprintf("write -P %d %d %d", kinds%250+1, off, n))
			case 2, 3:
				commands = append(commands, fmt.Sprintf("discard %d %d", off&^65535, min((n+65535)&^65535, size-off&^65535)), fmt.Sprintf("write -c -P %d %d %d", kinds%250+1, off&^65535, min((n+65535)&^65535, size-off&^65535)))
			case 4:
				commands = append(commands, fmt.Sprintf("discard %d %d", off, n))
			case 5:
				commands = append(commands, fmt.Sprintf("write -z %d %d", off, n))
			}
			kinds++
		}
		// A compressed write over a plain cluster fails, which is fine.
		args := []string{"-d", "unmap", "-f", "qcow2"}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		imgtest.Try(t, "qemu-io", append(args, path)...)
		if rng.IntN(2) == 0 && round < 2 {
			name := fmt.Sprintf("s%d", round)
			imgtest.QemuImg(t, "snapshot", "-c", name, path)
			snapshots = append(snapshots, name)
		}
		if len(snapshots) > 1 && rng.IntN(3) == 0 {
			imgtest.QemuImg(t, "snapshot", "-d", snapshots[0], path)
			snapshots = snapshots[1:]
		}
	}
	return path, snapshots
}

// bitmapNames are what qemu-img says of an image's bitmaps.
func bitmapInfo(t testing.TB, path string) string {
	var info struct {
		Specific struct {
			Data struct {
				Bitmaps json.RawMessage `json:"bitmaps"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(imgtest.QemuImg(t, "info", "--output=json", "-U", "-f", "qcow2", path), &info); err != nil {
		t.Fatal(err)
	}
	return string(info.Specific.Data.Bitmaps)
}

func TestQemuImages(t *testing.T) {
	ctx := context.Background()
	for i, options := range []string{
		"cluster_size=4096", "cluster_size=512,refcount_bits=32", "cluster_size=65536", "cluster_size=4096,compat=0.10",
		"cluster_size=16384,extended_l2=on", "cluster_size=4096,compression_type=zstd", "cluster_size=4096,lazy_refcounts=on",
	} {
		for seed := range uint64(2) {
			name := fmt.Sprintf("%s seed %d", options, seed)
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			path, snapshots := qemuImage(t, options, 3<<20, rng)
			bitmaps := i != 3 && seed != uint64(i)%2
			if bitmaps {
				imgtest.QemuImg(t, "bitmap", "--add", "-g", "4096", path, "b0")
				imgtest.QemuIO(t, "qcow2", path, "write -P 77 300k 200k")
				imgtest.QemuImg(t, "bitmap", "--add", "--disable", path, "b1")
				imgtest.QemuIO(t, "qcow2", path, "discard 0 1M")
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			d := &disk{file: backend.NewMemBytes("image", b)}
			want := map[string][]byte{}
			for _, s := range append(snapshots, "") {
				if want[s], err = d.content(ctx, s); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			info := bitmapInfo(t, path)
			r, err := d.compact(ctx, rewrite.Options{MaxExtra: []int64{1 << 16, 1}[seed]}, 0)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for s := range want {
				got, err := d.content(ctx, s)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if !bytes.Equal(got, want[s]) {
					t.Fatalf("%s: the content of snapshot %q has changed", name, s)
				}
			}
			if err := d.check(ctx, fsck.Note); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if err := os.WriteFile(path, d.file.(*backend.Mem).Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			if exit, out := imgtest.QemuCheck(t, path, "qcow2"); exit != 0 {
				t.Fatalf("%s: qemu-img check: %d\n%s", name, exit, out)
			}
			if now := bitmapInfo(t, path); now != info {
				t.Fatalf("%s: bitmaps %s, before %s", name, now, info)
			}
			t.Logf("%s: %d -> %d, ideal %d, moved %d", name, r.Before.Apparent, r.After.Apparent, r.Ideal, r.Move)
		}
	}
}
