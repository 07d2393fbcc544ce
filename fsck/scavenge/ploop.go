package scavenge

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// ploopJob is the work on a ploop image, whose pieces are its data clusters
// (OpenVZ include/ploop1_image.h; QEMU docs/interop/parallels.txt). All
// numbers are little-endian.
type ploopJob struct {
	*job
	version   int // 1 or 2
	cluster   int64
	bits      uint
	entries   int64
	firstData int64
	extension int64 // its cluster, 0 for none
	header    bool
	clusters  int64  // of data, in the file
	used      bitset // by piece: holds not only zeros
	buf       []byte
}

func (j *ploopJob) host(piece int32) int64 { return j.firstData + int64(piece)<<j.bits }

// geometry reads the header, as far as it can be believed.
func (j *ploopJob) geometry() error {
	le := binary.LittleEndian
	b := make([]byte, 64)
	j.src.read(b, 0)
	from := j.rep.Geometry
	j.version = 2
	if ploop.Probe(b) {
		if string(b[:16]) == "WithoutFreeSpace" {
			j.version = 1
		}
		c, sectors := int64(le.Uint32(b[28:]))*sector, le.Uint64(b[36:])
		if j.version == 1 {
			sectors &= 1<<32 - 1
		}
		if c >= sector && c <= ploop.MaxCluster && powerOfTwo(c) && sectors > 0 && sectors < uint64(anySize/sector) {
			j.header, j.cluster, j.size = true, c, int64(sectors)*sector
			from["cluster-size"], from["virtual-size"] = "header", "header"
			if ext := le.Uint64(b[56:]); ext < uint64(anySize/sector) {
				j.extension = int64(ext) * sector
			}
		}
	}
	if !j.header {
		j.rep.note("the header is lost")
	}
	if j.o.ClusterSize > 0 {
		j.cluster, from["cluster-size"] = j.o.ClusterSize, "flag"
	}
	if j.o.Size > 0 {
		j.size, from["virtual-size"] = j.o.Size, "flag"
	}
	switch {
	case j.cluster == 0 || j.size == 0:
		return fmt.Errorf("%w: the header is lost: say how large the disk and its clusters were (see --size and --cluster-size; ploop's default is 1M)", layers.ErrFormat)
	case !powerOfTwo(j.cluster) || j.cluster < sector || j.cluster > ploop.MaxCluster || j.size%sector != 0 || j.size > anySize:
		return fmt.Errorf("%w: a disk of %d bytes in clusters of %d", layers.ErrUnsupported, j.size, j.cluster)
	}
	j.bits = uint(bits.TrailingZeros64(uint64(j.cluster)))
	j.entries = (j.size + j.cluster - 1) >> j.bits
	if j.entries >= 1<<31-1 {
		return fmt.Errorf("%w: %d clusters", ErrMemory, j.entries)
	}
	bat := j.entries
	if j.header {
		bat = max(bat, int64(le.Uint32(b[32:])))
	}
	j.firstData = (64 + 4*bat + j.cluster - 1) &^ (j.cluster - 1)
	if first := int64(le.Uint32(b[48:])) * sector; j.header && first >= 64+4*j.entries && first%j.cluster == 0 && first <= j.src.size {
		j.firstData = first
	}
	if j.firstData > j.src.size+ploop.MaxCluster {
		return fmt.Errorf("%w: the BAT of a disk of %d bytes does not fit into the file", layers.ErrFormat, j.size)
	}
	j.clusters = max((j.src.size-j.firstData+j.cluster-1)>>j.bits, 0)
	return nil
}

func (j *ploopJob) prepare(ctx context.Context) error {
	if err := j.geometry(); err != nil {
		return err
	}
	j.ev.shift = j.bits
	j.ev.readLoc = j.src.read
	var err error
	if j.p, err = newPieces(j.src, j.clusters, j.cluster, j.entries); err != nil {
		return err
	}
	j.p.clustered = true
	j.p.same = func(a, b int32) bool { return j.src.sameBytes(j.host(a), j.host(b), j.cluster) }
	j.p.spots = func(loc int64, dst []spot) []spot {
		if at := loc - j.firstData; at >= 0 && at>>j.bits < j.clusters {
			dst = append(dst, spot{int32(at >> j.bits), at & (j.cluster - 1)})
		}
		return dst
	}
	if err := j.src.take(4*bitsetBytes(j.clusters), "the clusters of the file"); err != nil {
		return err
	}
	j.used = newBitset(j.clusters)
	err = j.src.each(ctx, "clusters", func(b []byte, n int, off int64) error {
		const step = 4096
		for x := 0; x < n; x += step {
			if at := off + int64(x) - j.firstData; at >= 0 && at>>j.bits < j.clusters && !j.used.get(at>>j.bits) && !backend.IsZero(b[x:min(x+step, n)]) {
				j.used.set(at >> j.bits)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return j.passes(ctx, nil)
}

// survivors keeps what is left of the BAT: sectors of it most entries of which
// are possible and unlike all others. Entries of garbage hardly ever are.
func (j *ploopJob) survivors(context.Context) error {
	if at := j.extension - j.firstData; j.extension > 0 && at >= 0 && at>>j.bits < j.clusters {
		j.p.idle.set(at >> j.bits)
		j.rep.note("the format extension is not in the new image")
	}
	seen, twice := newBitset(j.clusters), newBitset(j.clusters)
	err := j.eachEntry(func(_ int64, piece int64, _ int64) {
		if piece >= 0 {
			if seen.get(piece) {
				twice.set(piece)
			}
			seen.set(piece)
		}
	})
	if err != nil {
		return err
	}
	var claims []claim
	var open []claim
	good, bad, part := 0, 0, int64(-1)
	flush := func() {
		if good > bad {
			claims = append(claims, open...)
		}
		open, good, bad = open[:0], 0, 0
	}
	if err := j.src.take(j.clusters*16, "the entries that survive"); err != nil {
		return err
	}
	err = j.eachEntry(func(entry, piece, at int64) {
		if at/sector != part {
			flush()
			part = at / sector
		}
		if piece < 0 || twice.get(piece) || j.p.idle.get(piece) {
			bad++
			return
		}
		good++
		open = append(open, claim{int32(piece), int32(entry), -1, 0})
	})
	flush()
	if err != nil {
		return err
	}
	j.p.settle(claims, ProofSurvived)
	return nil
}

// eachEntry calls visit for the entries of the BAT that are not 0: with the
// piece that they name, -1 for none, and their offset.
func (j *ploopJob) eachEntry(visit func(entry, piece, at int64)) error {
	b := make([]byte, 64<<10)
	for i := int64(0); i < j.entries; i += int64(len(b)) / 4 {
		at := 64 + 4*i
		n := min(int64(len(b)), 4*(j.entries-i), max(j.firstData-at, 0))
		j.src.read(b[:n], at)
		for x := int64(0); x+4 <= n; x += 4 {
			e := int64(binary.LittleEndian.Uint32(b[x:]))
			if e == 0 {
				continue
			}
			host := e << j.bits
			if j.version == 1 {
				host = e * sector
			}
			piece := int64(-1)
			if rel := host - j.firstData; rel >= 0 && rel%j.cluster == 0 && rel>>j.bits < j.clusters {
				piece = rel >> j.bits
			}
			visit(i+x/4, piece, at+x)
		}
	}
	return nil
}

func (j *ploopJob) content(ctx context.Context, piece int32, at int64, out sink) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if j.buf == nil {
		j.buf = make([]byte, j.cluster) // whole: nothing is completed from a parent
	}
	if j.src.read(j.buf, j.host(piece)) {
		return out.write(at, j.buf)
	}
	return out.unreadable(at, j.cluster)
}

func (j *ploopJob) blocks(ctx context.Context, piece int32, visit func(b []byte, loc int64) error) error {
	if !j.used.get(int64(piece)) {
		return nil
	}
	if j.buf == nil {
		j.buf = make([]byte, j.cluster)
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if !j.src.read(j.buf, j.host(piece)) {
		return nil
	}
	return visit(j.buf, j.host(piece))
}

func (j *ploopJob) leftovers(ctx context.Context) error {
	open := func(c int64) bool { return j.p.place[c] < 0 && !j.p.idle.get(c) }
	for c := range j.clusters {
		if open(c) && !j.used.get(c) {
			j.rep.ZeroClusters++
		}
	}
	if j.rep.ZeroClusters > 0 {
		j.rep.note(fmt.Sprintf("%d clusters of zeros have no place; they matter only over a parent", j.rep.ZeroClusters))
	}
	j.rep.Clusters = j.clusters
	return j.loose(ctx, j.clusters, j.firstData, j.cluster, func(c int64) string {
		if !open(c) || !j.used.get(c) {
			return ""
		}
		return j.p.proof(int32(c))
	})
}

func (j *ploopJob) create(ctx context.Context, f backend.File, to string) (layers.Editor, error) {
	o := qcow2.CreateOptions{Size: j.rep.VirtualSize, ClusterSize: j.cluster, Version: j.version}
	if to == "qcow2" {
		o.Version, o.ClusterSize = 3, min(j.cluster, 2<<20)
	}
	return createImage(ctx, f, to, o, j.rep.VirtualSize)
}
