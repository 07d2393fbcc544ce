package qcow2fsck

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// Flags of a cell: what refers to the cluster.
const (
	fMeta     = 1 << iota // metadata
	fPlain                // guest data
	fPacked               // compressed guest data
	fActive               // guest data of the active map
	fCopied               // …through an entry with the COPIED flag
	fUncopied             // …through one without
	fCross                // owners that do not go together
	numFlags  = 7
)

// A page is the cells of pageCells clusters, in the narrowest of three widths
// that holds them. The two-bit states are those that nearly all clusters of an
// image without snapshots are in.
const (
	pageCells = 2048

	stateFree  = 0
	stateUsual = 1 // one reference, of the active map, with COPIED
	stateMeta  = 2 // one reference, metadata
	statePlain = 3 // one reference, data of a snapshot only

	usual = fPlain | fActive | fCopied

	mid16   = 16 - numFlags // bits of the count
	mid32   = 32 - numFlags
	pageFix = 64 // what a page takes besides its cells
)

var stateFlags = [4]uint8{0, usual, fMeta, fPlain}

type cellPage struct {
	mu   sync.Mutex
	used int32                // cells that are not free, while two is in use
	two  *[pageCells / 4]byte // not to be changed when it is shared
	w16  *[pageCells]uint16
	w32  *[pageCells]uint32
}

// freePage and usualPage are shared by all pages of which every cell is free,
// or is in the usual state. Most pages of a large image are.
var freePage = new([pageCells / 4]byte)

var usualPage = func() *[pageCells / 4]byte {
	var p [pageCells / 4]byte
	for i := range p {
		p[i] = stateUsual * 0x55
	}
	return &p
}()

func (p *cellPage) get(i int) (n uint32, fl uint8) {
	switch {
	case p.two != nil:
		s := p.two[i/4] >> (i % 4 * 2) & 3
		if s == stateFree {
			return 0, 0
		}
		return 1, stateFlags[s]
	case p.w16 != nil:
		v := p.w16[i]
		return uint32(v & (1<<mid16 - 1)), uint8(v >> mid16)
	}
	v := p.w32[i]
	return v & (1<<mid32 - 1), uint8(v >> mid32)
}

func (p *cellPage) shared() bool { return p.two == usualPage || p.two == freePage }

// own makes two a copy of the page's own.
func (p *cellPage) own() {
	if p.shared() {
		two := *p.two
		p.two = &two
	}
}

// bytes is what the cells of the page take.
func (p *cellPage) bytes() int64 {
	switch {
	case p.shared():
		return 0
	case p.two != nil:
		return pageCells / 4
	case p.w16 != nil:
		return pageCells * 2
	}
	return pageCells * 4
}

// set stores a cell and returns by how many bytes the page has grown.
func (p *cellPage) set(i int, n uint32, fl uint8) (grown int64) {
	n = min(n, 1<<mid32-1) // a count that large is never right
	before := p.bytes()
	if p.two != nil {
		s := -1
		switch {
		case n == 0 && fl == 0:
			s = stateFree
		case n == 1:
			s = slices.Index(stateFlags[1:], fl) + 1
			if s == 0 {
				s = -1
			}
		}
		if s >= 0 {
			old := p.two[i/4] >> (i % 4 * 2) & 3
			if int(old) == s {
				return 0
			}
			p.own()
			b := &p.two[i/4]
			*b = *b&^(3<<(i%4*2)) | byte(s)<<(i%4*2)
			switch {
			case old == stateFree:
				p.full(1)
			case s == stateFree:
				p.used--
			}
			return p.bytes() - before
		}
		w := new([pageCells]uint16)
		for k := range w {
			if n, fl := p.get(k); n > 0 {
				w[k] = uint16(fl)<<mid16 | uint16(n)
			}
		}
		p.two, p.w16 = nil, w
	}
	if p.w16 != nil && n >= 1<<mid16 {
		w := new([pageCells]uint32)
		for k := range w {
			n, fl := p.get(k)
			w[k] = uint32(fl)<<mid32 | n
		}
		p.w16, p.w32 = nil, w
	}
	if p.w16 != nil {
		p.w16[i] = uint16(fl)<<mid16 | uint16(n)
	} else {
		p.w32[i] = uint32(fl)<<mid32 | n
	}
	return p.bytes() - before
}

// full notes that n free cells are in use now, and shares the page if it is one
// like most.
func (p *cellPage) full(n int32) {
	if p.used += n; p.used == pageCells && *p.two == *usualPage {
		p.two = usualPage
	}
}

// addUsual makes the cells [i, i+k) usual if that is quick: they are free. It
// returns how many it did, and by how many bytes the page has grown.
func (p *cellPage) addUsual(i, k int) (done int, grown int64) {
	if p.two == nil || p.two == usualPage {
		return 0, 0
	}
	before := p.bytes()
	if k == pageCells && p.used == 0 {
		p.two, p.used = usualPage, pageCells
		return k, -before
	}
	for done+4 <= k && (i+done)%4 == 0 && p.two[(i+done)/4] == 0 {
		p.own()
		p.two[(i+done)/4] = stateUsual * 0x55
		done += 4
	}
	p.full(int32(done))
	return done, p.bytes() - before
}

// cells are the cells of a window [lo, hi) of clusters. hi falls when the
// memory does not suffice; the next window begins there.
type cells struct {
	lo    int64
	hi    atomic.Int64
	limit int64 // bytes
	used  atomic.Int64

	mu    sync.RWMutex
	dense []*cellPage // by page number, when the file is not too long for that
	far   map[int64]*cellPage
}

func newCells(lo, fileClusters, limit int64) *cells {
	c := &cells{lo: lo, limit: max(limit, 1<<10), far: map[int64]*cellPage{}}
	c.hi.Store(math.MaxInt64)
	if n := fileClusters/pageCells + 1; n <= limit/64 {
		c.dense = make([]*cellPage, n)
	}
	return c
}

func (c *cells) in(cluster int64) bool { return cluster >= c.lo && cluster < c.hi.Load() }

// page returns a page, nil when there is none and make is not set.
func (c *cells) page(no int64, create bool) *cellPage {
	c.mu.RLock()
	var p *cellPage
	if no < int64(len(c.dense)) {
		p = c.dense[no]
	} else {
		p = c.far[no]
	}
	c.mu.RUnlock()
	if p != nil || !create {
		return p
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if no < int64(len(c.dense)) {
		if c.dense[no] == nil {
			c.dense[no] = &cellPage{two: freePage}
			c.used.Add(pageFix)
		}
		return c.dense[no]
	}
	if c.far[no] == nil {
		c.far[no] = &cellPage{two: freePage}
		c.used.Add(pageFix)
	}
	return c.far[no]
}

// numbers are the numbers of all pages from first on, ascending.
func (c *cells) numbers(first int64) []int64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var all []int64
	for no := max(first, 0); no < int64(len(c.dense)); no++ {
		if c.dense[no] != nil {
			all = append(all, no)
		}
	}
	k := len(all)
	for no := range c.far {
		if no >= first {
			all = append(all, no)
		}
	}
	slices.Sort(all[k:])
	return all
}

// shrink lowers hi until the memory suffices again. At least one page stays.
func (c *cells) shrink() {
	if c.used.Load() <= c.limit {
		return
	}
	all := c.numbers(c.lo / pageCells)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used.Load() <= c.limit || len(all) < 2 {
		return
	}
	keep := max(len(all)/2, 1)
	hi := all[keep] * pageCells
	if hi >= c.hi.Load() {
		return
	}
	c.hi.Store(hi)
	var used int64
	for _, no := range all {
		var p *cellPage
		if no < int64(len(c.dense)) {
			p = c.dense[no]
		} else {
			p = c.far[no]
		}
		if p == nil {
			continue
		}
		if no*pageCells >= hi {
			if no < int64(len(c.dense)) {
				c.dense[no] = nil
			} else {
				delete(c.far, no)
			}
			continue
		}
		p.mu.Lock()
		used += p.bytes() + pageFix
		p.mu.Unlock()
	}
	c.used.Store(used)
}

// get returns the cell of a cluster; outside of the window it is empty.
func (c *cells) get(cluster int64) (n uint32, fl uint8) {
	if !c.in(cluster) {
		return 0, 0
	}
	p := c.page(cluster/pageCells, false)
	if p == nil {
		return 0, 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.get(int(cluster % pageCells))
}

// update changes a cell; outside of the window it does nothing.
func (c *cells) update(cluster int64, f func(n uint32, fl uint8) (uint32, uint8)) {
	if !c.in(cluster) {
		return
	}
	p := c.page(cluster/pageCells, true)
	p.mu.Lock()
	n, fl := p.get(int(cluster % pageCells))
	n, fl = f(n, fl)
	grown := p.set(int(cluster%pageCells), n, fl)
	p.mu.Unlock()
	if grown != 0 && c.used.Add(grown) > c.limit || c.used.Load() > c.limit {
		c.shrink()
	}
}

// join is a cell after w more references of kind fl.
func join(n uint32, have uint8, w uint32, fl uint8) (uint32, uint8) {
	sum := have | fl
	switch {
	case have&fActive != 0 && fl&fActive != 0, // twice in the active map
		sum&fPlain != 0 && sum&fPacked != 0:
		sum |= fCross
	}
	return n + min(w, math.MaxUint32-n), sum
}

// add adds w references of kind fl to n clusters from first on and returns
// n, or how many were done before one that holds metadata. Metadata itself is
// entered without that check.
func (c *cells) add(first, n int64, w uint32, fl uint8) int64 {
	for done := int64(0); done < n; {
		at := first + done
		if at < c.lo {
			done += min(n-done, c.lo-at)
			continue
		}
		if at >= c.hi.Load() {
			return n
		}
		i := int(at % pageCells)
		k := int(min(n-done, int64(pageCells-i)))
		p := c.page(at/pageCells, true)
		p.mu.Lock()
		var grown int64
		for j := i; j < i+k; j++ {
			if fl == usual && w == 1 && j%4 == 0 {
				n, more := p.addUsual(j, i+k-j)
				grown += more
				if j += n; j == i+k {
					break
				}
			}
			have, hfl := p.get(j)
			if hfl&fMeta != 0 && fl&fMeta == 0 {
				p.mu.Unlock()
				c.used.Add(grown)
				return done + int64(j-i)
			}
			sum, sfl := join(have, hfl, w, fl)
			grown += p.set(j, sum, sfl)
		}
		p.mu.Unlock()
		done += int64(k)
		if grown != 0 {
			c.used.Add(grown)
		}
		if c.used.Load() > c.limit {
			c.shrink()
		}
	}
	return n
}
