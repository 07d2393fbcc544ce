package imgtest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"
)

// Pattern fills p with the bytes that the pattern seed has at offset off. Any
// part of a pattern can be made alone, no two patterns or places look alike,
// and no aligned eight bytes are all zero, so that a lost, moved or stale
// block is seen.
func Pattern(p []byte, seed uint64, off int64) {
	var w [8]byte
	for i := 0; i < len(p); {
		at := off + int64(i)
		binary.LittleEndian.PutUint64(w[:], mix(seed^mix(uint64(at>>3)))|1)
		i += copy(p[i:], w[at&7:])
	}
}

// mix is the finaliser of SplitMix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// PatternBytes is n bytes of Pattern.
func PatternBytes(seed uint64, off int64, n int) []byte {
	p := make([]byte, n)
	Pattern(p, seed, off)
	return p
}

// RawFile makes a sparse raw file of the given size: runs of Pattern, of
// written zeros and of holes, with edges that are multiples of grain. The same
// arguments make the same bytes.
func RawFile(t testing.TB, path string, size, grain int64, seed uint64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	for off := int64(0); off < size; {
		n := min((1+rng.Int64N(32))*grain, size-off)
		p := make([]byte, n)
		switch rng.IntN(3) {
		case 0:
			Pattern(p, seed, off)
			fallthrough
		case 1:
			if _, err := f.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		off += n
	}
}

// SHA256File is the hex digest of a file's content.
func SHA256File(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// SameContent fails the test where two files differ, and names the first
// offset. A file that ends earlier must be followed by zeros only in the
// other, as a short backing file reads.
func SameContent(t testing.TB, a, b string) {
	t.Helper()
	fa, err := os.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = fa.Close() }() // read only
	fb, err := os.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = fb.Close() }() // read only
	pa, pb := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(pa)) {
		na, nb := fill(t, fa, pa), fill(t, fb, pb)
		if !bytes.Equal(pa, pb) {
			for i := range pa {
				if pa[i] != pb[i] {
					t.Fatalf("%s and %s differ first at offset %d: %#02x and %#02x", a, b, off+int64(i), pa[i], pb[i])
				}
			}
		}
		if na == 0 && nb == 0 {
			return
		}
	}
}

// fill reads all that p can hold, makes the rest zero, and returns the bytes
// read.
func fill(t testing.TB, f *os.File, p []byte) int {
	t.Helper()
	n, err := io.ReadFull(f, p)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	clear(p[n:])
	return n
}
