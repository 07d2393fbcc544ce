package guestfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/guesttest"
)

// sfdiskTable is what sfdisk -J prints.
type sfdiskTable struct {
	PartitionTable struct {
		SectorSize int64
		ID         string
		Partitions []struct {
			Node, Type, UUID, Name string
			Start, Size            int64
		}
	}
}

// sfdisk makes an image of size bytes with the table that script describes and
// returns the image and what sfdisk itself says about it.
func sfdisk(t testing.TB, size int64, script string) (string, sfdiskTable) {
	t.Helper()
	imgtest.Require(t, "sfdisk")
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sfdisk", "-q", "--no-reread", "--no-tell-kernel", path)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
	out, err := exec.Command("sfdisk", "-J", path).Output()
	if err != nil {
		t.Fatalf("sfdisk -J: %v", err)
	}
	var table sfdiskTable
	if err := json.Unmarshal(out, &table); err != nil {
		t.Fatal(err)
	}
	return path, table
}

func read(b []byte) ([]Partition, error) {
	return Partitions(context.Background(), bytes.NewReader(b), int64(len(b)))
}

// scripts for sfdisk, one per kind of table.
var scripts = map[string]string{
	"gpt":     "label: gpt\nsize=1M, type=L, name=\"root äß\"\nsize=2M, type=U\n",
	"gpt gap": "label: gpt\n3: start=4096, size=2048, type=S\n1: start=10240, size=2048\n128: size=2048\n",
	"gpt 0":   "label: gpt\n",
	"gpt few": "label: gpt\ntable-length: 4\nsize=1M\nsize=1M\nsize=1M\nsize=1M\n",
	"mbr":     "label: dos\nlabel-id: 0xdeadbeef\nsize=1M, type=83, bootable\nsize=1M, type=82\n",
	"mbr 0":   "label: dos\n",
	"mbr logical": "label: dos\nsize=1M, type=83\nsize=12M, type=5\nsize=1M, type=83\n" +
		"5: size=1M, type=83\n6: size=1M, type=82\n7: size=2M, type=8e\n8: size=1M, type=7\n",
	"mbr extended 0": "label: dos\nsize=1M, type=83\nsize=4M, type=f\n",
	"mbr gap":        "label: dos\n3: start=4096, size=2048, type=83\n1: start=10240, size=2048, type=83\n",
}

func TestAgainstSfdisk(t *testing.T) {
	for name, script := range scripts {
		t.Run(name, func(t *testing.T) {
			path, want := sfdisk(t, 24<<20, script)
			parts, err := read(guesttest.Bytes(t, path))
			if err != nil {
				t.Fatal(err)
			}
			if len(parts) != len(want.PartitionTable.Partitions) {
				t.Fatalf("%d partitions, sfdisk says %d: %+v", len(parts), len(want.PartitionTable.Partitions), parts)
			}
			for i, w := range want.PartitionTable.Partitions {
				p := parts[i]
				if number := strings.TrimPrefix(w.Node, path); fmt.Sprint(p.Number) != number {
					t.Errorf("number %d, sfdisk says %s", p.Number, number)
				}
				if p.Start != w.Start*512 || p.Size != w.Size*512 {
					t.Errorf("partition %d: %d+%d, sfdisk says %d+%d", p.Number, p.Start/512, p.Size/512, w.Start, w.Size)
				}
				if p.Type != w.Type || p.Name != w.Name || w.UUID != "" && p.UUID != w.UUID {
					t.Errorf("partition %d: %+v, sfdisk says %+v", p.Number, p, w)
				}
				if isContainer := p.Type == "5" || p.Type == "f"; p.Container != isContainer {
					t.Errorf("partition %d: container %v", p.Number, p.Container)
				}
				if strings.HasPrefix(name, "mbr") {
					id := strings.TrimPrefix(want.PartitionTable.ID, "0x")
					if p.UUID != fmt.Sprintf("%s-%02x", id, p.Number) {
						t.Errorf("partition %d: PARTUUID %s of disk %s", p.Number, p.UUID, id)
					}
				}
			}
		})
	}
}

// partx reads tables with libblkid, as udev does, and numbers as the kernel
// does. (Not every kernel has the code for partition tables built in, so the
// kernel itself is no oracle.)
func TestAgainstPartx(t *testing.T) {
	imgtest.Require(t, "partx")
	for name, script := range scripts {
		t.Run(name, func(t *testing.T) {
			path, _ := sfdisk(t, 24<<20, script)
			parts, err := read(guesttest.Bytes(t, path))
			if err != nil {
				t.Fatal(err)
			}
			out := ""
			if len(parts) > 0 { // of an empty table partx says that it found none
				out = string(imgtest.Run(t, "partx", "--raw", "--noheadings", "-o", "NR,START,SECTORS,UUID", path))
			}
			var got strings.Builder
			for _, p := range parts {
				fmt.Fprintf(&got, "%d %d %d %s\n", p.Number, p.Start/512, p.Size/512, strings.ToLower(p.UUID))
			}
			if got.String() != out {
				t.Errorf("got\n%spartx says\n%s", got.String(), out)
			}
		})
	}
}

// A table with sectors of 4,096 bytes, translated from one with 512.
func gpt4096(t testing.TB) []byte {
	b := make([]byte, 8<<20)
	copy(b[446:], []byte{0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	b[510], b[511] = 0x55, 0xaa
	entries := make([]byte, 128*128)
	copy(entries, "TYPETYPETYPETYPEUNIQUEUNIQUEUNIQ")
	le := binary.LittleEndian
	le.PutUint64(entries[32:], 100)
	le.PutUint64(entries[40:], 199)
	last := uint64(len(b)/4096 - 1)
	for _, c := range []struct{ self, other, table uint64 }{{1, last, 2}, {last, 1, last - 4}} {
		h := b[c.self*4096:]
		copy(h, "EFI PART")
		le.PutUint32(h[8:], 0x10000)
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], c.self)
		le.PutUint64(h[32:], c.other)
		le.PutUint64(h[40:], 6)
		le.PutUint64(h[48:], last-5)
		le.PutUint64(h[72:], c.table)
		le.PutUint32(h[80:], 128)
		le.PutUint32(h[84:], 128)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		copy(b[c.table*4096:], entries)
	}
	return b
}

func TestSectors4096(t *testing.T) {
	b := gpt4096(t)
	check := func(when string) {
		t.Helper()
		parts, err := read(b)
		if err != nil || len(parts) != 1 || parts[0].Start != 100*4096 || parts[0].Size != 100*4096 {
			t.Fatalf("%s: %+v %v", when, parts, err)
		}
	}
	check("whole")
	clear(b[4096:8192])
	check("copy only")
}

// With one of the two GPTs damaged the other serves; with both there is an
// error that names the place.
func TestGPTDamage(t *testing.T) {
	path, _ := sfdisk(t, 24<<20, scripts["gpt"])
	good := guesttest.Bytes(t, path)
	want, err := read(good)
	if err != nil || len(want) != 2 {
		t.Fatal(err)
	}
	end := len(good)
	places := map[string][2]int{ // primary and copy
		"magic":       {512, end - 512},
		"header":      {512 + 48, end - 512 + 48},
		"header size": {512 + 13, end - 512 + 13},
		"own sector":  {512 + 24, end - 512 + 24},
		"entries":     {1024 + 3, end - 512 - 128*128 + 3},
	}
	for name, at := range places {
		t.Run(name, func(t *testing.T) {
			for mask := 1; mask <= 3; mask++ {
				b := bytes.Clone(good)
				for i := range 2 {
					if mask>>i&1 == 1 {
						b[at[i]] ^= 0xff
					}
				}
				got, err := read(b)
				if mask < 3 {
					if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
						t.Errorf("mask %d: %+v %v", mask, got, err)
					}
					continue
				}
				var d *DamageError
				if !errors.As(err, &d) || !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "offset 0x") {
					t.Errorf("both: %+v %v", got, err)
				}
			}
		})
	}
}

// patchGPT changes both headers or tables and mends the checksums.
func patchGPT(b []byte, change func(header, table []byte)) {
	le := binary.LittleEndian
	for _, at := range []int{512, len(b) - 512} {
		h := b[at : at+512]
		table := b[int(le.Uint64(h[72:]))*512:][:128*128]
		change(h, table)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
		clear(h[16:20])
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	}
}

// Lies with right checksums.
func TestGPTLies(t *testing.T) {
	path, _ := sfdisk(t, 24<<20, scripts["gpt"])
	good := guesttest.Bytes(t, path)
	le := binary.LittleEndian
	for name, change := range map[string]func(h, e []byte){
		"entry size 0":           func(h, _ []byte) { le.PutUint32(h[84:], 0) },
		"entry size 129":         func(h, _ []byte) { le.PutUint32(h[84:], 129) },
		"entry size huge":        func(h, _ []byte) { le.PutUint32(h[84:], 1<<31) },
		"count huge":             func(h, _ []byte) { le.PutUint32(h[80:], 1<<32-1) },
		"usable backwards":       func(h, _ []byte) { le.PutUint64(h[40:], 1<<40) },
		"usable outside":         func(h, _ []byte) { le.PutUint64(h[48:], 1<<63) },
		"partition backwards":    func(_, e []byte) { le.PutUint64(e[40:], le.Uint64(e[32:])-1) },
		"partition outside":      func(_, e []byte) { le.PutUint64(e[40:], 1<<50) },
		"partition on the table": func(_, e []byte) { le.PutUint64(e[32:], 1) },
		"partition overflows":    func(_, e []byte) { le.PutUint64(e[32:], 1<<63); le.PutUint64(e[40:], 1<<63+5) },
		"overlap":                func(_, e []byte) { copy(e[128+32:128+48], e[32:48]) },
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(good)
			patchGPT(b, change)
			if parts, err := read(b); !errors.Is(err, ErrDamaged) {
				t.Errorf("accepted: %+v %v", parts, err)
			} else {
				t.Log(err)
			}
		})
	}
	b := bytes.Clone(good)
	patchGPT(b, func(_, _ []byte) {})
	if _, err := read(b); err != nil {
		t.Errorf("the patching itself does damage: %v", err)
	}
}

func TestMBRDamage(t *testing.T) {
	path, _ := sfdisk(t, 24<<20, scripts["mbr logical"])
	good := guesttest.Bytes(t, path)
	parts, err := read(good)
	if err != nil || len(parts) != 7 {
		t.Fatal(parts, err)
	}
	ext := int(parts[1].Start)
	le := binary.LittleEndian
	second := ext + int(le.Uint32(good[ext+446+16+8:]))*512
	for name, change := range map[string]func(b []byte){
		"outside the disk":  func(b []byte) { le.PutUint32(b[446+12:], 1<<32-1) },
		"start outside":     func(b []byte) { le.PutUint32(b[446+8:], 1<<32-1) },
		"on the MBR":        func(b []byte) { le.PutUint32(b[446+8:], 0) },
		"overlap":           func(b []byte) { le.PutUint32(b[446+12:], 1<<15) },
		"loop to itself":    func(b []byte) { le.PutUint32(b[ext+446+16+8:], 0) },
		"loop of two":       func(b []byte) { le.PutUint32(b[second+446+16+8:], 0) },
		"link outside":      func(b []byte) { le.PutUint32(b[ext+446+16+8:], 1<<32-1) },
		"two links":         func(b []byte) { b[ext+446+4] = 5 },
		"logical outside":   func(b []byte) { le.PutUint32(b[ext+446+12:], 1<<32-1) },
		"record signature":  func(b []byte) { b[second+510] = 0 },
		"record indicator":  func(b []byte) { b[second+446] = 1 },
		"first record junk": func(b []byte) { copy(b[ext:ext+512], bytes.Repeat([]byte("junk"), 128)) },
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(good)
			change(b)
			if parts, err := read(b); !errors.Is(err, ErrDamaged) {
				t.Errorf("accepted: %+v %v", parts, err)
			} else {
				t.Log(err)
			}
		})
	}
}

// A chain may be long, but not without end.
func TestLongChain(t *testing.T) {
	chain := func(n int) []byte {
		b := make([]byte, (2*n+3)*512)
		le := binary.LittleEndian
		entry := func(at, i int, kind byte, start, count int) {
			e := b[at+446+16*i:]
			e[4] = kind
			le.PutUint32(e[8:], uint32(start))
			le.PutUint32(e[12:], uint32(count))
			b[at+510], b[at+511] = 0x55, 0xaa
		}
		entry(0, 0, 5, 1, 2*n+2)
		for i := range n {
			at := (1 + 2*i) * 512
			entry(at, 0, 0x83, 1, 1)
			if i < n-1 {
				entry(at, 1, 5, 2*(i+1), 2)
			}
		}
		return b
	}
	if parts, err := read(chain(maxLogical)); err != nil || len(parts) != maxLogical+1 || parts[maxLogical].Number != maxLogical+4 {
		t.Errorf("%d partitions, %v", len(parts), err)
	}
	if _, err := read(chain(maxLogical + 1)); !errors.Is(err, ErrDamaged) {
		t.Errorf("too long: %v", err)
	}
}

// Boot sectors of filesystems and nonsense are not tables.
func TestNoTable(t *testing.T) {
	random := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(random)
	random[510] = 0
	boot := bytes.Clone(random)
	boot[510], boot[511], boot[446] = 0x55, 0xaa, 0x13
	for name, b := range map[string][]byte{
		"empty": nil, "tiny": make([]byte, 511), "zeros": make([]byte, 1<<20), "random": random, "boot sector": boot,
	} {
		if parts, err := read(b); err != nil || len(parts) != 0 {
			t.Errorf("%s: %+v %v", name, parts, err)
		}
	}
}

// failing reads fail from an offset on.
type failing struct {
	io.ReaderAt
	from int64
}

var errDisk = errors.New("bad disk")

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, errDisk
	}
	return f.ReaderAt.ReadAt(p, off)
}

// Errors of the disk come through and are not called damage.
func TestReadErrors(t *testing.T) {
	for _, script := range []string{scripts["gpt"], scripts["mbr logical"]} {
		path, _ := sfdisk(t, 24<<20, script)
		b := guesttest.Bytes(t, path)
		for _, from := range []int64{0, 600, 1500} {
			_, err := Partitions(context.Background(), failing{bytes.NewReader(b), from}, int64(len(b)))
			if !errors.Is(err, errDisk) {
				t.Errorf("from %d: %v", from, err)
			}
		}
	}
}

// FuzzPartitions: never a panic, a hang or a partition outside the disk.
func FuzzPartitions(f *testing.F) {
	for name, script := range scripts {
		if name == "mbr logical" || name == "gpt few" {
			path, _ := sfdisk(f, 24<<20, script)
			b := guesttest.Bytes(f, path)
			f.Add(b[:64<<10])
			f.Add(append(bytes.Clone(b[:34*512]), b[len(b)-33*512:]...))
		}
	}
	f.Add(gpt4096(f)[:32<<10])
	f.Fuzz(func(t *testing.T, b []byte) {
		parts, err := read(b)
		if err != nil {
			if parts != nil {
				t.Error("partitions beside an error")
			}
			return
		}
		seen := make(map[int]bool)
		for _, p := range parts {
			if p.Start < 512 || p.Size < 1 || p.End() > int64(len(b)) || p.End() < p.Start || seen[p.Number] {
				t.Errorf("%+v on a disk of %d bytes", p, len(b))
			}
			seen[p.Number] = true
		}
	})
}
