package crash_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/crash"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/raw"
	"github.com/imagestack/imagestack/rewrite"
)

// compactions are the operations of the table that make an image smaller, with
// little extra space, so that there are several batches.
var compactions = map[string]rewrite.Options{}

// compacting is the line of such an operation. The guest must see the same at
// every moment, and after a run there is nothing left to free, also when an
// earlier one was cut off.
func compacting(name string, s setup, o rewrite.Options) op {
	compactions[name] = o
	return op{Name: name, Setup: s, Run: func(ctx context.Context, s *crash.Session) error {
		if _, err := compactOnce(ctx, s, o); err != nil {
			return err
		}
		return noLeaks(ctx, s)
	}}
}

// noLeaks asks our checker, which may find nothing.
func noLeaks(ctx context.Context, s *crash.Session) (err error) {
	c, err := fsck.CheckerFor(s.Image.Format)
	if err != nil {
		return err
	}
	f, err := s.Dir.Open(crash.ImageFile, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	col := fsck.NewCollector(fsck.CollectorOptions{File: crash.ImageFile})
	stats, err := c.Check(ctx, f, fsck.Options{
		Memory: 32 << 20, Parallel: 1, Data: true,
		OpenFile: func(name string) (backend.File, error) { return s.Dir.Open(name, false) },
	}, col)
	if err != nil {
		return err
	}
	for _, d := range col.Sum(stats).Findings {
		if d.Sev() > fsck.Note {
			return fmt.Errorf("compacted, and %s: %s: %s: %s", d.Sev(), d.Code, d.Place, d.Text)
		}
	}
	return nil
}

func compactOnce(ctx context.Context, s *crash.Session, o rewrite.Options) (*rewrite.Report, error) {
	top, err := s.Open(ctx, true, "")
	if err != nil {
		return nil, err
	}
	if r, ok := top.(interface{ ResumeRelocation() }); ok && s.Again {
		r.ResumeRelocation() // as the record of the interrupted run says
	}
	pile := []layers.Layer{top}
	if s.Image.Below != nil {
		base, err := raw.Open(ctx, backend.NewMemBytes("below", s.Image.Below), layers.OpenOptions{Path: "below"})
		if err != nil {
			return nil, err
		}
		pile = append(pile, base)
	}
	stack, err := layers.NewStack(pile, layers.StackOptions{Writable: true})
	if err != nil {
		return nil, err
	}
	r, err := rewrite.CompactStack(ctx, stack, o)
	return r, errors.Join(err, stack.Close())
}

// compactingExtension is compacting for an image with a format extension. As
// long as the image is marked as in use that counts as out of date, but for who
// goes on.
func compactingExtension(name string, s setup, o rewrite.Options) op {
	line := compacting(name, s, o)
	line.May = []string{"ploop.extension.stale"}
	return line
}

// compactingCounts is compacting for an image whose counts are too high. They
// are made exact before the COPIED flags may be set.
func compactingCounts(name string, s setup, o rewrite.Options) op {
	line := compacting(name, s, o)
	line.May = []string{"qcow2.l2.copied-clear"}
	return line
}

// compactRaw is compacting for raw images, which have no leaks.
func compactRaw(ctx context.Context, s *crash.Session) error {
	_, err := compactOnce(ctx, s, rewrite.Options{})
	return err
}

// holed fills the disk and then gives parts of it back, so that there are holes
// all over the file.
func holed(stretch int64) func(e layers.Editor, rng *rand.Rand) error {
	return func(e layers.Editor, rng *rand.Rand) error {
		ctx, below := context.Background(), layertest.NewBelow(nil, 1)
		if err := e.WriteAt(ctx, imgtest.PatternBytes(5, 0, int(e.Size())), 0, below); err != nil {
			return err
		}
		for off := int64(0); off < e.Size(); off += stretch {
			if n := min(stretch, e.Size()-off); rng.IntN(2) == 0 {
				if err := e.ZeroAt(ctx, off, n, true, below); err != nil {
					return err
				}
			} else if rng.IntN(4) == 0 {
				if err := e.WriteAt(ctx, make([]byte, n), off, below); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

// packedStreams is an image of compressed clusters of about two thirds of their
// size, some of which were given back.
func packedStreams(t testing.TB, options string, size int) setup {
	imgtest.Require(t, "qemu-img", "qemu-io")
	return once(func() (*crash.Image, error) {
		dir := t.TempDir()
		plain, path := filepath.Join(dir, "plain"), filepath.Join(dir, "packed.qcow2")
		b := imgtest.PatternBytes(11, 0, size)
		for off := 0; off < size; off += 4096 {
			clear(b[off+2000+off/4096*17 : off+4096])
		}
		if err := os.WriteFile(plain, b, 0o600); err != nil {
			return nil, err
		}
		imgtest.QemuImg(t, "convert", "-q", "-c", "-O", "qcow2", "-o", options, plain, path)
		imgtest.QemuImg(t, "snapshot", "-c", "s1", path)
		imgtest.QemuIO(t, "qcow2", path, "write -P 1 40k 4k", "write -P 2 60k 8k")
		imgtest.QemuImg(t, "snapshot", "-c", "s2", path)
		imgtest.QemuImg(t, "snapshot", "-d", "s1", path)
		imgtest.QemuIO(t, "qcow2", path, "discard 0 24k", "discard 32k 4k")
		imgtest.QemuImg(t, "snapshot", "-d", "s2", path)
		imgtest.QemuImg(t, "snapshot", "-c", "s3", path)
		imgtest.QemuIO(t, "qcow2", path, "write -P 3 100k 4k")
		b, err := os.ReadFile(path)
		img := image("qcow2", backend.NewMemBytes(crash.ImageFile, b))
		img.Snapshots = []string{"s3"}
		return img, err
	})
}

// highCounts counts a reference too many to the clusters of the first L2 table
// (of 4 KiB, with counts of 16 bits), and to one that is not used: what a run
// that was cut off leaves of an image with snapshots.
func highCounts(p []byte) []byte {
	be := binary.BigEndian
	block := be.Uint64(p[be.Uint64(p[48:]):])
	count := func(cluster uint64) { p[block+2*cluster+1]++ }
	for i := l2Of(p); i < l2Of(p)+4096; i += 8 {
		if cluster := be.Uint64(p[i:]) & 0x00fffffffffffe00 / 4096; cluster != 0 {
			count(cluster)
			p[i] &= 0x7f
		}
	}
	count(uint64(len(p)) / 4096)
	return append(p, make([]byte, 4096)...)
}

// TestCompactTable shows that the operations of the table move and shrink
// something.
func TestCompactTable(t *testing.T) {
	for _, op := range table(t) {
		o, ok := compactions[op.Name]
		if !ok {
			continue
		}
		img, err := op.Setup(1)
		if err != nil {
			t.Fatal(err)
		}
		files := map[string]*backend.Mem{}
		for name, m := range img.Files {
			files[name] = m.Clone()
		}
		dir := layertest.NewDir(func(name string) (backend.File, error) { return files[name], nil })
		for name := range files {
			f, err := dir.Open(name, true)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		r, err := compactOnce(t.Context(), &crash.Session{Image: img, Dir: dir}, o)
		if err != nil {
			t.Fatalf("%s: %v", op.Name, err)
		}
		before, _ := img.Files[crash.ImageFile].Size()
		after, _ := files[crash.ImageFile].Size()
		if r.Move == 0 || after >= before {
			t.Errorf("%s: %d bytes moved, %d -> %d bytes", op.Name, r.Move, before, after)
		}
		t.Logf("%s: %d bytes moved, %d -> %d bytes", op.Name, r.Move, before, after)
	}
}
