package btrfs

import (
	"bytes"
	"os"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

// FuzzBtrfs changes superblock and tree blocks, whose checksums stay right.
func FuzzBtrfs(f *testing.F) {
	imgtest.Require(f, "mkfs.btrfs")
	const node = 4096
	b, err := os.ReadFile(mkfs(f, 114<<20, "-n 4096 -m single"))
	if err != nil {
		f.Fatal(err)
	}
	n := nodes{bytes.NewReader(b), node, map[int64]bool{}}
	if _, _, err := guesttest.JudgeAt(n, int64(len(b)), Free); err != nil {
		f.Fatal(err)
	}
	block := func(at int64) (int64, int64) { return at &^ (node - 1), node }
	guesttest.Edits(f, b, Free, block, resum)
}
