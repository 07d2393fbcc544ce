package qcow2fsck

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/imagestack/imagestack/fsck"
)

// Reads of neighbouring L2 tables are joined up to readMost bytes, over gaps
// of at most readGap.
const (
	readMost = 1 << 20
	readGap  = 16 << 10
)

// counters are what the walk counts for Stats.
type counters struct {
	mu                                sync.Mutex
	allocated, fragmented, compressed int64
	highest                           int64 // guest end of what is mapped
	dataEnd                           int64 // end of what is mapped in the external data file
	lastCluster                       int64
}

func (n *counters) add(m *counters) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.allocated += m.allocated
	n.fragmented += m.fragmented
	n.compressed += m.compressed
	n.highest = max(n.highest, m.highest)
	n.dataEnd = max(n.dataEnd, m.dataEnd)
}

func (n *counters) into(s *fsck.Stats) {
	s.AllocatedClusters, s.FragmentedClusters, s.CompressedClusters = n.allocated, n.fragmented, n.compressed
}

// eachTable reads all L2 tables, in the order of the file, and calls do for
// each from several goroutines. b is valid during the call; n is how much of it
// the file has.
func (c *check) eachTable(pass int, report bool, do func(w *worker, rec *tableRec, b []byte, n int)) error {
	done := int64(0)
	return c.eachBatch(report, func(list []tableRec) error {
		var next atomic.Int64
		var wg sync.WaitGroup
		var mu sync.Mutex
		take := func() (from, to int) {
			mu.Lock()
			defer mu.Unlock()
			from = int(next.Load())
			if from >= len(list) {
				return from, from
			}
			start := list[from].cluster << c.bits
			for to = from + 1; to < len(list); to++ {
				at := list[to].cluster << c.bits
				if at+c.cs-start > readMost || at-list[to-1].cluster<<c.bits-c.cs > readGap {
					break
				}
			}
			next.Store(int64(to))
			return from, to
		}
		for range min(c.parallel, max(len(list), 1)) {
			wg.Go(func() {
				w := &worker{c: c}
				defer c.counts.add(&w.n)
				buf := make([]byte, max(c.cs, readMost))
				for {
					from, to := take()
					if from == to || c.failed() != nil {
						return
					}
					start := list[from].cluster << c.bits
					b := buf[:list[to-1].cluster<<c.bits+c.cs-start]
					n := c.read(b, start)
					for i := from; i < to; i++ {
						at := int(list[i].cluster<<c.bits - start)
						do(w, &list[i], b[at:at+int(c.cs)], min(max(n-at, 0), int(c.cs)))
					}
					c.sink.Progress(pass, done+int64(to), done+int64(len(list)))
				}
			})
		}
		wg.Wait()
		done += int64(len(list))
		return c.failed()
	})
}

// survey reads all L2 tables once and drops those that are none, and refcount
// blocks that the map claims.
func (c *check) survey() {
	var mu sync.Mutex
	var bad []tableRec
	hit := map[int64]bool{}
	err := c.eachTable(1, true, func(w *worker, rec *tableRec, b []byte, n int) {
		good, junk := c.garbage(b)
		// Damage to single entries is theirs.
		if junk > good && junk > 2 {
			mu.Lock()
			bad = append(bad, *rec)
			mu.Unlock()
			return
		}
		if len(c.suspects) > 0 {
			for i := 0; i < len(b); i += int(c.entryBytes) {
				e := be64(b[i:])
				if e&(entryCompressed|l2Reserved) == 0 && c.isSuspect(int64(e&entryOffset>>c.bits)) && e&entryOffset&uint64(c.cs-1) == 0 && e != 0 {
					mu.Lock()
					hit[int64(e&entryOffset>>c.bits)] = true
					mu.Unlock()
				}
			}
		}
		if n < len(b) {
			c.cutTable(rec, n)
		}
	})
	if err != nil {
		return
	}
	for _, s := range c.suspects {
		if hit[s] {
			c.dropBlock(s)
		}
	}
	c.suspects = nil
	for i := range bad {
		r := &bad[i]
		c.tables.bad[r.cluster] = true
		c.mapLoss.Store(true)
		loses := c.guest(int64(r.idx)*c.l2Span, c.l2Span)
		if c.report(fsck.Finding{Code: codeL1NoTable, Place: fsck.Place{Offset: c.l1Place(r), Field: fmt.Sprintf("L1 entry %d", r.idx), Value: uint64(r.cluster) << c.bits},
			Guest: loses, Text: "the cluster does not hold an L2 table", Fix: full("clear the entry", loses...)}) {
			c.clearL1(r)
			c.keep(int64(r.idx)*c.l2Span, r.cluster<<c.bits, c.cs)
		}
	}
	c.counts = counters{}
}

// keep quarantines a range of the file, as far as the file has it.
func (c *check) keep(guest, off, n int64) {
	if off >= 0 && off < c.size {
		c.planned(c.plan.Quarantine(fsck.Lost{Guest: guest, Host: off, Len: min(n, c.size-off)}))
	}
}

// cutTable reports an L2 table of which the file has only n bytes.
func (c *check) cutTable(rec *tableRec, n int) {
	first := int64(n) / c.entryBytes
	guest := int64(rec.idx)*c.l2Span + first<<c.bits
	loses := c.guest(guest, (c.l2Entries-first)<<c.bits)
	c.mapLoss.Store(true)
	if c.report(fsck.Finding{Code: codeL2Cut, Place: fsck.Place{Offset: rec.cluster << c.bits, Field: "L2 table"}, Guest: loses,
		Text: fmt.Sprintf("the file has only %d bytes of the table", n), Fix: full("make the file longer", loses...)}) {
		c.planned(c.plan.Write(fsck.PhaseNew, (rec.cluster+1)<<c.bits-1, []byte{0}))
	}
}

// worker is one of the goroutines of a walk.
type worker struct {
	c   *check
	n   counters
	src []byte
	dst []byte
	bad []badEntry
}

// walk counts the references of all L2 tables.
func (c *check) walk() error {
	return c.eachTable(2, false, func(w *worker, rec *tableRec, b []byte, _ int) { w.table(rec, b) })
}

// table counts the references of one L2 table.
func (w *worker) table(rec *tableRec, b []byte) {
	c := w.c
	active := rec.owner == 0
	w.bad = w.bad[:0]
	next := uint64(0) // host offset that would follow, for the count of fragments
	// What an entry must not have to be of the usual kind.
	odd := uint64(l2Reserved|entryCompressed|entryZero) | uint64(c.cs-1)&entryOffset
	end := uint64(c.size) &^ uint64(c.cs-1) // a last cluster that is cut off is not usual
	cs := uint64(c.cs)
	for i := 0; i < len(b); {
		e := be64(b[i:])
		if e == 0 && !c.extended {
			i += 8
			continue
		}
		off := e & entryOffset
		if e&odd != 0 || off == 0 || off >= end || c.extended || c.external {
			w.entry(rec, b, i, &next)
			i += int(c.entryBytes)
			continue
		}
		// A run of entries that name consecutive clusters with equal flags.
		j, want := i+8, e+cs
		for j < len(b) && want&entryOffset < end && be64(b[j:]) == want {
			j += 8
			want += cs
		}
		k := int64(j-i) / 8
		fl := uint8(fPlain)
		if active {
			fl |= fActive | fUncopied
			if e&entryCopied != 0 {
				fl ^= fUncopied | fCopied
			}
		}
		done := c.cells.add(int64(off>>c.bits), k, rec.weight, fl)
		if c.first && active {
			w.n.allocated += done
			if done > 0 {
				if next != 0 && next != off {
					w.n.fragmented++
				}
				next = off + uint64(done)<<c.bits
				w.n.highest = max(w.n.highest, int64(rec.idx)*c.l2Span+(int64(i/8)+done)<<c.bits)
			}
		}
		i += int(done) * 8
		if done < k {
			w.intoMetadata(rec, b, i)
			i += 8
		}
	}
	w.settle(rec, b)
}
