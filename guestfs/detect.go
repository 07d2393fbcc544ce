package guestfs

import (
	"encoding/binary"
	"io"

	"github.com/imagestack/imagestack/guestfs/btrfs"
	"github.com/imagestack/imagestack/guestfs/ext4"
	"github.com/imagestack/imagestack/guestfs/fat"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/guestfs/lvm"
	"github.com/imagestack/imagestack/guestfs/ntfs"
	"github.com/imagestack/imagestack/guestfs/swap"
	"github.com/imagestack/imagestack/guestfs/xfs"
)

// headSize is where the signatures at the start of an area lie: that of btrfs,
// at 64 KiB, is the last, but for the pages of swap.
const headSize = 72 << 10

// format is a kind of content: how it is recognised and who judges it.
type format struct {
	name   string
	detect func(head []byte) bool
	read   freespace.Reader // nil: not judged
}

// formats are all kinds that are known. Those that are not judged count as
// well: a second signature makes the first one doubtful.
var formats = []format{
	{"ext", ext4.Detect, ext4.Free},
	{"xfs", xfs.Detect, xfs.Free},
	{"btrfs", btrfs.Detect, btrfs.Free},
	{"swap", swap.Detect, swap.Free},
	{"hibernation", swap.DetectSuspended, nil},
	{"lvm2", lvm.Detect, nil}, // judged by judge.lvm
	{"ntfs", ntfs.Detect, ntfs.Free},
	{"exfat", fat.DetectExFAT, fat.FreeExFAT},
	{"fat", fat.Detect, fat.Free},
	{"bitlocker", magic(3, "-FVE-FS-"), nil},
	// On removable media BitLocker hides behind a FAT.
	{"bitlocker", magic(424, "\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01"), nil},
	{"luks", magic(0, "LUKS\xba\xbe"), nil},
	{"md", magic(0, "\xfc\x4e\x2b\xa9"), nil},
	{"md", magic(4096, "\xfc\x4e\x2b\xa9"), nil},
	{"bcache", magic(4096+24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"), nil},
	{"bcachefs", magic(4096+24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"), nil},
	{"f2fs", magic(1024, "\x10\x20\xf5\xf2"), nil},
	{"erofs", magic(1024, "\xe2\xe1\xf5\xe0"), nil},
	{"nilfs2", magic(1024+6, "\x34\x34"), nil},
	{"hfsplus", magic(1024, "H+\x00\x04"), nil},
	{"hfsx", magic(1024, "HX\x00\x05"), nil},
	{"apfs", magic(32, "NXSB"), nil},
	{"jfs", magic(32768, "JFS1"), nil},
	{"reiserfs", magic(65536+52, "ReIsEr"), nil},
	{"iso9660", magic(32769, "CD001"), nil},
	{"squashfs", magic(0, "hsqs"), nil},
	{"vdo", magic(0, "dmvdo001"), nil},
}

func magic(at int, m string) func([]byte) bool {
	return func(head []byte) bool { return len(head) >= at+len(m) && string(head[at:at+len(m)]) == m }
}

// signatures are all the kinds of content that an area of size bytes shows.
func signatures(r io.ReaderAt, size int64) ([]format, error) {
	head := make([]byte, min(size, headSize))
	if err := freespace.ReadAt(r, head, 0); err != nil {
		return nil, err
	}
	var found []format
	for _, f := range formats {
		if f.detect(head) {
			found = append(found, f)
		}
	}
	tail, err := mdAtEnd(r, size)
	if err != nil {
		return nil, err
	}
	if tail {
		found = append(found, format{name: "md"})
	}
	zfs, err := hasUberblock(r, size)
	if err != nil {
		return nil, err
	}
	if zfs {
		found = append(found, format{name: "zfs"})
	}
	return found, nil
}

// hasUberblock looks for a member of a ZFS pool: the second half of its first
// label is an array of uberblocks. The first 8 KiB of a label stay as they
// were, so that another filesystem's superblock can be left there.
func hasUberblock(r io.ReaderAt, size int64) (bool, error) {
	const at, n, step, uberblock = 128 << 10, 128 << 10, 1 << 10, 0x00bab10c
	if size < at+n {
		return false, nil
	}
	b := make([]byte, n)
	if err := freespace.ReadAt(r, b, at); err != nil {
		return false, err
	}
	for ; len(b) >= step; b = b[step:] {
		if binary.LittleEndian.Uint64(b) == uberblock || binary.BigEndian.Uint64(b) == uberblock {
			return true, nil
		}
	}
	return false, nil
}

// mdAtEnd looks for the superblocks of MD arrays that lie at the end, version
// 0.90 and 1.0, behind a filesystem that looks like any other.
func mdAtEnd(r io.ReaderAt, size int64) (bool, error) {
	for _, at := range []int64{size&^(64<<10-1) - 64<<10, (size/512 - 16) &^ 7 * 512} {
		if at < 0 || at+4 > size {
			continue
		}
		b := make([]byte, 4)
		if err := freespace.ReadAt(r, b, at); err != nil {
			return false, err
		}
		const mdMagic = 0xa92b4efc
		if binary.LittleEndian.Uint32(b) == mdMagic || binary.BigEndian.Uint32(b) == mdMagic {
			return true, nil
		}
	}
	return false, nil
}
