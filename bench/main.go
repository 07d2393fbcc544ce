// Command bench measures imagestack beside what a user would pick instead:
// qemu-storage-daemon's FUSE export of the same image, and the bare file.
//
// Design note. A line of the table is one fio job (jobs/) on one image. Those
// who are compared take turns inside one line (A B C, B C A, …), so that what
// the machine does otherwise hits all of them; a pair of neighbouring runs
// gives one ratio, and the table shows the median ratio with its spread. A
// figure that is not such a ratio is never compared with one of another run.
// Nobody is timed before the bytes that it shows or writes were compared with
// what they should be (verify.go). What cannot be measured is a row that says
// why. See README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/imagestack/imagestack/internal/cli"
)

// options of the command line.
type options struct {
	quick, full bool
	size        int64
	pairs       int
	runtime     time.Duration
	only        string
	format      string
	json        string
	dir         string
	mountImage  string
	transport   string
	list        bool
	compact     bool
	fsck        bool
	verbose     bool
}

func parseOptions(args []string) (*options, error) {
	var o options
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.BoolVar(&o.quick, "quick", false, "a choice of lines, little data, under 3 minutes")
	f.BoolVar(&o.full, "full", false, "all lines (the default)")
	f.Func("size", "of the disk, such as 1G (default 4G, quick 256M)", func(s string) (err error) {
		o.size, err = cli.ParseSize(s)
		return err
	})
	f.IntVar(&o.pairs, "pairs", 0, "runs of each side per line (default 5, quick 3)")
	f.DurationVar(&o.runtime, "runtime", 0, "of one run (default 3s, quick 300ms)")
	f.StringVar(&o.only, "only", "", "only lines whose key matches this regular expression; see -list")
	f.StringVar(&o.format, "format", "", "only lines on this image: "+strings.Join(imageNames(), ", "))
	f.StringVar(&o.json, "json", "", "write everything to this file as JSON, - for stdout instead of the table")
	f.StringVar(&o.dir, "dir", "/var/tmp", "where the images are made; a real disk, for the cold lines")
	f.StringVar(&o.mountImage, "mount-image", "", "measure this binary and not one built from the source tree")
	f.StringVar(&o.transport, "transport", "auto", "of mount-image: auto, dev or uring; root switches io_uring on for the time of the run")
	f.BoolVar(&o.list, "list", false, "print the keys of the lines that would be measured")
	f.BoolVar(&o.fsck, "fsck", false, "measure image-fsck beside qemu-img check and ploop check instead")
	f.BoolVar(&o.compact, "compact", false, "measure image-compact beside qemu-img convert instead")
	f.BoolVar(&o.verbose, "v", false, "also print the commands")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	switch o.transport {
	case "auto", "dev", "uring":
	default:
		return nil, fmt.Errorf("-transport %q: want auto, dev or uring", o.transport)
	}
	if o.quick && o.full {
		return nil, errors.New("-quick and -full exclude each other")
	}
	size, pairs, runtime := int64(4<<30), 5, 3*time.Second
	if o.quick {
		size, pairs, runtime = 256<<20, 3, 300*time.Millisecond
	}
	if o.size == 0 {
		o.size = size
	}
	if o.pairs == 0 {
		o.pairs = pairs
	}
	if o.runtime == 0 {
		o.runtime = runtime
	}
	if o.size < 64<<20 || o.size%(1<<20) != 0 {
		return nil, fmt.Errorf("-size %d: want whole MiB, 64 or more", o.size)
	}
	if o.pairs < 1 || o.runtime < 50*time.Millisecond {
		return nil, errors.New("want at least one pair and 50ms per run")
	}
	if strings.ContainsAny(o.dir, ":,=\n") {
		return nil, fmt.Errorf("-dir %q: fio and qemu need a name without : , =", o.dir)
	}
	return &o, nil
}

func imageNames() []string {
	var names []string
	seen := map[string]bool{}
	for _, l := range allLines() {
		if !seen[l.image] {
			names = append(names, l.image)
		}
		seen[l.image] = true
	}
	return names
}

// choose picks the lines that the options ask for.
func (o *options) choose() ([]line, error) {
	only, err := regexp.Compile(o.only)
	if err != nil {
		return nil, fmt.Errorf("-only: %w", err)
	}
	var lines []line
	for _, l := range allLines() {
		if (o.format == "" || l.image == o.format) && only.MatchString(l.key()) && (!o.quick || l.quick || o.only != "") {
			lines = append(lines, l)
		}
	}
	if len(lines) == 0 {
		return nil, errors.New("no line is left; see -list")
	}
	return lines, nil
}

func main() {
	begin := time.Now()
	o, err := parseOptions(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer cancel()
	if err := run(ctx, o, begin); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		if ctx.Err() != nil {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

// quickLimit keeps the quick run, with all its building, under 3 minutes.
const quickLimit = 165 * time.Second

func run(ctx context.Context, o *options, begin time.Time) (err error) {
	lines, err := o.choose()
	if err != nil {
		return err
	}
	if o.list {
		for _, l := range lines {
			fmt.Println(l.key())
		}
		return nil
	}
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1fs "+format+"\n", append([]any{time.Since(begin).Seconds()}, args...)...)
	}
	var cleanup cleaner
	defer func() { err = errors.Join(err, cleanup.run()) }()
	if err := sweep(o.dir, say); err != nil {
		say("cleaning up after an earlier run: %v", err)
	}
	dir, err := scratch(&cleanup, o.dir)
	if err != nil {
		return err
	}
	if o.compact {
		return runCompact(ctx, o, dir, &cleanup, say)
	}
	if o.fsck {
		return runFsck(ctx, o, dir, say)
	}
	r, err := newRunner(ctx, o, dir, &cleanup, say)
	if err != nil {
		return err
	}
	if o.quick {
		r.deadline = begin.Add(quickLimit)
	}
	transport, err := switchURing(o.transport, &cleanup)
	if err != nil {
		return err
	}
	var total time.Duration
	for i := range lines {
		total += r.estimate(&lines[i])
	}
	say("%d lines, about %v and the building of the images", len(lines), total.Round(time.Second))

	doc := &document{
		Machine: describeMachine(ctx, ".", dir), Started: time.Now(),
		Settings: settings{
			Mode: map[bool]string{true: "quick", false: "full"}[o.quick], Size: o.size, Pairs: o.pairs,
			Runtime: o.runtime.Seconds(), Only: o.only, Format: o.format, Transport: transport,
		},
	}
	results := r.run(ctx, lines)
	doc.Ended = time.Now()
	if ctx.Err() != nil {
		doc.Stopped = "interrupted"
	}
	return errors.Join(report(o, doc, results), context.Cause(ctx), failures(results))
}

// newRunner checks what the run needs and builds the binary to be measured.
func newRunner(ctx context.Context, o *options, dir string, cleanup *cleaner, say func(string, ...any)) (*runner, error) {
	for _, tool := range []string{"fio", "qemu-img", "qemu-io", "qemu-storage-daemon", "losetup"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%w; scripts/deps bench installs or names what is missing", err)
		}
	}
	store := &imageStore{dir: filepath.Join(dir, "images"), size: o.size, built: map[string]*image{}, cleanup: cleanup, say: say}
	free, err := freeSpace(dir)
	if err != nil {
		return nil, err
	}
	if need := store.need(); free < need {
		return nil, fmt.Errorf("%s: %d MiB are free and %d MiB needed; see -dir and -size", o.dir, free>>20, need>>20)
	}
	s := &servers{dir: filepath.Join(dir, "mounts"), mountImage: o.mountImage, transport: o.transport, cleanup: cleanup}
	for _, d := range []string{store.dir, s.dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	jobs := filepath.Join(dir, "jobs")
	if err := unpackJobs(jobs); err != nil {
		return nil, err
	}
	if s.mountImage == "" {
		say("building mount-image")
		s.mountImage = filepath.Join(dir, "mount-image")
		if err := command(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", s.mountImage, "github.com/imagestack/imagestack/cmd/mount-image"); err != nil {
			return nil, err
		}
	} else if s.mountImage, err = filepath.Abs(s.mountImage); err != nil {
		return nil, err
	}
	return &runner{
		pairs: o.pairs, runtime: o.runtime, warmup: o.runtime / 3, store: store, servers: s,
		jobDir: jobs, say: say, checked: map[string]error{},
	}, nil
}

// report prints the table and writes the JSON document.
func report(o *options, doc *document, results []*lineResult) error {
	if o.verbose {
		if err := printCommands(os.Stderr, results); err != nil {
			return err
		}
	}
	if o.json == "-" {
		return printJSON(os.Stdout, doc, results)
	}
	if err := errors.Join(printHead(os.Stdout, doc), printTable(os.Stdout, results, o.pairs)); err != nil {
		return err
	}
	if o.json == "" {
		return nil
	}
	f, err := os.Create(o.json)
	if err != nil {
		return err
	}
	return errors.Join(printJSON(f, doc, results), f.Close())
}

// printHead says what was measured where.
func printHead(w io.Writer, d *document) error {
	m, s := d.Machine, d.Settings
	_, err := fmt.Fprintf(w, `%s, %d processors, %.0f GiB, Linux %s, images on %s; %s, %s, %s
imagestack %s, requests over %s; %s run: disk of %d MiB, %d pairs, %.1f s each; load average %.1f at the start
`, m.CPU, m.Processors, m.MemoryGiB, m.Kernel, m.Filesystem, m.Fio, m.QSD, m.Go,
		m.Revision, s.Transport, s.Mode, s.Size>>20, s.Pairs, s.Runtime, m.Load)
	return err
}

// failures makes the exit status tell that imagestack itself failed in a line.
func failures(results []*lineResult) error {
	var errs error
	for _, r := range results {
		if r.reason == "interrupted" {
			continue
		}
		for _, s := range r.subjects {
			if s.peer == peerOurs && s.err != nil {
				errs = errors.Join(errs, fmt.Errorf("%s: %w", r.key(), s.err))
			}
		}
	}
	return errs
}
