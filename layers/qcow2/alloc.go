package qcow2

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/imagestack/imagestack/backend"
)

// growStep is by how much the file is made longer at least, in bytes, so that
// neither every allocation nor every sync pays for a new length. Close cuts
// off what was not used.
const growStep = 4 << 20

// allocate takes up to want host clusters in one run, with a reference count
// of one each. Free clusters inside the file come first, in ascending order,
// then the file grows. fresh tells that the run was never used before and
// reads as zeros; otherwise old bytes may stand in it and the caller has to
// overwrite all of it.
func (r *refcounts) allocate(want int64) (run hostRun, fresh bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	run, err = r.reuse(want, scanBudget)
	if err != nil || run.n > 0 {
		return run, false, err
	}
	if !r.noTruncate {
		run, err = r.grow(want)
		if err == nil || !cannotGrow(err) {
			return run, err == nil, err
		}
		r.noTruncate = errors.Is(err, errors.ErrUnsupported)
	}
	// The file cannot grow: whatever is free must do.
	run, again := r.reuse(want, fullScan)
	if again != nil || run.n > 0 {
		return run, false, again
	}
	// A block device answers EINVAL to every other length.
	if err == nil || errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EINVAL) {
		err = fmt.Errorf("%s: no free cluster is left: %w", r.img.o.Path, syscall.ENOSPC)
	}
	return hostRun{}, false, err
}

// cannotGrow tells errors after which a smaller step, or looking further for
// free clusters, may help.
func cannotGrow(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EINVAL) ||
		errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EFBIG) || errors.Is(err, syscall.EDQUOT)
}

// reuse looks for free clusters inside the file: in the pages that are known
// to have some, then in up to budget pages not looked at before.
func (r *refcounts) reuse(want, budget int64) (hostRun, error) {
	for !r.hasFree.IsEmpty() {
		p := int64(r.hasFree.Minimum())
		run, err := r.takeFrom(p, want)
		if err != nil || run.n > 0 {
			return run, err
		}
		r.hasFree.Remove(uint32(p))
	}
	end := min(r.hwm, int64(len(r.table))<<r.blockBits)
	for ; budget > 0 && r.scan<<r.pageBits < end && r.scan <= 1<<32-1; budget-- {
		p := r.scan
		run, err := r.takeFrom(p, want)
		if err != nil {
			return run, err
		}
		r.scan++
		if run.n > 0 {
			r.hasFree.Add(uint32(p))
			return run, nil
		}
	}
	return hostRun{}, nil
}

// takeFrom allocates the first free run in page p, below hwm.
func (r *refcounts) takeFrom(p, want int64) (hostRun, error) {
	first := p << r.pageBits
	limit := min(int64(1)<<r.pageBits, r.hwm-first)
	if limit <= 0 {
		return hostRun{}, nil
	}
	page, err := r.page(p)
	if err != nil {
		return hostRun{}, err
	}
	if page == nil {
		// No block: all that it would count is free, and it goes first.
		k := p >> (r.blockBits - r.pageBits)
		if k == 0 {
			return hostRun{}, r.img.corrupt(r.tableOff, "refcount table entry", 0, "the header's cluster has no refcount block")
		}
		at := max(first, k<<r.blockBits)
		if err := r.addBlock(k, at, false); err != nil {
			return hostRun{}, err
		}
		if page, err = r.page(p); err != nil {
			return hostRun{}, err
		}
	}
	from := 0
	if p == r.hintPage {
		from = r.hintIndex
	}
	i, n := freeRun(page.b, r.order, from, int(limit), int(min(want, limit)))
	run := hostRun{first + int64(i), int64(n)}
	if n > 0 {
		if err := r.guard(run); err != nil {
			return hostRun{}, err
		}
		if err := r.set(run.first, run.n, 1); err != nil {
			return hostRun{}, err
		}
	}
	r.hintPage, r.hintIndex = p, i+n
	return run, nil
}

// guard refuses to allocate what is counted as free and yet known to be in
// use.
func (r *refcounts) guard(run hostRun) error {
	img := r.img
	bits := img.clusterBits
	hits := func(off, n int64) bool {
		return n > 0 && run.first<<bits < off+n && off < (run.first+run.n)<<bits
	}
	what := ""
	switch {
	case run.first == 0:
		what = "header"
	case hits(img.l1Off, img.l1Entries*8):
		what = "L1 table"
	case hits(r.tableOff, int64(len(r.table))*8):
		what = "refcount table"
	case img.hdr.NbSnapshots > 0 && hits(int64(img.hdr.SnapshotsOffset), 1):
		what = "snapshot table"
	default:
		for c := run.first; c < run.first+run.n && what == ""; c++ {
			if r.blocks.Contains(uint64(c)) {
				what = "refcount block"
			}
		}
	}
	if what == "" {
		return nil
	}
	return img.corrupt(run.first<<bits, "reference count", 0, "a cluster of the "+what+" is counted as free")
}

// grow allocates behind everything that was ever used.
func (r *refcounts) grow(want int64) (hostRun, error) {
	for tries := 0; ; tries++ {
		k := r.hwm >> r.blockBits
		off, err := r.blockOffset(k)
		if err != nil {
			return hostRun{}, err
		}
		if off == 0 {
			if err := r.addBlock(k, r.hwm, true); err != nil {
				return hostRun{}, err
			}
			continue
		}
		// Nothing behind the end of the file should be counted; what is
		// nevertheless is a leak to step over.
		p := r.hwm >> r.pageBits
		page, err := r.page(p)
		if err != nil {
			return hostRun{}, err
		}
		from, limit := r.inPage(r.hwm), 1<<r.pageBits
		i, n := freeRun(page.b, r.order, from, limit, int(min(want, 1<<r.pageBits)))
		if n == 0 {
			if tries > 4096 {
				return hostRun{}, r.img.corrupt(r.hwm<<r.img.clusterBits, "reference count", nil, "clusters behind the end of the file are counted as used")
			}
			r.hwm = (p + 1) << r.pageBits
			continue
		}
		run := hostRun{p<<r.pageBits + int64(i), int64(n)}
		if err := r.extend(run.first + run.n); err != nil {
			return hostRun{}, err
		}
		if err := r.set(run.first, run.n, 1); err != nil {
			return hostRun{}, err
		}
		r.hwm = run.first + run.n
		return run, nil
	}
}

// extend makes the file long enough for clusters below end. What is added is
// a hole.
func (r *refcounts) extend(end int64) error {
	need := end << r.img.clusterBits
	if end > int64(entryOffset>>r.img.clusterBits) {
		return fmt.Errorf("%s: the image file would be too long for the format: %w", r.img.o.Path, syscall.EFBIG)
	}
	if need <= r.fileEnd {
		return nil
	}
	want := (max(need, r.fileEnd+growStep) + r.img.clusterSize - 1) &^ (r.img.clusterSize - 1)
	err := r.img.f.Truncate(want)
	if cannotGrow(err) && want != need { // a limit may be nearer than the step
		want = need
		err = r.img.f.Truncate(want)
	}
	if err != nil {
		return err
	}
	r.fileEnd = want
	return nil
}

// addBlock gives the clusters [k<<blockBits, (k+1)<<blockBits), none of which
// is in use, a refcount block. It is put into cluster at, which it counts
// itself, so that the table entry can become durable alone.
func (r *refcounts) addBlock(k, at int64, fresh bool) error {
	if k >= int64(len(r.table)) {
		return r.growTable(k)
	}
	if fresh {
		if err := r.extend(at + 1); err != nil {
			return err
		}
	} else {
		if err := r.guard(hostRun{at, 1}); err != nil {
			return err
		}
		if err := backend.WriteZeros(r.img.f, at<<r.img.clusterBits, r.img.clusterSize); err != nil {
			return err
		}
	}
	r.enterBlock(k, at)
	if err := r.set(at, 1, 1); err != nil {
		r.table[k] = 0
		r.blocks.Remove(uint64(at))
		return err
	}
	if fresh {
		r.hwm = at + 1
	}
	return nil
}

// enterBlock makes the table name a new block whose content is zeros.
func (r *refcounts) enterBlock(k, at int64) {
	r.table[k] = uint64(at << r.img.clusterBits)
	r.blocks.Add(uint64(at))
	r.dirtyTable[k*8/512] = struct{}{}
	r.newBlocks = true
}

// growTable moves the refcount table to the end of the file and makes it
// large enough for block k, which it adds. The new table stands behind the
// new blocks that count it; all of it becomes valid at once with the header.
func (r *refcounts) growTable(k int64) error {
	img := r.img
	perCluster := img.clusterSize / 8
	start := r.hwm
	if k >= maxRefcountTableBytes/8 || start>>r.blockBits >= maxRefcountTableBytes/8 {
		return fmt.Errorf("%s: the image file would be too long for its refcount table: %w", img.o.Path, syscall.EFBIG)
	}
	entries := max(int64(len(r.table))*3/2, k+1)
	var nb, tc int64
	for { // until the region with its blocks and the table fit each other
		entries = (entries + perCluster - 1) / perCluster * perCluster
		tc = entries / perCluster
		last := (start + nb + tc - 1) >> r.blockBits
		need := int64(0)
		for b := start >> r.blockBits; b <= last; b++ {
			if b >= int64(len(r.table)) || r.table[b] == 0 {
				need++
			}
		}
		if last < entries && need <= nb {
			break
		}
		nb = max(nb, need)
		entries = max(entries, last+1)
	}
	if entries*8 > maxRefcountTableBytes {
		if entries = maxRefcountTableBytes / 8; k >= entries || (start+nb+tc)>>r.blockBits >= entries {
			return fmt.Errorf("%s: the image file would be too long for its refcount table: %w", img.o.Path, syscall.EFBIG)
		}
		tc = entries / perCluster
	}
	end := start + nb + tc
	if err := r.extend(end); err != nil {
		return err
	}
	// What can fail comes before what changes anything: load the pages of
	// the block that counts the first clusters of the region already.
	for p := start >> r.pageBits; p <= (end-1)>>r.pageBits; p++ {
		if off, err := r.pageAt(p); err != nil {
			return err
		} else if off != 0 {
			if _, err := r.change(p); err != nil {
				return err
			}
		}
	}
	oldTable, oldOff := r.table, r.tableOff
	r.table = make([]uint64, entries)
	copy(r.table, oldTable)
	next := start
	for b := start >> r.blockBits; b <= (end-1)>>r.blockBits; b++ {
		if r.table[b] == 0 {
			r.enterBlock(b, next)
			next++
		}
	}
	// nb may have been counted too high by one; the table follows directly.
	end = next + tc
	r.tableOff = next << img.clusterBits
	if err := r.set(start, end-start, 1); err != nil {
		for c := start; c < next; c++ {
			r.blocks.Remove(uint64(c))
		}
		r.table, r.tableOff = oldTable, oldOff
		for p := start >> r.pageBits; p <= (end-1)>>r.pageBits; p++ {
			r.forget(p)
		}
		return err
	}
	r.oldTables = append(r.oldTables, hostRun{oldOff >> img.clusterBits, int64(len(oldTable)) / perCluster})
	r.tableMoved = true
	r.hwm = end
	return nil
}

// forget drops the changed page p if its block does not exist.
func (r *refcounts) forget(p int64) {
	if off, err := r.pageAt(p); off != 0 || err != nil {
		return
	}
	if c := r.dirty[p]; c != nil {
		delete(r.dirty, p)
		c.Unpin()
	}
	r.pages.Drop(p)
}

// shrinkFile cuts off the part of the file behind the last cluster that was
// ever used: what extend added in advance.
func (r *refcounts) shrinkFile() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	end := r.hwm << r.img.clusterBits
	if r.noTruncate || end >= r.fileEnd {
		return nil
	}
	if r.img.imageEnd.Load() > end {
		r.img.imageEnd.Store(end)
	}
	if !r.img.external && r.img.dataEnd.Load() > end {
		r.img.dataEnd.Store(end)
	}
	if err := r.img.f.Truncate(end); err != nil {
		return err
	}
	r.fileEnd = end
	return nil
}
