package fat

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"sort"
	"strings"
	"unicode/utf16"

	"github.com/imagestack/imagestack/guestfs/freespace"
)

const (
	exfatID      = "EXFAT   "
	bootSectors  = 12 // of the boot region, of which the last has the checksum
	endOfChain   = 0xffffffff
	maxDirectory = 256 << 20

	entryBitmap  = 0x81
	entryUpcase  = 0x82
	entryLabel   = 0x83
	entryFile    = 0x85
	entryGUID    = 0xa0
	entryStream  = 0xc0
	entryName    = 0xc1
	entryVendor  = 0xe0
	entryVendor2 = 0xe1 // with clusters of its own
	inUse        = 0x80
)

// exfat is an exFAT filesystem while it is judged. Its bitmap is believed when
// every cluster of every file is marked in it, and no more are owned than
// marked.
type exfat struct {
	r   io.ReaderAt
	ctx context.Context

	sector, cluster int64 // bytes
	tableStart      int64
	heap            int64
	clusters        int64
	root            uint32
	serial          uint32
	label           string

	table        *freespace.Window
	marked       *freespace.Window
	bitmap       []piece // where the bitmap is
	used         int64   // clusters that are marked
	owned        int64   // clusters of the files so far
	found        int     // entries of the bitmap
	pending      []chain // directories
	bitmapLength int64
}

// chain is a file: clusters from first, linked in the table or in a row.
type chain struct {
	first uint32
	n     int64 // clusters; -1 is up to the end of the chain
	row   bool
}

// piece is a run of clusters.
type piece struct {
	first uint32
	n     int64
	at    int64 // cluster of the file
}

func broken(format string, args ...any) error {
	return freespace.Refuse(freespace.Damaged, "exfat: %s", fmt.Sprintf(format, args...))
}

// DetectExFAT reports whether head begins with the boot sector of an exFAT.
func DetectExFAT(head []byte) bool {
	return len(head) >= sectorMin && string(head[3:11]) == exfatID
}

// FreeExFAT is the freespace.Reader of exFAT.
func FreeExFAT(ctx context.Context, r io.ReaderAt, size int64, emit freespace.Emit) (freespace.Info, error) {
	var info freespace.Info
	x := &exfat{r: r, ctx: ctx}
	if err := x.readBoot(size); err != nil {
		return info, err
	}
	info.UUID, info.BlockSize = fmt.Sprintf("%04X-%04X", x.serial>>16, x.serial&0xffff), x.cluster
	x.table = freespace.NewWindow(io.NewSectionReader(r, x.tableStart, (x.clusters+2)*4), (x.clusters+2)*4)
	if err := x.findBitmap(); err != nil {
		return info, err
	}
	var err error
	if x.used, err = freespace.Zeros(ctx, bitmapReader{x}, x.clusters, nil); err != nil {
		return info, err
	}
	if err := x.walk(); err != nil {
		return info, err
	}
	info.Label = x.label
	_, err = freespace.Zeros(ctx, bitmapReader{x}, x.clusters, func(start, n int64) error {
		return emit(x.heap+start*x.cluster, n*x.cluster)
	})
	return info, err
}

// readBoot reads and checks the boot region.
func (x *exfat) readBoot(size int64) error {
	b := make([]byte, sectorMin)
	if err := freespace.ReadAt(x.r, b, 0); err != nil {
		return err
	}
	le := binary.LittleEndian
	if !DetectExFAT(b) || b[510] != 0x55 || b[511] != 0xaa || !bytes.Equal(b[11:64], make([]byte, 53)) {
		return broken("no boot sector")
	}
	if b[108] < 9 || b[108] > 12 || int(b[109]) > 25-int(b[108]) {
		return broken("sectors of 2^%d bytes, clusters of 2^%d sectors", b[108], b[109])
	}
	x.sector = 1 << b[108]
	x.cluster = x.sector << b[109]
	if err := x.checkBootSum(); err != nil {
		return err
	}
	if revision, tables := le.Uint16(b[104:]), b[110]; revision != 0x100 || tables != 1 {
		return freespace.Refuse(freespace.Unsupported, "exfat: revision %#x, %d tables", revision, tables)
	}
	const dirty, failed, clearToZero = 2, 4, 8 // 1 is the second table of TexFAT
	switch flags := le.Uint16(b[106:]); {
	case flags&failed != 0:
		return freespace.Refuse(freespace.ErrorState, "exfat: the filesystem records errors of its disk (flags %#x): run fsck.exfat", flags)
	case flags&dirty != 0:
		return freespace.Refuse(freespace.NotClean, "exfat: not cleanly unmounted (flags %#x): run fsck.exfat", flags)
	case flags&^clearToZero != 0:
		return freespace.Refuse(freespace.UnknownFeature, "exfat: flags %#x", flags)
	}
	sectors := le.Uint64(b[72:])
	if sectors > uint64(size/x.sector) {
		return freespace.Refuse(freespace.Truncated, "exfat: %d sectors of %d bytes do not fit into %d bytes", sectors, x.sector, size)
	}
	table, tableLen, heap := int64(le.Uint32(b[80:])), int64(le.Uint32(b[84:])), int64(le.Uint32(b[88:]))
	x.clusters, x.root, x.serial = int64(le.Uint32(b[92:])), le.Uint32(b[96:]), le.Uint32(b[100:])
	x.tableStart, x.heap = table*x.sector, heap*x.sector
	if table < 2*bootSectors || heap < table+tableLen || tableLen*x.sector < (x.clusters+2)*4 ||
		x.clusters < 1 || x.clusters > 0xfffffff5 || x.heap+x.clusters*x.cluster > int64(sectors)*x.sector {
		return broken("table of %d sectors at %d, %d clusters from sector %d, of %d sectors", tableLen, table, x.clusters, heap, sectors)
	}
	return nil
}

// checkBootSum compares the checksum of the boot region, and the copy of its
// first sector behind it.
func (x *exfat) checkBootSum() error {
	b := make([]byte, bootSectors*x.sector)
	if err := freespace.ReadAt(x.r, b, 0); err != nil {
		return err
	}
	body, sums := b[:(bootSectors-1)*x.sector], b[(bootSectors-1)*x.sector:]
	sum := uint32(0)
	for i, c := range body {
		if i == 106 || i == 107 || i == 112 { // flags and fill level change
			continue
		}
		sum = bits.RotateLeft32(sum, -1) + uint32(c)
	}
	for i := 0; i < len(sums); i += 4 {
		if want := binary.LittleEndian.Uint32(sums[i:]); want != sum {
			return freespace.Refuse(freespace.BadChecksum, "exfat: boot region: checksum %#x, computed %#x", want, sum)
		}
	}
	copied := make([]byte, sectorMin)
	if err := freespace.ReadAt(x.r, copied, bootSectors*x.sector); err != nil {
		return err
	}
	if !bytes.Equal(copied[64:106], b[64:106]) || !bytes.Equal(copied[108:111], b[108:111]) {
		return broken("the boot sector and its copy disagree")
	}
	return nil
}

// follow calls f for the pieces of a file.
func (x *exfat) follow(c chain, f func(piece) error) error {
	if c.first < 2 || int64(c.first)-2 >= x.clusters || c.n > x.clusters {
		return broken("a file of %d clusters from %d, of %d", c.n, c.first, x.clusters)
	}
	if c.row {
		if c.n > x.clusters-(int64(c.first)-2) {
			return broken("a file of %d clusters from %d, of %d", c.n, c.first, x.clusters)
		}
		return f(piece{c.first, c.n, 0})
	}
	most := c.n
	if most < 0 {
		most = min(x.clusters, maxDirectory/x.cluster+1)
	}
	run := piece{c.first, 1, 0}
	at := c.first
	for n := int64(1); ; n++ {
		b, err := x.table.Bytes(4*int64(at), 4)
		if err != nil {
			return err
		}
		next := binary.LittleEndian.Uint32(b)
		if next == endOfChain {
			if c.n >= 0 && n != c.n {
				return broken("a file of %d clusters from %d ends after %d", c.n, c.first, n)
			}
			return f(run)
		}
		if n >= most || next < 2 || int64(next)-2 >= x.clusters {
			return broken("cluster %d, the %d. of a file of %d, is followed by %#x", at, n, c.n, next)
		}
		if next == at+1 {
			run.n++
		} else {
			if err := f(run); err != nil {
				return err
			}
			if err := x.ctx.Err(); err != nil {
				return err
			}
			run = piece{next, 1, n}
		}
		at = next
	}
}

// own checks that the clusters of a file are marked as used. Whoever leads
// the walk in circles owns more than there is.
func (x *exfat) own(c chain) error {
	return x.follow(c, func(p piece) error {
		ok, err := x.marked.Ones(int64(p.first)-2, p.n)
		if err != nil {
			return err
		}
		if !ok {
			return broken("clusters %d+%d are part of a file, and some are marked as free: run fsck.exfat", p.first, p.n)
		}
		if x.owned += p.n; x.owned > x.used {
			return freespace.Refuse(freespace.CountMismatch, "exfat: the files have more than the %d clusters that are marked as used: run fsck.exfat", x.used)
		}
		return nil
	})
}

// readDir calls f for the entries of a directory up to its end.
func (x *exfat) readDir(c chain, f func(entry []byte) error) error {
	b := make([]byte, min(x.cluster, 64<<10))
	errEnd := fmt.Errorf("the end")
	err := x.follow(c, func(p piece) error {
		at := x.heap + (int64(p.first)-2)*x.cluster
		for end := at + p.n*x.cluster; at < end; at += int64(len(b)) {
			if err := x.ctx.Err(); err != nil {
				return err
			}
			if err := freespace.ReadAt(x.r, b, at); err != nil {
				return err
			}
			for e := b; len(e) > 0; e = e[entrySize:] {
				if e[0] == 0 {
					return errEnd
				}
				if err := f(e[:entrySize]); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err == errEnd {
		return nil
	}
	return err
}

// findBitmap finds the allocation bitmap, which the root directory names.
func (x *exfat) findBitmap() error {
	err := x.readDir(chain{x.root, -1, false}, func(e []byte) error {
		if e[0] != entryBitmap {
			return nil
		}
		le := binary.LittleEndian
		n := int64(le.Uint64(e[24:]))
		if x.found++; x.found > 1 || e[1] != 0 || n != (x.clusters+7)/8 {
			return broken("bitmap of %d bytes for %d clusters (flags %#x), or a second one", n, x.clusters, e[1])
		}
		x.bitmapLength = n
		return x.follow(chain{le.Uint32(e[20:]), (n + x.cluster - 1) / x.cluster, false}, func(p piece) error {
			x.bitmap = append(x.bitmap, p)
			return nil
		})
	})
	if err == nil && x.found == 0 {
		err = broken("no bitmap")
	}
	x.marked = freespace.NewWindow(bitmapReader{x}, x.bitmapLength)
	return err
}

// bitmapReader reads the bitmap.
type bitmapReader struct{ x *exfat }

func (b bitmapReader) ReadAt(p []byte, off int64) (int, error) {
	x, done := b.x, 0
	c := off / x.cluster
	i := sort.Search(len(x.bitmap), func(i int) bool { return x.bitmap[i].at+x.bitmap[i].n > c })
	for ; done < len(p) && i < len(x.bitmap); i++ {
		r := x.bitmap[i]
		in := off + int64(done) - r.at*x.cluster
		q := p[done:]
		q = q[:min(int64(len(q)), r.n*x.cluster-in)]
		n, err := x.r.ReadAt(q, x.heap+(int64(r.first)-2)*x.cluster+in)
		if done += n; n < len(q) {
			return done, err
		}
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

// walk reads all directories.
func (x *exfat) walk() error {
	root := chain{x.root, -1, false}
	if err := x.own(root); err != nil {
		return err
	}
	if err := x.judgeDir(root, true); err != nil {
		return err
	}
	for len(x.pending) > 0 {
		if len(x.pending) > maxPending {
			return freespace.Refuse(freespace.TooLarge, "exfat: more than %d directories wait to be read", maxPending)
		}
		d := x.pending[len(x.pending)-1]
		x.pending = x.pending[:len(x.pending)-1]
		if err := x.judgeDir(d, false); err != nil {
			return err
		}
	}
	return nil
}

// judgeDir checks the files of a directory. A file has a set of entries: the
// first says how many follow and has the checksum of all.
func (x *exfat) judgeDir(c chain, root bool) error {
	var set []byte
	rest := 0
	le := binary.LittleEndian
	return x.readDir(c, func(e []byte) error {
		switch kind := e[0]; {
		case rest > 0:
			if set = append(set, e...); kind&0xc0 != 0xc0 {
				return broken("a set of entries is interrupted by one of type %#x", kind)
			}
			if rest--; rest == 0 {
				return x.judgeSet(set)
			}
		case kind&inUse == 0:
		case kind == entryFile:
			set, rest = append(set[:0], e...), int(e[1])
			if rest < 2 {
				return broken("a set of %d entries", rest+1)
			}
		case root && kind == entryLabel:
			var u []uint16
			for i := range min(int(e[1]), 11) {
				u = append(u, le.Uint16(e[2+2*i:]))
			}
			x.label = strings.ToValidUTF8(string(utf16.Decode(u)), "?")
		case root && kind == entryBitmap, root && kind == entryUpcase:
			n := int64(le.Uint64(e[24:]))
			if n <= 0 || n > x.clusters*x.cluster {
				return broken("a table of %d bytes", n)
			}
			return x.own(chain{le.Uint32(e[20:]), (n + x.cluster - 1) / x.cluster, false})
		case root && kind == entryGUID:
		default:
			return freespace.Refuse(freespace.UnknownFeature, "exfat: a directory entry of type %#x", kind)
		}
		return nil
	})
}

// judgeSet checks the set of entries of a file.
func (x *exfat) judgeSet(set []byte) error {
	le := binary.LittleEndian
	sum := uint16(0)
	for i, c := range set {
		if i != 2 && i != 3 {
			sum = bits.RotateLeft16(sum, -1) + uint16(c)
		}
	}
	if want := le.Uint16(set[2:]); want != sum {
		return freespace.Refuse(freespace.BadChecksum, "exfat: directory entries: checksum %#x, computed %#x", want, sum)
	}
	isDir := le.Uint16(set[4:])&attrDir != 0
	for i := entrySize; i < len(set); i += entrySize {
		e := set[i:][:entrySize]
		if stream := i == entrySize; stream != (e[0] == entryStream) {
			return broken("entry %d of a file is of type %#x", i/entrySize, e[0])
		}
		switch e[0] {
		case entryName, entryVendor:
			continue
		case entryStream, entryVendor2:
		default:
			return freespace.Refuse(freespace.UnknownFeature, "exfat: a directory entry of type %#x", e[0])
		}
		first, n := le.Uint32(e[20:]), int64(le.Uint64(e[24:]))
		if n < 0 || n > x.clusters*x.cluster || (first == 0) != (n == 0) {
			return broken("a file of %d bytes from cluster %d", n, first)
		}
		if first == 0 {
			continue
		}
		c := chain{first, (n + x.cluster - 1) / x.cluster, e[1]&2 != 0}
		if err := x.own(c); err != nil {
			return err
		}
		if isDir && e[0] == entryStream {
			if n > maxDirectory {
				return broken("a directory of %d bytes", n)
			}
			x.pending = append(x.pending, c)
		}
	}
	return nil
}
