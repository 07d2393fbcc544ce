package main

import (
	"bytes"
	"context"
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

// The check workload (-fsck): image-fsck -n beside qemu-img check (and ploop
// check) on the same files, which fsckimage.go makes. The sides take turns.
// Nobody's time counts unless he has found the image sound, with as many
// clusters as it has, and has found what is wrong with it once it was damaged.

// Goals of the design.
const (
	fsckGoalTime = 5.0  // the peer's time by ours, at least
	fsckGoalRSS  = 0.25 // our memory by the peer's, at most
)

// fsckCase is one image.
type fsckCase struct {
	Name   string `json:"name"`
	Format string `json:"format"` // as qemu-img calls it
	// Start says that the check is hardly more than the start of the programs,
	// for which there is no goal.
	Start bool `json:"start_only,omitempty"`
	image string
	build func(path string) (fsckImage, error)
}

// fsckSample is one run of one side.
type fsckSample struct {
	Seconds float64 `json:"seconds"`
	RSS     int64   `json:"peak_rss"`
	said    string  // on stderr
}

// fsckSide is one of those who check.
type fsckSide struct {
	Peer    string       `json:"peer"`
	Command []string     `json:"command"`
	Samples []fsckSample `json:"samples"`
	Error   string       `json:"error,omitempty"`
}

// fsckResult is one case.
type fsckResult struct {
	fsckCase
	Sides []*fsckSide `json:"sides"` // ours first
	Error string      `json:"error,omitempty"`
}

type fsckBench struct {
	dir, tool string
	timer     timer
	pairs     int
	say       func(string, ...any)
}

// runFsck measures all cases and prints them.
func runFsck(ctx context.Context, o *options, dir string, say func(string, ...any)) error {
	b := &fsckBench{dir: dir, tool: filepath.Join(dir, "image-fsck"), pairs: o.pairs, say: say}
	var err error
	if b.timer, err = newTimer(dir); err != nil {
		return err
	}
	say("building image-fsck")
	if err := command(ctx, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-buildvcs=false", "-o", b.tool, "github.com/imagestack/imagestack/cmd/image-fsck"); err != nil {
		return err
	}
	var results []*fsckResult
	for _, c := range fsckCases() {
		if o.format != "" && o.format != c.Format && !(o.format == imgPloop && c.Format == "parallels") {
			continue
		}
		r := &fsckResult{fsckCase: c}
		if err := b.measure(ctx, r); err != nil {
			r.Error = err.Error()
		}
		results = append(results, r)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	doc := fsckDocument{Machine: describeMachine(ctx, ".", dir), Pairs: b.pairs, Results: results}
	if o.json == "-" {
		return printAny(os.Stdout, doc)
	}
	err = doc.print(os.Stdout)
	if o.json != "" && err == nil {
		var f *os.File
		if f, err = os.Create(o.json); err == nil {
			err = errors.Join(printAny(f, doc), f.Close())
		}
	}
	for _, r := range results {
		if r.Error != "" || len(r.Sides) > 0 && r.Sides[0].Error != "" {
			err = errors.Join(err, fmt.Errorf("%s: %s %s", r.Name, r.Error, r.Sides[0].Error))
		}
	}
	return err
}

// measure builds an image, has everybody judge it, and times them.
func (b *fsckBench) measure(ctx context.Context, r *fsckResult) (err error) {
	b.say("%s: building", r.Name)
	r.image = filepath.Join(b.dir, "check."+r.Format)
	defer func() { err = errors.Join(err, os.Remove(r.image)) }()
	img, err := r.build(r.image)
	if err != nil {
		return err
	}
	r.Sides = []*fsckSide{
		{Peer: "image-fsck", Command: []string{b.tool, "-n", r.image}},
		{Peer: "qemu-img check", Command: []string{"qemu-img", "check", "-f", r.Format, r.image}},
	}
	if _, err := exec.LookPath("ploop"); err == nil && r.Format == "parallels" {
		r.Sides = append(r.Sides, &fsckSide{Peer: "ploop check", Command: []string{"ploop", "check", "-F", r.image}})
	}
	if err := b.verdicts(ctx, r, img); err != nil {
		return err
	}
	b.say("%s: %d pairs", r.Name, b.pairs)
	for pair := range b.pairs {
		for k := range r.Sides {
			s := r.Sides[(pair+k)%len(r.Sides)]
			if s.Error != "" {
				continue
			}
			x, code, err := b.once(ctx, s.Command)
			switch {
			case ctx.Err() != nil:
				return context.Cause(ctx)
			case err != nil:
				s.Error = err.Error()
			case code != 0:
				s.Error = fmt.Sprintf("exit %d: %s", code, x.said)
			default:
				s.Samples = append(s.Samples, x)
			}
		}
	}
	return nil
}

// verdicts makes sure that everybody finds the image sound, that the two who
// say so find the same number of clusters, and that the damage is found.
func (b *fsckBench) verdicts(ctx context.Context, r *fsckResult, img fsckImage) error {
	counts := func(argv ...string) (allocated, end int64, err error) {
		out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).Output()
		var v struct {
			Allocated int64 `json:"allocated-clusters"`
			End       int64 `json:"image-end-offset"`
		}
		if err == nil {
			err = json.Unmarshal(out, &v)
		}
		return v.Allocated, v.End, err
	}
	allocated, end, err := counts(b.tool, "--compat", "qemu", "-n", "--json", r.image)
	if err != nil {
		return fmt.Errorf("image-fsck: %w", err)
	}
	theirs, theirEnd, err := counts("qemu-img", "check", "--output=json", "-f", r.Format, r.image)
	if err != nil {
		return fmt.Errorf("qemu-img check: %w", err)
	}
	if allocated != img.clusters || theirs != img.clusters && theirs != 0 || end != theirEnd {
		return fmt.Errorf("%d clusters are stored; image-fsck says %d (end %d), qemu-img check %d (end %d)", img.clusters, allocated, end, theirs, theirEnd)
	}
	f, err := os.OpenFile(r.image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	was := make([]byte, len(img.damage))
	if _, err := f.ReadAt(was, img.damageAt); err != nil {
		return err
	}
	if _, err := f.WriteAt(img.damage, img.damageAt); err != nil {
		return err
	}
	for _, s := range r.Sides {
		if _, code, err := b.once(ctx, s.Command); err != nil {
			return err
		} else if code == 0 {
			s.Error = "it does not see what is wrong with a damaged copy"
		}
	}
	_, err = f.WriteAt(was, img.damageAt)
	return err
}

// once runs a command and returns its time, its peak of memory and its exit
// status.
func (b *fsckBench) once(ctx context.Context, argv []string) (x fsckSample, code int, err error) {
	cmd := b.timer.command(ctx, argv...)
	var said bytes.Buffer
	cmd.Stderr = &said
	begin := time.Now()
	err = cmd.Run()
	x.Seconds = time.Since(begin).Seconds()
	x.said = lastLines(said.String(), 1)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code, err = exit.ExitCode(), nil
	}
	if err != nil {
		return x, code, err
	}
	x.RSS, err = b.timer.peak()
	return x, code, err
}

type fsckDocument struct {
	Machine machine       `json:"machine"`
	Pairs   int           `json:"pairs"`
	Results []*fsckResult `json:"results"`
}

func (s *fsckSide) times() (v []float64) {
	for _, x := range s.Samples {
		v = append(v, x.Seconds)
	}
	return v
}

func (s *fsckSide) memory() (v []float64) {
	for _, x := range s.Samples {
		v = append(v, float64(x.RSS))
	}
	return v
}

// print prints one row for each peer of each image.
func (d *fsckDocument) print(w io.Writer) error {
	m := d.Machine
	fmt.Fprintf(w, "%s, %d processors, %.0f GiB, Linux %s; %s; %s\n%d runs each; load average %.1f\n\n", m.CPU, m.Processors, m.MemoryGiB, m.Kernel, m.Go, m.QSD, d.Pairs, m.Load)
	fmt.Fprintln(w, "| image | peer | image-fsck s | peer s | faster: median (min–max) | goal | image-fsck MiB | peer MiB | memory | goal |\n|---|---|---|---|---|---|---|---|---|---|")
	for _, r := range d.Results {
		if r.Error != "" {
			fmt.Fprintf(w, "| %s | – | not measured: %s |||||||||\n", r.Name, strings.NewReplacer("\n", "; ", "|", "/").Replace(r.Error))
			continue
		}
		ours := r.Sides[0]
		for _, s := range r.Sides[1:] {
			if ours.Error != "" || s.Error != "" || len(s.Samples) != len(ours.Samples) {
				fmt.Fprintf(w, "| %s | %s | not measured: %s%s |||||||||\n", r.Name, s.Peer, ours.Error, s.Error)
				continue
			}
			faster := summarize(ratios(ours.times(), s.times(), true))
			memory := summarize(ours.memory()).Max / summarize(s.memory()).Max
			verdict := map[bool]string{true: "met", false: "missed"}
			goalTime := fmt.Sprintf("%.0fx %s", fsckGoalTime, verdict[faster.Median >= fsckGoalTime])
			goalRSS := fmt.Sprintf("%.2f %s", fsckGoalRSS, verdict[memory <= fsckGoalRSS])
			if r.Start {
				goalTime, goalRSS = "–", "–"
			}
			fmt.Fprintf(w, "| %s | %s | %.3f | %.3f | %.2fx (%.2f–%.2f) | %s | %.1f | %.1f | %.2f | %s |\n", r.Name, s.Peer,
				summarize(ours.times()).Median, summarize(s.times()).Median, faster.Median, faster.Min, faster.Max, goalTime,
				summarize(ours.memory()).Max/(1<<20), summarize(s.memory()).Max/(1<<20), memory, goalRSS)
		}
	}
	return nil
}
