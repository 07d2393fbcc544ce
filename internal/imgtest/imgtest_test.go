package imgtest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPatternPartsAgree(t *testing.T) {
	whole := PatternBytes(7, 1000, 4096)
	for _, r := range [][2]int{{0, 1}, {3, 17}, {8, 8}, {1001, 3000}} {
		part := PatternBytes(7, 1000+int64(r[0]), r[1])
		if !bytes.Equal(part, whole[r[0]:r[0]+r[1]]) {
			t.Errorf("part %v of the pattern differs from the whole", r)
		}
	}
	if bytes.Equal(PatternBytes(7, 0, 4096), PatternBytes(8, 0, 4096)) || bytes.Equal(PatternBytes(7, 0, 4096), PatternBytes(7, 4096, 4096)) {
		t.Error("two patterns or places look alike")
	}
	if bytes.Contains(PatternBytes(7, 0, 1<<20), make([]byte, 16)) {
		t.Error("the pattern holds zeros")
	}
}

// recorder is a TB that notes how a test was ended.
type recorder struct {
	testing.TB
	skipped, failed bool
}

func (r *recorder) Helper()               {}
func (r *recorder) Skip(...any)           { r.skipped = true }
func (r *recorder) Fatalf(string, ...any) { r.failed = true }

func TestRequire(t *testing.T) {
	t.Setenv("IMAGESTACK_REQUIRE", "")
	r := &recorder{TB: t}
	Require(r, "sh")
	if r.skipped || r.failed {
		t.Error("sh is there, and yet the test was ended")
	}
	Require(r, "sh", "no-such-program-here")
	if !r.skipped || r.failed {
		t.Errorf("a missing program: skipped %v, failed %v; want skipped", r.skipped, r.failed)
	}
	t.Setenv("IMAGESTACK_REQUIRE", "all")
	r = &recorder{TB: t}
	Require(r, "no-such-program-here")
	if !r.failed {
		t.Error("IMAGESTACK_REQUIRE=all: a missing program did not fail the test")
	}
}

func TestTryStatus(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 3": 3, "kill -9 $$": 137} {
		if exit, _ := Try(t, "sh", "-c", script); exit != want {
			t.Errorf("%s: exit %d, want %d", script, exit, want)
		}
	}
}

func TestQemuOracles(t *testing.T) {
	Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	img, raw := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "a.raw")
	QemuImg(t, "create", "-q", "-f", "qcow2", img, "4M")
	QemuIO(t, "qcow2", img, "write -P 0x5a 1M 64K")
	if exit, out := QemuCheck(t, img, "qcow2"); exit != 0 {
		t.Errorf("check: exit %d\n%s", exit, out)
	}
	m := QemuMap(t, "qcow2", img)
	if len(m) != 3 || m[1].Start != 1<<20 || m[1].Length != 64<<10 || !m[1].Data || m[1].Offset == nil {
		t.Errorf("map: %+v", m)
	}
	QemuRaw(t, "qcow2", img, raw)
	want := make([]byte, 4<<20)
	copy(want[1<<20:], bytes.Repeat([]byte{0x5a}, 64<<10))
	if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, want) {
		t.Errorf("convert to raw gives other bytes (%v)", err)
	}
}

// TestPloopBundle makes a bundle of three deltas with ploop's own tool, fills
// each through QEMU, and lets both read the pile.
func TestPloopBundle(t *testing.T) {
	Require(t, "qemu-img", "qemu-io")
	RequirePloop(t)
	for _, mode := range []string{"expanded", "raw"} {
		t.Run(mode, func(t *testing.T) {
			dir := t.TempDir()
			images := PloopBundle(t, dir, mode, 2, 32<<20, 3)
			if d := cmp.Diff(images, PloopChain(t, filepath.Join(dir, "DiskDescriptor.xml"))); d != "" {
				t.Errorf("PloopChain (-made +listed):\n%s", d)
			}
			for i, im := range images {
				if im.Format == "parallels" {
					QemuIO(t, "", Chain(images[i:]...), fmt.Sprintf("write -P %d %dM 1M", 1+i, 2+i))
				}
			}
			out := filepath.Join(dir, "out.raw")
			QemuRaw(t, "", Chain(images...), out)
			got, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			for i, im := range images {
				if im.Format == "parallels" && got[(2+i)<<20] != byte(1+i) {
					t.Errorf("layer %d: byte %#x, want %#x", i, got[(2+i)<<20], 1+i)
				}
			}
			// QEMU leaves what the tool demands undone (unwritten extents,
			// the empty flag): its own delta checks clean only with -S.
			if exit, out := Ploop(t, "check", "-f", "-c", "-S", images[0].Path); exit != 0 {
				t.Errorf("check: exit %d\n%s", exit, out)
			}
		})
	}
}

func TestPloopCheckSeesDamage(t *testing.T) {
	RequirePloop(t)
	images := PloopBundle(t, t.TempDir(), "expanded", 1, 32<<20, 1)
	if exit, out := PloopCheck(t, images[0].Path); exit != 0 {
		t.Fatalf("a new image: exit %d\n%s", exit, out)
	}
	f, err := os.OpenFile(images[0].Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 3); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if exit, out := PloopCheck(t, images[0].Path); exit != 11 || !strings.Contains(out, "signature") {
		t.Errorf("a wrong signature: exit %d, want 11\n%s", exit, out)
	}
}
