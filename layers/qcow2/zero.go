package qcow2

import (
	"context"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
)

// punchInPlace is the length in bytes from which on a part of a cluster is
// punched rather than overwritten with zeros.
const punchInPlace = 64 << 10

// ZeroAt implements layers.Editor. Zero clusters exist in version 3 (section
// Cluster mapping); in version 2 zeros are written where something would
// shine through. A raw external data file has to read as the disk does
// without this image, so there zeros always go to the file.
func (img *Image) ZeroAt(ctx context.Context, off, n int64, punch bool, below layers.Below) error {
	ed, err := img.usable(ctx, off, n)
	if err != nil {
		return err
	}
	raw := img.external && img.hdr.RawDataFile()
	mask := img.clusterSize - 1
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		next := end
		switch part := min(end-off, img.clusterSize-off&mask); {
		case raw:
			next, err = ed.zeroRaw(ctx, off, end, punch)
		case off&mask != 0 || part < img.clusterSize && off+part != img.size:
			next = off + part
			err = ed.zeroPart(ctx, off, part, punch, below)
		default:
			if end != img.size {
				next = end &^ mask
			}
			next, err = ed.zeroWhole(ctx, off, next, punch, below)
		}
		if err == nil {
			err = ed.relieve(ctx)
		}
		if err != nil {
			return err
		}
		off = next
	}
	return nil
}

// zeroWhole zeroes whole clusters (the last one may be cut by the end of the
// disk) from off on and returns how far it came. What already reads as zeros
// is passed over an extent at a time.
func (ed *editor) zeroWhole(ctx context.Context, off, end int64, punch bool, below layers.Below) (int64, error) {
	img := ed.img
	var one [1]blockmap.Extent
	t := img.readers.Enter(off) // see look
	ext, err := img.Lookup(ctx, off, end-off, one[:0])
	img.readers.Exit(t)
	if err != nil {
		return off, err
	}
	stop := ext[0].End()
	if stop != end {
		stop &^= img.clusterSize - 1
	}
	if stop > off {
		skip := ext[0].Kind == blockmap.Zero && !punch
		if ext[0].Kind == blockmap.Unmapped {
			if skip, err = below.IsZero(ctx, off, stop-off); err != nil {
				return off, err
			}
		}
		if skip {
			return stop, nil
		}
	}
	// One cluster after the other, at most to the end of the L2 table.
	stop = min(max(stop, off+1), off-off&(img.l2Span-1)+img.l2Span)
	for ; off < stop; off += img.clusterSize {
		if err := ed.zeroCluster(ctx, off, punch, below); err != nil {
			return off, err
		}
		if err := ctx.Err(); err != nil {
			return off, err
		}
		if err := ed.relieve(ctx); err != nil {
			return off, err
		}
	}
	return min(off, end), nil
}

// zeroCluster makes one whole cluster read as zeros.
func (ed *editor) zeroCluster(ctx context.Context, guest int64, punch bool, below layers.Below) error {
	img := ed.img
	mu := ed.stripes.Lock(guest >> img.clusterBits)
	write, err := ed.zeroEntry(ctx, guest, punch, below)
	mu.Unlock()
	if err == nil && write {
		n := min(img.clusterSize, img.size-guest)
		err = img.WriteAt(ctx, ed.zeros[:n], guest, below)
	}
	return err
}

// zeroEntry gives a cluster, whose stripe is held, an entry that reads as
// zeros. It reports true when there is none and zeros have to be written.
func (ed *editor) zeroEntry(ctx context.Context, guest int64, punch bool, below layers.Below) (write bool, err error) {
	img := ed.img
	s, err := ed.look(guest)
	if err != nil {
		return false, err
	}
	e := &s.e
	if e.zero == allSubclusters && (!punch || !e.hasHost) {
		return false, nil
	}
	nothing, err := below.IsZero(ctx, guest, min(img.clusterSize, img.size-guest))
	if err != nil {
		return false, err
	}
	if nothing && !e.hasHost && !e.isPacked && e.zero == 0 {
		return false, nil
	}
	if !nothing && !img.zeroFlag && !img.extended {
		return true, nil
	}
	if s, err = ed.ownTable(guest); err != nil {
		return false, err
	}
	var now l2Entry
	switch {
	case ed.ours(&s) && !punch && (img.zeroFlag || img.extended):
		now = l2Entry{host: e.host, hasHost: true, copied: e.copied, zero: allSubclusters}
		return false, ed.store(&s, now)
	case !nothing:
		now.zero = allSubclusters
	}
	return false, ed.store(&s, now, ed.old(guest, &s.e, punch))
}

// zeroPart zeroes a part of one cluster.
func (ed *editor) zeroPart(ctx context.Context, off, n int64, punch bool, below layers.Below) error {
	img := ed.img
	if !img.extended {
		return ed.zeroBytes(ctx, off, n, punch, below)
	}
	sub := int64(1)<<img.subBits - 1
	end := off + n
	from, to := (off+sub)&^sub, end&^sub
	if end == img.size {
		to = (end + sub) &^ sub
	}
	if from >= to {
		for off < end { // parts of one or two subclusters
			next := min(end, off&^sub+sub+1)
			if err := ed.zeroBytes(ctx, off, next-off, punch, below); err != nil {
				return err
			}
			off = next
		}
		return nil
	}
	if off < from {
		if err := ed.zeroBytes(ctx, off, from-off, punch, below); err != nil {
			return err
		}
	}
	if err := ed.zeroSubclusters(ctx, from, to, punch, below); err != nil {
		return err
	}
	if to < end {
		return ed.zeroBytes(ctx, to, end-to, punch, below)
	}
	return nil
}

// zeroSubclusters zeroes whole subclusters of one cluster (the last may be cut
// by the end of the disk).
func (ed *editor) zeroSubclusters(ctx context.Context, off, end int64, punch bool, below layers.Below) error {
	img := ed.img
	guest := off &^ (img.clusterSize - 1)
	mu := ed.stripes.Lock(guest >> img.clusterBits)
	packed, err := ed.zeroBits(ctx, guest, off, end, punch, below)
	mu.Unlock()
	if err == nil && packed {
		end = min(end, img.size)
		err = img.WriteAt(ctx, ed.zeros[:end-off], off, below)
	}
	return err
}

// zeroBits sets the zero bits of whole subclusters. The stripe of the cluster
// is held. A compressed cluster has no such bits and is reported.
func (ed *editor) zeroBits(ctx context.Context, guest, off, end int64, punch bool, below layers.Below) (packed bool, err error) {
	img := ed.img
	mask := uint32(uint64(1)<<((end-guest)>>img.subBits) - uint64(1)<<((off-guest)>>img.subBits))
	s, err := ed.look(guest)
	if err != nil || s.e.isPacked {
		return s.e.isPacked, err
	}
	if s.e.zero&mask == mask {
		return false, nil
	}
	if s.e.alloc&mask == 0 {
		nothing, err := below.IsZero(ctx, off, min(end, img.size)-off)
		if nothing || err != nil {
			return false, err
		}
	}
	if s, err = ed.ownTable(guest); err != nil {
		return false, err
	}
	now := s.e
	now.alloc &^= mask
	now.zero |= mask
	var rel release
	if now.alloc == 0 && now.hasHost && (punch || !ed.ours(&s)) {
		rel = ed.old(guest, &s.e, punch)
		now.host, now.hasHost, now.copied = 0, false, false
	}
	return false, ed.store(&s, now, rel)
}

// zeroBytes zeroes bytes within one cluster, or one subcluster of an extended
// entry, unless they read as zeros already.
func (ed *editor) zeroBytes(ctx context.Context, off, n int64, punch bool, below layers.Below) error {
	img := ed.img
	in := off & (img.clusterSize - 1)
	s, err := ed.look(off - in)
	if err != nil {
		return err
	}
	i := uint(in >> img.subBits)
	switch {
	case s.e.isPacked:
	case s.e.zero>>i&1 != 0:
		return nil
	case s.e.alloc>>i&1 != 0:
		if punch && n >= punchInPlace {
			if done := ed.punchOwned(off, n); done {
				return nil
			}
		}
	default:
		if nothing, err := below.IsZero(ctx, off, n); nothing || err != nil {
			return err
		}
	}
	return img.WriteAt(ctx, ed.zeros[:n], off, below)
}

// punchOwned punches a part of a cluster where it stands, if it is ours.
func (ed *editor) punchOwned(off, n int64) bool {
	t := ed.img.readers.Enter(off)
	defer ed.img.readers.Exit(t)
	host, m, err := ed.ownedAt(off, n)
	return err == nil && m == n && ed.img.data.PunchHole(host, n) == nil
}

// zeroRaw zeroes a part of [off, end) in a raw external data file, in place,
// and returns how far it came.
func (ed *editor) zeroRaw(ctx context.Context, off, end int64, punch bool) (int64, error) {
	img := ed.img
	t := img.readers.Enter(off)
	defer img.readers.Exit(t)
	var one [1]blockmap.Extent
	ext, err := img.Lookup(ctx, off, end-off, one[:0])
	if err != nil {
		return off, err
	}
	e := ext[0]
	if e.Kind != blockmap.Data {
		return e.End(), nil // there is no backing file
	}
	if punch {
		err = img.data.PunchHole(e.Host, e.Len)
	} else {
		err = img.data.ZeroRange(e.Host, e.Len)
	}
	if err != nil {
		err = backend.WriteZeros(img.data, e.Host, e.Len)
	}
	return e.End(), err
}
