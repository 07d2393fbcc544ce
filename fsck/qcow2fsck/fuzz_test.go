package qcow2fsck

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/mutate"
)

// fuzzShapes are images of some tens of KiB, of every kind of cluster and
// table, so that one execution costs little.
var fuzzShapes = []struct {
	options string
	size    string
	steps   []string // qemu-io commands, or qemu-img ones with IMG
}{
	{"cluster_size=512", "96k", []string{"write -P 1 0 10000", "write -P 2 48k 5000", "write -z 4k 2k"}},
	{"cluster_size=512", "64k", []string{"write -P 1 0 10000", "snapshot -c a IMG", "write -P 2 4k 3000", "snapshot -c b IMG", "write -P 3 60k 1k"}},
	{"cluster_size=512,compat=0.10", "64k", []string{"write -P 1 0 10000", "snapshot -c a IMG", "write -P 2 4k 3000"}},
	{"cluster_size=4096", "128k", []string{"write -c -P 1 0 32k", "write -P 2 64k 8k", "write -z 16k 4k"}},
	{"cluster_size=4096,compression_type=zstd", "64k", []string{"write -c -P 1 0 32k", "write -P 2 40k 8k"}},
	{"cluster_size=1024,refcount_bits=1", "64k", []string{"write -P 1 0 10000"}},
	{"cluster_size=4096,refcount_bits=64", "128k", []string{"write -P 1 0 10000", "snapshot -c a IMG", "write -P 2 4k 3000"}},
	{"cluster_size=512", "64k", []string{"write -P 1 0 10000", "bitmap --add -g 512 IMG one", "bitmap --add IMG two", "write -P 2 4k 3000"}},
	{"cluster_size=16k,extended_l2=on", "128k", []string{"write -P 1 0 10000", "write -P 2 64k 512", "write -z 32k 1k"}},
}

func fuzzSeeds(t testing.TB) (all []*intact) {
	t.Helper()
	imgtest.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	for _, s := range fuzzShapes {
		path := filepath.Join(dir, "image")
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-o", s.options, path, s.size)
		for _, step := range s.steps {
			if strings.Contains(step, "IMG") {
				imgtest.QemuImg(t, strings.Fields(strings.ReplaceAll(step, "IMG", path))...)
			} else {
				imgtest.QemuIO(t, "qcow2", path, step)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		in := &intact{name: s.options, dir: dir, b: b}
		if in.original, err = content(backend.NewMemBytes("image", b), dir, nil); err != nil {
			t.Fatal(err)
		}
		in.findMeta(t)
		all = append(all, in)
	}
	return all
}

// fuzzMemory is what one execution may allocate, all rounds of the repair, the
// undo and the comparison together.
const fuzzMemory = 64 << 20

// damageBy damages an image as a script says: each four bytes change a byte
// of metadata, or a field of the header or a table into a value that is nearly
// right.
func (in *intact) damageBy(script []byte) []byte {
	b := append([]byte(nil), in.b...)
	for ; len(script) >= 4; script = script[4:] {
		if script[0]&0x80 != 0 {
			b = mutate.Apply("qcow2", b, append([]byte{script[0] & 0x7f}, script[1:4]...))
			continue
		}
		r := in.meta[int(script[0])%len(in.meta)]
		n := min(r.Len, int64(len(b))-r.Off)
		b[r.Off+(int64(script[1])<<8|int64(script[2]))%n] ^= script[3] | 1
	}
	// A damaged table may have led to the data, which is nobody's to repair.
	out := append([]byte(nil), in.b...)
	for _, r := range in.meta {
		end := min(r.Off+r.Len, int64(len(b)))
		copy(out[r.Off:end], b[r.Off:end])
	}
	return out
}

// FuzzRepair: whatever is damaged in the metadata, a full repair leaves an
// image that is clean, in which only what was damaged or named has changed, and
// its undo file restores the damaged one. See TestRandomDamage.
func FuzzRepair(f *testing.F) {
	all := fuzzSeeds(f)
	for i := range all {
		f.Add(byte(i), byte(0), []byte{0, 0, 20, 1, 0x80, 16, 3, 255})
		f.Add(byte(i), byte(1), []byte{0x80, byte(3 * i), byte(i), 7, 2, 0, 60, 255, 1, 0, 1, 0x80})
	}
	f.Add(byte('_'), byte('\f'), []byte("80&0")) // a thousand leaks, each of which had a buffer of 1 MiB
	f.Fuzz(func(t *testing.T, seed, flags byte, script []byte) {
		if len(script) > 40 {
			return
		}
		in := all[int(seed)%len(all)]
		o := options(in.dir)
		o.Data, o.Memory = true, []int64{0, 1}[flags&1]
		o.Parallel = 1
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if msg := in.tryImage(in.damageBy(script), o); msg != "" {
			t.Fatalf("%s: %s", in.name, msg)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > fuzzMemory {
			t.Fatalf("%s: %d MiB of memory allocated", in.name, n>>20)
		}
	})
}

// TestRepairFound repeats what fuzzing found, on every image.
func TestRepairFound(t *testing.T) {
	for _, in := range fuzzSeeds(t) {
		for _, script := range [][]byte{
			// header_length damaged, and the compression type lies behind it.
			{0xfb, 0x1c, 0x1b, 0x96, 0xf0, 0x8d, 0xd7, 0x6, 0x84, 0x4f, 0x68, 0xb8, 0x19, 0x5f, 0x53, 0x71, 0x6, 0xe3, 0x45, 0xe7},
			// refcount_order damaged into one that is too small.
			{0x92, 0x5d, 0xa9, 0xb0, 0xe4, 0x38, 0xd5, 0x6e, 0x64, 0x53, 0x3, 0x8a, 0x5, 0x76, 0x13, 0x8a, 0xa2, 0xfa, 0xdd, 0x92, 0xa8, 0xb6, 0x3e, 0x4f},
			{0xb3, 0x2d, 0xf2, 0xc6, 0xdd, 0x6f, 0x1a, 0x90, 0x1, 0xd8, 0x78, 0xde, 0x12, 0xa3, 0xb8, 0x47, 0xdd, 0xb3, 0x48, 0x6, 0x60, 0x56, 0xf6, 0x77},
			// The last cluster is cut off and copied.
			{0xb9, 0x74, 0x6b, 0x9f, 0x5, 0xf5, 0xd0, 0xde, 0xbe, 0x27, 0xb1, 0x4a, 0x85, 0xb7, 0xdd, 0x92, 0xa7, 0x77, 0x20, 0xe9},
		} {
			for memory := range int64(2) {
				o := options(in.dir)
				o.Data, o.Memory, o.Parallel = true, memory, 1
				if msg := in.tryImage(in.damageBy(script), o); msg != "" {
					t.Errorf("%s, memory %d, script %#v: %s", in.name, memory, script, msg)
				}
			}
		}
	}
}

// TestRepairSmall goes through random scripts of FuzzRepair, as many as the
// time allows; QCOW2FSCK_SECONDS makes it longer.
func TestRepairSmall(t *testing.T) {
	all := fuzzSeeds(t)
	limit, first := 2*time.Second, uint64(0)
	if s, err := strconv.Atoi(os.Getenv("QCOW2FSCK_SECONDS")); err == nil {
		limit, first = time.Duration(s)*time.Second, uint64(time.Now().UnixNano())
	}
	n := 0
	for end := time.Now().Add(limit); time.Now().Before(end) && !t.Failed(); n++ {
		rng := rand.New(rand.NewPCG(first+uint64(n), 11))
		in := all[rng.IntN(len(all))]
		script := make([]byte, 4*(1+rng.IntN(6)))
		for i := range script {
			script[i] = byte(rng.Uint32())
		}
		o := options(in.dir)
		o.Data, o.Memory, o.Parallel = true, rng.Int64N(2), 1
		if msg := in.tryImage(in.damageBy(script), o); msg != "" {
			t.Errorf("%s, script %#v: %s", in.name, script, msg)
		}
	}
	t.Logf("%d executions", n)
}
