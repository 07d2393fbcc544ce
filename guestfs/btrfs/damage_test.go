package btrfs

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

// agedImage is a filesystem that lived and was unmounted.
func agedImage(t testing.TB, args string) []byte {
	t.Helper()
	path := mkfs(t, 128<<20, args)
	dir, umount := guesttest.Mount(t, path)
	guesttest.Age(t, dir, 5, 200, 100_000)
	umount()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// resum makes the checksum of a superblock or tree block right again.
func resum(b []byte) { copy(b, sums[0](b[sumSize:])) }

func judge(b []byte) error {
	_, _, err := guesttest.JudgeAt(bytes.NewReader(b), int64(len(b)), Free)
	return err
}

func TestDamagedByte(t *testing.T) {
	guesttest.Require(t, "mkfs.btrfs")
	var super []int64
	for at := range int64(superSize) {
		super = append(super, superOffset+at)
	}
	guesttest.DamagedBytes(t, agedImage(t, "-n 4096"), Free, super, 1500)
}

// nodes notes where tree blocks are read.
type nodes struct {
	r    io.ReaderAt
	size int
	at   map[int64]bool
}

func (n nodes) ReadAt(p []byte, off int64) (int, error) {
	if len(p) == n.size && off != superOffset && off != reserved[1].start {
		n.at[off] = true
	}
	return n.r.ReadAt(p, off)
}

// A changed bit in a tree block whose checksum is right: what the trees say
// of each other still shows it.
func TestDamageWithRightSum(t *testing.T) {
	guesttest.Require(t, "mkfs.btrfs")
	const node = 16384
	b := agedImage(t, "-n 16384 -m single")
	n := nodes{bytes.NewReader(b), node, map[int64]bool{}}
	good, _, err := guesttest.JudgeAt(n, int64(len(b)), Free)
	if err != nil || len(n.at) < 5 {
		t.Fatalf("%v, %d tree blocks", err, len(n.at))
	}
	rng := rand.New(rand.NewPCG(1, 3))
	refused, tries := 0, 0
	for at := range n.at {
		block := b[at : at+node]
		keep := bytes.Clone(block)
		entries := int(binary.LittleEndian.Uint32(block[96:]))
		for range 300 {
			// The header, and what stands in for pointers and items.
			block[sumSize+rng.IntN(headSize-sumSize+entries*itemSize)] ^= 1 << rng.IntN(8)
			resum(block)
			got, _, err := guesttest.JudgeAt(bytes.NewReader(b), int64(len(b)), Free)
			if tries++; err != nil {
				refused++
			}
			if outside(got, good) != 0 {
				t.Fatalf("tree block at %d: more is free", at)
			}
			copy(block, keep)
		}
	}
	if refused < tries/2 {
		t.Errorf("only %d of %d damages were refused", refused, tries)
	}
}

func TestRefusals(t *testing.T) {
	guesttest.Require(t, "mkfs.btrfs")
	base := agedImage(t, "")
	le := binary.LittleEndian
	or := func(at int, bit uint64) func([]byte) {
		return func(s []byte) { le.PutUint64(s[at:], le.Uint64(s[at:])|bit) }
	}
	for _, c := range []struct {
		name   string
		breaks func(super []byte)
		want   freespace.Code
	}{
		{"unknown compat", or(172, 1), freespace.UnknownFeature},
		{"unknown compat_ro", or(180, 1<<40), freespace.UnknownFeature},
		{"unknown incompat", or(188, 1<<40), freespace.UnknownFeature},
		{"zoned", or(188, incompatZoned), freespace.Unsupported},
		{"extent tree v2", or(188, incompatTreeV2), freespace.Unsupported},
		{"stripe tree", or(188, incompatStripeTree), freespace.Unsupported},
		{"block group tree that is not there", or(180, roGroupTree), freespace.Damaged},
		{"errors", or(56, superFlagError), freespace.ErrorState},
		{"seed", or(56, superFlagSeed), freespace.Unsupported},
		{"other flags", or(56, 1<<33), freespace.Unsupported},
		{"two devices", func(s []byte) { s[136] = 2 }, freespace.Unsupported},
		{"log tree that is not there", or(96, 1<<20), freespace.Damaged},
		{"checksum kind", func(s []byte) { s[196] = 9 }, freespace.UnknownFeature},
		{"used bytes", func(s []byte) { s[121] ^= 0x10 }, freespace.CountMismatch},
		{"device size", func(s []byte) { s[deviceAt+8+5]++ }, freespace.Truncated},
		{"node size", func(s []byte) { s[150] = 0xff }, freespace.Damaged},
		{"chunks", func(s []byte) { s[160] = 7 }, freespace.Damaged},
		{"level", func(s []byte) { s[198] = 7 }, freespace.Damaged},
		{"generation", func(s []byte) { s[72]-- }, freespace.Damaged},
		{"other device", func(s []byte) { s[deviceAt+66] ^= 1 }, freespace.Unsupported},
	} {
		b := bytes.Clone(base)
		s := b[superOffset:][:superSize]
		c.breaks(s)
		resum(s)
		guesttest.Refused(t, c.name, judge(b), c.want)
	}
	_, _, err := guesttest.JudgeAt(bytes.NewReader(base), int64(len(base))-4096, Free)
	guesttest.Refused(t, "truncated", err, freespace.Truncated)

	b := bytes.Clone(base)
	newer := b[reserved[1].start:][:superSize]
	newer[72] += 2
	resum(newer)
	guesttest.Refused(t, "newer copy", judge(b), freespace.Damaged)

	// Without the flag the free-space tree is not asked.
	b = bytes.Clone(base)
	s := b[superOffset:][:superSize]
	s[180] &^= roFreeSpaceValid
	resum(s)
	if err := judge(b); err != nil {
		t.Errorf("no valid free-space tree: %v", err)
	}
	if err := judge(base); err != nil {
		t.Error(err)
	}
}
