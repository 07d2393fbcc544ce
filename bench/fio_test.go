package main

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const readAnswer = `fio: some warning
{
  "fio version" : "fio-3.33",
  "jobs" : [ {
    "jobname" : "randread", "error" : 0,
    "read" : { "io_bytes" : 1048576, "total_ios" : 256, "runtime" : 500, "clat_ns" : { "percentile" : { "99.000000" : 30080 } } },
    "write" : { "io_bytes" : 0, "total_ios" : 0, "runtime" : 0 }
  } ]
}`

func TestParseFio(t *testing.T) {
	r, err := parseFio([]byte(readAnswer))
	if err != nil {
		t.Fatal(err)
	}
	if r.mibPerSecond() != 2 || r.iops() != 512 || r.p99 != 30.08 {
		t.Errorf("got %v MiB/s, %v IOPS, p99 %v us; want 2, 512, 30.08", r.mibPerSecond(), r.iops(), r.p99)
	}
	swap := strings.NewReplacer(`"read"`, `"write"`, `"write"`, `"read"`).Replace(readAnswer)
	if r, err = parseFio([]byte(swap)); err != nil || r.bytes != 1048576 {
		t.Errorf("of a writer: %+v, %v", r, err)
	}
	for what, bad := range map[string]string{
		"nothing":         "",
		"no document":     "fio: failed",
		"cut off":         readAnswer[:200],
		"an error":        strings.Replace(readAnswer, `"error" : 0`, `"error" : 5`, 1),
		"no time":         strings.Replace(readAnswer, `"runtime" : 500`, `"runtime" : 0`, 1),
		"no bytes":        strings.Replace(readAnswer, `"io_bytes" : 1048576`, `"io_bytes" : 0`, 1),
		"both directions": strings.Replace(readAnswer, `"io_bytes" : 0`, `"io_bytes" : 1`, 1),
		"no job":          `{"jobs":[]}`,
	} {
		if r, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%s: got the figure %+v", what, r)
		}
	}
}

func TestFioCommand(t *testing.T) {
	r := fioRun{job: "bufread", file: "/x/disk.raw", size: 8192, runtime: 300 * time.Millisecond, invalidate: true}
	env, argv := r.command("/jobs")
	want := []string{"BENCH_FILE=/x/disk.raw", "BENCH_SIZE=8192", "BENCH_RUNTIME=300ms", "BENCH_DIRECT=0", "BENCH_INVALIDATE=1"}
	if !slices.Equal(env, want) || argv[len(argv)-1] != "/jobs/bufread.fio" {
		t.Errorf("got %v %v", env, argv)
	}
}

// Whatever a job file refers to must be in the environment of some run, or fio
// would read an empty value.
func TestJobFiles(t *testing.T) {
	env, _ := (&fioRun{iolog: "x"}).command("")
	var known []string
	for _, e := range env {
		k, _, _ := strings.Cut(e, "=")
		known = append(known, k)
	}
	entries, err := jobFiles.ReadDir("jobs")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := jobFiles.ReadFile("jobs/" + e.Name())
		if err != nil {
			t.Fatal(err)
		}
		var jobs int
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, ";") {
				continue
			}
			if strings.HasPrefix(line, "[") {
				jobs++
			}
			if _, v, ok := strings.Cut(line, "${"); ok {
				v, _, _ = strings.Cut(v, "}")
				if !slices.Contains(known, v) {
					t.Errorf("%s: %s is never set", e.Name(), v)
				}
			}
		}
		if jobs != 1 {
			t.Errorf("%s has %d jobs, want 1", e.Name(), jobs)
		}
	}
}

func TestWriteIOLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := writeIOLog(path, "/disk", 64*200, 64, 100); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	ascending := true
	var last int64
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 4 && f[1] == "write" {
			if seen[f[2]] {
				t.Errorf("offset %s twice: its second write would meet a mapped cluster", f[2])
			}
			seen[f[2]] = true
			off, err := strconv.ParseInt(f[2], 10, 64)
			if err != nil || off%64 != 0 || f[3] != "4096" {
				t.Errorf("line %q, %v", line, err)
			}
			ascending = ascending && off >= last
			last = off
		}
	}
	if len(seen) != 100 || ascending {
		t.Errorf("%d offsets, ascending %v; want 100 in a random order", len(seen), ascending)
	}
}
