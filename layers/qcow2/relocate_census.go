package qcow2

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/RoaringBitmap/roaring/v2"
	"github.com/RoaringBitmap/roaring/v2/roaring64"
	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// hostCensus is what a comparison of the reference counts with the references
// has found. Counts that are too low, and places that are used twice, are
// errors instead: then nothing may be moved.
type hostCensus struct {
	leaked  int64 // clusters that are counted and not referenced
	inexact bool  // counts of referenced clusters are too high, or COPIED is missing
	// parts are those in which there is either; nil stands for all.
	parts *roaring.Bitmap
	// keep is why what is not referenced may be in use nevertheless, "" when
	// everything in the image is known.
	keep string
}

// censusClass is the use of a cluster; those of one class may share it. L1 and
// L2 tables are told apart by the walk that moves them.
func censusClass(r layers.Role) layers.Role {
	if r == layers.RoleSnapshotMap {
		return layers.RoleMap
	}
	return r
}

// mayShare tells which clusters may have several references.
func mayShare(r layers.Role) bool {
	return r == layers.RoleMap || r == layers.RoleData || r == layers.RolePacked
}

// takeCensus compares the counts with the references.
func (ed *editor) takeCensus(ctx context.Context, step func(done, total int64)) (*hostCensus, error) {
	img := ed.img
	if err := ed.ref.checkBlocks(); err != nil {
		return nil, err
	}
	c, err := ed.countCensus(ctx, step)
	if errors.Is(err, errNarrow) {
		ed.wide = true
		c, err = ed.countCensus(ctx, step)
	}
	if err != nil {
		return nil, err
	}
	if err := ed.checkCopied(ctx, c); err != nil {
		return nil, err
	}
	if c.inexact && c.keep != "" {
		return nil, img.corrupt(-1, "reference count", nil, "clusters have fewer references than are counted, and "+c.keep)
	}
	return c, nil
}

// checkBlocks refuses a refcount table that names a block twice. The census
// would find that as well, after it has gone through all that the block seems
// to count.
func (r *refcounts) checkBlocks() error {
	seen := roaring64.New()
	for k, v := range r.table {
		if v != 0 && !seen.CheckedAdd(v>>r.img.clusterBits) {
			return r.img.corrupt(r.tableOff+int64(k)*8, "refcount table entry", v, "another entry names the same block")
		}
	}
	return nil
}

func (ed *editor) countCensus(ctx context.Context, step func(done, total int64)) (*hostCensus, error) {
	img := ed.img
	c := &hostCensus{keep: img.unknownOwner(), parts: roaring.New()}
	return c, ed.eachCensus(ctx, nil, step, func(first int64, words *censusWords) error {
		return ed.eachWord(ctx, first, words, func(i int64) error {
			have, err := ed.ref.count(first + i)
			if err != nil {
				return err
			}
			class, want := words.get(i)
			switch {
			case want > 1 && !mayShare(class):
				return img.corrupt((first+i)<<img.clusterBits, class.String(), nil, "the cluster is used twice")
			case have < want:
				return img.corrupt((first+i)<<img.clusterBits, "reference count", have, fmt.Sprintf("a cluster has %d references", want))
			case have == want:
				return nil
			case want > 0:
				c.inexact = true
			default:
				c.leaked++
			}
			c.parts.Add(uint32(first / words.len()))
			return nil
		})
	})
}

// eachWord calls do for every word that says something or whose cluster may be
// counted. Where a page of counts and its words are zeros it need not be asked
// cluster by cluster: a small file can name refcount blocks in holes for 2^44 of
// them.
func (ed *editor) eachWord(ctx context.Context, first int64, words *censusWords, do func(i int64) error) error {
	r := ed.ref
	var hole fileHole // what is in it changes as little as what it counts
	for i := int64(0); i < words.len(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		page := (first + i) >> r.pageBits
		end := min((page+1)<<r.pageBits-first, words.len())
		nothing, err := r.nothing(page, &hole)
		if err != nil {
			return err
		}
		if nothing && words.blank(i, end) {
			i = end
			continue
		}
		for ; i < end; i++ {
			if err := do(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// eachCensus counts the references, as many clusters at a time as fit into
// memory, and calls do for every part of the file in which something is
// referenced or can be counted, or for those of these parts that only has.
func (ed *editor) eachCensus(ctx context.Context, only *roaring.Bitmap, step func(done, total int64), do func(first int64, words *censusWords) error) error {
	img := ed.img
	words := newCensusWords(min(ed.countable(), cmp.Or(ed.part, math.MaxInt64)), ed.wide || img.hdr.NbSnapshots >= narrowCount)
	n := words.len()
	parts, err := ed.censusParts(ctx, n)
	if err != nil {
		return err
	}
	if only != nil {
		parts.And(only)
	}
	for done, it := int64(0), parts.Iterator(); it.HasNext(); done++ {
		if step != nil {
			step(done, int64(parts.GetCardinality()))
		}
		first := int64(it.Next()) * n
		words.clear()
		err := img.walkHost(ctx, true, func(h layers.HostRange) error {
			return img.countRange(h, first, words)
		})
		if err != nil {
			return err
		}
		if err := do(first, words); err != nil {
			return err
		}
	}
	return nil
}

// countable is the number of clusters that the file has or that its refcount
// table can count.
func (ed *editor) countable() int64 {
	r := ed.ref
	for k := len(r.table); k > 0; k-- {
		if r.table[k-1] != 0 {
			return max(r.hwm, int64(k)<<r.blockBits)
		}
	}
	return r.hwm
}

// maxCensus is the number of clusters that may be looked at, in parts in which
// there is something. 512 TiB in clusters of 64 KiB have as many; a file with
// holes of exabytes may have any number.
const maxCensus = 1 << 33

// censusParts are the parts, of n clusters, in which there is anything to
// count.
func (ed *editor) censusParts(ctx context.Context, n int64) (*roaring.Bitmap, error) {
	img, r := ed.img, ed.ref
	parts, most := roaring.New(), uint64(max(maxCensus/n, 1))
	if ed.countable() <= n {
		parts.Add(0)
		return parts, nil
	}
	add := func(from, to int64) error {
		for p := from / n; p <= (to-1)/n; p++ {
			if p > math.MaxUint32 || parts.CheckedAdd(uint32(p)) && parts.GetCardinality() > most {
				return img.errorf(-1, "", nil, fmt.Errorf("%w: the file is too sparse", layers.ErrUnsupported))
			}
		}
		return nil
	}
	for k, off := range r.table {
		if off != 0 {
			if err := add(int64(k)<<r.blockBits, int64(k+1)<<r.blockBits); err != nil {
				return nil, err
			}
		}
	}
	return parts, img.walkHost(ctx, true, func(h layers.HostRange) error {
		return add(h.Off>>img.clusterBits, (h.Off+h.Len)>>img.clusterBits)
	})
}

// countRange counts one reference in the words of the clusters from first on.
func (img *Image) countRange(h layers.HostRange, first int64, words *censusWords) error {
	class := censusClass(h.Role)
	from, to := h.Off>>img.clusterBits, (h.Off+h.Len)>>img.clusterBits
	if to > img.ed.ref.hwm {
		return img.corrupt(h.Off, h.Role.String(), nil, "it lies behind the end of the file")
	}
	active := h.Role == layers.RoleData && h.Guest >= 0
	for c := max(from, first); c < min(to, first+words.len()); c++ {
		err := words.add(c-first, class, active)
		switch {
		case err == nil:
		case errors.Is(err, errNarrow):
			return err
		case errors.Is(err, errOtherClass):
			class, _ := words.get(c - first)
			return img.corrupt(c<<img.clusterBits, h.Role.String(), nil, "the cluster is also used as "+class.String())
		case errors.Is(err, errMany):
			return img.corrupt(c<<img.clusterBits, h.Role.String(), nil, "the cluster has too many references")
		default:
			return img.corrupt(c<<img.clusterBits, h.Role.String(), nil, err.Error())
		}
	}
	return nil
}

// checkCopied checks that what the active map calls its own is.
func (ed *editor) checkCopied(ctx context.Context, c *hostCensus) error {
	img := ed.img
	var pairs, plain int
	holes := stillHoles{img: img, still: true}
	judge := func(at int64, field string, off int64, copied bool) error {
		single, err := ed.single(off)
		switch {
		case err != nil:
			return err
		case copied && !single:
			return img.corrupt(at, field, off, "the COPIED flag is set although the cluster is shared")
		case single && !copied:
			c.inexact = true
		}
		return nil
	}
	err := img.eachL1(ctx, func(i, at int64, entry uint64) error {
		if entry&^entryCopied == 0 {
			return nil
		}
		table, err := img.checkL1(at, entry)
		if err != nil {
			return err
		}
		if err := judge(at, "L1 entry", table, entry&entryCopied != 0); err != nil || img.external {
			return err
		}
		if holes.in(table, img.clusterSize) {
			return nil
		}
		return img.eachL2(ctx, table, i*img.l2Span, func(guest int64, e *l2Entry) error {
			if img.extended && !e.isPacked && e.alloc|e.zero != 0 {
				pairs++
				if ed.likeEntry(uint64(e.zero)<<32 | uint64(e.alloc)) {
					plain++
				}
			}
			if e.isPacked || !e.hasHost {
				return nil
			}
			return judge(table, "L2 entry", int64(e.host), e.copied)
		})
	})
	if err == nil && pairs > 0 && plain == pairs {
		err = img.corrupt(offIncompatible, "incompatible_features", img.hdr.Incompatible, "it says that L2 entries are extended, but the tables are plain ones")
	}
	return err
}

// likeEntry reports whether a subcluster bitmap looks like an entry of a plain
// L2 table: then half of the disk would be taken for leaks.
func (ed *editor) likeEntry(word uint64) bool {
	e, bad := ed.img.parseL2(0, word, 1)
	if bad != "" || e.isPacked || !e.copied || e.host == 0 || int64(e.host)>>ed.img.clusterBits >= ed.ref.hwm {
		return false
	}
	n, err := ed.ref.count(int64(e.host) >> ed.img.clusterBits)
	return err == nil && n > 0
}

// unknownOwner says what may own clusters without our knowing, "" for nothing.
func (img *Image) unknownOwner() string {
	h := &img.hdr
	for _, e := range h.Extensions {
		switch e.Type {
		case extBackingFormat, extFeatureNames, extDataFile:
		case extBitmaps:
			if !h.bitmapsValid() {
				return "its bitmaps are stale (image-fsck -p drops them)"
			}
		default:
			return fmt.Sprintf("what the unknown header extension %#x owns is not known", e.Type)
		}
	}
	return ""
}

// Leaked is the bytes that BeginRelocation has found counted and not
// referenced.
func (img *Image) Leaked() int64 {
	if img.ed == nil || img.ed.census == nil {
		return 0
	}
	return img.ed.census.leaked << img.clusterBits
}

// FreeLeaks implements layers.Relocator. Counts that are too high for the
// references there are, which an interrupted move of a shared cluster leaves,
// are made exact and durable before the COPIED flags follow.
func (img *Image) FreeLeaks(ctx context.Context) (int64, error) {
	ed, err := img.relocator(ctx)
	if err != nil {
		return 0, err
	}
	c := ed.census
	if c.keep != "" || c.leaked == 0 && !c.inexact {
		return 0, nil
	}
	if err := ed.quiesce(ctx); err != nil {
		return 0, err
	}
	var freed int64
	free := func() error {
		return ed.eachCensus(ctx, c.parts, nil, func(first int64, words *censusWords) error {
			return ed.eachWord(ctx, first, words, func(i int64) error {
				_, want := words.get(i)
				n, err := ed.lower(first+i, want)
				freed += n
				return err
			})
		})
	}
	if err = free(); errors.Is(err, errNarrow) { // what it did is done
		ed.wide, c.parts = true, nil
		err = free()
	}
	if err != nil {
		return 0, err
	}
	if err := ed.syncCounts(); err != nil {
		return 0, err
	}
	if c.inexact {
		if err := ed.fixCopied(ctx); err != nil {
			return 0, err
		}
		if err := ed.quiesce(ctx); err != nil {
			return 0, err
		}
	}
	c.leaked, c.inexact = 0, false
	return freed, nil
}

// lower makes the count of a cluster what its references are. It returns the
// bytes that are free now and were not before.
func (ed *editor) lower(cluster int64, want uint64) (int64, error) {
	r := ed.ref
	if r.dirtyBytes() > ed.img.cache.PinnedLimit() {
		if err := r.writePages(); err != nil {
			return 0, err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	have, err := r.get(cluster)
	if err != nil || have <= want {
		return 0, err
	}
	if err := r.set(cluster, 1, want); err != nil || want > 0 {
		return 0, err
	}
	r.markFree(cluster)
	return ed.img.clusterSize, nil
}

// count is get for who does not hold mu.
func (r *refcounts) count(cluster int64) (uint64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.get(cluster)
}

// nothing reports whether a page of counts is missing or all zeros. hole is the
// last one in the file that was met.
func (r *refcounts) nothing(page int64, hole *fileHole) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.pages.Get(page); c != nil {
		return backend.IsZero(c.Value.(*refPage).b), nil
	}
	off, err := r.pageAt(page)
	if off == 0 || err != nil {
		return err == nil, err
	}
	if !hole.has(off, r.pageBytes) {
		*hole = r.img.holeAt(off, *hole)
	}
	if hole.has(off, r.pageBytes) {
		return true, nil
	}
	p, err := r.page(page)
	return p == nil || backend.IsZero(p.b), err
}
