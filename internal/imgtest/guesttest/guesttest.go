// Package guesttest makes images of guest filesystems that have lived: mkfs,
// mounts through loop devices, files created and deleted at random.
package guesttest

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// Require needs root, loop devices and the programs named.
func Require(t testing.TB, tools ...string) {
	t.Helper()
	imgtest.RequireRoot(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, append([]string{"mount", "umount", "findmnt"}, tools...)...)
}

// scratch is a directory for images: in memory where there is such a place,
// because mounted filesystems sync often.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "guesttest")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Image makes an empty file of size bytes and returns its path.
func Image(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(scratch(t), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// Mount mounts path through a loop device and returns the directory and a
// function that unmounts it. At the end of the test it is unmounted in any
// case.
func Mount(t testing.TB, path string, options ...string) (dir string, umount func()) {
	t.Helper()
	dir = t.TempDir()
	imgtest.Run(t, "mount", "-o", strings.Join(append([]string{"loop"}, options...), ","), path, dir)
	mounted := true
	umount = func() {
		if mounted {
			mounted = false
			imgtest.Umount(t, dir)
		}
	}
	t.Cleanup(umount)
	return dir, umount
}

// Loop attaches a loop device to path and returns its name and a function that
// detaches it. At the end of the test it is detached in any case.
func Loop(t testing.TB, path string) (device string, detach func()) {
	t.Helper()
	imgtest.RequireLoop(t)
	device = strings.TrimSpace(string(imgtest.Run(t, "losetup", "-f", "--show", path)))
	attached := true
	detach = func() {
		if attached {
			attached = false
			imgtest.Run(t, "losetup", "-d", device)
		}
	}
	t.Cleanup(detach)
	return device, detach
}

// Copy copies the image as it is at one moment, holes kept, and returns the
// path of the copy. A mounted filesystem may write meanwhile: a copy that still
// equals the image afterwards is that of the moment between the two readings.
func Copy(t testing.TB, path string) string {
	t.Helper()
	to := filepath.Join(scratch(t), "copy")
	for range 20 {
		imgtest.Run(t, "cp", "--sparse=always", path, to)
		if exit, _ := imgtest.Try(t, "cmp", "-s", path, to); exit == 0 {
			return to
		}
	}
	t.Fatalf("%s does not stay the same for as long as a copy takes", path)
	return ""
}

// Age creates, extends and deletes files of up to largest bytes at random
// until steps are done. The filesystem may become full.
func Age(t testing.TB, dir string, seed uint64, steps int, largest int64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 2))
	var files []string
	for i := range steps {
		switch k := rng.IntN(10); {
		case k < 4 && len(files) > 3:
			n := rng.IntN(len(files))
			if err := os.RemoveAll(files[n]); err != nil {
				t.Fatal(err)
			}
			files = append(files[:n], files[n+1:]...)
		case k == 4:
			d := filepath.Join(dir, fmt.Sprintf("d%d", i))
			if os.MkdirAll(d, 0o700) == nil {
				for n := range rng.IntN(20) {
					Write(d, fmt.Sprintf("a file with a rather long name %d", n), seed, rng.Int64N(3000))
				}
				files = append(files, d)
			}
		default:
			Write(dir, fmt.Sprintf("f%d", i), seed, rng.Int64N(largest))
			files = append(files, filepath.Join(dir, fmt.Sprintf("f%d", i)))
		}
	}
	imgtest.Run(t, "sync", "-f", dir)
}

// Write makes a file with a pattern, as much as fits.
func Write(dir, name string, seed uint64, size int64) {
	_ = os.WriteFile(filepath.Join(dir, name), imgtest.PatternBytes(seed, 0, int(size)), 0o600) // a full disk is fine
}

// Set is a set of ranges from a list of them.
func Set(ranges []blockmap.Range) *blockmap.Set {
	var s blockmap.Set
	for _, r := range ranges {
		s.Add(r.Off, r.Len)
	}
	return &s
}

// Inside fails the test unless every range of got lies in want.
func Inside(t testing.TB, got, want *blockmap.Set) {
	t.Helper()
	for r := range got.Ranges() {
		for gap := range want.Gaps(r.Off, r.Len) {
			t.Errorf("bytes %d+%d are called free, the oracle says used", gap.Off, gap.Len)
			return
		}
	}
}

// Damaged reads Base with one byte replaced.
type Damaged struct {
	Base io.ReaderAt
	At   int64
	Xor  byte
}

// ReadAt implements io.ReaderAt.
func (d Damaged) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Base.ReadAt(p, off)
	if i := d.At - off; i >= 0 && i < int64(n) {
		p[i] ^= d.Xor
	}
	return n, err
}
