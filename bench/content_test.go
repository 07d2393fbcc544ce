package main

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"
)

func TestContent(t *testing.T) {
	c := content{size: 3<<20 + 4096, seed: 7}
	whole := make([]byte, c.size)
	c.read(whole, 0)
	part := make([]byte, 8192)
	c.read(part, 1<<20)
	if !bytes.Equal(part, whole[1<<20:1<<20+8192]) {
		t.Error("a part differs from the same bytes of the whole")
	}
	blocks := map[string]bool{}
	zero := make([]byte, 4096)
	for off := int64(0); off < c.size; off += 4096 {
		b := whole[off : off+4096]
		if bytes.Equal(b, zero) || blocks[string(b)] {
			t.Fatalf("block at %d is zero or a repetition", off)
		}
		blocks[string(b)] = true
	}
	var z bytes.Buffer
	w, _ := flate.NewWriter(&z, 6)
	if _, err := w.Write(whole); err != nil || w.Close() != nil {
		t.Fatal(err)
	}
	if r := float64(z.Len()) / float64(len(whole)); r < 0.3 || r > 0.7 {
		t.Errorf("compresses to %.2f of its size: no likeness of real data", r)
	}
	sum := sha256.Sum256(whole)
	if got := c.sum(); got != hex.EncodeToString(sum[:]) {
		t.Error("the sum is not that of the bytes")
	}

	p := c.patched(map[int64]uint64{2: 99})
	if len(c.patches) != 0 || p.sum() == c.sum() {
		t.Error("a patch changed its origin, or nothing")
	}
	fill(whole[8192:12288], 99, 8192)
	got := make([]byte, c.size)
	p.read(got, 0)
	if !bytes.Equal(got, whole) {
		t.Error("a patch changed other bytes than its own")
	}
}

func TestWriteTo(t *testing.T) {
	c := content{size: 1 << 20, seed: 1}
	dir := t.TempDir()
	odd, even := filepath.Join(dir, "odd"), filepath.Join(dir, "even")
	for path, rest := range map[string]int64{odd: 1, even: 0} {
		if err := c.writeTo(path, 64<<10, func(n int64) bool { return n%2 == rest }); err != nil {
			t.Fatal(err)
		}
	}
	a, err := os.ReadFile(odd)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(even)
	if err != nil {
		t.Fatal(err)
	}
	for i := range a {
		a[i] ^= b[i] // one of the two is zero
	}
	whole := make([]byte, c.size)
	c.read(whole, 0)
	if !bytes.Equal(a, whole) {
		t.Error("the two halves are not the whole")
	}
	sum, err := sumFile(odd, c.size, false)
	if err != nil || sum == c.sum() {
		t.Errorf("the sum of half of it: %s, %v", sum, err)
	}
	if _, err := sumFile(odd, c.size+1, false); err == nil {
		t.Error("a file that is too short passes")
	}
}

// All layers of a chain together must be the disk, each with its share.
func TestLayerOf(t *testing.T) {
	for _, depth := range []int{8, 64} {
		count := make([]int, depth)
		const n = 16384
		for i := range int64(n) {
			count[layerOf(i, depth)]++
		}
		for i, c := range count {
			if c < n/depth/2 || c > n/depth*2 {
				t.Errorf("layer %d of %d holds %d of %d runs", i, depth, c, n)
			}
		}
	}
}
