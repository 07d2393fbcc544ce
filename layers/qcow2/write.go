package qcow2

import (
	"context"
	"errors"
	"io"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// WriteAt implements layers.Editor.
func (img *Image) WriteAt(ctx context.Context, p []byte, off int64, below layers.Below) error {
	ed, err := img.usable(ctx, off, int64(len(p)))
	if err != nil {
		return err
	}
	for len(p) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := ed.writeOwned(p, off)
		if err == nil && n == 0 {
			if n, err = ed.writeNew(ctx, p, off, below); err == nil {
				err = ed.relieve(ctx)
			}
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// WriteInPlace implements layers.InPlaceWriter.
func (img *Image) WriteInPlace(p []byte, off int64) bool {
	ed := img.ed
	if ed == nil || ed.failed() != nil || !ed.started.Load() {
		return false
	}
	n, err := ed.writeOwned(p, off)
	return err == nil && n == len(p)
}

// relieve commits when changes pin more of the cache than an editor may.
func (ed *editor) relieve(ctx context.Context) error {
	ed.mu.Lock()
	pinned, released := ed.pinned, len(ed.released)
	ed.mu.Unlock()
	if released < maxReleased && pinned+ed.ref.dirtyBytes() <= ed.img.cache.PinnedLimit() {
		return nil
	}
	return ed.img.Sync(ctx)
}

// writeOwned writes the prefix of p whose place we own and which lies in one
// run of the file, in place. It returns 0 when the first byte is not like
// that. It does not allocate memory.
func (ed *editor) writeOwned(p []byte, off int64) (int, error) {
	t := ed.img.readers.Enter(off)
	defer ed.img.readers.Exit(t)
	var host int64
	n := 0
	for n < len(p) {
		h, m, err := ed.ownedAt(off+int64(n), int64(len(p)-n))
		if err != nil {
			return 0, err
		}
		if m == 0 || n > 0 && h != host+int64(n) {
			break
		}
		if n == 0 {
			host = h
		}
		n += int(m)
	}
	if n == 0 {
		return 0, nil
	}
	_, err := ed.img.data.WriteAt(p[:n], host)
	return n, err
}

// ownedAt tells how many of the n bytes at off, up to the end of the cluster,
// can be written in place, and where. The caller is between Enter and Exit.
func (ed *editor) ownedAt(off, n int64) (host, m int64, err error) {
	img := ed.img
	in := off & (img.clusterSize - 1)
	s, err := ed.lookEntered(off - in)
	if err != nil || !ed.ours(&s) {
		return 0, 0, err
	}
	end := in
	for end < img.clusterSize && end-in < n && s.e.alloc>>uint(end>>img.subBits)&1 != 0 {
		end = (end>>img.subBits + 1) << img.subBits
	}
	return int64(s.e.host) + in, min(end-in, n), nil
}

// writeNew writes a prefix of p, at least the part in its first cluster, which
// is not wholly owned. It returns 0 without an error when somebody else
// changed the cluster meanwhile and the caller has to look again.
func (ed *editor) writeNew(ctx context.Context, p []byte, off int64, below layers.Below) (int, error) {
	img := ed.img
	in := off & (img.clusterSize - 1)
	guest := off - in
	s, err := ed.ownTable(guest)
	if err != nil {
		return 0, err
	}
	first := p[:min(int64(len(p)), img.clusterSize-in)]
	if img.external {
		at := guest >> img.clusterBits
		_, err := ed.writeCluster(ctx, first, off, below, at, false)
		return len(first), err
	}
	if ed.ours(&s) {
		if _, err := ed.writeCluster(ctx, first, off, below, -1, false); err == errLookAgain {
			return 0, nil
		} else if err != nil {
			return 0, err
		}
		return len(first), nil
	}
	want, err := ed.countNew(guest, off+int64(len(p)))
	if err != nil {
		return 0, err
	}
	run, fresh, err := ed.ref.allocate(want)
	if err != nil {
		return 0, err
	}
	return ed.writeRun(ctx, p, off, below, run, fresh)
}

// countNew counts the clusters from guest on that need a place, in the same L2
// table and up to end.
func (ed *editor) countNew(guest, end int64) (int64, error) {
	img := ed.img
	n := int64(1)
	for guest += img.clusterSize; guest < end && img.l2Index(guest) != 0; guest += img.clusterSize {
		s, err := ed.look(guest)
		if err != nil {
			return 0, err
		}
		if ed.ours(&s) {
			break
		}
		n++
	}
	return n, nil
}

// writeRun writes the prefix of p that goes to a run of newly allocated
// clusters, gives back what it did not use and returns how much it wrote.
// Whole clusters need nothing but themselves, so they are written together and
// without a lock: nobody else knows the place.
func (ed *editor) writeRun(ctx context.Context, p []byte, off int64, below layers.Below, run hostRun, fresh bool) (int, error) {
	img := ed.img
	n := 0
	for run.n > 0 && n < len(p) {
		in := off & (img.clusterSize - 1)
		rest := p[n:]
		if in == 0 && int64(len(rest)) >= img.clusterSize {
			k := min(run.n, int64(len(rest))>>img.clusterBits)
			done, err := ed.writeWhole(rest[:k<<img.clusterBits], off, run.first)
			run.first, run.n = run.first+done, run.n-done
			if err != nil {
				ed.ref.undo(run.first, run.n)
				return 0, err
			}
			n += int(k << img.clusterBits)
			off += k << img.clusterBits
			continue
		}
		part := rest[:min(int64(len(rest)), img.clusterSize-in)]
		used, err := ed.writeCluster(ctx, part, off, below, run.first, fresh)
		if err != nil {
			ed.ref.undo(run.first, run.n)
			return 0, err
		}
		if !used {
			ed.ref.undo(run.first, 1)
		}
		run.first, run.n = run.first+1, run.n-1
		n += len(part)
		off += int64(len(part))
	}
	ed.ref.undo(run.first, run.n)
	return n, nil
}

// writeWhole writes whole clusters to a run of the file and makes it theirs.
// It returns how many places are in use now, all of them unless there is an
// error.
func (ed *editor) writeWhole(p []byte, guest, first int64) (int64, error) {
	img := ed.img
	if _, err := img.f.WriteAt(p, first<<img.clusterBits); err != nil {
		return 0, err
	}
	n := int64(len(p)) >> img.clusterBits
	for i := range n {
		if err := ed.replace(guest+i<<img.clusterBits, first+i); err != nil {
			return i, err
		}
	}
	return n, nil
}

// replace makes a host cluster that holds the content of the whole guest
// cluster its place.
func (ed *editor) replace(guest, cluster int64) error {
	img := ed.img
	defer ed.stripes.Lock(guest >> img.clusterBits).Unlock()
	s, err := ed.look(guest)
	if err != nil {
		return err
	}
	e := l2Entry{host: uint64(cluster << img.clusterBits), hasHost: true, copied: true, alloc: allSubclusters}
	return ed.store(&s, e, ed.old(guest, &s.e, false))
}

// errLookAgain: the cluster is not in the state any more that the caller saw.
var errLookAgain = errors.New("the cluster changed meanwhile")

// writeCluster writes p, a part of one cluster (in image files: not the
// whole). When the cluster has a place of its own that goes there, and used is
// false; otherwise to the host cluster at, which must be given.
func (ed *editor) writeCluster(ctx context.Context, p []byte, off int64, below layers.Below, at int64, fresh bool) (used bool, err error) {
	img := ed.img
	in := off & (img.clusterSize - 1)
	guest := off - in
	defer ed.stripes.Lock(guest >> img.clusterBits).Unlock()
	s, err := ed.look(guest)
	if err != nil {
		return false, err
	}
	w := clusterWrite{ed: ed, ctx: ctx, below: below, guest: guest, e: s.e, p: p, x: in, y: in + int64(len(p))}
	w.a, w.b = in, w.y
	if !img.extended {
		w.a, w.b, w.touched = 0, img.clusterSize, allSubclusters
	} else {
		sub := int64(1)<<img.subBits - 1
		w.a, w.b = in&^sub, (w.y+sub)&^sub
		w.touched = uint32(uint64(1)<<(w.b>>img.subBits) - uint64(1)<<(w.a>>img.subBits))
	}
	if !ed.ours(&s) {
		if at < 0 {
			return false, errLookAgain
		}
		e, err := w.move(at<<img.clusterBits, fresh)
		if err != nil {
			return false, err
		}
		return true, ed.store(&s, e, ed.old(guest, &s.e, false))
	}
	if w.touched&^s.e.alloc == 0 {
		_, err := img.data.WriteAt(p, int64(s.e.host)+in)
		return false, err
	}
	e := s.e
	e.alloc |= w.touched
	e.zero &^= w.touched
	e.copied = true
	if err := w.put(int64(s.e.host), false, s.e.alloc); err != nil {
		return false, err
	}
	return false, ed.store(&s, e)
}

// clusterWrite is a write of bytes [x, y) of the guest cluster at guest, whose
// stripe is held and whose entry is e. The subclusters that it touches are
// [a, b), with the mask touched; without extended entries that is the whole
// cluster.
type clusterWrite struct {
	ed      *editor
	ctx     context.Context
	below   layers.Below
	guest   int64
	e       l2Entry
	p       []byte
	x, y    int64
	a, b    int64
	touched uint32
}

// move writes the cluster to a place of its own at host and returns the entry
// that names it.
func (w *clusterWrite) move(host int64, fresh bool) (l2Entry, error) {
	img := w.ed.img
	e := l2Entry{host: uint64(host), hasHost: true, copied: true, alloc: w.touched | w.e.alloc, zero: w.e.zero &^ w.touched}
	if w.e.isPacked {
		e.alloc, e.zero = allSubclusters, 0
		return e, w.unpack(host)
	}
	if err := w.put(host, fresh, 0); err != nil {
		return e, err
	}
	// Subclusters that the write does not touch come along.
	for i := uint(0); img.extended && i < subclusters; i++ {
		if (w.e.alloc&^w.touched)>>i&1 == 0 {
			continue
		}
		j := i + 1
		for j < subclusters && (w.e.alloc&^w.touched)>>j&1 != 0 {
			j++
		}
		if err := w.carry(host, int64(i)<<img.subBits, int64(j)<<img.subBits); err != nil {
			return e, err
		}
		i = j
	}
	return e, nil
}

// carry copies [from, to) of the cluster from its present place to host.
func (w *clusterWrite) carry(host, from, to int64) error {
	img := w.ed.img
	buf := w.ed.bufs.Get().(*[]byte)
	defer w.ed.bufs.Put(buf)
	b := (*buf)[from:to]
	if err := img.readData(b, int64(w.e.host)+from); err != nil {
		return err
	}
	_, err := img.data.WriteAt(b, host+from)
	return err
}

// unpack writes the cluster, decompressed and with p in it, to host.
func (w *clusterWrite) unpack(host int64) error {
	img := w.ed.img
	buf := w.ed.bufs.Get().(*[]byte)
	defer w.ed.bufs.Put(buf)
	b := *buf
	ext := blockmap.Extent{Guest: w.guest, Len: img.clusterSize, Kind: blockmap.Packed, Host: int64(w.e.packed.off), PackedLen: w.e.packed.len}
	if w.y-w.x < img.clusterSize {
		if err := img.Unpack(w.ctx, ext, 0, b); err != nil {
			return err
		}
	}
	copy(b[w.x:], w.p)
	_, err := img.data.WriteAt(b, host)
	return err
}

// put writes [a, b) of the cluster to its place at host: p, and around it what
// completes the touched subclusters, unless they are stored there already
// (here). In a fresh place zeros need not be written.
func (w *clusterWrite) put(host int64, fresh bool, here uint32) error {
	img := w.ed.img
	buf := w.ed.bufs.Get().(*[]byte)
	defer w.ed.bufs.Put(buf)
	start, stop := w.a, w.b
	if img.external && stop > img.size-w.guest {
		stop = max(w.y, img.size-w.guest)
	}
	if here>>uint(w.a>>img.subBits)&1 != 0 {
		start = w.x
	}
	if here>>uint((w.b-1)>>img.subBits)&1 != 0 {
		stop = w.y
	}
	head, err := w.fill((*buf)[start:w.x], start)
	if err != nil {
		return err
	}
	tail, err := w.fill((*buf)[w.y:stop], w.y)
	if err != nil {
		return err
	}
	if fresh && head == nil {
		start = w.x
	}
	if fresh && tail == nil {
		stop = w.y
	}
	if start == w.x && stop == w.y {
		_, err = img.data.WriteAt(w.p, host+w.x)
		return err
	}
	if head == nil {
		head = w.ed.zeros[:w.x-start]
	}
	if tail == nil {
		tail = w.ed.zeros[:stop-w.y]
	}
	_, err = img.data.WritevAt([][]byte{head, w.p, tail}, host+start)
	return err
}

// fill reads what b, at offset from of the cluster and within one subcluster,
// holds now, or returns nil when that is zeros.
func (w *clusterWrite) fill(b []byte, from int64) ([]byte, error) {
	img := w.ed.img
	n := min(int64(len(b)), img.size-w.guest-from)
	if n <= 0 {
		return nil, nil
	}
	i := uint(from >> img.subBits)
	if w.e.alloc>>i&1 != 0 {
		return b, img.readData(b, int64(w.e.host)+from)
	}
	if w.e.zero>>i&1 != 0 {
		return nil, nil
	}
	if zero, err := w.below.IsZero(w.ctx, w.guest+from, n); zero || err != nil {
		return nil, err
	}
	clear(b[n:])
	return b, w.below.ReadAt(w.ctx, b[:n], w.guest+from)
}

// readData reads guest data; behind the end of the file are zeros.
func (img *Image) readData(b []byte, host int64) error {
	n, err := img.data.ReadAt(b, host)
	if errors.Is(err, io.EOF) {
		clear(b[n:])
		return nil
	}
	return err
}
