package guesttest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
)

// JudgeAt is what read calls free in [0, size) of r; empty with an error.
func JudgeAt(r io.ReaderAt, size int64, read freespace.Reader) (*blockmap.Set, freespace.Info, error) {
	c := freespace.NewCollector(1<<20, 1)
	info, err := read(context.Background(), r, size, c.Add)
	if err != nil {
		return &blockmap.Set{}, info, err
	}
	return Set(c.Ranges()), info, nil
}

// Judge is JudgeAt of an image.
func Judge(t testing.TB, path string, read freespace.Reader) (*blockmap.Set, freespace.Info, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return JudgeAt(f, st.Size(), read)
}

// Exact fails the test unless read calls free what want has, to the byte.
func Exact(t testing.TB, path, when string, read freespace.Reader, want *blockmap.Set) freespace.Info {
	t.Helper()
	got, info, err := Judge(t, path, read)
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	Inside(t, got, want)
	if got.Len() != want.Len() || got.Len() == 0 {
		t.Errorf("%s: %d bytes free, the oracle says %d", when, got.Len(), want.Len())
	}
	return info
}

// Refused fails the test unless err is a refusal with the code; no error is
// wanted with no code.
func Refused(t testing.TB, what string, err error, want freespace.Code) {
	t.Helper()
	var r *freespace.Refusal
	if want == "" {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		return
	}
	if !errors.As(err, &r) || r.Code != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

// Refusal is a way to break a filesystem, and the code of its refusal ("": it
// is judged).
type Refusal struct {
	Name   string
	Base   []byte // nil: that of Refusals
	Breaks func(b []byte)
	Want   freespace.Code
}

// Broken is a Refusal of an image of its own, or of that of Refusals.
func Broken(name string, base []byte, breaks func(b []byte), want freespace.Code) Refusal {
	return Refusal{Name: name, Base: base, Breaks: breaks, Want: want}
}

// Refusals breaks a copy of base in each of the ways; resum, unless it is nil,
// makes checksums right again.
func Refusals(t *testing.T, base []byte, read freespace.Reader, resum func(b []byte), all []Refusal) {
	t.Helper()
	for _, c := range all {
		b := c.Base
		if b == nil {
			b = base
		}
		b = bytes.Clone(b)
		c.Breaks(b)
		if resum != nil {
			resum(b)
		}
		_, _, err := JudgeAt(bytes.NewReader(b), int64(len(b)), read)
		Refused(t, c.Name, err, c.Want)
	}
}

// Bytes is what a file holds.
func Bytes(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Traced notes which bytes are read.
type Traced struct {
	R    io.ReaderAt
	Seen blockmap.Set
}

// ReadAt implements io.ReaderAt.
func (t *Traced) ReadAt(p []byte, off int64) (int, error) {
	t.Seen.Add(off, int64(len(p)))
	return t.R.ReadAt(p, off)
}

// Sample is n offsets, evenly spread by chance over what the set has.
func Sample(seen *blockmap.Set, rng *rand.Rand, n int) []int64 {
	var at []int64
	total := seen.Len()
	for range n {
		k := rng.Int64N(total)
		for r := range seen.Ranges() {
			if k < r.Len {
				at = append(at, r.Off+k)
				break
			}
			k -= r.Len
		}
	}
	return at
}

// DamagedBytes changes one bit at each of the offsets, and at sample others
// among all that read looks at, and fails the test when more becomes free than
// in the whole image. At least a tenth must be refused: a reader that looks
// at nothing would pass otherwise.
func DamagedBytes(t testing.TB, b []byte, read freespace.Reader, try []int64, sample int) {
	t.Helper()
	size := int64(len(b))
	tr := &Traced{R: bytes.NewReader(b)}
	good, _, err := JudgeAt(tr, size, read)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	try = append(try, Sample(&tr.Seen, rng, sample)...)
	refused := 0
	for _, at := range try {
		got, _, err := JudgeAt(Damaged{Base: bytes.NewReader(b), At: at, Xor: byte(1 << rng.IntN(8))}, size, read)
		if err != nil {
			refused++
		}
		for r := range got.Ranges() {
			if !good.Contains(r.Off, r.Len) {
				t.Fatalf("byte %#x damaged: %d+%d is free, was used", at, r.Off, r.Len)
			}
		}
	}
	if refused < len(try)/10 {
		t.Errorf("only %d of %d damages were refused", refused, len(try))
	}
}

// Trash overwrites what the set has: who calls it free must not miss it.
func Trash(t testing.TB, path string, free *blockmap.Set) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	junk := bytes.Repeat([]byte{0xdb}, 1<<20)
	for r := range free.Ranges() {
		for n := int64(0); n < r.Len; n += int64(len(junk)) {
			if _, err := f.WriteAt(junk[:min(int64(len(junk)), r.Len-n)], r.Off+n); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TrashKeeps overwrites what read calls free in an image, lets check look at
// it, and fails the test unless mount then shows the tree as it was.
func TrashKeeps(t testing.TB, path string, read freespace.Reader, tree map[string][sha256.Size]byte, check func(), mount func() (dir string, umount func())) {
	t.Helper()
	got, _, err := Judge(t, path, read)
	if err != nil {
		t.Fatal(err)
	}
	Trash(t, path, got)
	check()
	dir, umount := mount()
	SameTree(t, Tree(t, dir), tree)
	umount()
}

// Tree is a hash of every file below dir, by name.
func Tree(t testing.TB, dir string) map[string][sha256.Size]byte {
	t.Helper()
	sums := map[string][sha256.Size]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		sums[path[len(dir):]] = sha256.Sum256(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sums
}

// SameTree fails the test unless two trees have the same files.
func SameTree(t testing.TB, got, want map[string][sha256.Size]byte) {
	t.Helper()
	if len(want) == 0 || !maps.Equal(got, want) {
		t.Errorf("%d files, %d before, or other content", len(got), len(want))
	}
}
