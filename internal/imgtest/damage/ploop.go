package damage

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// PloopDamage is a Damage of a ploop image, with what ploop's own tool says.
type PloopDamage struct {
	Damage
	// Tool is the exit status of ploop check -f -c on the damaged image, -1
	// when it does not matter. After a full repair that ends Clean it must be
	// 0, but for images with a format extension, which it does not know.
	Tool int
	// Extension says that a format extension is there after the repair.
	Extension bool
}

// PloopImage is a small image under construction: header, BAT and clusters.
type PloopImage struct {
	Version int
	Cluster int
	Entries int // of the disk, whole clusters
	B       []byte
	// Holes are ranges of the file that are left out when it is written.
	Holes []blockmap.Range
}

var le = binary.LittleEndian

// NewPloop makes an image of cluster bytes and entries in which the guest
// clusters in mapped are stored one after the other, with a pattern.
func NewPloop(version, cluster, entries int, mapped ...int) *PloopImage {
	p := &PloopImage{Version: version, Cluster: cluster, Entries: entries}
	first := (64 + 4*entries + cluster - 1) / cluster * cluster
	p.B = make([]byte, first)
	copy(p.B, "WithouFreSpacExt")
	if version == 1 {
		copy(p.B, "WithoutFreeSpace")
	}
	sectors := uint64(entries) * uint64(cluster/512)
	le.PutUint32(p.B[16:], 2)
	le.PutUint32(p.B[20:], 16)
	le.PutUint32(p.B[24:], uint32(sectors/512))
	le.PutUint32(p.B[28:], uint32(cluster/512))
	le.PutUint32(p.B[32:], uint32(entries))
	le.PutUint64(p.B[36:], sectors)
	le.PutUint32(p.B[48:], uint32(first/512))
	for _, idx := range mapped {
		p.SetEntry(idx, p.Append(uint64(idx)+1))
	}
	if len(mapped) == 0 {
		le.PutUint32(p.B[52:], 1)
	}
	return p
}

// Append adds a cluster with a pattern and returns its number in the file.
func (p *PloopImage) Append(seed uint64) int {
	p.B = append(p.B, imgtest.PatternBytes(seed, 0, p.Cluster)...)
	return len(p.B)/p.Cluster - 1
}

// Put32 changes a field.
func (p *PloopImage) Put32(off int, v uint32) *PloopImage {
	le.PutUint32(p.B[off:], v)
	return p
}

// Put64 changes a field.
func (p *PloopImage) Put64(off int, v uint64) *PloopImage {
	le.PutUint64(p.B[off:], v)
	return p
}

// SetEntry lets guest cluster idx be cluster slot of the file.
func (p *PloopImage) SetEntry(idx, slot int) *PloopImage {
	return p.Put32(64+4*idx, p.unit(slot))
}

func (p *PloopImage) unit(slot int) uint32 {
	if p.Version == 1 {
		return uint32(slot * p.Cluster / 512)
	}
	return uint32(slot)
}

// Guest is what the guest sees, by the BAT as it is now, which must be sound.
func (p *PloopImage) Guest() []byte {
	b := make([]byte, p.Entries*p.Cluster)
	for idx := range p.Entries {
		if e := le.Uint32(p.B[64+4*idx:]); e != 0 {
			at := int(e/p.unit(1)) * p.Cluster
			copy(b[idx*p.Cluster:(idx+1)*p.Cluster], p.B[at:])
		}
	}
	return b
}

// Write writes the image.
func (p *PloopImage) Write(t testing.TB, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}()
	at := int64(0)
	for _, h := range append(p.Holes, blockmap.Range{Off: int64(len(p.B))}) {
		if _, err := f.WriteAt(p.B[at:h.Off], at); err != nil {
			t.Fatal(err)
		}
		at = h.End()
	}
	if err := f.Truncate(int64(len(p.B))); err != nil {
		t.Fatal(err)
	}
	// So that the host has decided about blocks before anybody asks.
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// AddExtension appends a format extension with a dirty bitmap, one cluster
// each, and marks the image as closed with it.
func (p *PloopImage) AddExtension() *PloopImage {
	at := len(p.B)
	ext := make([]byte, p.Cluster)
	le.PutUint64(ext, 0xab234cef23dcea87)
	e := ext[24:]
	le.PutUint64(e, 0x20385fae252cb34a)
	le.PutUint32(e[16:], 32+8)
	bm := e[24:]
	le.PutUint64(bm, uint64(p.Entries*p.Cluster/512))
	copy(bm[8:24], "0123456789abcdef")
	le.PutUint32(bm[24:], 128)
	le.PutUint32(bm[28:], 1)
	le.PutUint64(bm[32:], uint64(at+p.Cluster)/512)
	p.B = append(p.B, ext...)
	p.B = append(p.B, bytes.Repeat([]byte{0xaa}, p.Cluster)...)
	p.Put64(56, uint64(at)/512)
	p.Put32(44, 0x312e3276)
	return p.Seal()
}

// Seal writes the checksum of the format extension.
func (p *PloopImage) Seal() *PloopImage {
	at := int(le.Uint64(p.B[56:])) * 512
	sum := md5.Sum(p.B[at+24 : at+p.Cluster])
	copy(p.B[at+8:], sum[:])
	return p
}

const ploopK = 64 << 10

// sound is the undamaged image of most cases: a disk of 16 clusters of 64 KiB,
// guest clusters 0, 3, 4 and 15 in clusters 1 to 4 of the file.
func sound(version int) *PloopImage { return NewPloop(version, ploopK, 16, 0, 3, 4, 15) }

func guestClusters(idx ...int64) (all []blockmap.Range) {
	for _, i := range idx {
		all = append(all, blockmap.Range{Off: i * ploopK, Len: ploopK})
	}
	return all
}

// Ploop are the cases of damage of single ploop images.
func Ploop() []PloopDamage {
	return slices.Concat(ploopHeader(), ploopEntries(), ploopSpace(), ploopExtension())
}

// ploopCase makes a case of one of the versions from an image that is sound
// until hurt.
func ploopCase(name string, image func() *PloopImage, hurt func(*PloopImage), preen, full State, lost []blockmap.Range, codes ...string) PloopDamage {
	v, ok := ploopVerdicts[name]
	if !ok {
		panic("no verdicts on " + name)
	}
	return PloopDamage{
		Damage: Damage{Name: name, Format: "ploop", Codes: codes, Preen: preen, Full: full, Lost: lost, Foreign: v.qemu,
			Build: func(t testing.TB, dir string) string {
				t.Helper()
				p := image()
				if err := os.WriteFile(Original(dir), p.Guest(), 0o600); err != nil {
					t.Fatal(err)
				}
				hurt(p)
				path := filepath.Join(dir, "image.hds")
				p.Write(t, path)
				return path
			}},
		Tool: v.tool,
	}
}

func v1() *PloopImage { return sound(1) }
func v2() *PloopImage { return sound(2) }

func put32(off int, v uint32) func(*PloopImage) { return func(p *PloopImage) { p.Put32(off, v) } }
func put64(off int, v uint64) func(*PloopImage) { return func(p *PloopImage) { p.Put64(off, v) } }

func ploopHeader() []PloopDamage {
	h := func(name string, hurt func(*PloopImage), preen, full State, codes ...string) PloopDamage {
		return ploopCase("header/"+name, v2, hurt, preen, full, nil, codes...)
	}
	return []PloopDamage{
		h("short", func(p *PloopImage) { p.B = p.B[:63] }, Fatal, Fatal, "ploop.header.short"),
		h("no signature", func(p *PloopImage) { copy(p.B, "something else!!") }, Fatal, Fatal, "ploop.header.signature"),
		h("signature", func(p *PloopImage) { p.B[3] ^= 0x40 }, Fatal, Clean, "ploop.header.signature"),
		h("type", put32(16, 3), Damaged, Clean, "ploop.header.type"),
		h("cluster 0", put32(28, 0), Damaged, Clean, "ploop.header.cluster-size"),
		h("cluster doubled", put32(28, 256), Damaged, Clean, "ploop.header.cluster-size"),
		h("cluster huge", put32(28, 1<<31), Damaged, Clean, "ploop.header.cluster-size"),
		h("one entry too few", put32(32, 15), Damaged, Clean, "ploop.header.bat-size"),
		h("one entry too many", put32(32, 17), Damaged, Clean, "ploop.header.bat-size"),
		h("entries huge", put32(32, 0x7fffffff), Damaged, Clean, "ploop.header.bat-size"),
		h("disk too large", put64(36, 1<<40), Damaged, Clean, "ploop.header.disk-size"),
		h("disk too small", put64(36, 1024), Damaged, Clean, "ploop.header.disk-size"),
		h("all sizes", func(p *PloopImage) { p.Put32(28, 0).Put32(32, 7).Put32(48, 5) }, Fatal, Fatal, "ploop.header.geometry"),
		h("first block 0", put32(48, 0), Damaged, Clean, "ploop.header.first-block"),
		h("first block unaligned", put32(48, 129), Damaged, Clean, "ploop.header.first-block"),
		h("first block late", put32(48, 256), Damaged, Clean, "ploop.header.first-block"),
		h("first block behind the file", put32(48, 0xffffff80), Damaged, Clean, "ploop.header.first-block"),
		ploopCase("header/high word", v1, put32(40, 0xdead), Clean, Clean, nil, "ploop.header.size-high-word"),
		h("in use", put32(44, 0x746f6e59), Clean, Clean, "ploop.header.in-use"),
		h("in use, unknown value", put32(44, 0xdeadbeef), Clean, Clean, "ploop.header.in-use-value"),
		h("v2.1 without extension", put32(44, 0x312e3276), Clean, Clean, "ploop.header.v21-without-extension"),
		h("empty set", put32(52, 1), Clean, Clean, "ploop.header.empty-set"),
		ploopCase("header/empty missing", func() *PloopImage { return NewPloop(2, ploopK, 16) }, put32(52, 0), Clean, Clean, nil, "ploop.header.empty-missing"),
		h("first block all ones", put32(48, 0xffffffff), Damaged, Clean, "ploop.header.first-block"),
		h("converting and in use", func(p *PloopImage) { p.Put32(52, 2).Put32(44, 0x746f6e59) }, Fatal, Clean, "ploop.header.converting", "ploop.header.in-use"),
		h("converting, entries valid", put32(52, 2), Fatal, Clean, "ploop.header.converting"),
		h("converting, in both forms", func(p *PloopImage) { p.Put32(52, 2).Put32(64+12, 256) }, Fatal, Fatal, "ploop.header.converting"),
		h("unknown flags", put32(52, 0x100), Clean, Clean, "ploop.header.unknown-flags"),
	}
}

func ploopEntries() []PloopDamage {
	entry := func(name string, version int, idx int, v uint32, lost []blockmap.Range, codes ...string) PloopDamage {
		image := v2
		if version == 1 {
			image = v1
		}
		return ploopCase("bat/"+name, image, put32(64+4*idx, v), Damaged, Clean, lost, codes...)
	}
	all := []PloopDamage{
		entry("at the end of the file", 2, 3, 5, guestClusters(3), "ploop.bat.past-eof", "ploop.leak.suspect"),
		entry("at the end of the file v1", 1, 3, 5*128, guestClusters(3), "ploop.bat.past-eof"),
		entry("far behind the end", 2, 7, 0x7fffffff, guestClusters(7), "ploop.bat.past-eof"),
		entry("invalid", 2, 3, 0xffffffff, guestClusters(3), "ploop.bat.invalid"),
		entry("invalid v1", 1, 3, 0xffffffff, guestClusters(3), "ploop.bat.invalid"),
		entry("unaligned v1", 1, 3, 129, guestClusters(3), "ploop.bat.unaligned"),
		entry("unaligned into the BAT v1", 1, 3, 1, guestClusters(3), "ploop.bat.unaligned"),
		entry("duplicate", 2, 9, 2, guestClusters(3, 9), "ploop.bat.duplicate"),
		entry("duplicate v1", 1, 9, 2*128, guestClusters(3, 9), "ploop.bat.duplicate"),
		entry("duplicate that lost its own", 2, 15, 3, guestClusters(4, 15), "ploop.bat.duplicate", "ploop.leak.suspect"),
		ploopCase("bat/five owners", v2, func(p *PloopImage) {
			for _, idx := range []int{1, 7, 8, 9} {
				p.SetEntry(idx, 2)
			}
		}, Damaged, Clean, guestClusters(1, 3, 7, 8, 9), "ploop.bat.duplicate"),
		ploopCase("bat/all on one", v2, func(p *PloopImage) {
			for idx := range 16 {
				p.SetEntry(idx, 2)
			}
		}, Damaged, Clean, []blockmap.Range{{Len: 16 * ploopK}}, "ploop.bat.duplicate"),
		ploopCase("bat/behind the disk", v2, func(p *PloopImage) { p.SetEntry(16, 2) }, Clean, Clean, nil, "ploop.bat.beyond-disk"),
		ploopCase("bat/far behind the disk", v2, func(p *PloopImage) { p.Put32(64+4*1000, 77) }, Clean, Clean, nil, "ploop.bat.beyond-disk"),
		ploopCase("bat/behind the disk v1", v1, func(p *PloopImage) { p.SetEntry(17, 3) }, Clean, Clean, nil, "ploop.bat.beyond-disk"),
		ploopCase("bat/several at once", v2, func(p *PloopImage) {
			p.Put32(44, 0x746f6e59).Put32(52, 1).Put32(64+4*5, 900).SetEntry(9, 1).Append(77)
			p.B = append(p.B, 1, 2, 3)
		}, Damaged, Clean, guestClusters(0, 5, 9),
			"ploop.header.in-use", "ploop.bat.past-eof", "ploop.bat.duplicate", "ploop.leak.suspect"),
	}
	for version := 1; version <= 2; version++ {
		three := func() *PloopImage { return NewPloop(version, ploopK, 16, 2, 3, 4) }
		all = append(all, ploopCase([]string{"", "bat/between its neighbours v1", "bat/between its neighbours"}[version], three,
			put32(64+4*3, 0x80000001), Damaged, Clean, guestClusters(3), "ploop.bat."+[]string{"", "unaligned", "past-eof"}[version]))
	}
	large := func() *PloopImage { return NewPloop(2, 32<<10, 8200, 0, 3, 8199) }
	all = append(all,
		ploopCase("bat/into the BAT", large, func(p *PloopImage) { p.SetEntry(3, 1) }, Damaged, Clean,
			[]blockmap.Range{{Off: 3 * 32 << 10, Len: 32 << 10}}, "ploop.bat.into-metadata"))
	return all
}

func ploopSpace() []PloopDamage {
	return []PloopDamage{
		ploopCase("file/last cluster cut off", v2, func(p *PloopImage) { p.B = p.B[:len(p.B)-1000] }, Damaged, Clean,
			[]blockmap.Range{{Off: 16*ploopK - 1000, Len: 1000}}, "ploop.bat.truncated-cluster"),
		ploopCase("file/last cluster gone", v2, func(p *PloopImage) { p.B = p.B[:len(p.B)-ploopK] }, Damaged, Clean,
			guestClusters(15), "ploop.bat.past-eof"),
		ploopCase("file/cut inside the BAT", v2, func(p *PloopImage) { p.B = p.B[:100] }, Fatal, Clean,
			[]blockmap.Range{{Len: 16 * ploopK}}, "ploop.bat.cut-off"),
		ploopCase("file/ragged", v2, func(p *PloopImage) { p.B = append(p.B, 1, 2, 3) }, Clean, Clean, nil, "ploop.file.ragged"),
		ploopCase("file/leak at the end", v2, func(p *PloopImage) { p.Append(99); p.Append(98) }, Clean, Clean, nil, "ploop.leak.tail"),
		ploopCase("file/leak at the end, ragged", v1, func(p *PloopImage) { p.Append(99); p.B = append(p.B, 1) }, Clean, Clean, nil, "ploop.leak.tail", "ploop.file.ragged"),
		ploopCase("file/leak inside", func() *PloopImage {
			p := sound(2)
			p.SetEntry(3, 0).SetEntry(15, 4)
			return p
		}, func(*PloopImage) {}, Clean, Clean, nil, "ploop.leak.inner"),
		ploopCase("file/hole in a cluster", v2, func(p *PloopImage) {
			clear(p.B[2*ploopK : 2*ploopK+8192])
			p.Holes = []blockmap.Range{{Off: 2 * ploopK, Len: 8192}}
		}, Clean, Clean, []blockmap.Range{{Off: 3 * ploopK, Len: 8192}}, "ploop.host.hole"),
		ploopCase("file/hole in the BAT area", v2, func(p *PloopImage) {
			p.Holes = []blockmap.Range{{Off: 8192, Len: ploopK - 8192}}
		}, Clean, Clean, nil, "ploop.host.hole-metadata"),
	}
}

func ploopExtension() []PloopDamage {
	with := func() *PloopImage { return sound(2).AddExtension() }
	ext := func(p *PloopImage) int { return int(le.Uint64(p.B[56:])) * 512 }
	x := func(name string, hurt func(*PloopImage), preen, full State, codes ...string) PloopDamage {
		return ploopCase("extension/"+name, with, hurt, preen, full, nil, codes...)
	}
	sealed := func(off int, v uint64) func(*PloopImage) {
		return func(p *PloopImage) { p.Put64(ext(p)+off, v).Seal() }
	}
	all := []PloopDamage{
		x("none", func(*PloopImage) {}, Clean, Clean),
		x("stale", put32(44, 0), Clean, Clean, "ploop.extension.stale"),
		x("stale and in use", put32(44, 0x746f6e59), Clean, Clean, "ploop.extension.stale", "ploop.header.in-use"),
		x("offset behind the file", put64(56, 1<<40), Clean, Clean, "ploop.extension.offset"),
		x("offset overflows", put64(56, 1<<63), Clean, Clean, "ploop.extension.offset"),
		x("offset into the BAT", put64(56, 1), Clean, Clean, "ploop.extension.offset"),
		x("offset in bytes", func(p *PloopImage) { p.Put64(56, uint64(ext(p))) }, Clean, Clean, "ploop.extension.offset-in-bytes"),
		x("sound at no place of a cluster", func(p *PloopImage) {
			at := ext(p)
			b := bytes.Clone(p.B[at : at+ploopK])
			p.B = append(p.B, make([]byte, 2*ploopK)...)
			copy(p.B[len(p.B)-2*ploopK+4096:], b)
			clear(p.B[at : at+ploopK])
			p.Put64(56, uint64(len(p.B)-2*ploopK+4096)/512)
		}, Damaged, Clean, "ploop.extension.offset"),
		x("sound on the guest's cluster", func(p *PloopImage) {
			copy(p.B[2*ploopK:3*ploopK], p.B[ext(p):])
			p.Put64(56, 2*ploopK/512)
		}, Damaged, Clean, "ploop.extension.shared"),
		x("magic", func(p *PloopImage) { p.B[ext(p)]++ }, Clean, Clean, "ploop.extension.magic"),
		x("checksum", func(p *PloopImage) { p.B[ext(p)+4000]++ }, Clean, Clean, "ploop.extension.checksum"),
		x("element too long", func(p *PloopImage) { p.Put32(ext(p)+24+16, ploopK).Seal() }, Clean, Clean, "ploop.extension.element"),
		x("bitmap too short", func(p *PloopImage) { p.Put32(ext(p)+24+16, 8).Seal() }, Clean, Clean, "ploop.extension.bitmap"),
		x("granularity 0", func(p *PloopImage) { p.Put32(ext(p)+48+24, 0).Seal() }, Clean, Clean, "ploop.extension.bitmap"),
		x("table too long", func(p *PloopImage) { p.Put32(ext(p)+48+28, 1<<31).Seal() }, Clean, Clean, "ploop.extension.bitmap"),
		x("bits behind the file", sealed(48+32, 1<<40), Clean, Clean, "ploop.extension.bitmap"),
		x("bits unaligned", sealed(48+32, 129), Clean, Clean, "ploop.extension.bitmap"),
		x("bits in the BAT", sealed(48+32, 2), Clean, Clean, "ploop.extension.bitmap"),
		x("bits on the extension", func(p *PloopImage) { p.Put64(ext(p)+48+32, uint64(ext(p))/512).Seal() }, Clean, Clean, "ploop.extension.shared"),
		x("bits on the guest's cluster", sealed(48+32, 2*ploopK/512), Damaged, Clean, "ploop.extension.shared"),
		x("leak behind it", func(p *PloopImage) { p.Append(5) }, Clean, Clean, "ploop.leak.tail"),
	}
	for i := range all {
		switch all[i].Name {
		case "extension/sound on the guest's cluster", "extension/bits on the guest's cluster":
			all[i].Lost = guestClusters(3)
		case "extension/none", "extension/sound at no place of a cluster", "extension/offset in bytes", "extension/leak behind it":
			all[i].Extension = true
		}
	}
	return all
}
