package scavenge_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/fsck/scavenge"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// random makes a file of noise.
func random(t testing.TB, size int) string {
	t.Helper()
	rng := rand.NewChaCha8([32]byte{1})
	b := make([]byte, size)
	_, _ = rng.Read(b) // never fails
	path := filepath.Join(t.TempDir(), "noise")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// In noise nothing is found, and no image is made of it.
func TestNoise(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"qcow2", "ploop"} {
		name, r := run(t, random(t, 8<<20), scavenge.Options{Format: format, Size: 1 << 30, ClusterSize: 64 << 10, Guess: true})
		if r.New != "" || r.Exit != 4 || len(r.Places) != 0 || len(r.Filesystems) != 0 || r.UnplacedBytes < 7<<20 || r.UnknownBytes != 1<<30 {
			t.Errorf("%s: %+v", format, r)
		}
		gone(t, name)
	}
}

// gone fails the test when anything was made.
func gone(t testing.TB, name string) {
	t.Helper()
	left, err := filepath.Glob(name + "*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// Part of the BAT survives. What survives is kept, and is evidence of where
// the filesystem begins.
func TestPartOfBAT(t *testing.T) {
	t.Parallel()
	disk := mkfs(t, "ext4", 1<<30)
	img := convert(t, disk, "parallels", "-o", "cluster_size=64k")
	all := peek(t, img, 64, 64<<10)
	loseBAT(t, img)
	half := bytes.Clone(all[:32<<10])
	copy(half[512-64:], bytes.Repeat([]byte{0xee}, 512)) // one sector of garbage
	poke(t, img, 64, half)
	name, r := run(t, img, scavenge.Options{})
	if r.Placed[scavenge.ProofSurvived] < 20 || r.New == "" {
		t.Errorf("placed %v", r.Placed)
	}
	same(t, r, "parallels", name, disk)
	// The whole of it: nothing is missing then.
	poke(t, img, 64, all)
	name, r = run(t, img, scavenge.Options{})
	if r.Exit != 1 || len(r.Placed) != 1 {
		t.Errorf("exit %d, placed %v", r.Exit, r.Placed)
	}
	same(t, r, "parallels", name, disk)
	// Entries that name each other's clusters are not believed.
	poke(t, img, 64, bytes.Repeat(all[:4], 16<<10))
	_, r = run(t, img, scavenge.Options{})
	if r.Placed[scavenge.ProofSurvived] > 0 {
		t.Errorf("placed %v", r.Placed)
	}
	// Two that were exchanged: the first superblock knows better.
	other := 4
	for ; bytes.Equal(all[other:other+4], make([]byte, 4)) || other < 4*64; other += 4 {
	}
	swapped := bytes.Clone(all)
	copy(swapped, all[other:other+4])
	copy(swapped[other:], all[:4])
	poke(t, img, 64, swapped)
	name, r = run(t, img, scavenge.Options{})
	if r.Placed[scavenge.ProofSurvived] != r.Pieces-2 || r.Places[0].Proof != scavenge.ProofGuest {
		t.Errorf("placed %v, first %+v", r.Placed, r.Places[0])
	}
	same(t, r, "parallels", name, disk)
}

// Guesses are made only when asked for, and are labelled.
func TestGuess(t *testing.T) {
	t.Parallel()
	disk := mkfs(t, "ext4", 1<<30)
	img := convert(t, disk, "parallels", "-o", "cluster_size=64k")
	loseBAT(t, img)
	_, proven := run(t, img, scavenge.Options{})
	name, r := run(t, img, scavenge.Options{Guess: true})
	if proven.Placed[scavenge.GuessRun] != 0 || proven.GuessedBytes != 0 {
		t.Errorf("guessed without being asked: %v", proven.Placed)
	}
	if r.Placed[scavenge.GuessRun] == 0 || r.GuessedBytes == 0 || r.Exit&4 == 0 {
		t.Errorf("exit %d, placed %v", r.Exit, r.Placed)
	}
	same(t, r, "parallels", name, disk) // written by qemu-img in order, so they are right
	b, err := json.Marshal(r)
	if err != nil || !bytes.Contains(b, []byte(`"proof":"guess-order"`)) {
		t.Errorf("%v", err)
	}
}

// Other formats than that of the source.
func TestFormats(t *testing.T) {
	t.Parallel()
	disk := mkfs(t, "ext4", 1<<30)
	img := convert(t, disk, "qcow2")
	loseL1(t, img, 0)
	for to, qemu := range map[string]string{"raw": "raw", "ploop": "parallels"} {
		name, r := run(t, img, scavenge.Options{To: to})
		if r.Exit != 1 {
			t.Errorf("%s: exit %d", to, r.Exit)
		}
		same(t, r, qemu, name, disk)
	}
}

// An image over a backing file: the new one names it as well.
func TestBacking(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=16k", mkfs(t, "ext4", 1<<30), base)
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=16k,extended_l2=on", "-b", "base.qcow2", "-F", "qcow2", top)
	imgtest.QemuIO(t, "qcow2", top, "write -P 0x5a 5M 1k", "write -z 6M 64k", "write -P 0x5b 7M 1M")
	want := filepath.Join(dir, "want")
	imgtest.QemuRaw(t, "qcow2", top, want)
	loseL1(t, top, 0)
	name := filepath.Join(dir, "new.qcow2")
	r, err := scavenge.Run(t.Context(), top, name, scavenge.Options{Guess: true})
	if err != nil {
		t.Fatal(err)
	}
	if r.New != "" {
		t.Errorf("without evidence: %+v", r)
	}
	// The first sectors of the filesystem, in the top, prove the place.
	loseNothing := filepath.Join(dir, "top2.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=16k,extended_l2=on", "-b", "base.qcow2", "-F", "qcow2", loseNothing)
	super := filepath.Join(dir, "super")
	if err := os.WriteFile(super, peek(t, want, 0, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	imgtest.QemuIO(t, "qcow2", loseNothing, "write -s "+super+" 0 64k", "write -P 0x5a 5M 1k", "write -z 6M 64k", "write -P 0x5b 7M 1M")
	imgtest.QemuRaw(t, "qcow2", loseNothing, want)
	loseL1(t, loseNothing, 0)
	r, err = scavenge.Run(t.Context(), loseNothing, name, scavenge.Options{})
	if err != nil || r.Exit != 1 {
		t.Fatalf("%v: %+v", err, r)
	}
	same(t, r, "qcow2", name, want)
}

// A new file is never one that exists, and what was begun is taken away again.
func TestNewFileOnly(t *testing.T) {
	t.Parallel()
	disk := mkfs(t, "ext4", 1<<30)
	img := convert(t, disk, "qcow2")
	loseL1(t, img, 0)
	for _, suffix := range []string{"", ".incomplete", ".lost+found"} {
		name := filepath.Join(t.TempDir(), "new")
		if err := os.WriteFile(name+suffix, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := scavenge.Run(t.Context(), img, name, scavenge.Options{}); !errors.Is(err, scavenge.ErrExists) {
			t.Errorf("%s: %v", suffix, err)
		}
		if b, err := os.ReadFile(name + suffix); string(b) != "mine" {
			t.Errorf("%s: overwritten: %v", suffix, err)
		}
	}
	// Interrupted in every pass.
	passes := map[string]bool{}
	name := filepath.Join(t.TempDir(), "new")
	for {
		stopped := ""
		ctx, cancel := context.WithCancel(t.Context())
		_, err := scavenge.Run(ctx, img, name, scavenge.Options{OnProgress: func(pass string, _, _ int64) {
			if !passes[pass] && stopped == "" {
				stopped, passes[pass] = pass, true
				cancel()
			}
		}})
		cancel()
		if stopped == "" {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if !errors.Is(err, context.Canceled) && stopped != "new image" {
			t.Errorf("interrupted in pass %q: %v", stopped, err)
		}
		if err != nil {
			gone(t, name)
		} else {
			os.RemoveAll(name)
		}
	}
	if len(passes) < 4 {
		t.Errorf("passes: %v", passes)
	}
	if _, err := scavenge.Run(t.Context(), img, filepath.Join(t.TempDir(), "x"), scavenge.Options{Memory: 4096}); !errors.Is(err, scavenge.ErrMemory) {
		t.Errorf("4 KiB of memory: %v", err)
	}
}
