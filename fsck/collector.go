package fsck

import (
	"cmp"
	"slices"
	"sync"
)

// DefaultDetails is how many findings of each code are kept with all details.
const DefaultDetails = 100

// Decide says whether the fix of a finding is wanted. It is called only for
// findings that have one.
type Decide func(Finding) bool

// DecideNo wants nothing (-n).
func DecideNo(Finding) bool { return false }

// DecidePreen wants the fixes that lose nothing (-p).
func DecidePreen(f Finding) bool { return f.lossless() }

// DecideAll wants every fix (-y).
func DecideAll(Finding) bool { return true }

// CollectorOptions say what a Collector does with findings.
type CollectorOptions struct {
	// File is what Place.File is set to where it is "".
	File string
	// Decide answers for fixes; nil is DecideNo. Calls come one at a time.
	Decide Decide
	// Details is how many findings per code are kept, 0 for DefaultDetails.
	Details int
	// OnProgress is told of progress, if it is not nil. Calls come one at a
	// time.
	OnProgress func(pass int, done, total int64)
}

// Collector is a Sink that counts exactly and keeps a bounded number of
// details.
type Collector struct {
	o      CollectorOptions
	mu     sync.Mutex
	prog   sync.Mutex
	counts map[*Code]*Count
	found  []Detail
}

// NewCollector returns an empty Collector.
func NewCollector(o CollectorOptions) *Collector {
	if o.Details <= 0 {
		o.Details = DefaultDetails
	}
	return &Collector{o: o, counts: map[*Code]*Count{}}
}

// Report implements Sink.
func (c *Collector) Report(f Finding) bool {
	if f.Place.File == "" {
		f.Place.File = c.o.File
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	wanted := f.Fix != nil && c.o.Decide != nil && c.o.Decide(f)
	n := c.counts[f.Code]
	if n == nil {
		n = &Count{Code: f.Code}
		c.counts[f.Code] = n
	}
	n.Found++
	n.sev[f.Sev()].found++
	if wanted {
		n.Fixed++
		n.sev[f.Sev()].fixed++
	}
	if n.Found <= int64(c.o.Details) {
		c.found = append(c.found, Detail{Finding: f, Fixed: wanted})
	}
	return wanted
}

// Progress implements Sink.
func (c *Collector) Progress(pass int, done, total int64) {
	if c.o.OnProgress != nil {
		c.prog.Lock()
		defer c.prog.Unlock()
		c.o.OnProgress(pass, done, total)
	}
}

// Count says how often a code was found.
type Count struct {
	Code *Code
	// Found are all findings, Fixed those whose fix was wanted.
	Found, Fixed int64
	sev          [Fatal + 1]struct{ found, fixed int64 }
}

// Detail is one finding with what was decided.
type Detail struct {
	Finding
	Fixed bool // its fix was wanted
}

// Report is what a check of one file found.
type Report struct {
	File  string
	Stats Stats
	// Counts are exact, the worst codes first.
	Counts []Count
	// Findings are the first of each code, by severity and place.
	Findings []Detail
}

// Sum is the report on what was collected so far.
func (c *Collector) Sum(stats Stats) *Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := &Report{File: c.o.File, Stats: stats, Findings: slices.Clone(c.found)}
	for _, n := range c.counts {
		r.Counts = append(r.Counts, *n)
	}
	r.sort()
	return r
}

// Tally is the number of findings of a severity, and how many of these are or
// will be fixed.
func (r *Report) Tally(s Severity) (found, fixed int64) {
	for i := range r.Counts {
		found += r.Counts[i].sev[s].found
		fixed += r.Counts[i].sev[s].fixed
	}
	return found, fixed
}

// Worst is the worst severity found, 0 for none. A report whose Worst is at
// most Note is clean.
func (r *Report) Worst() Severity {
	for s := Fatal; s >= Note; s-- {
		if n, _ := r.Tally(s); n > 0 {
			return s
		}
	}
	return 0
}

// Remaining is the worst severity among the findings that are not fixed.
func (r *Report) Remaining() Severity {
	for s := Fatal; s >= Note; s-- {
		if n, fixed := r.Tally(s); n > fixed {
			return s
		}
	}
	return 0
}

// More is how many findings of the code are not among Findings.
func (r *Report) More(code *Code) int64 {
	var all, kept int64
	for i := range r.Counts {
		if r.Counts[i].Code == code {
			all = r.Counts[i].Found
		}
	}
	for i := range r.Findings {
		if r.Findings[i].Code == code {
			kept++
		}
	}
	return all - kept
}

// sort brings the report into its order, whatever order findings came in.
func (r *Report) sort() {
	slices.SortFunc(r.Counts, func(a, b Count) int {
		return cmp.Or(cmp.Compare(b.Code.Severity, a.Code.Severity), cmp.Compare(a.Code.Name, b.Code.Name))
	})
	slices.SortStableFunc(r.Findings, func(a, b Detail) int {
		return cmp.Or(cmp.Compare(b.Sev(), a.Sev()), cmp.Compare(a.Place.File, b.Place.File),
			cmp.Compare(a.Place.Offset, b.Place.Offset), cmp.Compare(a.Code.Name, b.Code.Name))
	})
}
