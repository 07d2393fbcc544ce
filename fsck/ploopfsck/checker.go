// Package ploopfsck checks and repairs ploop (Parallels) images and the
// DiskDescriptor.xml of a bundle. Importing it registers the checkers "ploop"
// and "ploop-descriptor".
//
// Design note. The walk is one pass over the BAT, read in pieces by several
// goroutines, with two bits for each cluster of the file: used, and used
// again. Images whose bits do not fit into the memory allowed are walked in
// several passes, a window of the file each. Further passes happen only where
// something is wrong: to collect who shares a cluster, or to move clusters
// out of the end of the file. Format: OpenVZ include/ploop1_image.h, QEMU
// docs/interop/parallels.txt and prl-xml.rst.
//
// What a repair may do without being asked follows one rule: as long as an
// entry of the BAT is in doubt, a cluster that nothing refers to may be the one
// that this entry lost. So leaks are given back only by a round of repair that
// has found the BAT clean; before that, a full repair puts them into
// lost+found.
//
// The parts: layout.go numbers of the format, codes.go the codes, header.go
// the header, convert.go interrupted conversions, extension.go the format extension, bat.go the walk, entries.go
// bad entries, shared.go clusters with several owners, space.go leaks and the
// end of the file, holes.go sparseness, descriptor.go the XML.
package ploopfsck

import (
	"context"
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

func init() {
	fsck.RegisterChecker(Checker{})
	fsck.RegisterChecker(DescriptorChecker{})
}

// Checker checks one ploop image.
//
// In an image that stands on another (Options.Parent) an entry that has to be
// given up gets a new cluster of zeros, because an empty entry would show the
// parent's data, which is older and belongs to something else by now. Without
// a parent the entry is emptied.
type Checker struct{}

// Format implements fsck.Checker.
func (Checker) Format() string { return "ploop" }

// check is the state of one walk.
type check struct {
	ctx  context.Context
	f    backend.File
	r    fsck.ReadSizer
	o    fsck.Options
	sink fsck.Sink
	plan *fsck.Plan

	geometry
	eof     int64  // length of the file
	changed header // the header as it will be
	stats   fsck.Stats

	damaged atomic.Int64 // findings of damage that are not going to be fixed
	suspect atomic.Bool  // an entry was bad: leaks may be what it lost
	blind   atomic.Bool  // a part of the BAT could not be read
	doubt   bool         // the header was wrong
	convert bool         // interrupted conversion: entries are not touched
	noSaved string       // why the BAT saved before it is of no use
	bad     atomic.Int64 // bad entries
	used    int64        // slots that entries refer to
	last    int64        // the last slot that is used, -1 without any
	ext     extension
	marks   marks
	space   space
	orphans []run           // single bad entries, to be decided when all are known
	copies  fsck.CopyBudget // for owners of the same cluster
	fixMu   sync.Mutex      // guards what follows
	end     int64           // where new clusters are appended, 0 before the first
}

// Check implements fsck.Checker.
func (Checker) Check(ctx context.Context, f backend.File, o fsck.Options, sink fsck.Sink) (fsck.Stats, error) {
	c := &check{ctx: ctx, f: f, r: o.Reader(f), o: o, sink: sink, plan: o.Plan, last: -1}
	c.stats.Format = "ploop"
	var err error
	if c.eof, err = c.r.Size(); err != nil {
		return c.stats, err
	}
	if ok, err := c.checkHeader(); err != nil || !ok {
		return c.stats, err
	}
	if settled, err := c.conversion(); err != nil || settled {
		return c.stats, err
	}
	if err := c.checkExtension(); err != nil {
		return c.stats, err
	}
	if err := c.checkBAT(); err != nil {
		return c.stats, err
	}
	if err := c.checkSpace(); err != nil {
		return c.stats, err
	}
	if err := c.reportHoles(); err != nil {
		return c.stats, err
	}
	if err := c.checkFlags(); err != nil {
		return c.stats, err
	}
	return c.stats, c.writeHeader()
}

// report hands a finding over and reports whether its fix is to be planned.
func (c *check) report(f fsck.Finding) bool {
	wanted := c.sink.Report(f) && c.plan != nil && f.Fix != nil
	if !wanted && f.Sev() >= fsck.Damage {
		c.damaged.Add(1)
	}
	return wanted
}

func (c *check) parallel() int {
	if c.o.Parallel > 0 {
		return c.o.Parallel
	}
	return runtime.GOMAXPROCS(0)
}

// read fills p; what lies behind the end of the file is zeros.
func (c *check) read(p []byte, off int64) error {
	n, err := c.r.ReadAt(p, off)
	if n < len(p) && err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(p[n:])
	return nil
}

// unreadable reports a place that gives no bytes.
func (c *check) unreadable(off int64, field string, err error) {
	c.fixMu.Lock()
	c.stats.CheckErrors++
	c.fixMu.Unlock()
	c.blind.Store(true)
	c.report(fsck.Finding{Code: codeUnreadable, Place: fsck.Place{Offset: off, Field: field}, Text: err.Error()})
}

// guest is the part of the disk that entries idx to idx+count-1 stand for,
// nothing when they lie behind its end.
func (c *check) guest(idx, count int64) []blockmap.Range {
	start, end := idx*c.cluster, (idx+count)*c.cluster
	if start >= c.size {
		return nil
	}
	return []blockmap.Range{{Off: start, Len: min(end, c.size) - start}}
}

// keep puts n bytes of the file at off into lost+found, unless they are a hole:
// what is no data needs no memory of the plan. guest is -1 when it is not known
// whose they are.
func (c *check) keep(guest, off, n int64) error {
	if n = min(n, c.eof-off); n <= 0 || !c.holds(off, n) {
		return nil
	}
	return c.plan.Quarantine(fsck.Lost{Guest: guest, Host: off, Len: n})
}

// holds reports whether there is anything but a hole in n bytes of the file at
// off. A file that cannot tell is all data.
func (c *check) holds(off, n int64) bool {
	data, err := c.f.SeekData(off)
	return n > 0 && (err == nil && data < off+n || err != nil && !errors.Is(err, io.EOF))
}

// canGrow reports whether the file may become n bytes long. Without a plan
// nothing is known against it.
func (c *check) canGrow(n int64) bool {
	if c.plan == nil {
		return true
	}
	size, err := c.plan.Size()
	if err != nil || size >= n {
		return err == nil
	}
	if c.plan.SetSize(n) != nil {
		return false
	}
	return c.plan.SetSize(size) == nil
}

// canAllocate reports whether there is room for n more clusters.
func (c *check) canAllocate(n int64) bool {
	end := max(c.end, c.roundUp(c.eof)) + n*c.cluster
	return end/c.cluster-1 <= c.maxSlot() && c.canGrow(end)
}

// allocate returns the place of a new cluster at the end of the file.
func (c *check) allocate() (int64, error) {
	c.fixMu.Lock()
	defer c.fixMu.Unlock()
	if c.end == 0 {
		c.end = c.roundUp(c.eof)
		// The rest of the last cluster has to be there, and not as a hole.
		if c.end > c.eof {
			if err := c.plan.Zero(fsck.PhaseCounts, c.eof, c.end-c.eof); err != nil {
				return 0, err
			}
		}
	}
	if c.end/c.cluster > c.maxSlot() {
		return 0, fmt.Errorf("%w: entries of the BAT cannot point behind %#x", fsck.ErrNoRoom, c.end)
	}
	at := c.end
	c.end += c.cluster
	return at, nil
}
