package scavenge_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/imagestack/imagestack/fsck/scavenge"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
	"github.com/imagestack/imagestack/layers"
)

// convert makes an image of a raw disk.
func convert(t testing.TB, disk, format string, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image."+format)
	imgtest.QemuImg(t, append(append([]string{"convert", "-f", "raw", "-O", format}, args...), disk, path)...)
	return path
}

// fsckGuest runs the filesystem's checker on a raw copy of the image.
func fsckGuest(t testing.TB, kind, format, name string) {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "fs")
	imgtest.QemuRaw(t, format, name, disk)
	switch kind {
	case "ext4":
		imgtest.Run(t, "e2fsck", "-fn", disk)
	case "xfs":
		imgtest.Run(t, "xfs_repair", "-n", "-f", disk)
	case "btrfs":
		imgtest.Run(t, "btrfs", "check", "--readonly", disk)
	}
}

func TestLostL1(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, kind string
		size       int64
		fs         []string
		args       []string
	}{
		{"ext4 64K", "ext4", 1 << 30, nil, nil},
		{"ext4 without checksums", "ext4", 1 << 30, []string{"-O", "^metadata_csum"}, nil},
		{"ext4 16K", "ext4", 1 << 30, nil, []string{"-o", "cluster_size=16k"}},
		{"ext4 v2 compressed", "ext4", 1 << 30, nil, []string{"-c", "-o", "compat=0.10"}},
		{"ext4 extended", "ext4", 1 << 30, nil, []string{"-o", "extended_l2=on,cluster_size=32k"}},
		{"xfs 64K", "xfs", 1 << 30, nil, nil},
		{"xfs 16K", "xfs", 1 << 30, nil, []string{"-o", "cluster_size=16k"}},
		{"btrfs 16K", "btrfs", 1 << 30, nil, []string{"-o", "cluster_size=16k"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := mkfs(t, c.kind, c.size, c.fs...)
			img := convert(t, disk, "qcow2", c.args...)
			loseL1(t, img, 0)
			name, r := run(t, img, scavenge.Options{})
			if r.New == "" {
				t.Fatal("nothing was rebuilt")
			}
			if code, out := imgtest.QemuCheck(t, name, "qcow2"); code != 0 {
				t.Errorf("qemu-img check: %d: %s", code, out)
			}
			same(t, r, "qcow2", name, disk)
			if r.UnplacedBytes == 0 {
				fsckGuest(t, c.kind, "qcow2", name)
			}
		})
	}
}

// A disk with a partition table: the table tells where the filesystem begins,
// or confirms it.
func TestPartitioned(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ label, kind, format string }{
		{"gpt", "ext4", "qcow2"}, {"dos", "ext4", "qcow2"}, {"gpt", "xfs", "parallels"}, {"dos", "ext4", "parallels"},
	} {
		t.Run(c.label+" "+c.kind+" "+c.format, func(t *testing.T) {
			disk := partitioned(t, c.label, c.kind, 600<<20)
			args := []string{}
			if c.format == "qcow2" {
				args = []string{"-o", "cluster_size=32k"}
			}
			img := convert(t, disk, c.format, args...)
			if c.format == "qcow2" {
				loseL1(t, img, 0xff)
			} else {
				loseBAT(t, img)
			}
			name, r := run(t, img, scavenge.Options{})
			if len(r.Filesystems) != 1 || r.Filesystems[0].Base == nil || *r.Filesystems[0].Base != 1<<20 {
				t.Fatalf("filesystems: %+v", r.Filesystems)
			}
			if r.New == "" || r.Placed[scavenge.ProofGuest] < 2 {
				t.Fatal("hardly anything was placed")
			}
			if first := r.Places[0]; first.Guest != 0 {
				t.Errorf("the partition table was not placed: %+v", first)
			}
			same(t, r, c.format, name, disk)
		})
	}
}

// What names the L1 table is lost, or the whole header.
func TestLostHeader(t *testing.T) {
	t.Parallel()
	disk := mkfs(t, "ext4", 1<<30)
	img := convert(t, disk, "qcow2")
	t.Run("L1 offset", func(t *testing.T) {
		poke(t, img, 40, []byte{0x40})
		name, r := run(t, img, scavenge.Options{})
		if r.Exit != 1 {
			t.Errorf("exit %d", r.Exit)
		}
		same(t, r, "qcow2", name, disk)
		fsckGuest(t, "ext4", "qcow2", name)
	})
	for _, c := range []struct {
		name string
		with byte
	}{{"zeros", 0}, {"garbage", 0xa7}} {
		t.Run(c.name, func(t *testing.T) {
			off, n := int64(3<<16), int64(8)
			poke(t, img, 0, bytes.Repeat([]byte{c.with}, 64<<10))
			if _, err := scavenge.Run(t.Context(), img, filepath.Join(t.TempDir(), "x"), scavenge.Options{}); !errors.Is(err, layers.ErrFormat) {
				t.Fatalf("without a format: %v", err)
			}
			name, r := run(t, img, scavenge.Options{Format: "qcow2"})
			if r.Placed[scavenge.ProofFoundL1] != 2 || r.VirtualSize != 1<<30 {
				t.Errorf("placed %v of a disk of %d bytes", r.Placed, r.VirtualSize)
			}
			same(t, r, "qcow2", name, disk)
			// The L1 table as well.
			both := filepath.Join(t.TempDir(), "both")
			imgtest.Run(t, "cp", "--sparse=always", img, both)
			poke(t, both, off, make([]byte, 2*n))
			name, r = run(t, both, scavenge.Options{Format: "qcow2", Size: 1 << 30})
			if r.Placed[scavenge.ProofGuest] != 2 {
				t.Errorf("without an L1 table: placed %v", r.Placed)
			}
			same(t, r, "qcow2", name, disk)
		})
	}
}

// The active state differs from that of the snapshot in some tables.
func TestSnapshot(t *testing.T) {
	t.Parallel()
	disk := mkfs(t, "ext4", 1<<30)
	img := convert(t, disk, "qcow2", "-o", "cluster_size=32k")
	imgtest.QemuImg(t, "snapshot", "-c", "before", img)
	imgtest.QemuIO(t, "qcow2", img, "write -P 0x5a 40M 3M", "write -P 0x5b 144M 64k")
	want := filepath.Join(t.TempDir(), "want")
	imgtest.QemuRaw(t, "qcow2", img, want)
	loseL1(t, img, 0)
	name, r := run(t, img, scavenge.Options{})
	if r.Placed[scavenge.ProofSnapshot] == 0 || r.Placed[scavenge.ProofShared]+r.Placed[scavenge.ProofGuest] == 0 || r.UnplacedBytes > 0 {
		t.Errorf("placed %v", r.Placed)
	}
	same(t, r, "qcow2", name, want)
}

// copyTable makes a second generation of the table at host: it names copies of
// the same clusters, in which the first byte of each differs.
func copyTable(t *testing.T, img string, host int64) {
	t.Helper()
	const cluster = 64 << 10
	st, err := os.Stat(img)
	if err != nil {
		t.Fatal(err)
	}
	end := (st.Size() + cluster - 1) / cluster * cluster
	table := peek(t, img, host, cluster)
	for i := 0; i < cluster; i += 8 {
		at := int64(binary.BigEndian.Uint64(table[i:]) & 0x00fffffffffffe00)
		if at == 0 {
			continue
		}
		data := peek(t, img, at, cluster)
		data[cluster-1] ^= 0xff
		poke(t, img, end, data)
		binary.BigEndian.PutUint64(table[i:], uint64(end)|1<<63)
		end += cluster
	}
	poke(t, img, end, table)
}

// Two tables of different times claim one place. Where the reference counts
// tell which of them is in use, that one is taken; else neither.
func TestGenerations(t *testing.T) {
	t.Parallel()
	disk := mkfs(t, "ext4", 1<<30)
	for _, dirty := range []bool{false, true} {
		img := convert(t, disk, "qcow2")
		off, _ := l1(t, img)
		first := be64(t, img, off) & 0x00fffffffffffe00
		copyTable(t, img, first)
		if dirty {
			poke(t, img, 79, []byte{1}) // the counts may be wrong
		}
		loseL1(t, img, 0)
		name, r := run(t, img, scavenge.Options{})
		same(t, r, "qcow2", name, disk)
		placed := false
		for _, p := range r.Places {
			placed = placed || p.Guest == 0
		}
		if placed == dirty {
			t.Errorf("dirty %v: first table placed: %v", dirty, placed)
		}
		if dirty {
			why := 0
			for _, u := range r.Unplaced {
				if u.Why == "conflict" && len(u.Places) == 1 && u.Places[0] == 0 {
					why++
				}
			}
			if why != 2 || r.Exit != 5 || r.UnknownBytes != 512<<20 {
				t.Errorf("exit %d, %d conflicts, %d bytes unknown: %+v", r.Exit, why, r.UnknownBytes, r.Unplaced)
			}
			if _, err := os.Stat(filepath.Join(r.LostFound, r.Unplaced[0].File)); err != nil {
				t.Error(err)
			}
		} else if r.Exit != 1 {
			t.Errorf("exit %d", r.Exit)
		}
	}
}

// Reference counts that were lost do not make a table one of earlier times.
func TestLostCounts(t *testing.T) {
	t.Parallel()
	disk := mkfs(t, "ext4", 1<<30)
	for _, all := range []bool{false, true} {
		img := convert(t, disk, "qcow2")
		off, _ := l1(t, img)
		table := be64(t, img, off) & 0x00fffffffffffe00
		block := be64(t, img, be64(t, img, 48))
		if all {
			poke(t, img, block, make([]byte, 64<<10))
		} else {
			poke(t, img, block+table>>16*2, []byte{0, 0})
		}
		loseL1(t, img, 0)
		name, r := run(t, img, scavenge.Options{})
		if r.Exit != 1 {
			t.Errorf("all %v: exit %d", all, r.Exit)
		}
		same(t, r, "qcow2", name, disk)
	}
}

// rebuilt puts a disk into an image, loses the map, and holds what is rebuilt
// against the disk.
func rebuilt(t testing.TB, disk, format string, args ...string) {
	t.Helper()
	img := convert(t, disk, format, args...)
	if format == "qcow2" {
		loseL1(t, img, 0)
	} else {
		loseBAT(t, img)
	}
	name, r := run(t, img, scavenge.Options{})
	if r.New == "" {
		t.Fatal("nothing was rebuilt")
	}
	same(t, r, format, name, disk)
}

// A guest that is in use: its journal is full of copies of metadata.
func TestJournal(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		format string
		args   []string
	}{{"qcow2", []string{"-o", "cluster_size=8k"}}, {"parallels", []string{"-o", "cluster_size=64k"}}, {"parallels", nil}} {
		disk := guesttest.Image(t, 256<<20)
		imgtest.Run(t, "mkfs.ext4", "-q", "-F", disk)
		dir, umount := guesttest.Mount(t, disk, "data=journal")
		guesttest.Age(t, dir, 3, 150, 100<<10)
		busy := guesttest.Copy(t, disk)
		umount()
		rebuilt(t, busy, c.format, c.args...)
	}
}

// Images of disks in files of the guest are data.
func TestNested(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		format string
		args   []string
	}{{"qcow2", []string{"-o", "cluster_size=8k"}}, {"parallels", nil}, {"parallels", []string{"-o", "cluster_size=64k"}}} {
		disk := guesttest.Image(t, 512<<20)
		imgtest.Run(t, "mkfs.ext4", "-q", "-F", disk)
		dir, umount := guesttest.Mount(t, disk)
		inner := mkfs(t, "ext4", 256<<20)
		imgtest.Run(t, "cp", "--sparse=always", inner, filepath.Join(dir, "inner.raw"))
		imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=8k", inner, filepath.Join(dir, "inner.qcow2"))
		imgtest.Run(t, "sync", "-f", dir)
		guesttest.Age(t, dir, 9, 60, 100<<10)
		umount()
		rebuilt(t, disk, c.format, c.args...)
	}
}
