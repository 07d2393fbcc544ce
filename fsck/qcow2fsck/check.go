package qcow2fsck

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
)

// Checker is the fsck.Checker of qcow2 images.
type Checker struct{}

func init() { fsck.RegisterChecker(Checker{}) }

// Format implements fsck.Checker.
func (Checker) Format() string { return "qcow2" }

// Check implements fsck.Checker.
func (Checker) Check(ctx context.Context, f backend.File, o fsck.Options, sink fsck.Sink) (fsck.Stats, error) {
	c := &check{ctx: ctx, r: o.Reader(f), f: f, o: o, sink: sink, plan: o.Plan, fresh: map[int64]bool{}, kept: map[int64]bool{}, sources: map[int64]bool{}, spreads: map[int64]bool{}, told: map[int64]bool{}, lookedAt: map[int64]bool{}}
	c.stats.Format = "qcow2"
	c.budget = o.Budget()
	c.parallel = o.Parallel
	if c.parallel <= 0 {
		c.parallel = runtime.GOMAXPROCS(0)
	}
	err := c.run()
	c.stats.CheckErrors = c.errors.Load()
	return c.stats, err
}

// check is the state of one check.
type check struct {
	ctx      context.Context
	f        backend.File
	r        fsck.ReadSizer
	o        fsck.Options
	sink     fsck.Sink
	plan     *fsck.Plan
	budget   int64
	parallel int
	stats    fsck.Stats
	errors   atomic.Int64

	h header
	geometry

	claims       claims // what the header names, directly or through snapshots and bitmaps
	bmRefs       []bmRef
	bmDirs       []bmDir
	claimsBefore claims  // without bitmaps
	l1s          []l1    // tables to walk, the active one first
	blocks       blocks  // the refcount table
	suspects     []int64 // clusters of refcount blocks that do not look like any, sorted
	suspected    bool    // they were looked for
	lookedAt     map[int64]bool
	countPart    atomic.Pointer[countPart]
	hole         atomic.Pointer[blockmap.Range] // the last one of the file that was met
	zeros        []byte                         // a cluster of zeros, not to be changed
	asked        int                            // clusters that counted looked at
	decoded      atomic.Int64                   // bytes that decodes produced

	cells    *cells
	first    bool  // the first window
	grown    []ref // clusters that were allocated behind the window
	tables   *tableList
	counts   counters
	mapLoss  atomic.Bool // an entry of the map is damaged beyond mending
	unfixed  atomic.Bool // damage stays
	fresh    map[int64]bool
	sources  map[int64]bool  // clusters of which the plan makes copies
	copies   fsck.CopyBudget // for those who name the same cluster
	kept     map[int64]bool  // clusters whose owners stay in doubt
	spreads  map[int64]bool  // entries, by their place, whose compressed cluster was moved
	told     map[int64]bool  // clusters of which it was said that they cannot be counted
	doubtAll bool            // there were too many of these to look at all
	end      int64           // clusters of the file as the repair will have it
	cursor   int64           // of the search for free clusters
	many     int64           // of that for several side by side
	leaks    bool

	external   bool
	data       backend.File // external data file, nil when there is none to look at
	dataEnd    int64
	failMu     sync.Mutex
	fail       error // of the plan
	errorsSeen blockmap.Set
}

// ref is a reference to a cluster from a structure of the header.
type ref struct {
	cluster int64
	n       uint32
	fl      uint8
}

// geometry is what follows from the header.
type geometry struct {
	bits       uint
	cs         int64 // bytes of a cluster
	size       int64 // length of the file
	clusters   int64 // of the file, the last one may be cut off
	extended   bool
	entryBytes int64
	l2Entries  int64
	l2Span     int64 // guest bytes of an L2 table
	order      uint  // of counts
	perBlock   int64 // counts in a refcount block
}

func (c *check) setGeometry() {
	h := &c.h
	c.bits = uint(h.clusterBits)
	c.cs = 1 << c.bits
	c.clusters = (c.size + c.cs - 1) >> c.bits
	c.extended = h.incompat&incompatExtL2 != 0
	c.entryBytes = 8
	if c.extended {
		c.entryBytes = 16
	}
	c.l2Entries = c.cs / c.entryBytes
	c.l2Span = c.l2Entries << c.bits
	c.order = uint(h.order)
	c.perBlock = c.cs * 8 >> c.order
	c.external = h.incompat&incompatDataFile != 0
	c.end = c.clusters
	c.stats.ClusterSize = c.cs
	c.stats.VirtualSize = int64(min(h.size, 1<<63-1))
	c.stats.TotalClusters = int64(h.size>>c.bits) + b2i(h.size&uint64(c.cs-1) != 0)
}

func b2i(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// report passes a finding on and reports whether to enter its fix in the plan.
func (c *check) report(f fsck.Finding) bool {
	wanted := c.sink.Report(f) && c.plan != nil && f.Fix != nil
	if !wanted && f.Sev() >= fsck.Damage {
		c.unfixed.Store(true)
	}
	return wanted
}

// found reports a finding without guest ranges.
func (c *check) found(code *fsck.Code, off int64, field string, value any, text string, fix *fsck.Fix) bool {
	return c.report(fsck.Finding{Code: code, Place: fsck.Place{Offset: off, Field: field, Value: value}, Text: text, Fix: fix})
}

func preen(text string) *fsck.Fix { return &fsck.Fix{Text: text, Level: fsck.Preen} }
func full(text string, loses ...blockmap.Range) *fsck.Fix {
	return &fsck.Fix{Text: text, Level: fsck.Full, Loses: loses}
}

// planned keeps the first error of the plan, which run returns.
func (c *check) planned(err error) bool {
	if err == nil {
		return true
	}
	c.failMu.Lock()
	defer c.failMu.Unlock()
	if c.fail == nil {
		c.fail = err
	}
	return false
}

func (c *check) failed() error {
	c.failMu.Lock()
	defer c.failMu.Unlock()
	if c.fail != nil {
		return c.fail
	}
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	return nil
}

// read fills b from off on, zeros behind the end of the file, and returns how
// much the file has of it. What cannot be read is a finding and reads as zeros.
func (c *check) read(b []byte, off int64) int {
	if off < 0 || off >= c.size {
		clear(b)
		return 0
	}
	n, err := c.r.ReadAt(b, off)
	have := int(min(int64(len(b)), c.size-off))
	if n == len(b) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		clear(b[n:])
		return have
	}
	if len(b) > smallRead { // as little as possible shall be missing
		for at := 0; at < len(b); at += smallRead {
			c.read(b[at:min(at+smallRead, len(b))], off+int64(at))
		}
		return have
	}
	clear(b)
	c.failMu.Lock()
	seen := c.errorsSeen.Contains(off, int64(len(b)))
	c.errorsSeen.Add(off, int64(len(b)))
	c.failMu.Unlock()
	c.mapLoss.Store(true)
	if !seen {
		c.errors.Add(1)
		c.found(codeUnreadable, off, "", nil, fmt.Sprint(err), nil)
	}
	return have
}

// dataAt returns where the file has data again, from off on; a hole is not
// read. (What a plan writes never makes a table of a hole.)
func (c *check) dataAt(off int64) int64 {
	if h := c.hole.Load(); h != nil && h.Off <= off && off-h.Off < h.Len {
		return h.Off + h.Len
	}
	at, err := c.f.SeekData(off)
	switch {
	case errors.Is(err, io.EOF):
		at = 1<<63 - 1
	case err != nil:
		return off
	}
	if at > off { // very many tables may lie in one hole
		c.hole.Store(&blockmap.Range{Off: off, Len: at - off})
	}
	return at
}

// isHole reports that all of [off, off+n) is in a hole of the file.
func (c *check) isHole(off, n int64) bool {
	return off >= 0 && n <= c.size && off <= c.size-n && c.dataAt(off) >= off+n
}

// readTable reads a table, which may be a hole.
func (c *check) readTable(b []byte, off int64) {
	if c.isHole(off, int64(len(b))) {
		clear(b)
		return
	}
	c.read(b, off)
}

// smallRead is the unit in which places that cannot be read are looked for.
const smallRead = 4096

func (c *check) put64(ph fsck.Phase, off int64, v uint64) bool {
	return c.planned(c.plan.Write(ph, off, binary.BigEndian.AppendUint64(nil, v)))
}

func (c *check) put32(ph fsck.Phase, off int64, v uint32) bool {
	return c.planned(c.plan.Write(ph, off, binary.BigEndian.AppendUint32(nil, v)))
}

func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }
func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
func be64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }

// aligned reports that a table or cluster can stand at off: on a cluster
// boundary behind the header, with n bytes in clusters that the file has.
func (c *check) aligned(off, n uint64) bool {
	return off&uint64(c.cs-1) == 0 && off != 0 && off < uint64(c.clusters)<<c.bits && n <= uint64(c.clusters)<<c.bits-off
}

// guest is [off, off+n) as far as it is part of the disk.
func (c *check) guest(off, n int64) []blockmap.Range {
	end := min(off+n, c.stats.VirtualSize)
	if off < 0 || off >= end {
		return nil
	}
	return []blockmap.Range{{Off: off, Len: end - off}}
}

// run does the passes.
func (c *check) run() error {
	size, err := c.r.Size()
	if err != nil {
		return err
	}
	c.size = size
	if !c.header() || !c.structures() {
		return c.failed()
	}
	defer func() {
		if c.data != nil {
			c.data.Close()
		}
	}()
	c.openData()
	if err := c.failed(); err != nil {
		return err
	}
	c.first = true
	counted := c.survey()
	for lo := int64(0); ; {
		if err := c.window(lo, counted); err != nil {
			return err
		}
		c.first, counted = false, false
		if lo = c.cells.hi.Load(); lo == 1<<63-1 {
			break
		}
	}
	c.finish()
	return c.failed()
}

// begin starts a window with the metadata that is in it.
func (c *check) begin(lo int64) error {
	c.cells = newCells(lo, c.clusters, c.cellBytes())
	c.cursor = lo
	c.cells.add(0, 1, 1, fMeta)
	c.claims.all(func(r claim) { c.cells.add(r.first, r.n, 1, fMeta) })
	for _, b := range c.blocks.table {
		if b != 0 {
			c.cells.add(int64(b>>c.bits), 1, 1, fMeta)
		}
	}
	for _, g := range c.grown {
		c.cells.add(g.cluster, 1, g.n, g.fl)
	}
	return c.eachBatch(false, func(list []tableRec, _ bool) error {
		for _, t := range list {
			c.cells.add(t.cluster, t.n(), t.weight, fMeta)
		}
		return nil
	})
}

// window counts and compares the clusters from lo on, as many as the memory
// holds. counted says that the survey has counted them.
func (c *check) window(lo int64, counted bool) error {
	if !counted {
		if err := c.begin(lo); err != nil {
			return err
		}
		if err := c.walk(); err != nil {
			return err
		}
	}
	same, err := c.scan()
	if err != nil {
		return err
	}
	if c.odd() {
		same = false
		if err := c.look(); err != nil {
			return err
		}
	}
	if !same {
		if err := c.compare(); err != nil {
			return err
		}
	}
	c.stats.ImageEnd = c.counts.lastCluster << c.bits
	if c.cells.hi.Load() == 1<<63-1 {
		c.writeTable()
	}
	return c.failed()
}

// finish judges what depends on everything else.
func (c *check) finish() {
	h := &c.h
	if h.size == 0 && c.counts.highest > 0 {
		to := uint64(c.counts.highest)
		if c.found(codeSize, offSize, "size", h.size, "the disk has no bytes, but data is mapped", full(fmt.Sprintf("set it to %d, the end of what is mapped", to))) {
			h.size = to
			c.put64(fsck.PhaseHeader, offSize, to)
		}
	}
	if need := c.counts.dataEnd; c.data != nil {
		if h.autoclear&autoclearRaw != 0 {
			need = c.stats.VirtualSize
		}
		if c.dataEnd < need {
			c.report(fsck.Finding{Code: codeDataShort, Place: fsck.Place{File: c.data.Name(), Offset: c.dataEnd}, Guest: c.guest(c.dataEnd, need-c.dataEnd),
				Text: fmt.Sprintf("the file has %d bytes, %d are needed", c.dataEnd, need)})
		}
	}
	if h.incompat&incompatDirty != 0 {
		if c.found(codeDirty, offIncompat, "incompatible_features", h.incompat, "the dirty bit is set", preenIf(!c.unfixed.Load() && !c.leaks, "clear it")) {
			h.incompat &^= incompatDirty
			c.put64(fsck.PhaseFlags, offIncompat, h.incompat)
		}
	}
	if h.incompat&incompatCorrupt != 0 {
		if c.found(codeCorrupt, offIncompat, "incompatible_features", h.incompat, "the corrupt bit is set", preenIf(!c.unfixed.Load(), "clear it")) {
			h.incompat &^= incompatCorrupt
			c.put64(fsck.PhaseFlags, offIncompat, h.incompat)
		}
	}
	if unknown := h.autoclear &^ autoclearKnown; unknown != 0 && c.plan != nil && !c.plan.Empty() {
		h.autoclear &= autoclearKnown
		c.put64(fsck.PhaseNew, offAutoclear, h.autoclear)
	}
	c.counts.into(&c.stats)
}

func preenIf(ok bool, text string) *fsck.Fix {
	if !ok {
		return nil
	}
	return preen(text)
}
