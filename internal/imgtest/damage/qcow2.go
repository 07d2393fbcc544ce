package damage

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// qcow2 is an intact image in memory, to be damaged. Small clusters give small
// images with several tables.
type qcow2 struct {
	b  []byte
	cs int64
}

func (q *qcow2) u32(off int64) uint32     { return binary.BigEndian.Uint32(q.b[off:]) }
func (q *qcow2) u64(off int64) uint64     { return binary.BigEndian.Uint64(q.b[off:]) }
func (q *qcow2) p16(off int64, v uint16)  { binary.BigEndian.PutUint16(q.b[off:], v) }
func (q *qcow2) p32(off int64, v uint32)  { binary.BigEndian.PutUint32(q.b[off:], v) }
func (q *qcow2) p64(off int64, v uint64)  { binary.BigEndian.PutUint64(q.b[off:], v) }
func (q *qcow2) or64(off int64, v uint64) { q.p64(off, q.u64(off)|v) }

const offsetMask = 0x00fffffffffffe00

// l1 is the place of an entry of the active L1 table.
func (q *qcow2) l1(i int64) int64 { return int64(q.u64(40)) + i*8 }

// l2 is the place of the entry for a guest offset, entries being n bytes.
func (q *qcow2) l2n(guest, n int64) int64 {
	per := q.cs / n
	table := int64(q.u64(q.l1(guest/q.cs/per)) & offsetMask)
	return table + guest/q.cs%per*n
}
func (q *qcow2) l2(guest int64) int64   { return q.l2n(guest, 8) }
func (q *qcow2) host(guest int64) int64 { return int64(q.u64(q.l2(guest)) & offsetMask) }

// table and block are the refcount table and its first block.
func (q *qcow2) table() int64 { return int64(q.u64(48)) }
func (q *qcow2) block() int64 { return int64(q.u64(q.table())) }

// count is the place of the 16-bit count of the cluster at off.
func (q *qcow2) count(off int64) int64 { return q.block() + off/q.cs*2 }

// ext is the place of the data of a header extension, -1 when it is missing.
func (q *qcow2) ext(typ uint32) int64 {
	off := int64(q.u32(100))
	for q.u32(off) != 0 {
		if q.u32(off) == typ {
			return off + 8
		}
		off += 8 + int64(q.u32(off+4)+7)&^7
	}
	return -1
}

// end is the length of the file in whole clusters.
func (q *qcow2) end() int64 { return (int64(len(q.b)) + q.cs - 1) / q.cs * q.cs }

// grow makes the file n clusters longer and returns where they begin.
func (q *qcow2) grow(n int64) int64 {
	at := q.end()
	q.b = append(q.b, make([]byte, at+n*q.cs-int64(len(q.b)))...)
	return at
}

// qcow2Shape is how an intact image is made; IMG is the image, SRC content of
// 8 MiB with data at 0 to 1 MiB, 3 to 3.5 MiB and behind 7 MiB.
type qcow2Shape struct {
	cs       int64
	commands []string
}

const qcow2Disk = 8 << 20

var qcow2Shapes = map[string]qcow2Shape{
	"v3":     {4096, []string{"convert -f raw -O qcow2 -o cluster_size=4k SRC IMG"}},
	"v2":     {4096, []string{"convert -f raw -O qcow2 -o cluster_size=4k,compat=0.10 SRC IMG"}},
	"64k":    {65536, []string{"convert -f raw -O qcow2 SRC IMG"}},
	"packed": {4096, []string{"convert -c -f raw -O qcow2 -o cluster_size=4k SRC IMG"}},
	"mixed":  {4096, []string{"convert -c -f raw -O qcow2 -o cluster_size=4k SRC IMG", "io write -P 7 4M 64k"}},
	"zstd":   {4096, []string{"convert -c -f raw -O qcow2 -o cluster_size=4k,compression_type=zstd SRC IMG"}},
	"narrow": {4096, []string{"create -f qcow2 -o cluster_size=4k,refcount_bits=1 IMG 8M", "io write -c -P 3 0 4k", "io write -c -P 4 4k 4k", "io write -c -P 5 8k 4k",
		"io write -P 6 1M 64k"}},
	"snapshot": {4096, []string{"convert -f raw -O qcow2 -o cluster_size=4k SRC IMG", "snapshot -c first IMG",
		"io write -P 6 64k 64k", "snapshot -c second IMG", "io write -P 7 5M 64k"}},
	"small": {512, []string{"convert -f raw -O qcow2 -o cluster_size=512 SRC IMG", "snapshot -c first IMG", "io write -P 6 64k 64k"}},
	"bitmaps": {4096, []string{"convert -f raw -O qcow2 -o cluster_size=4k SRC IMG", "bitmap --add IMG one", "bitmap --add -g 64k IMG two",
		"io write -P 6 64k 64k"}},
	"extl2":   {16384, []string{"create -f qcow2 -o cluster_size=16k,extended_l2=on IMG 8M", "io write -P 1 0 1M", "io write -P 2 3M 512", "io write -P 3 7M 100k"}},
	"data":    {4096, []string{"create -f qcow2 -o cluster_size=4k,data_file=image.data IMG 8M", "io write -P 1 0 1M", "io write -P 2 7M 100k"}},
	"raw":     {4096, []string{"create -f qcow2 -o cluster_size=4k,data_file=image.data,data_file_raw=on IMG 8M", "io write -P 1 0 1M", "io write -P 2 7M 100k"}},
	"backing": {4096, []string{"create -f qcow2 -o cluster_size=4k -F raw -b base.raw IMG 8M", "io write -P 1 0 1M"}},
}

// qcow2Source is the content of the images.
func qcow2Source() []byte {
	b := make([]byte, qcow2Disk)
	fill := func(from, to int) {
		imgtest.Pattern(b[from:to], 3, int64(from))
		for i := from; i < to; i += 64 { // so that it compresses
			clear(b[i : i+40])
		}
	}
	fill(0, 1<<20)
	fill(3<<20, 3<<20+512<<10)
	fill(7<<20, 8<<20-4096)
	return b
}

// made is an intact image with its files and content.
type made struct {
	files    map[string][]byte
	original []byte
}

var (
	madeMu  sync.Mutex
	madeAll = map[string]*made{}
)

// Qcow2Image writes the intact image of a shape into dir, and Original(dir),
// and makes dir the working directory of the test: QEMU looks there for
// external data files.
func Qcow2Image(t testing.TB, dir, shape string) string {
	t.Helper()
	madeMu.Lock()
	defer madeMu.Unlock()
	m := madeAll[shape]
	if m == nil {
		m = makeQcow2(t, qcow2Shapes[shape])
		madeAll[shape] = m
	}
	for name, b := range m.files {
		write(t, filepath.Join(dir, name), b)
	}
	write(t, Original(dir), m.original)
	t.Chdir(dir)
	return filepath.Join(dir, "image")
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func makeQcow2(t testing.TB, s qcow2Shape) *made {
	t.Helper()
	dir := t.TempDir()
	img, src := filepath.Join(dir, "image"), filepath.Join(dir, "src")
	write(t, src, qcow2Source())
	write(t, filepath.Join(dir, "base.raw"), qcow2Source())
	names := strings.NewReplacer("IMG", img, "SRC", src)
	t.Chdir(dir) // QEMU looks for external data files where it runs
	for _, c := range s.commands {
		if rest, ok := strings.CutPrefix(c, "io "); ok {
			imgtest.QemuIO(t, "qcow2", img, rest)
			continue
		}
		imgtest.QemuImg(t, strings.Fields(names.Replace(c))...)
	}
	m := &made{files: map[string][]byte{}}
	raw := filepath.Join(dir, "raw")
	imgtest.QemuRaw(t, "qcow2", img, raw)
	m.original = read(t, raw)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		switch e.Name() {
		case "src", "raw":
		case "base.raw":
			if strings.Contains(strings.Join(s.commands, " "), "base.raw") {
				m.files[e.Name()] = read(t, filepath.Join(dir, e.Name()))
			}
		default:
			m.files[e.Name()] = read(t, filepath.Join(dir, e.Name()))
		}
	}
	return m
}

// qcow2Case makes a Damage from a change of an intact image.
func qcow2Case(name, shape string, change func(q *qcow2), d Damage) Damage {
	d.Name, d.Format = name, "qcow2"
	d.Build = func(t testing.TB, dir string) string {
		t.Helper()
		img := Qcow2Image(t, dir, shape)
		q := &qcow2{b: read(t, img), cs: qcow2Shapes[shape].cs}
		change(q)
		write(t, img, q.b)
		return img
	}
	return d
}

// rng is one guest range.
func rng(off, n int64) []blockmap.Range { return []blockmap.Range{{Off: off, Len: n}} }
