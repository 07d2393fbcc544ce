package ploop

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"

	"github.com/RoaringBitmap/roaring/v2"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// pageSize is the unit in which the BAT is cached and written. Page n is
// bytes [n*pageSize, (n+1)*pageSize) of the file; the first one begins with
// the header.
const (
	pageSize  = 4096
	pageWords = pageSize / 4
)

// page is a piece of the file as little-endian words. Words outside the BAT
// (header, padding) are kept as they were read and never written.
type page [pageWords]atomic.Uint32

// pageOf says where entry idx is kept.
func pageOf(idx int64) (page int64, word int) {
	off := headerSize + 4*idx
	return off / pageSize, int(off % pageSize / 4)
}

// firstEntry is the first entry of page n (negative words of page 0, which
// hold the header, are not entries).
func firstEntry(n int64) int64 { return max((n*pageSize-headerSize)/4, 0) }

// table is the BAT of an image file: cached pages, the dirty ones pinned, and
// the rules of a valid entry.
type table struct {
	f      backend.File
	path   string
	h      *header
	shift  uint   // log2 of the cluster size
	step   uint32 // difference of the entries of neighbouring clusters
	owner  layers.Owner
	limit  atomic.Int64 // length of the file as far as known
	noSeek atomic.Bool  // the file cannot tell its holes

	dirtyMu    sync.Mutex
	dirty      *roaring.Bitmap // pages changed since the last commit began; each is pinned once
	writing    *roaring.Bitmap // pages that a commit is writing; each is pinned once (more)
	dirtyPages atomic.Int64    // how many pins that are
}

func newTable(f backend.File, path string, h *header, cache *layers.Cache, fileSize int64) *table {
	t := &table{f: f, path: path, h: h, shift: h.shift(), step: 1, owner: cache.NewOwner(), dirty: roaring.New(), writing: roaring.New()}
	if h.version == 1 {
		t.step = uint32(h.cluster / sectorSize)
	}
	t.limit.Store(fileSize)
	return t
}

// get returns page n from the cache or the file.
func (t *table) get(n int64) (*page, error) {
	if p := t.owner.Get(n); p != nil {
		return p.Value.(*page), nil
	}
	p, err := t.owner.Load(n, t.loader(n))
	if err != nil {
		return nil, err
	}
	return p.Value.(*page), nil
}

// loader reads page n from the file.
func (t *table) loader(n int64) func() (any, int64, error) {
	return func() (any, int64, error) {
		buf := make([]byte, pageSize)
		off := n * pageSize
		got, err := t.f.ReadAt(buf, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, 0, fmt.Errorf("%s: read of the BAT at %#x: %w", t.path, off, err)
		}
		if need := min(off+pageSize, t.h.batEnd()); off+int64(got) < need {
			return nil, 0, t.bad(off+int64(got), "BAT", nil, "file ends inside the BAT")
		}
		p := new(page)
		for w := range p {
			p[w].Store(binary.LittleEndian.Uint32(buf[4*w:]))
		}
		return p, pageSize, nil
	}
}

// bad is an ErrCorrupt with its place.
func (t *table) bad(off int64, field string, value any, why string) error {
	return &layers.ImageError{Path: t.path, Layer: -1, Offset: off, Field: field, Value: value,
		Err: fmt.Errorf("%w: %s", layers.ErrCorrupt, why)}
}

// badEntry is bad for an entry of the BAT.
func (t *table) badEntry(idx int64, entry uint32, why string) error {
	return t.bad(headerSize+4*idx, fmt.Sprintf("BAT[%d]", idx), entry, why)
}

// host is where the cluster of a nonzero entry begins, whether the entry is
// valid or not. It cannot overflow: 2^32 clusters of 2^26 bytes.
func (t *table) host(entry uint32) int64 {
	if t.h.version == 1 {
		return int64(entry) * sectorSize
	}
	return int64(entry) << t.shift
}

// entry is the inverse of host for a place that the allocator chose.
func (t *table) entry(host int64) uint32 {
	if t.h.version == 1 {
		return uint32(host / sectorSize)
	}
	return uint32(host >> t.shift)
}

// maxHost is the end of what an entry can point to.
func (t *table) maxHost() int64 {
	if t.h.version == 1 {
		return math.MaxUint32 * sectorSize &^ (t.h.cluster - 1)
	}
	return (math.MaxUint32 - 1) << t.shift // 0xffffffff is invalid to the kernel driver
}

// check validates a run of count entries that begins with idx -> entry and
// ascends by step. Only the first bad one is named.
func (t *table) check(idx int64, entry uint32, count int64) error {
	host := t.host(entry)
	switch {
	case host&(t.h.cluster-1) != 0:
		return t.badEntry(idx, entry, "is not a multiple of the cluster size")
	case host < t.h.firstData:
		return t.badEntry(idx, entry, fmt.Sprintf("points into the header or the BAT (data begins at %#x)", t.h.firstData))
	}
	if host+count<<t.shift <= t.limit.Load() {
		return nil
	}
	// Somebody else may have made the file longer since it was opened.
	size, err := t.f.Size()
	if err != nil {
		return fmt.Errorf("%s: %w", t.path, err)
	}
	t.limit.Store(size)
	if host+count<<t.shift <= size {
		return nil
	}
	fit := max(size-host, 0) >> t.shift
	idx, host = idx+fit, host+fit<<t.shift
	entry += uint32(fit) * t.step
	why := fmt.Sprintf("points behind the end of the file (%d bytes)", size)
	if host < size {
		why = fmt.Sprintf("cluster is cut off by the end of the file (%d bytes)", size)
	}
	return t.badEntry(idx, entry, why)
}

// run is a maximal number of neighbouring entries that are all 0 (host 0), or
// that are valid and ascend together. It is cut at the end of a page.
type run struct {
	idx, count int64
	host       int64
}

// next returns the run at idx, looking no further than entry end (idx < end).
// Pages that are holes of the file are passed without reading them.
func (t *table) next(idx, end int64) (run, error) {
	n, w := pageOf(idx)
	var p *page
	if c := t.owner.Get(n); c != nil {
		p = c.Value.(*page)
	} else {
		if stop := firstEntry(n + 1); end > stop {
			skip, err := t.holeEnd(n)
			if err != nil {
				return run{}, err
			}
			if skip > n {
				return run{idx: idx, count: min(firstEntry(skip), end) - idx}, nil
			}
		}
		var err error
		if p, err = t.get(n); err != nil {
			return run{}, err
		}
	}
	words := p[w:min(pageWords, w+int(min(end-idx, pageWords)))]
	first := words[0].Load()
	k := 1
	if first == 0 {
		for k < len(words) && words[k].Load() == 0 {
			k++
		}
		return run{idx: idx, count: int64(k)}, nil
	}
	for want := first + t.step; k < len(words) && want > first && words[k].Load() == want; k++ {
		want += t.step
	}
	if err := t.check(idx, first, int64(k)); err != nil {
		return run{}, err
	}
	return run{idx: idx, count: int64(k), host: t.host(first)}, nil
}

// holeEnd returns the first page at or behind n that may hold an entry, as far
// as the file's holes tell. It is n itself when they tell nothing.
func (t *table) holeEnd(n int64) (int64, error) {
	if t.noSeek.Load() {
		return n, nil
	}
	last := (t.h.batEnd()-1)/pageSize + 1
	// Dirty pages first: one that is written (and no longer dirty) between
	// the two questions is then seen by the second.
	if d := t.nextDirty(n); d < last {
		last = d
	}
	if last <= n {
		return n, nil
	}
	data, err := t.f.SeekData(n * pageSize)
	switch {
	case errors.Is(err, io.EOF):
		return last, nil
	case errors.Is(err, errors.ErrUnsupported):
		t.noSeek.Store(true)
		return n, nil
	case err != nil:
		return 0, fmt.Errorf("%s: seek in the BAT: %w", t.path, err)
	}
	return min(data/pageSize, last), nil
}

// nextDirty is the first dirty page at or behind n, or a huge number.
func (t *table) nextDirty(n int64) int64 {
	t.dirtyMu.Lock()
	defer t.dirtyMu.Unlock()
	first := int64(math.MaxInt64)
	for _, set := range [...]*roaring.Bitmap{t.dirty, t.writing} {
		if d := set.NextValue(uint32(n)); d >= 0 { // a page number has 23 bits at most
			first = min(first, d)
		}
	}
	return first
}

// lookup answers blockmap.Map.Lookup.
func (t *table) lookup(guest, n int64, dst []blockmap.Extent) ([]blockmap.Extent, error) {
	if err := blockmap.CheckRange(guest, n); err != nil {
		return nil, err
	}
	size := t.h.size
	til := blockmap.NewTiler(guest, n, dst)
	end := (min(guest+n, size) + t.h.cluster - 1) >> t.shift
	for !til.Done() {
		pos := til.Next()
		if pos >= size {
			til.Add(blockmap.Extent{Guest: pos, Len: math.MaxInt64 - pos, Kind: blockmap.Zero})
			break
		}
		r, err := t.next(pos>>t.shift, end)
		if err != nil {
			return nil, err
		}
		e := blockmap.Extent{Guest: r.idx << t.shift, Host: r.host, Kind: blockmap.Unmapped}
		e.Len = min((r.idx+r.count)<<t.shift, size) - e.Guest
		if r.host != 0 {
			e.Kind = blockmap.Data
		}
		til.Add(e)
	}
	return til.Extents(), nil
}
