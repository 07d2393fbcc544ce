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
	readMost = 256 << 10
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
	return c.eachBatch(report, func(list []tableRec, _ bool) error {
		n := tablesIn(list)
		err := c.readTables(list, do, func(to int64) { c.sink.Progress(pass, done+to, done+n) })
		done += n
		return err
	})
}

// readTables reads tables. Those that are holes have no entries and are left
// out, as many at a time as lie in the hole.
func (c *check) readTables(list []tableRec, do func(w *worker, rec *tableRec, b []byte, n int), progress func(to int64)) error {
	at := func(t *tableRec) int64 { return t.cluster << c.bits }
	var mu sync.Mutex
	i, k := 0, int64(0) // the next one is table k of run i
	passed := int64(0)
	data := int64(0) // where the last hole ends
	// take adds tables that are read at once to recs, which is empty.
	take := func(recs []tableRec) ([]tableRec, int64) {
		mu.Lock()
		defer mu.Unlock()
		for ; i < len(list); i, k = i+1, 0 {
			for k < list[i].n() {
				t := list[i].table(k)
				n := len(recs)
				switch off := at(&t); {
				case n == 0 && off+c.cs <= c.size:
					if data <= off {
						data = c.dataAt(off)
					}
					if hole := min((min(data, c.size)-off)>>c.bits, list[i].n()-k); hole > 0 {
						k, passed = k+hole, passed+hole
						continue
					}
				case n > 0 && (off+c.cs-at(&recs[0]) > readMost || off-at(&recs[n-1])-c.cs > readGap):
					return recs, passed
				}
				recs = append(recs, t)
				k, passed = k+1, passed+1
			}
		}
		return recs, passed
	}
	workers := int(max(1, min(int64(c.parallel), tablesIn(list)*c.cs/readMost)))
	work := func() {
		w := &worker{c: c}
		defer c.counts.add(&w.n)
		var buf []byte
		var recs []tableRec
		for {
			var to int64
			recs, to = take(recs[:0])
			if len(recs) == 0 || c.failed() != nil {
				return
			}
			start, end := at(&recs[0]), at(&recs[len(recs)-1])+c.cs
			if n := int(end - start); cap(buf) < n {
				buf = make([]byte, n)
			}
			b := buf[:end-start]
			n := c.read(b, start)
			for i := range recs {
				k := int(at(&recs[i]) - start)
				do(w, &recs[i], b[k:k+int(c.cs)], min(max(n-k, 0), int(c.cs)))
			}
			progress(to)
		}
	}
	var wg sync.WaitGroup
	for range workers - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return c.failed()
}

// survey reads all L2 tables once and drops those that are none, and refcount
// blocks that the map claims. Where nothing of that is to be done, and no entry
// is wrong, it has counted the references of the first window by the way, and
// returns true.
func (c *check) survey() (counted bool) {
	var mu sync.Mutex
	var bad []tableRec
	hit := map[int64]bool{}
	look := func(_ *worker, rec *tableRec, b []byte, n int) {
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
	}
	err := c.eachBatch(true, func(list []tableRec, whole bool) error {
		if counted = whole && c.quick(); counted {
			return nil
		}
		c.suspect()
		n := tablesIn(list)
		return c.readTables(list, look, func(to int64) { c.sink.Progress(1, to, n) })
	})
	if err != nil || counted {
		c.suspects = nil
		return counted && err == nil
	}
	for _, s := range c.suspects {
		if hit[s] {
			c.dropBlock(s)
		}
	}
	c.suspects = nil
	c.tables.drop(bad)
	clear := map[int64]clearing{}
	for i := range bad {
		r := &bad[i]
		c.mapLoss.Store(true)
		loses := c.guest(int64(r.idx)*c.l2Span, c.l2Span)
		if c.report(fsck.Finding{Code: codeL1NoTable, Place: fsck.Place{Offset: c.l1Place(r), Field: fmt.Sprintf("L1 entry %d", r.idx), Value: uint64(r.cluster) << c.bits},
			Guest: loses, Text: "the cluster does not hold an L2 table", Fix: full("clear the entry", loses...)}) {
			clear[r.cluster] = clearing{drop: []uint32{r.idx}, known: []uint32{r.idx}}
			c.keep(int64(r.idx)*c.l2Span, r.cluster<<c.bits, c.cs)
		}
	}
	c.clearL1(clear)
	c.counts = counters{}
	return false
}

// quick counts the references of the first window and reports whether nothing
// in the tables is worth a second look. It has no findings.
func (c *check) quick() bool {
	if c.begin(0) != nil {
		return false
	}
	var again atomic.Bool
	n := tablesIn(c.tables.whole)
	err := c.readTables(c.tables.whole, func(w *worker, rec *tableRec, b []byte, n int) {
		if n < len(b) || again.Load() {
			again.Store(true)
			return
		}
		if w.count1(rec, b); len(w.bad) > 0 {
			again.Store(true)
		}
	}, func(to int64) { c.sink.Progress(1, to, n) })
	return err == nil && !again.Load()
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
		c.growTo((rec.cluster + 1) << c.bits)
	}
}

// growTo makes the file at least n bytes long, without a change of bytes that a
// copy may need.
func (c *check) growTo(n int64) {
	c.failMu.Lock()
	size, err := c.plan.Size()
	if err == nil && size < n {
		err = c.plan.SetSize(n)
	}
	c.failMu.Unlock()
	c.planned(err)
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
	return c.eachTable(2, false, func(w *worker, rec *tableRec, b []byte, _ int) {
		w.count1(rec, b)
		w.settle(rec, b)
	})
}

// count1 counts the references of one L2 table and collects in w.bad what is
// wrong.
func (w *worker) count1(rec *tableRec, b []byte) {
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
}
