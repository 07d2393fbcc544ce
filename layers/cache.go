package layers

import (
	"sync"
	"sync/atomic"
)

// DefaultCacheSize is the metadata budget of a stack in bytes.
const DefaultCacheSize = 64 << 20

// pageOverhead is charged for every page besides its own size.
const pageOverhead = 128

// Cache holds what has been read of the metadata of all layers of a stack
// (pages of BAT, L1, L2 and refcount tables, resolved spans, decompressed
// clusters) under one budget in bytes, whatever the images say.
//
// A hit takes no lock: the pages of a hash set stand in an immutable slice
// behind an atomic pointer. A miss loads under the lock of its stripe, so a
// page is never loaded twice at the same time and a stale one never inserted.
// Eviction is by clock; pinned pages (those an Editor has changed and not yet
// written) stay, so an Editor has to flush when PinnedLimit is reached.
type Cache struct {
	budget  int64
	bytes   atomic.Int64
	owners  atomic.Uint32
	sets    []atomic.Pointer[[]*Page]
	stripes [64]sync.Mutex
	hand    atomic.Uint32
}

// Page is one cached value. Value must not be replaced; if it is mutable (a
// table an Editor changes) its parts are read and written atomically.
type Page struct {
	owner uint32
	index int64
	size  int64
	pins  atomic.Int32
	used  atomic.Bool
	Value any
}

// Owner is the key space of one user of a Cache, usually one table of one
// layer.
type Owner struct {
	c  *Cache
	id uint32
}

// NewCache returns a cache that keeps at most budget bytes (at least 256 KiB).
func NewCache(budget int64) *Cache {
	budget = max(budget, 256<<10)
	sets := int64(64)
	for sets < budget/(16<<10) && sets < 1<<16 {
		sets *= 2
	}
	return &Cache{budget: budget, sets: make([]atomic.Pointer[[]*Page], sets)}
}

// Budget is the limit in bytes.
func (c *Cache) Budget() int64 { return c.budget }

// PinnedLimit is the number of bytes an Editor may keep pinned before it has
// to flush.
func (c *Cache) PinnedLimit() int64 { return c.budget / 4 }

// Bytes is what is cached now.
func (c *Cache) Bytes() int64 { return c.bytes.Load() }

// NewOwner returns a fresh key space.
func (c *Cache) NewOwner() Owner { return Owner{c: c, id: c.owners.Add(1)} }

func (o Owner) set(index int64) uint32 {
	h := (uint64(o.id)<<40 ^ uint64(index)) * 0x9e3779b97f4a7c15
	return uint32(h>>32) & uint32(len(o.c.sets)-1)
}

func (c *Cache) stripe(set uint32) *sync.Mutex { return &c.stripes[set%uint32(len(c.stripes))] }

// Get returns the page with that index, or nil. It takes no lock and does not
// allocate.
func (o Owner) Get(index int64) *Page {
	pages := o.c.sets[o.set(index)].Load()
	if pages == nil {
		return nil
	}
	for _, p := range *pages {
		if p.index == index && p.owner == o.id {
			if !p.used.Load() {
				p.used.Store(true)
			}
			return p
		}
	}
	return nil
}

// Load returns the page with that index, calling load for its value and its
// size in bytes when it is missing. No other Load of the same page runs
// meanwhile. load must not use the same Cache.
func (o Owner) Load(index int64, load func() (value any, size int64, err error)) (*Page, error) {
	return o.get(index, 0, load)
}

// Put caches a value that was made without the stripe's lock and returns the
// page; when there is one already, that one stays and is returned. It suits
// values that never change, so that it does not matter who made them, and
// whose making uses the Cache itself.
func (o Owner) Put(index int64, value any, size int64) *Page {
	p, _ := o.get(index, 0, func() (any, int64, error) { return value, size, nil })
	return p
}

// Pin is Load, and the page stays cached until as many calls of Unpin.
func (o Owner) Pin(index int64, load func() (value any, size int64, err error)) (*Page, error) {
	return o.get(index, 1, load)
}

// Unpin takes back one Pin.
func (p *Page) Unpin() {
	if p.pins.Add(-1) < 0 {
		panic("layers: page unpinned more often than pinned")
	}
}

// Size is the number of bytes charged for p.
func (p *Page) Size() int64 { return p.size }

func (o Owner) get(index int64, pins int32, load func() (any, int64, error)) (*Page, error) {
	set := o.set(index)
	mu := o.c.stripe(set)
	mu.Lock()
	if p := o.Get(index); p != nil {
		p.pins.Add(pins)
		mu.Unlock()
		return p, nil
	}
	value, size, err := load()
	if err != nil {
		mu.Unlock()
		return nil, err
	}
	p := &Page{owner: o.id, index: index, size: size + pageOverhead, Value: value}
	p.pins.Store(pins)
	p.used.Store(true)
	o.c.insert(set, p)
	mu.Unlock()
	o.c.shrink()
	return p, nil
}

// insert adds p to its set, whose stripe is locked.
func (c *Cache) insert(set uint32, p *Page) {
	var pages []*Page
	if old := c.sets[set].Load(); old != nil {
		pages = append(make([]*Page, 0, len(*old)+1), *old...)
	}
	pages = append(pages, p)
	c.sets[set].Store(&pages)
	c.bytes.Add(p.size)
}

// shrink evicts until the budget holds, at most two turns of the clock.
func (c *Cache) shrink() {
	for turns := 2 * len(c.sets); turns > 0 && c.bytes.Load() > c.budget; turns-- {
		set := c.hand.Add(1) % uint32(len(c.sets))
		c.filter(set, func(p *Page) bool {
			return p.pins.Load() > 0 || p.used.Swap(false) || c.bytes.Load() <= c.budget
		})
	}
}

// filter keeps the pages of a set that keep approves of.
func (c *Cache) filter(set uint32, keep func(*Page) bool) {
	if c.sets[set].Load() == nil {
		return
	}
	mu := c.stripe(set)
	mu.Lock()
	defer mu.Unlock()
	old := *c.sets[set].Load()
	pages := make([]*Page, 0, len(old))
	for _, p := range old {
		if keep(p) {
			pages = append(pages, p)
		} else {
			c.bytes.Add(-p.size)
		}
	}
	if len(pages) != len(old) {
		c.sets[set].Store(&pages)
	}
}

// Drop forgets the page with that index, pinned or not. The caller makes sure
// that nobody will change it any more.
func (o Owner) Drop(index int64) {
	o.c.filter(o.set(index), func(p *Page) bool { return p.index != index || p.owner != o.id })
}

// DropAll forgets every page of the owner.
func (o Owner) DropAll() {
	for set := range o.c.sets {
		o.c.filter(uint32(set), func(p *Page) bool { return p.owner != o.id })
	}
}
