package mutate

import (
	"embed"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"sync"
)

// Guest is a filesystem, or a disk with several, that can be damaged so that
// its checksums are right again.
type Guest struct {
	Name  string
	Image *Sparse
	// fields are numbers that it has; sums make the checksums right, in this
	// order (a later one may cover an earlier one).
	fields []guestField
	// Marks are the bytes at which things are, for who damages by hand.
	Marks map[string]int64
	sums  []func(m memory)
}

// memory is what a checksum is made in: an image or a part of one.
type memory interface {
	Bytes(off int64, n int) []byte
	Put(off int64, p []byte)
}

// shifted is a part of an image.
type shifted struct {
	memory
	by int64
}

func (s shifted) Bytes(off int64, n int) []byte { return s.memory.Bytes(s.by+off, n) }
func (s shifted) Put(off int64, p []byte)       { s.memory.Put(s.by+off, p) }

// guestField is a number at a byte of the image.
type guestField struct {
	off  int64
	size int
	big  bool
}

// Damage changes a copy as the script says: of the first byte, bit 0 leaves the
// checksums as they are; then four bytes for each edit, at most 6 edits.
func (g *Guest) Damage(script []byte) *Sparse {
	s := g.Image.Clone()
	if len(script) == 0 {
		return s
	}
	how := script[0]
	script = script[1:]
	for n := 0; len(script) >= 4 && n < 6; n++ {
		f := g.fields[(int(script[0])<<8|int(script[1]))%len(g.fields)]
		other := g.fields[int(script[3])*7%len(g.fields)]
		f.put(s, newValue(f.get(s), other.get(s), f.size, s.size, script[2], script[3]))
		script = script[4:]
	}
	if how&1 == 0 {
		g.Fix(s)
	}
	return s
}

// Fix makes the checksums of a changed copy right.
func (g *Guest) Fix(s *Sparse) {
	for _, fix := range g.sums {
		fix(s)
	}
}

// Fields is how many numbers can be damaged.
func (g *Guest) Fields() int { return len(g.fields) }

// At is the guest in a larger image, whose other places are those of whole.
func (g *Guest) At(off int64, whole *Sparse) *Guest {
	whole.Place(off, g.Image)
	o := &Guest{Name: g.Name, Image: whole}
	for _, f := range g.fields {
		f.off += off
		o.fields = append(o.fields, f)
	}
	for _, fix := range g.sums {
		o.sums = append(o.sums, func(m memory) { fix(shifted{m, off}) })
	}
	return o
}

func (f guestField) get(s *Sparse) uint64 {
	return field{0, f.size, f.big}.get(s.Bytes(f.off, f.size))
}

func (f guestField) put(s *Sparse, v uint64) {
	b := make([]byte, f.size)
	field{0, f.size, f.big}.put(b, v)
	s.Put(f.off, b)
}

// add enters fields at off: pairs of a place relative to it and a size.
func (g *Guest) add(off int64, big bool, pairs ...[2]int64) {
	for _, p := range pairs {
		g.fields = append(g.fields, guestField{off + p[0], int(p[1]), big})
	}
}

// run are n fields of a size, one behind the other.
func run(from, n, size int64) (pairs [][2]int64) {
	for i := range n {
		pairs = append(pairs, [2]int64{from + i*size, size})
	}
	return pairs
}

//go:embed testdata/*.gz
var recorded embed.FS

// recordings are the names of the recorded filesystems, with what finds their
// numbers. How they were made is in recipes_test.go.
var recordings = []struct {
	name  string
	parse func(*Guest) error
}{
	{"ext2", parseExt}, {"ext4-clean", parseExt}, {"ext4-dirty", parseExt}, {"ext4-v2", parseExt}, {"ext4-gdt", parseExt}, {"ext4-bigalloc", parseExt},
	{"xfs", parseXFS}, {"xfs-v4", parseXFS}, {"swap", parseSwap},
}

// Guests are all recorded filesystems.
var Guests = sync.OnceValue(func() []*Guest {
	var all []*Guest
	for _, r := range recordings {
		g, err := loadGuest(r.name, r.parse)
		if err != nil {
			panic(fmt.Sprintf("%s: %v", r.name, err)) // a defect of the test kit
		}
		all = append(all, g)
	}
	return all
})

// ByName is one of them.
func ByName(name string) *Guest {
	for _, g := range Guests() {
		if g.Name == name {
			return g
		}
	}
	panic("no recording of " + name)
}

func loadGuest(name string, parse func(*Guest) error) (*Guest, error) {
	f, err := recorded.Open("testdata/" + name + ".gz")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	g := &Guest{Name: name, Marks: map[string]int64{}}
	if g.Image, err = load(f); err != nil {
		return nil, err
	}
	return g, parse(g)
}

// parseSwap knows the header of a swap area (linux/swap.h).
func parseSwap(g *Guest) error {
	g.add(1024, false, run(0, 3, 4)...)
	g.add(4086, false, run(0, 10, 1)...)
	return nil
}

// GPTDisk is a disk with a GUID partition table, whose checksums can be made
// right, and the guests in its partitions.
func GPTDisk(guests ...*Guest) *Guest {
	const mib = 1 << 20
	size := int64(2 * mib)
	for _, g := range guests {
		size += (g.Image.size + mib - 1) / mib * mib
	}
	d := &Guest{Name: "gpt", Image: NewSparse(size)}
	sectors := size / 512
	table := make([]byte, 128*128)
	at := int64(mib)
	le := binary.LittleEndian
	for i, g := range guests {
		e := table[128*i:]
		for j := range 16 {
			e[j], e[16+j] = byte(j+1), byte(16*i+j+1)
		}
		le.PutUint64(e[32:], uint64(at/512))
		le.PutUint64(e[40:], uint64((at+g.Image.size)/512-1))
		in := g.At(at, d.Image)
		d.fields, d.sums = append(d.fields, in.fields...), append(d.sums, in.sums...)
		at += (g.Image.size + mib - 1) / mib * mib
	}
	mbr := make([]byte, 512)
	mbr[450] = 0xee
	le.PutUint32(mbr[454:], 1)
	le.PutUint32(mbr[458:], uint32(sectors-1))
	mbr[510], mbr[511] = 0x55, 0xaa
	d.Image.Put(0, mbr)
	d.add(446, false, [2]int64{4, 1}, [2]int64{8, 4}, [2]int64{12, 4})
	for _, place := range []struct{ own, other, entries int64 }{{1, sectors - 1, 2}, {sectors - 1, 1, sectors - 33}} {
		h := make([]byte, 512)
		copy(h, "EFI PART")
		for off, v := range map[int]uint64{24: uint64(place.own), 32: uint64(place.other), 40: 34, 48: uint64(sectors - 34), 72: uint64(place.entries)} {
			le.PutUint64(h[off:], v)
		}
		for off, v := range map[int]uint32{8: 0x10000, 12: 92, 80: 128, 84: 128} {
			le.PutUint32(h[off:], v)
		}
		header, entries := place.own*512, place.entries*512
		d.Image.Put(header, h)
		d.Image.Put(entries, table)
		d.add(header, false, [2]int64{8, 4}, [2]int64{12, 4}, [2]int64{24, 8}, [2]int64{32, 8}, [2]int64{40, 8}, [2]int64{48, 8}, [2]int64{72, 8}, [2]int64{80, 4}, [2]int64{84, 4})
		for i := range int64(len(guests)) + 1 {
			d.add(entries+128*i, false, [2]int64{0, 8}, [2]int64{16, 8}, [2]int64{32, 8}, [2]int64{40, 8}, [2]int64{48, 8}, [2]int64{56, 2})
		}
		d.sums = append(d.sums, func(m memory) { fixGPT(m, header, sectors) })
	}
	d.Fix(d.Image)
	return d
}

// fixGPT follows the header as it is now, as far as that makes sense.
func fixGPT(s memory, header, sectors int64) {
	le := binary.LittleEndian
	h := s.Bytes(header, 512)
	n, size, at := int64(le.Uint32(h[80:])), int64(le.Uint32(h[84:])), int64(le.Uint64(h[72:]))
	if n*size <= 1<<20 && at > 0 && at < sectors {
		le.PutUint32(h[88:], crc32.ChecksumIEEE(s.Bytes(at*512, int(n*size))))
	}
	le.PutUint32(h[16:], 0)
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:min(le.Uint32(h[12:]), 512)]))
	s.Put(header, h)
}
