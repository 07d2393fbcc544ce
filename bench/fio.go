package main

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

//go:embed jobs/*.fio
var jobFiles embed.FS

// fioRun is one run of one job file.
type fioRun struct {
	job        string // name in jobs/, without .fio
	file       string
	size       int64
	runtime    time.Duration
	direct     bool
	invalidate bool   // drop the page cache of file first
	iolog      string // list of accesses, for the jobs that replay one
}

// fioResult is what the benchmark needs of fio's answer.
type fioResult struct {
	bytes   int64
	ios     int64
	seconds float64
	p99     float64       // microseconds, 99th percentile of the completion latency
	cpu     time.Duration // of fio itself
}

func (r *fioResult) mibPerSecond() float64 { return float64(r.bytes) / r.seconds / (1 << 20) }
func (r *fioResult) iops() float64         { return float64(r.ios) / r.seconds }

// command is the command line, the environment that the job file refers to
// first.
func (r *fioRun) command(dir string) (env, argv []string) {
	flag := map[bool]string{true: "1", false: "0"}
	env = []string{
		"BENCH_FILE=" + r.file,
		fmt.Sprintf("BENCH_SIZE=%d", r.size),
		fmt.Sprintf("BENCH_RUNTIME=%dms", r.runtime.Milliseconds()),
		"BENCH_DIRECT=" + flag[r.direct],
		"BENCH_INVALIDATE=" + flag[r.invalidate],
	}
	if r.iolog != "" {
		env = append(env, "BENCH_IOLOG="+r.iolog)
	}
	return env, []string{"fio", "--output-format=json", "--eta=never", filepath.Join(dir, r.job+".fio")}
}

// unpackJobs writes the job files to a directory for fio to read.
func unpackJobs(dir string) error {
	entries, err := jobFiles.ReadDir("jobs")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, e := range entries {
		b, err := jobFiles.ReadFile("jobs/" + e.Name())
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, e.Name()), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// run runs fio and reads its answer.
func (r *fioRun) run(ctx context.Context, jobDir string) (*fioResult, error) {
	env, argv := r.command(jobDir)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Dir = jobDir // fio may leave state files
	detach(cmd)
	// Three times what it should take, and a minute for a slow disk.
	limit := time.AfterFunc(3*r.runtime+time.Minute, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("fio %s: %w: %s", r.job, err, lastLines(stderr.String()+fioMessages(out), 3))
	}
	res, err := parseFio(out)
	if err != nil {
		return nil, fmt.Errorf("fio %s: %w", r.job, err)
	}
	res.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return res, nil
}

// fioMessages is what fio prints among or before its JSON when things go wrong.
func fioMessages(out []byte) string {
	s, _, _ := strings.Cut(string(out), "{")
	return s
}

// fioOutput is the part of fio's JSON that is read.
type fioOutput struct {
	Jobs []struct {
		Name  string  `json:"jobname"`
		Error int     `json:"error"`
		Read  fioSide `json:"read"`
		Write fioSide `json:"write"`
	} `json:"jobs"`
}

type fioSide struct {
	Bytes   int64 `json:"io_bytes"`
	IOs     int64 `json:"total_ios"`
	Runtime int64 `json:"runtime"` // milliseconds
	Latency struct {
		Percentile map[string]float64 `json:"percentile"` // nanoseconds
	} `json:"clat_ns"`
}

// parseFio reads the answer of one job (with all its threads as one group).
// Nothing done, or in no time, is an error: there is no figure in it.
func parseFio(out []byte) (*fioResult, error) {
	// Warnings may come before the document.
	if i := strings.IndexByte(string(out), '{'); i > 0 {
		out = out[i:]
	}
	var o fioOutput
	if err := json.NewDecoder(strings.NewReader(string(out))).Decode(&o); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("no JSON document")
		}
		return nil, fmt.Errorf("its answer: %w", err)
	}
	if len(o.Jobs) != 1 {
		return nil, fmt.Errorf("its answer has %d jobs, want 1", len(o.Jobs))
	}
	job := &o.Jobs[0]
	if job.Error != 0 {
		return nil, fmt.Errorf("job %s: error %d", job.Name, job.Error)
	}
	side := &job.Read
	switch {
	case job.Read.Bytes > 0 && job.Write.Bytes > 0:
		return nil, fmt.Errorf("job %s both read and wrote", job.Name)
	case job.Write.Bytes > 0:
		side = &job.Write
	}
	if side.Bytes <= 0 || side.IOs <= 0 || side.Runtime <= 0 {
		return nil, fmt.Errorf("job %s: %d bytes, %d requests in %d ms: nothing measured", job.Name, side.Bytes, side.IOs, side.Runtime)
	}
	return &fioResult{
		bytes: side.Bytes, ios: side.IOs, seconds: float64(side.Runtime) / 1000,
		p99: side.Latency.Percentile["99.000000"] / 1000,
	}, nil
}

// writeIOLog lists one write of 4 KiB to each run of stride bytes, or to as many
// of them as most says, in a random order that is the same each time.
func writeIOLog(path, file string, size, stride, most int64) error {
	n := size / stride
	order := make([]int64, n)
	for i := range order {
		order[i] = int64(i)
	}
	for i := n - 1; i > 0; i-- {
		j := int64(mix(uint64(i)+0x5eed) % uint64(i+1))
		order[i], order[j] = order[j], order[i]
	}
	var b strings.Builder
	fmt.Fprintf(&b, "fio version 2 iolog\n%s add\n%s open\n", file, file)
	for _, c := range order[:min(n, most)] {
		fmt.Fprintf(&b, "%s write %d 4096\n", file, c*stride)
	}
	fmt.Fprintf(&b, "%s close\n", file)
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

// lastLines of a message, for an error.
func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}
