package ext4

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

// oracle is what dumpe2fs lists as free, in bytes.
func oracle(t testing.TB, path string) *blockmap.Set {
	t.Helper()
	var block, cluster int64
	var s blockmap.Set
	number := func(v string) int64 {
		n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	groups := 0
	for line := range strings.Lines(string(imgtest.Run(t, "dumpe2fs", path))) {
		name, value, _ := strings.Cut(line, ":")
		switch name {
		case "Block size":
			block = number(value)
			cluster = block
		case "Cluster size":
			cluster = number(value)
		case "  Free blocks":
			groups++
			for item := range strings.SplitSeq(strings.TrimSpace(value), ", ") {
				if item == "" {
					continue
				}
				from, to, many := strings.Cut(item, "-")
				if !many {
					to = from
				}
				// With bigalloc the first block of each cluster is named.
				s.Add(number(from)*block, (number(to)-number(from))*block+cluster)
			}
		}
	}
	if groups == 0 {
		t.Fatal("dumpe2fs lists no group")
	}
	return &s
}

// variants are filesystems with every feature that concerns the bitmaps.
var variants = []struct {
	name    string
	size    int64
	args    string
	journal bool
}{
	{"default", 64 << 20, "", true},
	{"1k", 64 << 20, "-b 1024", true},
	{"2k", 96 << 20, "-b 2048", true},
	{"64bit 1k", 48 << 20, "-b 1024 -O 64bit", true},
	{"32bit", 48 << 20, "-b 1024 -O ^64bit", true},
	{"no flex_bg", 48 << 20, "-b 1024 -O ^flex_bg", true},
	{"flex 4", 80 << 20, "-b 1024 -G 4", true},
	{"meta_bg", 96 << 20, "-b 1024 -O meta_bg,^resize_inode", true},
	{"meta_bg 64bit", 300 << 20, "-b 1024 -O meta_bg,^resize_inode,64bit -N 2048", true},
	{"uninit_bg", 64 << 20, "-b 1024 -O ^metadata_csum,uninit_bg", true},
	{"uninit_bg 64bit", 64 << 20, "-b 1024 -O ^metadata_csum,uninit_bg,64bit", true},
	{"uninit_bg 32bit", 64 << 20, "-b 1024 -O ^metadata_csum,uninit_bg,^64bit", true},
	{"no sums", 48 << 20, "-b 1024 -O ^metadata_csum,^uninit_bg", true},
	{"sums 32bit", 48 << 20, "-b 1024 -O metadata_csum,^64bit", true},
	{"csum_seed", 48 << 20, "-b 1024 -O metadata_csum_seed", true},
	{"bigalloc", 256 << 20, "-O bigalloc -C 16384", true},
	{"bigalloc 64k", 256 << 20, "-O bigalloc -C 65536 -N 4096", true},
	{"bigalloc 1k", 64 << 20, "-b 1024 -O bigalloc -C 4096", true},
	{"bigalloc no sums", 64 << 20, "-b 1024 -O bigalloc,^metadata_csum -C 8192", true},
	{"sparse_super2", 64 << 20, "-b 1024 -O sparse_super2", true},
	{"sparse_super2 none", 64 << 20, "-b 1024 -O sparse_super2 -E num_backup_sb=0", true},
	{"no sparse_super", 64 << 20, "-b 1024 -O ^sparse_super,^resize_inode", true},
	{"mmp", 48 << 20, "-b 1024 -O mmp", true},
	{"orphan_file", 48 << 20, "-b 1024 -O orphan_file", true},
	{"fast_commit", 48 << 20, "-b 1024 -O fast_commit", false}, // refused while dirty
	{"more", 48 << 20, "-b 1024 -O ea_inode,large_dir,inline_data,verity,encrypt,stable_inodes -I 256", true},
	{"odd end", 41<<20 + 7*1024, "-b 1024", true},
	{"odd groups", 64 << 20, "-b 1024 -g 1032", true},
	{"packed", 64 << 20, "-b 1024 -E packed_meta_blocks=1", true},
	{"ext2", 48 << 20, "-t ext2 -b 1024", false},
	{"ext2 4k", 48 << 20, "-t ext2 -b 4096", false},
	{"ext2 rev 0", 48 << 20, "-t ext2 -b 1024 -r 0 -O none", false},
	{"ext3", 48 << 20, "-t ext3 -b 1024", true},
	{"ext4 no journal", 48 << 20, "-O ^has_journal", false},
}

func mkfs(t testing.TB, size int64, args string) string {
	t.Helper()
	path := guesttest.Image(t, size)
	a := append([]string{"-q", "-F"}, strings.Fields(args)...)
	if !strings.Contains(args, "-t ") {
		a = append([]string{"-t", "ext4"}, a...)
	}
	imgtest.Run(t, "mke2fs", append(a, path)...)
	return path
}

// exact fails the test unless the reader and dumpe2fs agree to the byte.
func exact(t testing.TB, path, when string) {
	t.Helper()
	guesttest.Exact(t, path, when, Free, oracle(t, path))
}

// Every variant: new, aged and unmounted, and copied while mounted. A dirty
// copy is judged against what the kernel's own replay makes of it.
func TestAgainstDumpe2fs(t *testing.T) {
	guesttest.Require(t, "mke2fs", "dumpe2fs", "e2fsck")
	for i, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := mkfs(t, v.size, v.args)
			exact(t, path, "new")
			dir, umount := guesttest.Mount(t, path)
			guesttest.Age(t, dir, uint64(i), 60, v.size/40)
			held := holdDeleted(t, dir)
			guesttest.Age(t, dir, uint64(i)+1000, 25, v.size/40)
			dirty := guesttest.Copy(t, path)
			held.Close()
			umount()
			exact(t, path, "aged")
			got, info, err := guesttest.Judge(t, dirty, Free)
			if !v.journal {
				guesttest.Refused(t, "dirty, no journal to replay", err, freespace.NotClean)
				return
			}
			if v.name == "mmp" {
				guesttest.Refused(t, "mounted", err, freespace.InUse)
				return
			}
			if err != nil || info.Replayed == 0 {
				t.Fatalf("dirty: %v, %d blocks replayed", err, info.Replayed)
			}
			replayed := guesttest.Copy(t, dirty)
			imgtest.Try(t, "e2fsck", "-y", "-E", "journal_only", replayed)
			want := oracle(t, replayed)
			guesttest.Inside(t, got, want)
			// e2fsck deletes the orphan as well: 300,000 bytes in whole
			// clusters, which stay used here.
			if d := want.Len() - got.Len(); d < 300_000 || d > 300_000+4*info.BlockSize {
				t.Errorf("dirty: %d bytes free, after e2fsck's replay dumpe2fs says %d", got.Len(), want.Len())
			}
			_, umount = guesttest.Mount(t, dirty) // the kernel's replay, and the orphans
			umount()
			guesttest.Inside(t, got, oracle(t, dirty))
		})
	}
}

// Features that not every kernel mounts.
func TestNewAgainstDumpe2fs(t *testing.T) {
	imgtest.Require(t, "mke2fs", "dumpe2fs")
	for _, args := range []string{"-O quota,project", "-O casefold", "-O quota -b 1024 -E quotatype=usrquota:grpquota", "-b 65536", "-g 256 -b 1024 -O ^resize_inode"} {
		exact(t, mkfs(t, 64<<20, args), args)
	}
}

// holdDeleted makes a file that is deleted and still open: an orphan.
func holdDeleted(t testing.TB, dir string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "orphan"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(make([]byte, 300_000)); err != nil {
		t.Log(err) // full
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	return f
}

// The trap: 20 files are synced, and the image is copied before the journal's
// checkpoint. Tools that read the bitmaps alone take these files for free.
func TestJournalTrap(t *testing.T) {
	guesttest.Require(t, "mke2fs", "dumpe2fs")
	for _, args := range []string{"", "-b 1024 -O ^metadata_csum,^64bit", "-t ext3 -b 1024", "-O 64bit"} {
		for _, option := range []string{"journal_checksum", "nojournal_checksum", "data=journal"} {
			t.Run(args+" "+option, func(t *testing.T) {
				t.Parallel()
				path := mkfs(t, 64<<20, args)
				if strings.Contains(args, "ext3") {
					option = "data=journal"
				}
				dir, umount := guesttest.Mount(t, path, option)
				for i := range 20 {
					f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
					if err != nil {
						t.Fatal(err)
					}
					b := imgtest.PatternBytes(uint64(i), 0, 100_000)
					copy(b, []byte{0xc0, 0x3b, 0x39, 0x98}) // the journal's magic: escaped with data=journal
					if _, err := f.Write(b); err != nil {
						t.Fatal(err)
					}
					if err := f.Sync(); err != nil {
						t.Fatal(err)
					}
					f.Close()
				}
				dirty := guesttest.Copy(t, path)
				umount()
				got, info, err := guesttest.Judge(t, dirty, Free)
				if err != nil || info.Replayed == 0 {
					t.Fatalf("%v, %d blocks replayed", err, info.Replayed)
				}
				guesttest.Trash(t, dirty, got)
				dir, umount = guesttest.Mount(t, dirty)
				for i := range 20 {
					b, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i)))
					want := imgtest.PatternBytes(uint64(i), 0, 100_000)
					copy(want, []byte{0xc0, 0x3b, 0x39, 0x98})
					if err != nil || !bytes.Equal(b, want) {
						t.Errorf("file %d: lost (%v)", i, err)
					}
				}
				umount()
				imgtest.Run(t, "e2fsck", "-fn", dirty)
			})
		}
	}
}
