package ploop

import (
	"context"
	"errors"

	"github.com/imagestack/imagestack/layers"
)

// ZeroAt implements layers.Editor. The format has no mark for zeros: a whole
// cluster is unmapped when below shows zeros there (with or without punch),
// else zeros are written, which may allocate.
func (i *Image) ZeroAt(ctx context.Context, off, n int64, _ bool, below layers.Below) error {
	e, err := i.change(off, n)
	if err != nil || n == 0 {
		return err
	}
	if err := i.begin(); err != nil {
		return err
	}
	for end := off + n; off < end; {
		done, err := i.zeroSome(ctx, off, end, below)
		if err != nil {
			return err
		}
		off += done
		if err := e.relieve(i); err != nil {
			return err
		}
	}
	return nil
}

// zeroSome zeroes a prefix of [off, end) and returns its length: a part of one
// cluster, or a run of whole ones.
func (i *Image) zeroSome(ctx context.Context, off, end int64, below layers.Below) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	shift, idx := i.bat.shift, off>>i.bat.shift
	next := min((idx+1)<<shift, i.h.size)
	if off != idx<<shift || end < next {
		n := min(end, next) - off
		return n, i.zeroPart(ctx, off, n, below)
	}
	last := end >> shift
	if end == i.h.size {
		last = i.h.clusters() // the last cluster may be longer than the disk
	}
	r, err := i.bat.next(idx, last)
	if err != nil {
		return 0, err
	}
	if err := i.zeroClusters(ctx, idx, r.count, r.host != 0, below); err != nil {
		return 0, err
	}
	return min((idx+r.count)<<shift, i.h.size) - off, nil
}

// zeroPart zeroes a range inside one cluster.
func (i *Image) zeroPart(ctx context.Context, off, n int64, below layers.Below) error {
	for n > 0 {
		c := min(n, chunk)
		idx := off >> i.bat.shift
		done, r, err := i.writeMapped(zeroes[:c], off, idx+1)
		if err != nil {
			return err
		}
		if done == 0 && r.host == 0 {
			zero, err := below.IsZero(ctx, off, n)
			if err != nil || zero {
				return err
			}
			if err := i.writePart(ctx, idx, zeroes[:c], off-idx<<i.bat.shift, below); err != nil {
				return err
			}
		}
		off, n = off+c, n-c
	}
	return nil
}

// zeroClusters zeroes count whole clusters, which were all mapped or all not.
// Where below shows zeros in a part only, the range is halved until it shows
// them in all or none of it.
func (i *Image) zeroClusters(ctx context.Context, idx, count int64, mapped bool, below layers.Below) error {
	shift := i.bat.shift
	start := idx << shift
	zero, err := below.IsZero(ctx, start, min(count<<shift, i.h.size-start))
	switch {
	case err != nil:
		return err
	case zero && !mapped:
		return nil
	case zero:
		// Before anything is released it must be known that no two entries
		// share it.
		if err := i.edit.alloc.ready(ctx); err != nil {
			return err
		}
		for k := range count {
			if err := i.publish(idx+k, 0); err != nil {
				return err
			}
		}
		return nil
	case count == 1:
		return i.zeroCluster(ctx, idx)
	}
	half := count / 2
	if err := i.zeroClusters(ctx, idx, half, mapped, below); err != nil {
		return err
	}
	return i.zeroClusters(ctx, idx+half, count-half, mapped, below)
}

// zeroCluster writes zeros over one whole cluster, in place or into a new one.
func (i *Image) zeroCluster(ctx context.Context, idx int64) error {
	if done, err := i.zeroInPlace(idx); done || err != nil {
		return err
	}
	mu := i.edit.stripes.Lock(idx)
	defer mu.Unlock()
	if done, err := i.zeroInPlace(idx); done || err != nil {
		return err
	}
	a := &i.edit.alloc
	host, _, err := a.take(ctx, 1)
	if err != nil {
		return err
	}
	err = i.writeZeros(host, i.h.cluster)
	if err == nil {
		err = i.remap(idx, host)
	}
	if err != nil {
		return errors.Join(err, a.giveBack(host, 1))
	}
	return nil
}

// zeroInPlace does nothing and returns false when the cluster is not mapped.
func (i *Image) zeroInPlace(idx int64) (bool, error) {
	tok := i.readers.Enter(idx << i.bat.shift)
	defer i.readers.Exit(tok)
	r, err := i.bat.next(idx, idx+1)
	if err != nil || r.host == 0 {
		return false, err
	}
	return true, i.writeZeros(r.host, i.h.cluster)
}
