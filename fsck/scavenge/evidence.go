package scavenge

import (
	"cmp"
	"fmt"
	"slices"
)

// The places at which evidence was found are called locs: a byte offset of the
// file, or for what was decompressed packedLoc and a place in the table of
// pieces, see tables.packedLoc.
const packedLoc = int64(1) << 62

// kind says what the offset of a hit means.
type kind uint8

const (
	kindPlain   kind = iota // bytes from the start of the filesystem (of the disk for fs -1)
	kindInodes              // bytes into all inode tables, one behind the other
	kindLogical             // btrfs: a logical address
	kindAgainst             // a copy: it has no place here
	kindJournal             // a block of a journal itself, among copies
)

// hit is a run of metadata blocks that say where they belong.
type hit struct {
	loc, off int64
	n        int32 // blocks
	fs       int16 // index in evidence.guests; -1 is the disk itself
	kind     kind
}

const hitBytes = 24

// seedHit is a block of ext4 under a checksum that begins with the seed of an
// inode: a directory block or a block of an extent tree.
type seedHit struct {
	loc   int64
	seed  uint32
	first uint32 // directory: 1 for its first block; extents: the first logical block
	fs    int16
	depth int8 // of an extent block; -1 is a directory block
}

const seedBytes = 24

// super is one superblock that was found.
type super struct {
	loc, off int64 // off: in the filesystem, as it says itself
	primary  bool
}

// guest is a filesystem in the disk.
type guest struct {
	index  int16
	kind   string
	uuid   [16]byte
	size   int64 // bytes
	block  int64 // the unit in which its metadata is aligned
	phases []int64
	supers []super
	ext    *extFS
	xfs    *xfsFS
	btrfs  *btrfsFS
	newest uint64 // of its superblocks
	blocks int64  // hits

	base   int64
	rank   rank
	basis  string
	deep   bool // its trees were looked at
	mapped bool // its bitmaps were looked for
	tailed bool // the ends of its files were looked for
	tails  []tail
}

const (
	maxGuests  = 64
	maxPhases  = 3
	maxSupers  = 4096
	maxTables  = 256 // of each kind
	alignGuest = 512
)

// evidence is what the passes found.
type evidence struct {
	src    *source
	shift  uint // log2 of the cluster size
	guests []*guest
	hits   []hit
	seeds  []seedHit
	tables []table
	report *Report
	// read fills p from a loc; it is set by the format.
	readLoc func(p []byte, loc int64) bool
	spent   int64 // attempts at descriptors, see extFS.descriptors
}

// guestFor finds or makes the filesystem with this identity; nil when there
// are too many.
func (e *evidence) guestFor(kind string, uuid [16]byte, block int64) *guest {
	for _, g := range e.guests {
		if g.kind == kind && g.uuid == uuid && g.block == block {
			return g
		}
	}
	if len(e.guests) == maxGuests {
		e.report.note("more filesystems than are looked at")
		return nil
	}
	g := &guest{index: int16(len(e.guests)), kind: kind, uuid: uuid, block: block, basis: "not found"}
	e.guests = append(e.guests, g)
	return g
}

// super enters a superblock.
func (g *guest) super(loc, off int64, primary bool) {
	if len(g.supers) < maxSupers {
		g.supers = append(g.supers, super{loc, off, primary})
	}
	// Blocks are aligned as the superblock is, as far as clusters go.
	p := (loc - off) & (g.block - 1) &^ (alignGuest - 1)
	if !slices.Contains(g.phases, p) && len(g.phases) < maxPhases {
		g.phases = append(g.phases, p)
	}
}

// add enters a metadata block of n bytes.
func (e *evidence) add(g *guest, k kind, loc, off int64, n int64) error {
	index := int16(-1)
	if g != nil {
		index = g.index
		if k != kindAgainst && k != kindJournal {
			g.blocks++
		}
	}
	if l := len(e.hits); l > 0 {
		h := &e.hits[l-1]
		if h.fs == index && h.kind == k && h.loc>>e.shift == loc>>e.shift {
			end := int64(h.n) * n
			if k >= kindAgainst || h.loc+end == loc && h.off+end == off && (k != kindInodes || g.ext.sameTable(h.off, off)) {
				h.n++
				return nil
			}
		}
	}
	var err error
	e.hits, err = append1(e.src, e.hits, hit{loc: loc, off: off, n: 1, fs: index, kind: k}, hitBytes, "evidence")
	return err
}

func (e *evidence) addSeed(s seedHit) (err error) {
	e.seeds, err = append1(e.src, e.seeds, s, seedBytes, "evidence")
	return err
}

// supers looks for superblocks and partition tables in the first n bytes of b,
// which lie at loc.
func (e *evidence) supers(b []byte, n int, loc int64) error {
	for x := 0; x+sector <= n; x += sector {
		w := b[x:]
		at := loc + int64(x)
		switch {
		case string(w[:4]) == "XFSB":
			e.xfsSuper(w, at)
		case string(w[:8]) == "EFI PART":
			e.gptHeader(w, at)
		case string(w[64:72]) == "_BHRfS_M":
			e.btrfsSuper(w, at)
		case w[56] == 0x53 && w[57] == 0xef && at%1024 == 0 && len(w) >= 1024:
			e.extSuper(w[:1024], at)
		}
		if w[510] == 0x55 && w[511] == 0xaa {
			e.mbr(w[:sector], at)
		}
	}
	return nil
}

// meta looks for metadata of the filesystems that were found.
func (e *evidence) meta(b []byte, n int, loc int64) error {
	for _, g := range e.guests {
		step := g.block
		if g.kind == "xfs" {
			step = sector
		}
		for i, p := range g.phases {
			if g.kind == "xfs" && i > 0 {
				break
			}
			// The first place at or behind loc with this phase.
			x := (p - loc) & (step - 1)
			for ; x+step <= int64(n); x += step {
				w := b[x:]
				var err error
				switch g.kind {
				case "ext4":
					err = g.ext.look(e, g, w[:step], loc+x)
				case "xfs":
					err = g.xfs.look(e, g, w, loc+x)
				case "btrfs":
					err = g.btrfs.look(e, g, w, loc+x)
				}
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// finish sorts what the passes found.
func (e *evidence) finish() {
	slices.SortFunc(e.hits, func(a, b hit) int {
		return cmp.Or(cmp.Compare(a.loc, b.loc), cmp.Compare(a.fs, b.fs), cmp.Compare(a.kind, b.kind), cmp.Compare(a.off, b.off), cmp.Compare(a.n, b.n))
	})
	e.hits = slices.Compact(e.hits) // an inode may have copies, which say the same
	slices.SortFunc(e.seeds, func(a, b seedHit) int {
		return cmp.Or(cmp.Compare(a.fs, b.fs), cmp.Compare(a.seed, b.seed), cmp.Compare(a.loc, b.loc))
	})
}

// resolve appends the offsets in the filesystem that h can mean.
func (e *evidence) resolve(h hit, dst []int64) []int64 {
	switch h.kind {
	case kindPlain:
		return append(dst, h.off)
	case kindInodes:
		return e.guests[h.fs].ext.inodePlace(h.off, dst)
	case kindLogical:
		return e.guests[h.fs].btrfs.physical(h.off, dst)
	}
	return dst
}

func uuidText(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
