package qcow2fsck

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// intact is an image of which the metadata is known.
type intact struct {
	name     string
	dir      string
	b        []byte
	original []byte
	base     []byte
	meta     []layers.HostRange // metadata of the file, the header first
}

func loadIntact(t testing.TB, shape string) *intact {
	t.Helper()
	dir := t.TempDir()
	path := damage.Qcow2Image(t, dir, shape)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	in := &intact{name: shape, dir: dir, b: b}
	in.original, _ = os.ReadFile(damage.Original(dir))
	in.base, _ = os.ReadFile(filepath.Join(dir, "base.raw"))
	in.findMeta(t)
	return in
}

// findMeta finds where the metadata is.
func (in *intact) findMeta(t testing.TB) {
	t.Helper()
	dir, b := in.dir, in.b
	img, err := qcow2.Open(context.Background(), backend.NewMemBytes("image", b), layers.OpenOptions{OpenFile: func(name string, _ bool) (backend.File, error) {
		return backend.Open(filepath.Join(dir, filepath.Base(name)), backend.Options{})
	}})
	if err != nil {
		t.Fatal(err)
	}
	err = img.WalkHost(context.Background(), func(r layers.HostRange) error {
		if r.Role != layers.RoleData && r.Role != layers.RolePacked {
			in.meta = append(in.meta, r)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// owned are the guest ranges whose own entries in the active map lie at off:
// damage there may be a valid entry with another meaning, which nobody sees.
func (in *intact) owned(off int64) []blockmap.Range {
	be := binary.BigEndian
	cs := int64(1) << be.Uint32(in.b[20:])
	entry := int64(8)
	if be.Uint64(in.b[72:])&16 != 0 && be.Uint32(in.b[4:]) == 3 {
		entry = 16
	}
	l1, n := int64(be.Uint64(in.b[40:])), int64(be.Uint32(in.b[36:]))
	span := cs / entry * cs
	if off >= l1 && off < l1+n*8 {
		return []blockmap.Range{{Off: (off - l1) / 8 * span, Len: span}}
	}
	for i := range n {
		table := int64(be.Uint64(in.b[l1+8*i:]) & entryOffset)
		if table != 0 && off >= table && off < table+cs {
			return []blockmap.Range{{Off: i*span + (off-table)/entry*cs, Len: cs}}
		}
	}
	return nil
}

// tryDamage damages an image at some places, repairs it, and judges the
// result. It returns what is wrong, "" for nothing.
func (in *intact) tryDamage(places []int64, values []byte, o fsck.Options) (msg string) {
	b := bytes.Clone(in.b)
	for i, at := range places {
		b[at] ^= values[i]
	}
	return in.tryImage(b, o)
}

// tryImage repairs a damaged image, of the same length, and judges the result.
func (in *intact) tryImage(b []byte, o fsck.Options) (msg string) {
	except := []blockmap.Range{}
	header := false
	for at := range b {
		if b[at] != in.b[at] {
			except = append(except, in.owned(int64(at))...)
			header = header || at < 512
		}
	}
	damaged := backend.NewMemBytes("image", b)
	f := damaged.Clone()
	undo := backend.NewMem("undo")
	var reps []*fsck.Report
	for range 4 {
		rep, err := tryCheck(f, o, fsck.DecideAll, undo)
		if err != nil {
			return fmt.Sprintf("error: %v", err)
		}
		reps = append(reps, rep)
		for _, fd := range rep.Findings {
			if fd.Sev() >= fsck.Damage && fd.Fix == nil && header {
				return "" // nothing can be done about that in place
			}
		}
		if rep.Worst() <= fsck.Note {
			break
		}
	}
	history := func() string {
		s := ""
		for i, r := range reps {
			s += fmt.Sprintf("round %d:\n%s", i+1, list(r))
		}
		return s
	}
	if last := reps[len(reps)-1]; last.Worst() > fsck.Note {
		return "not clean after repair\n" + history()
	}
	if !header {
		got, err := content(f, in.dir, in.base)
		if err != nil {
			return fmt.Sprintf("content: %v\n%s", err, history())
		}
		if at := differs(got, in.original, append(except, lost(reps)...)); at >= 0 {
			return fmt.Sprintf("content differs at %#x\n%s", at, history())
		}
	}
	if f.Hash() != damaged.Hash() {
		if _, err := fsck.ApplyUndo(context.Background(), undo, f, fsck.UndoOptions{}); err != nil {
			return fmt.Sprintf("undo: %v", err)
		}
		if !bytes.Equal(f.Bytes(), b) {
			return "undo does not restore the image"
		}
	}
	return ""
}

// TestRandomDamage: whatever bytes of the metadata are damaged, a full repair
// leaves a clean image in which only what was damaged or named has changed.
func TestRandomDamage(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	runs := 40
	if testing.Short() {
		runs = 10
	}
	for _, shape := range []string{"v3", "v2", "snapshot", "small", "mixed", "bitmaps", "extl2", "raw", "backing"} {
		t.Run(shape, func(t *testing.T) {
			in := loadIntact(t, shape)
			for run := range runs {
				rng := rand.New(rand.NewPCG(uint64(run), 7))
				var places []int64
				var values []byte
				for range 1 + rng.IntN(6) {
					r := in.meta[rng.IntN(len(in.meta))]
					n := min(r.Len, int64(len(in.b))-r.Off)
					if rng.IntN(2) == 0 {
						n = min(n, 256) // where tables of small images have their entries
					}
					places = append(places, r.Off+rng.Int64N(n))
					values = append(values, byte(1+rng.IntN(255)))
				}
				o := options(in.dir)
				o.Data = true
				if run%3 == 0 || shape == "small" {
					o.Memory = 1
				}
				if msg := in.tryDamage(places, values, o); msg != "" {
					t.Fatalf("run %d, bytes %#x xor %#x: %s", run, places, values, msg)
				}
			}
		})
	}
}
