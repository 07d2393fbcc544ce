package rewrite_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/rewrite"
)

// same runs rewrite on an image that may be damaged in any way. What could be
// read before reads the same afterwards; an image that is turned away stays as
// it is, byte for byte, but for autoclear bits. It returns the error of the
// run.
func same(ctx context.Context, t *testing.T, name string, image []byte) error {
	t.Helper()
	d := &disk{file: backend.NewMemBytes("image", image)}
	before := readable(ctx, d)
	fine := d.check(ctx, fsck.Leak) == nil
	_, err := d.compact(ctx, rewrite.Options{MaxExtra: 1 << 20}, 0)
	after := readable(ctx, d)
	if len(before) != len(after) {
		t.Errorf("%s: %d ranges can be read, %d before (%v)", name, len(after), len(before), err)
	}
	for off, want := range before {
		if got, ok := after[off]; !ok || !bytes.Equal(got, want) {
			t.Errorf("%s: the content at %#x has changed (%v)", name, off, err)
			break
		}
	}
	switch {
	case fine && err != nil && !errors.Is(err, layers.ErrUnsupported) && !errors.Is(err, layers.ErrCorrupt) && !errors.Is(err, layers.ErrFormat):
		t.Errorf("%s: %v", name, err)
	case fine && err == nil:
		if err := d.check(ctx, fsck.Leak); err != nil {
			t.Errorf("%s: compacted: %v", name, err)
		}
	case err != nil && !errors.Is(err, layers.ErrCorrupt) && !errors.Is(err, layers.ErrUnsupported) && !errors.Is(err, layers.ErrFormat):
		t.Errorf("%s: turned away with an error of no class: %v", name, err)
	}
	return err
}

// readable is what can be read of an image, in pieces by their offsets.
func readable(ctx context.Context, d *disk) map[int64][]byte {
	const piece = 32 << 10
	all := map[int64][]byte{}
	s, err := d.open(ctx, false, "", 0)
	if err != nil {
		return all
	}
	defer s.Close()
	for off := int64(0); off < min(s.Size(), 16<<20); off += piece {
		p := make([]byte, min(piece, s.Size()-off))
		if _, err := s.ReadAt(ctx, p, off); err == nil {
			all[off] = p
		}
	}
	return all
}

// TestDamaged compacts every kind of damaged image.
func TestDamaged(t *testing.T) {
	refused := 0
	for _, c := range damage.Qcow2() {
		dir := t.TempDir()
		b, err := os.ReadFile(c.Build(t, dir))
		if err != nil {
			t.Fatal(err)
		}
		err = same(t.Context(), t, c.Name, b)
		if err != nil {
			refused++
			continue
		}
		t.Logf("%s: compacted", c.Name)
	}
	if refused < 10 {
		t.Errorf("only %d damaged images were turned away", refused)
	}
}

// TestMutated compacts images in which random fields were changed.
func TestMutated(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	done, refused := 0, 0
	for _, o := range []qcow2.CreateOptions{{Size: 256 << 10, ClusterSize: 512}, {Size: 512 << 10, ClusterSize: 4096}, {Size: 512 << 10, ClusterSize: 16384, ExtendedL2: true}} {
		base := scribbled(t, o, 4).Bytes()
		for range 200 {
			script := make([]byte, 4+rng.IntN(24))
			for i := range script {
				script[i] = byte(rng.Uint32())
			}
			if same(t.Context(), t, "mutated", mutate.Apply("qcow2", base, script)) != nil {
				refused++
			} else {
				done++
			}
			if t.Failed() {
				t.Fatalf("script %x, cluster %d", script, o.ClusterSize)
			}
		}
	}
	t.Logf("%d compacted, %d turned away", done, refused)
}

// FuzzCompact compacts images with changed fields; seeds choose the image.
func FuzzCompact(f *testing.F) {
	var bases [][]byte
	for i, o := range []qcow2.CreateOptions{{Size: 128 << 10, ClusterSize: 512}, {Size: 256 << 10, ClusterSize: 4096}, {Size: 512 << 10, ClusterSize: 16384, ExtendedL2: true}} {
		bases = append(bases, scribbled(f, o, uint64(i)).Bytes())
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), []byte{0, 30, 3, 7, 0, 40, 1, 1})
	}
	f.Fuzz(func(t *testing.T, which uint8, script []byte) {
		_ = same(t.Context(), t, "fuzzed", mutate.Apply("qcow2", bases[int(which)%len(bases)], script))
	})
}
