package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// comparison is imagestack beside another subject of a line.
type comparison struct {
	with  *subject
	stats stats   // of the ratios of the pairs; above 1 imagestack is better
	goal  float64 // 0: none
}

// compare pairs imagestack with every other subject.
func (r *lineResult) compare(pairs int) []comparison {
	if len(r.subjects) == 0 {
		return nil
	}
	ours := r.subjects[0]
	var out []comparison
	for _, s := range r.subjects[1:] {
		c := comparison{with: s}
		switch s.peer {
		case peerQSD:
			c.goal = r.goal
		case peerOurs:
			c.goal = r.selfTo
		case peerBare:
			c.goal = r.bareGoal
		}
		c.stats = summarize(ratios(ours.values(pairs), s.values(pairs), r.lowerIsBetter()))
		out = append(out, c)
	}
	return out
}

// cpuPerGiB is the processor time of the server for each GiB moved, in
// seconds; false when it was not measured.
func (s *subject) cpuPerGiB() (stats, bool) {
	var v []float64
	for _, x := range s.samples {
		if x.result.bytes > 0 {
			v = append(v, x.serverCPU.Seconds()*(1<<30)/float64(x.result.bytes))
		}
	}
	return summarize(v), len(v) > 0 && s.serve != nil
}

func (s *subject) peakRSS() int64 {
	var m int64
	for _, x := range s.samples {
		m = max(m, x.rss)
	}
	return m
}

// figure in about three digits.
func figure(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (s *subject) cell() string {
	if len(s.samples) == 0 {
		return "–"
	}
	return figure(s.stats().Median)
}

func ratioCell(s stats) string {
	if s.N == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2fx (%.2f–%.2f)", s.Median, s.Min, s.Max)
}

func goalCell(goal float64, s stats) string {
	switch {
	case goal == 0:
		return "–"
	case s.N == 0:
		return fmt.Sprintf("%.2fx", goal)
	case s.Median >= goal:
		return fmt.Sprintf("%.2fx met", goal)
	}
	return fmt.Sprintf("%.2fx missed", goal)
}

// brief is a line's outcome in one row, for the progress on stderr.
func (r *lineResult) brief() string {
	if r.reason != "" {
		return "not measured: " + r.reason
	}
	var parts []string
	for _, s := range r.subjects {
		if s.err != nil {
			parts = append(parts, fmt.Sprintf("%s: %v", s.peer, s.err))
		} else {
			parts = append(parts, fmt.Sprintf("%s %s", s.peer, s.cell()))
		}
	}
	return fmt.Sprintf("%s %s (%.1f s)", strings.Join(parts, ", "), r.unit(), r.took.Seconds())
}

// notes that a line needs to be read rightly.
func (r *lineResult) notes(pairs int) string {
	var n []string
	for _, c := range r.compare(pairs) {
		if c.with.peer == peerOurs {
			n = append(n, fmt.Sprintf("%s of own %s: %s", ratioCell(c.stats), c.with.image, goalCell(c.goal, c.stats)))
		}
	}
	if r.absGoal > 0 && len(r.subjects) > 0 && len(r.subjects[0].samples) > 0 {
		verdict := "missed"
		if r.subjects[0].stats().Median <= r.absGoal {
			verdict = "met"
		}
		n = append(n, fmt.Sprintf("goal at most %s %s: %s", figure(r.absGoal), r.unit(), verdict))
	}
	for _, s := range r.subjects {
		switch {
		case s.err != nil && len(s.samples) == 0:
			n = append(n, fmt.Sprintf("%s not measured: %v", s.peer, s.err))
		case s.err != nil:
			n = append(n, fmt.Sprintf("%s gave up after %d samples: %v", s.peer, len(s.samples), s.err))
		}
	}
	if other := r.mostOther(); other > otherLoadLimit {
		n = append(n, fmt.Sprintf("other load %.0f %%", other*100))
	}
	return strings.NewReplacer("\n", "; ", "|", "/").Replace(strings.Join(n, "; "))
}

// printTable prints one Markdown table for each image, and one about the
// servers.
func printTable(w io.Writer, results []*lineResult, pairs int) error {
	for i, r := range results {
		if i == 0 || results[i-1].image != r.image {
			fmt.Fprintf(w, "\n### %s\n\n", r.image)
			fmt.Fprintln(w, "| workload | unit | imagestack | qemu-storage-daemon | bare file | vs qsd: median (min–max) | goal | vs bare | server CPU s/GiB: ours / qsd | notes |")
			fmt.Fprintln(w, "|---|---|---|---|---|---|---|---|---|---|")
		}
		if r.reason != "" {
			fmt.Fprintf(w, "| %s | %s | – | – | – | – | %s | – | – | not measured: %s |\n", r.name, r.unit(), goalCell(r.goal, stats{}), r.reason)
			continue
		}
		cells := map[string]string{}
		for _, s := range []string{peerOurs, peerQSD, peerBare} {
			cells[s] = "–"
		}
		var vsQSD, vsBare stats
		bare := ""
		for _, c := range r.compare(pairs) {
			switch c.with.peer {
			case peerQSD:
				vsQSD = c.stats
			case peerBare:
				vsBare = c.stats
				if c.goal > 0 {
					bare = "; goal " + goalCell(c.goal, c.stats)
				}
			}
		}
		for _, s := range r.subjects {
			if s.image == r.image || s.peer == peerBare {
				cells[s.peer] = s.cell()
			}
		}
		cpu := "–"
		if r.kind == kindFio {
			cpu = cpuCell(r.find(peerOurs, r.image)) + " / " + cpuCell(r.find(peerQSD, r.image))
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", r.name, r.unit(), cells[peerOurs], cells[peerQSD],
			cells[peerBare], ratioCell(vsQSD), goalCell(r.goal, vsQSD), ratioCell(vsBare)+bare, cpu, r.notes(pairs))
	}
	return printServers(w, results, pairs)
}

func cpuCell(s *subject) string {
	if s == nil {
		return "–"
	}
	c, ok := s.cpuPerGiB()
	if !ok {
		return "–"
	}
	return figure(c.Median)
}

const (
	cpuGoal = 2.0                    // half of the peer's
	rssGoal = int64(64<<20) + 64<<20 // metadata budget and 64 MiB
)

// printServers prints what the servers cost: the processor for a sequential
// read, and the memory of all lines.
func printServers(w io.Writer, results []*lineResult, pairs int) error {
	fmt.Fprintf(w, "\n### servers\n\n")
	fmt.Fprintln(w, "| what | imagestack | qemu-storage-daemon | ratio | goal |")
	fmt.Fprintln(w, "|---|---|---|---|---|")
	for _, r := range results {
		if r.job != "seqread-1m" || r.loop || r.cold {
			continue
		}
		ours, qsd := r.find(peerOurs, r.image), r.find(peerQSD, r.image)
		if ours == nil || qsd == nil {
			continue
		}
		s := summarize(ratios(ours.cpuByPair(pairs), qsd.cpuByPair(pairs), true))
		fmt.Fprintf(w, "| server CPU, seq read of %s, s/GiB | %s | %s | %s | %s |\n", r.image, cpuCell(ours), cpuCell(qsd), ratioCell(s), goalCell(cpuGoal, s))
	}
	peak := peakOf(results)
	verdict := "–"
	if peak[peerOurs] > 0 {
		verdict = map[bool]string{true: "met", false: "missed"}[peak[peerOurs] <= rssGoal]
	}
	mib := func(n int64) string {
		if n == 0 {
			return "–"
		}
		return fmt.Sprintf("%.0f", float64(n)/(1<<20))
	}
	_, err := fmt.Fprintf(w, "| largest resident memory, all lines, MiB | %s | %s | – | at most %s MiB %s |\n", mib(peak[peerOurs]), mib(peak[peerQSD]), mib(rssGoal), verdict)
	return err
}

func (s *subject) cpuByPair(pairs int) []float64 {
	v := make([]float64, pairs)
	for _, x := range s.samples {
		if x.result.bytes > 0 {
			v[x.pair] = x.serverCPU.Seconds() / float64(x.result.bytes)
		}
	}
	return v
}

func peakOf(results []*lineResult) map[string]int64 {
	peak := map[string]int64{}
	for _, r := range results {
		for _, s := range r.subjects {
			peak[s.peer] = max(peak[s.peer], s.peakRSS())
		}
	}
	return peak
}

// printCommands prints how every subject was served and measured.
func printCommands(w io.Writer, results []*lineResult) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range results {
		fmt.Fprintf(tw, "%s\n", r.key())
		for _, s := range r.subjects {
			for _, c := range []struct {
				what string
				argv []string
			}{{"serve", s.serve}, {"attach", s.attach}, {"fio", s.fio}} {
				if c.argv != nil {
					fmt.Fprintf(tw, "  %s\t%s\t%s\n", s.peer, c.what, strings.Join(c.argv, " "))
				}
			}
		}
	}
	return tw.Flush()
}
