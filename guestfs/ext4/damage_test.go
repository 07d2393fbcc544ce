package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

func free(r io.ReaderAt, size int64) (*blockmap.Set, error) {
	s, _, err := guesttest.JudgeAt(r, size, Free)
	return s, err
}

// dirtyImage is a small filesystem that was copied while mounted.
func dirtyImage(t testing.TB, args string, options ...string) []byte {
	t.Helper()
	path := mkfs(t, 24<<20, args)
	dir, umount := guesttest.Mount(t, path, options...)
	guesttest.Age(t, dir, 3, 40, 300_000)
	b, err := os.ReadFile(guesttest.Copy(t, path))
	if err != nil {
		t.Fatal(err)
	}
	umount()
	return b
}

// Whatever byte changes in anything that is read, no more becomes free: every
// byte of the superblock and a sample of all others.
func TestDamagedByte(t *testing.T) {
	guesttest.Require(t, "mke2fs")
	for _, c := range []struct {
		args   string
		sample int
	}{{"-b 1024 -O metadata_csum,64bit", 1500}, {"-b 1024 -O bigalloc -C 4096", 1500}, {"-b 4096 -O metadata_csum_seed,orphan_file", 1500}} {
		t.Run(c.args, func(t *testing.T) {
			t.Parallel()
			var super []int64
			for at := range int64(superSize) {
				super = append(super, superOffset+at)
			}
			guesttest.DamagedBytes(t, dirtyImage(t, c.args), Free, super, c.sample)
		})
	}
}

// Without checksums the copy of the superblock and the counts still notice.
func TestDamagedByteWithoutSums(t *testing.T) {
	imgtest.Require(t, "mke2fs")
	b, err := os.ReadFile(mkfs(t, 24<<20, "-t ext2 -b 1024"))
	if err != nil {
		t.Fatal(err)
	}
	good, err := free(bytes.NewReader(b), int64(len(b)))
	if err != nil || good.Len() == 0 {
		t.Fatal(err)
	}
	for at := int64(1024); at < 4096; at++ { // superblock, descriptors
		for _, x := range []byte{1, 2, 0x10, 0x80, 0xff} {
			got, _ := free(guesttest.Damaged{Base: bytes.NewReader(b), At: at, Xor: x}, int64(len(b)))
			for r := range got.Ranges() {
				if !good.Contains(r.Off, r.Len) {
					t.Fatalf("byte %#x ^ %#x: %d+%d is free, was used", at, x, r.Off, r.Len)
				}
			}
		}
	}
}

// resum makes the checksum of the superblock right again.
func resum(b []byte) {
	s := b[superOffset:][:superSize]
	binary.LittleEndian.PutUint32(s[superCsumAt:], crc32c(^uint32(0), s[:superCsumAt]))
}

// Every reason for a refusal, on a filesystem that is right otherwise.
func TestRefusals(t *testing.T) {
	guesttest.Require(t, "mke2fs", "debugfs")
	clean, err := os.ReadFile(mkfs(t, 24<<20, "-b 1024 -O mmp"))
	if err != nil {
		t.Fatal(err)
	}
	dirty := dirtyImage(t, "-b 1024")
	le := binary.LittleEndian
	or := func(at int, bit uint32) func([]byte) {
		return func(b []byte) { le.PutUint32(b[superOffset+at:], le.Uint32(b[superOffset+at:])|bit) }
	}
	for _, c := range []struct {
		name   string
		base   []byte
		breaks func(b []byte)
		want   freespace.Code
	}{
		{"unknown compat", clean, or(92, 1<<30), freespace.UnknownFeature},
		{"unknown incompat", clean, or(96, 1<<30), freespace.UnknownFeature},
		{"unknown ro_compat", clean, or(100, 1<<30), freespace.UnknownFeature},
		{"unassigned incompat", clean, or(96, 0x800), freespace.UnknownFeature},
		{"compression", clean, or(96, 1), freespace.Unsupported},
		{"journal device", clean, or(96, 8), freespace.Unsupported},
		{"has_snapshot", clean, or(100, 0x80), freespace.Unsupported},
		{"shared_blocks", clean, or(100, 0x4000), freespace.Unsupported},
		{"exclude_bitmap", clean, or(92, 0x100), freespace.Unsupported},
		{"external journal", clean, or(0xe4, 7), freespace.Unsupported},
		{"error state", clean, func(b []byte) { b[superOffset+58] |= 2 }, freespace.ErrorState},
		{"error count", clean, or(0x194, 1), freespace.ErrorState},
		{"not valid", clean, func(b []byte) { b[superOffset+58] = 0 }, freespace.NotClean},
		{"orphans in recovery", clean, func(b []byte) { b[superOffset+58] |= 4 }, freespace.NotClean},
		{"two kinds of sums", clean, or(100, roGDTCsum), freespace.Damaged},
		{"larger than its place", clean, func(b []byte) { le.PutUint32(b[superOffset+4:], 1<<20) }, freespace.Damaged},
		{"block size", clean, func(b []byte) { b[superOffset+24] = 200 }, freespace.Damaged},
		{"no groups", clean, func(b []byte) { le.PutUint32(b[superOffset+32:], 0) }, freespace.Damaged},
		{"dirty and fast commit", dirty, or(92, compatFastCommit), freespace.NotClean},
		{"dirty and no journal", dirty, func(b []byte) { b[superOffset+92] &^= compatHasJournal }, freespace.Damaged},
		{"transactions and not dirty", dirty, func(b []byte) { b[superOffset+96] &^= incompatRecover }, freespace.Damaged},
		{"not the journal", dirty, func(b []byte) { le.PutUint32(b[superOffset+0xe0:], 2) }, freespace.Damaged},
		{"mounted", clean, func(b []byte) {
			at := int(le.Uint64(b[superOffset+0x168:])) * 1024
			le.PutUint32(b[at+4:], 17)
			s := crc32c(^uint32(0), b[superOffset+104:][:16])
			le.PutUint32(b[at+superCsumAt:], crc32c(s, b[at:at+superCsumAt]))
		}, freespace.InUse},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := bytes.Clone(c.base)
			c.breaks(b)
			resum(b)
			_, err := free(bytes.NewReader(b), int64(len(b)))
			guesttest.Refused(t, c.name, err, c.want)
		})
	}
	t.Run("truncated", func(t *testing.T) {
		_, err := free(bytes.NewReader(clean), int64(len(clean))-1024)
		guesttest.Refused(t, "truncated", err, freespace.Truncated)
	})
	t.Run("whole", func(t *testing.T) {
		for _, b := range [][]byte{clean, dirty} {
			if s, err := free(bytes.NewReader(b), int64(len(b))); err != nil || s.Len() == 0 {
				t.Error(err)
			}
		}
	})
}

// Metadata that the bitmap calls free, with all checksums right: debugfs
// writes them.
func TestMetadataMarkedFree(t *testing.T) {
	imgtest.Require(t, "mke2fs", "debugfs")
	for _, args := range []string{"-b 1024", "-t ext2 -b 1024", "-b 1024 -O uninit_bg,^metadata_csum"} {
		path := mkfs(t, 24<<20, args)
		if _, _, err := guesttest.Judge(t, path, Free); err != nil {
			t.Fatal(err)
		}
		for _, block := range []string{"1", "2", "300"} { // superblock, descriptors, the first inode table
			broken := guesttest.Copy(t, path)
			script := filepath.Join(t.TempDir(), "script")
			if err := os.WriteFile(script, []byte("freeb "+block+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			imgtest.Run(t, "debugfs", "-w", "-f", script, broken)
			_, _, err := guesttest.Judge(t, broken, Free)
			var r *freespace.Refusal
			if !errors.As(err, &r) || r.Code != freespace.Damaged || !strings.Contains(r.Text, "metadata") {
				t.Errorf("%s, block %s: %v", args, block, err)
			}
		}
	}
}
