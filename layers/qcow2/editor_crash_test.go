package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers"
	"golang.org/x/sys/unix"
)

// crashImages are the starting points of the crash and fault tests: small
// images by QEMU in which clusters are shared, compressed and zero.
func crashImages(t *testing.T, each func(t *testing.T, start *backend.Mem, model, snap []byte)) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	for name, opts := range map[string]string{
		"v3-512":    "cluster_size=512",
		"v2-512":    "cluster_size=512,compat=0.10",
		"extl2-16k": "cluster_size=16384,extended_l2=on",
		"v3-4k-rc8": "cluster_size=4096,refcount_bits=8",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", opts, path, "160k")
			imgtest.QemuIO(t, "qcow2", path, "write -c -P 1 0 16k", "write -c -P 2 32k 16k", "write -P 3 64k 32k")
			imgtest.QemuImg(t, "snapshot", "-c", "before", path)
			snap := qemuRead(t, path, "before")
			imgtest.QemuIO(t, "qcow2", path, "write -P 4 80k 40k", "write -z 64k 8k")
			model := qemuRead(t, path, "")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			each(t, backend.NewMemBytes("image", b), model, snap)
		})
	}
}

// script makes n random changes with a Sync here and there. after is called
// with the content that the image has then; synced tells that the step was a
// Sync.
func script(img *Image, rng *rand.Rand, n int, model []byte, after func(model []byte, synced bool)) error {
	ctx := context.Background()
	below := nothing()
	size := int64(len(model))
	for i := range n {
		off := rng.Int64N(size/512) * 512
		k := min(512*(1+rng.Int64N(24)), size-off)
		var err error
		synced := false
		switch rng.IntN(4) {
		case 0:
			err = img.ZeroAt(ctx, off, k, rng.IntN(2) == 0, below)
			clear(model[off : off+k])
		case 1:
			if i == 0 {
				continue
			}
			err, synced = img.Sync(ctx), true
		default:
			p := bytes.Repeat([]byte{byte(10 + i)}, int(k))
			err = img.WriteAt(ctx, p, off, below)
			copy(model[off:], p)
		}
		if err != nil {
			return err
		}
		if after != nil {
			after(model, synced)
		}
	}
	return nil
}

// TestPowerCutQemuImages cuts the power at every moment while an image with a
// snapshot, compressed and zero clusters is changed. The checker finds leaks
// at most, the snapshot is untouched, and every byte has a value not older
// than the last completed Sync.
func TestPowerCutQemuImages(t *testing.T) {
	crashImages(t, func(t *testing.T, start *backend.Mem, model, snap []byte) {
		dir := t.TempDir()
		for seed := range uint64(3) {
			type step struct {
				content       []byte
				before, after int // completed syncs
				synced        bool
			}
			rec := backend.NewRecorder()
			m := start.Clone()
			f, err := rec.Wrap(m)
			if err != nil {
				t.Fatal(err)
			}
			img := reopenMem(t, f, m)
			steps := []step{{content: bytes.Clone(model), synced: true}}
			last := 0
			err = script(img, rand.New(rand.NewPCG(seed, 2)), 14, bytes.Clone(model), func(now []byte, synced bool) {
				steps = append(steps, step{bytes.Clone(now), last, rec.Syncs(), synced})
				last = rec.Syncs()
			})
			if err == nil {
				err = img.closeEditor()
			}
			if err != nil {
				t.Fatal(err)
			}
			asked := 0
			for s := range rec.States(backend.StateOptions{Exhaustive: 4, Random: 8, MaxPerEpoch: 14, Seed: seed}) {
				if err := inspect(context.Background(), s.Files[0], true); err != nil {
					t.Fatalf("seed %d, %s: %v", seed, s, err)
				}
				from, to := 0, 0
				for i, p := range steps {
					if p.synced && p.after <= s.Completed {
						from = i
					}
					if p.before <= s.Completed {
						to = i
					}
				}
				got := memContent(t, s.Files[0], "")
			bytes:
				for b := range got {
					for _, p := range steps[from : to+1] {
						if got[b] == p.content[b] {
							continue bytes
						}
					}
					t.Fatalf("seed %d, %s: byte %#x is %#x, of steps %d to %d", seed, s, b, got[b], from, to)
				}
				same(t, fmt.Sprintf("seed %d, %s: snapshot", seed, s), memContent(t, s.Files[0], "before"), snap)
				if asked++; asked%40 == 1 { // the other program's opinion, now and then
					path := filepath.Join(dir, "state.qcow2")
					if err := os.WriteFile(path, s.Files[0].Bytes(), 0o600); err != nil {
						t.Fatal(err)
					}
					if status, out := imgtest.QemuCheck(t, path, "qcow2"); status != 0 && status != 3 {
						t.Fatalf("seed %d, %s: qemu-img check: %d\n%s", seed, s, status, out)
					}
				}
			}
			if asked < 20 {
				t.Fatalf("only %d states", asked)
			}
		}
	})
}

func memContent(t testing.TB, m *backend.Mem, snapshot string) []byte {
	t.Helper()
	img, err := Open(context.Background(), m, layers.OpenOptions{Snapshot: snapshot})
	if err != nil {
		t.Fatal(err)
	}
	got, err := readAll(img, nil)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestFaultsQemuImages fails every operation of such a run once, with EIO and
// with ENOSPC. The error comes out, the image is sound at any time and whole
// after the same work was done again.
func TestFaultsQemuImages(t *testing.T) {
	crashImages(t, func(t *testing.T, start *backend.Mem, model, snap []byte) {
		for _, errno := range []error{unix.EIO, unix.ENOSPC} {
			for i := 1; ; i++ {
				m := start.Clone()
				fault := backend.NewFault(m)
				img := reopenMem(t, fault, m)
				// A sector is written whole or not.
				fault.Inject(backend.Rule{On: backend.OpRead | backend.OpChange&^backend.OpPunch, Nth: i, Err: errno, Short: 512 * (i % 2)})
				now := bytes.Clone(model)
				rng := rand.New(rand.NewPCG(3, 3))
				err := script(img, rng, 25, now, nil)
				if err == nil {
					err = img.Sync(context.Background())
				}
				fired := fault.Fired() > 0
				fault.Clear()
				// When there is no room for a step ahead a smaller one is made.
				// A read that failed with all its bytes there is no failure.
				if fired && err == nil && errno == unix.EIO && i%2 == 0 {
					t.Fatalf("operation %d failed and nobody said so", i)
				}
				if err := inspect(context.Background(), m, true); err != nil {
					t.Fatalf("operation %d, %v: %v", i, errno, err)
				}
				now = bytes.Clone(model)
				for off := int64(0); off < int64(len(now)); off += 3000 {
					n := min(1500, int64(len(now))-off)
					if err := img.WriteAt(context.Background(), bytes.Repeat([]byte{200}, int(n)), off, layertest.NewBelow(nil, 1)); err != nil {
						t.Fatalf("operation %d, %v: write afterwards: %v", i, errno, err)
					}
				}
				if err := img.closeEditor(); err != nil {
					t.Fatalf("operation %d, %v: close: %v", i, errno, err)
				}
				if err := inspect(context.Background(), m, true); err != nil {
					t.Fatalf("operation %d, %v, at the end: %v", i, errno, err)
				}
				same(t, "snapshot", memContent(t, m, "before"), snap)
				if !fired {
					if err := inspect(context.Background(), m, false); err != nil {
						t.Fatalf("without a fault: %v", err)
					}
					break
				}
			}
		}
	})
}
