package hostile

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

var le = binary.LittleEndian

// ploop is an image of version 2 with clusters of 32 KiB: header and BAT in
// the first one, then two data clusters.
type ploop []byte

const (
	pCluster = 32 << 10
	pName    = "disk.hds"
)

func newPloop() ploop {
	p := make(ploop, 3*pCluster)
	copy(p, "WithouFreSpacExt")
	p.set32(16, 2)
	p.set32(20, 16).set32(24, 4).set32(28, pCluster/512)
	p.set32(32, 32)
	p.set64(36, 32*pCluster/512)
	p.set32(48, pCluster/512)
	p.set32(64, 1).set32(68, 2)
	copy(p[pCluster:], "data of the guest")
	return p
}

func (p ploop) set32(off int, v uint32) ploop { le.PutUint32(p[off:], v); return p }
func (p ploop) set64(off int, v uint64) ploop { le.PutUint64(p[off:], v); return p }

func mkfifo(path string) error { return unix.Mkfifo(path, 0o644) }

func pl(title string, class Class, p ploop, exit int, words ...string) Case {
	return Case{Name: "ploop " + title, Class: class, Image: pName, Build: file(pName, p), Exit: exit, Words: append(words, pName)}
}

func ploopHeaders() []Case {
	var all []Case
	bad32 := func(field string, off, exit int, values ...uint32) {
		for _, v := range values {
			all = append(all, pl(fmt.Sprintf("%s %#x", field, v), Header, newPloop().set32(off, v), exit, field))
		}
	}
	bad64 := func(field string, off, exit int, values ...uint64) {
		for _, v := range values {
			all = append(all, pl(fmt.Sprintf("%s %#x", field, v), Header, newPloop().set64(off, v), exit, field))
		}
	}
	bad32("m_Type", 16, 1, 0, 1, 0xffffffff)
	bad32("m_Sectors", 28, 1, 0, 3, 96, 1<<18, 1<<31, 0xffffffff)
	bad32("m_Size", 32, 1, 0, 31)
	bad32("m_FirstBlockOffset", 48, 4, 0, 1, 0xffffffff)
	all = append(all, pl("m_Size 0xffffffff", Header, newPloop().set32(32, 0xffffffff), 4))
	bad64("m_SizeInSectors", 36, 1, 1<<63, 1<<64-1, 1<<55, 1<<40)
	bad32("m_Flags", 52, 4, 2)
	for _, v := range []uint64{1, 1 << 40, 1<<64 - 1, 3 * pCluster / 512, pCluster / 512} {
		all = append(all, pl(fmt.Sprintf("extension at sector %#x", v), Header, newPloop().set64(56, v), 0))
	}
	ext := append(newPloop(), make([]byte, pCluster)...).set64(56, 3*pCluster/512).set32(44, 0x312e3276)
	ext.set64(3*pCluster, 0xAB234CEF23DCEA87)
	ext.set64(3*pCluster+24, 0x20385FAE252CB34A).set32(3*pCluster+40, 0xffffffff)
	all = append(all, pl("extension with a wrong checksum", Header, ext, 0))
	// Tables.
	for title, v := range map[string]uint32{
		"behind the end": 3, "of 2^31": 1 << 31, "of 2^32-1": 0xffffffff, "twice": 1,
	} {
		c := pl("BAT entry "+title, Table, newPloop().set32(68, v), 0)
		if title != "twice" {
			c.By = exits(4, 4, 0, 0)
		}
		all = append(all, c)
	}
	v1 := newPloop()
	copy(v1, "WithoutFreeSpace")
	v1.set32(64, pCluster/512).set32(68, 2*pCluster/512+1)
	c := pl("BAT entry unaligned", Table, v1, 0)
	c.By = exits(4, 4, 0, 0)
	all = append(all, c)
	for n, by := range map[int]map[Tool]int{
		0: exits(1, 1, 1, 1), 3: exits(1, 1, 1, 1), 15: exits(1, 1, 1, 1), 63: exits(1, 1, 1, 1),
		64: exits(4, 4, 4, 4), 100: exits(4, 4, 4, 4),
		pCluster + 100: exits(4, 4, 4, 4), 2*pCluster + 1: exits(4, 4, 0, 0),
	} {
		c := pl(fmt.Sprintf("cut off at %d", n), Header, newPloop()[:n], 0)
		c.By = by
		all = append(all, c)
	}
	// 2^32-1 BAT entries in a hole: a header of 16 GiB.
	all = append(all, Case{Name: "ploop with a BAT of 16 GiB", Class: Bomb, Image: pName, Build: func(d Dirs) error {
		p := newPloop().set32(32, 0xffffffff).set64(36, 0xffffffff*64).set32(48, (1<<34+pCluster)/512)
		path := filepath.Join(d.In, pName)
		if err := os.WriteFile(path, p, 0o644); err != nil {
			return err
		}
		return os.Truncate(path, 1<<35)
	}, Exit: 4, Words: []string{"BAT"},
		By: map[Tool]int{Info: 0}}) // it does not read a table that long
	return all
}

// odd are things that are no images at all.
func odd() []Case {
	// A name that the user gives is the user's will; that it is no disk is
	// still to be said, and quickly.
	link := func(target string) func(Dirs) error {
		return func(d Dirs) error { return os.Symlink(target, filepath.Join(d.In, "image")) }
	}
	var all []Case
	all = append(all,
		Case{Name: "a FIFO", Class: Path, Image: "fifo", Build: func(d Dirs) error { return mkfifo(filepath.Join(d.In, "fifo")) }, Exit: 1},
		Case{Name: "a character device", Class: Path, Image: "image", Build: link("/dev/zero"), Exit: 1},
		Case{Name: "an empty directory", Class: Path, Image: ".", Build: file("x", nil), Exit: 1},
		Case{Name: "a link to itself", Class: Path, Image: "image", Build: link("image"), Exit: 1},
		Case{Name: "nothing", Class: Path, Image: "image", Build: file("x", nil), Exit: 1},
		Case{Name: "a descriptor that is a FIFO", Class: Path, Image: ".", Build: func(d Dirs) error {
			return mkfifo(filepath.Join(d.In, "DiskDescriptor.xml"))
		}, Exit: 1},
	)
	for name, magic := range map[string]string{
		"VMDK": "KDMV\x01\x00\x00\x00", "VMDK text": "# Disk DescriptorFile\nversion=1\nRW 1 FLAT \"/etc/shadow\" 0\n",
		"VHDX": "vhdxfile", "VHD": "conectix", "QED": "QED\x00", "QCOW1": "QFI\xfb\x00\x00\x00\x01",
	} {
		content := make([]byte, 4096)
		copy(content, magic)
		all = append(all, Case{Name: "an image of a foreign format: " + name, Class: Path, Image: "image", Build: file("image", content), Exit: 1})
	}
	return all
}
