package main

import (
	"encoding/json"
	"io"
	"time"
)

// The JSON document holds every sample, so that anything in the table can be
// worked out again. Lengths are bytes, times seconds unless the name says.

type document struct {
	Machine  machine    `json:"machine"`
	Settings settings   `json:"settings"`
	Started  time.Time  `json:"started"`
	Ended    time.Time  `json:"ended"`
	Stopped  string     `json:"stopped,omitempty"` // why the run ended early
	Lines    []lineJSON `json:"lines"`
	Memory   struct {
		Peaks map[string]int64 `json:"peak_rss"`
		Goal  int64            `json:"goal_imagestack"`
	} `json:"memory"`
}

// settings of the run.
type settings struct {
	Mode      string  `json:"mode"`
	Size      int64   `json:"size"`
	Pairs     int     `json:"pairs"`
	Runtime   float64 `json:"runtime"`
	Only      string  `json:"only,omitempty"`
	Format    string  `json:"format,omitempty"`
	Transport string  `json:"transport"`
}

type lineJSON struct {
	Key           string        `json:"key"`
	Name          string        `json:"name"`
	Image         string        `json:"image"`
	Unit          string        `json:"unit"`
	LowerIsBetter bool          `json:"lower_is_better,omitempty"`
	NotMeasured   string        `json:"not_measured,omitempty"`
	AbsoluteGoal  float64       `json:"goal_at_most,omitempty"`
	OtherLoad     float64       `json:"other_load"`
	Subjects      []subjectJSON `json:"subjects,omitempty"`
	Ratios        []ratioJSON   `json:"ratios,omitempty"`
}

type subjectJSON struct {
	Peer    string       `json:"peer"`
	Image   string       `json:"image"`
	Error   string       `json:"error,omitempty"`
	Serve   []string     `json:"serve_command,omitempty"`
	Attach  []string     `json:"attach_command,omitempty"`
	Fio     []string     `json:"fio_command,omitempty"`
	Stats   stats        `json:"stats"`
	CPU     *stats       `json:"server_cpu_per_gib,omitempty"`
	Samples []sampleJSON `json:"samples"`
}

type sampleJSON struct {
	Pair      int     `json:"pair"`
	Order     int     `json:"order"`
	Value     float64 `json:"value"`
	Bytes     int64   `json:"bytes,omitempty"`
	IOs       int64   `json:"ios,omitempty"`
	Seconds   float64 `json:"seconds,omitempty"`
	P99       float64 `json:"p99_latency_us,omitempty"`
	ServerCPU float64 `json:"server_cpu"`
	FioCPU    float64 `json:"fio_cpu,omitempty"`
	RSS       int64   `json:"server_peak_rss,omitempty"`
	Other     float64 `json:"other_load"`
	Steal     float64 `json:"steal"`
	Load      float64 `json:"load_average"`
}

type ratioJSON struct {
	Peer  string  `json:"peer"`
	Image string  `json:"image"`
	Stats stats   `json:"ratio"`
	Goal  float64 `json:"goal,omitempty"`
	Met   *bool   `json:"met,omitempty"`
}

func newLineJSON(r *lineResult, pairs int) lineJSON {
	l := lineJSON{
		Key: r.key(), Name: r.name, Image: r.image, Unit: r.unit(), LowerIsBetter: r.lowerIsBetter(),
		NotMeasured: r.reason, AbsoluteGoal: r.absGoal, OtherLoad: r.mostOther(),
	}
	for _, s := range r.subjects {
		j := subjectJSON{
			Peer: s.peer, Image: s.image, Serve: s.serve, Attach: s.attach, Fio: s.fio, Stats: s.stats(),
			Samples: []sampleJSON{},
		}
		if s.err != nil {
			j.Error = s.err.Error()
		}
		if c, ok := s.cpuPerGiB(); ok {
			j.CPU = &c
		}
		for _, x := range s.samples {
			j.Samples = append(j.Samples, sampleJSON{
				Pair: x.pair, Order: x.order, Value: x.value, Bytes: x.result.bytes, IOs: x.result.ios,
				Seconds: x.result.seconds, P99: x.result.p99, ServerCPU: x.serverCPU.Seconds(),
				FioCPU: x.result.cpu.Seconds(), RSS: x.rss, Other: x.other, Steal: x.steal, Load: x.load,
			})
		}
		l.Subjects = append(l.Subjects, j)
	}
	for _, c := range r.compare(pairs) {
		j := ratioJSON{Peer: c.with.peer, Image: c.with.image, Stats: c.stats, Goal: c.goal}
		if c.goal > 0 && c.stats.N > 0 {
			met := c.stats.Median >= c.goal
			j.Met = &met
		}
		l.Ratios = append(l.Ratios, j)
	}
	return l
}

// printJSON writes the document.
func printJSON(w io.Writer, d *document, results []*lineResult) error {
	d.Lines = []lineJSON{}
	for _, r := range results {
		d.Lines = append(d.Lines, newLineJSON(r, d.Settings.Pairs))
	}
	d.Memory.Peaks, d.Memory.Goal = peakOf(results), rssGoal
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(d)
}
