package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// The compact workload (-compact): image-compact in place beside what people do
// without it, qemu-img convert to a second file, made durable. The guest is an
// ext4 most of whose files were deleted (compactimage.go). Each run gets a fresh
// copy of the image; the two take turns. Nobody's time counts unless the
// content of every file was found right in what he made, and the filesystem
// and the image are sound.

// compactGoals, as in the design.
const (
	goalExtra     = 64 << 20
	goalTime      = 1.0  // of convert, at most
	goalTimeSmall = 0.1  // where little must move
	goalSize      = 1.02 // of fstrim and convert
	goalRSS       = 256 << 20
)

// compactCase is one image of the workload.
type compactCase struct {
	Name   string `json:"name"`
	Format string `json:"format"` // as qemu-img calls it
	// TimeGoal is the largest ratio of times.
	TimeGoal float64 `json:"goal_time"`
	image    string
	guest    *aged // what it must hold
}

// compactSample is one run of one side.
type compactSample struct {
	Seconds   float64 `json:"seconds"`
	Extra     int64   `json:"peak_extra"` // bytes, of the files' storage
	RSS       int64   `json:"peak_rss"`
	Allocated int64   `json:"allocated"` // of the result
	Apparent  int64   `json:"apparent"`
}

// compactResult is one case.
type compactResult struct {
	compactCase
	Before    compactSample   `json:"before"`    // only the sizes
	Reference int64           `json:"reference"` // allocated after fstrim and convert
	Ours      []compactSample `json:"image_compact"`
	Convert   []compactSample `json:"qemu_img_convert"`
	Ratio     stats           `json:"time_ratio"` // ours by convert
	Error     string          `json:"error,omitempty"`
}

// compactBench is one run of the workload.
type compactBench struct {
	dir     string
	pairs   int
	tools   string // directory of our binaries
	timer   timer
	cleanup *cleaner
	say     func(string, ...any)
}

// runCompact measures all cases and prints them.
func runCompact(ctx context.Context, o *options, dir string, cleanup *cleaner, say func(string, ...any)) error {
	if os.Geteuid() != 0 {
		return errors.New("the compact workload mounts filesystems: it needs root")
	}
	b := &compactBench{dir: dir, pairs: o.pairs, tools: filepath.Join(dir, "bin"), cleanup: cleanup, say: say}
	var err error
	if b.timer, err = newTimer(dir); err != nil {
		return err
	}
	say("building image-compact and mount-image")
	for _, tool := range []string{"image-compact", "mount-image"} {
		if err := command(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(b.tools, tool), "github.com/imagestack/imagestack/cmd/"+tool); err != nil {
			return err
		}
	}
	recipe := agedRecipe{Size: 20 << 30, Files: 60000, Delete: 70}
	if o.quick {
		recipe = agedRecipe{Size: 2 << 30, Files: 6000, Delete: 70}
	}
	say("building a guest of %d files in %d GiB, and deleting %d %%", recipe.Files, recipe.Size>>30, recipe.Delete)
	guest, err := b.makeAged(ctx, recipe)
	if err != nil {
		return err
	}
	var results []*compactResult
	for _, format := range []string{"qcow2", "parallels"} {
		if o.format != "" && o.format != format && !(o.format == imgPloop && format == "parallels") {
			continue
		}
		many, little, err := b.cases(ctx, guest, format)
		if err != nil {
			return err
		}
		results = append(results, many, little)
	}
	memory, err := b.largeDisk(ctx, o.quick)
	if err != nil {
		return err
	}
	doc := compactDocument{Machine: describeMachine(ctx, ".", dir), Recipe: recipe, Results: results, Memory: memory}
	if o.json == "-" {
		return printAny(os.Stdout, doc)
	}
	if err := doc.print(os.Stdout); err != nil || o.json == "" {
		return err
	}
	f, err := os.Create(o.json)
	if err != nil {
		return err
	}
	return errors.Join(printAny(f, doc), f.Close())
}

func printAny(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// cases measures an image in which much has to go, and what is left of it after
// a little has changed.
func (b *compactBench) cases(ctx context.Context, guest *aged, format string) (many, little *compactResult, err error) {
	image := filepath.Join(b.dir, "aged."+format)
	b.say("%s: building", format)
	if err := b.convertFrom(ctx, guest.raw, image, format); err != nil {
		return nil, nil, err
	}
	reference, err := b.reference(ctx, guest, format)
	if err != nil {
		return nil, nil, err
	}
	many = b.measure(ctx, compactCase{Name: "70 % deleted", Format: format, TimeGoal: goalTime, image: image, guest: guest}, reference)
	b.say("%s: compacting once, and changing a little", format)
	changed, err := b.changeLittle(ctx, image, guest)
	if err != nil {
		return nil, nil, err
	}
	reference, err = b.reference(ctx, changed, format)
	if err != nil {
		return nil, nil, err
	}
	little = b.measure(ctx, compactCase{Name: "little to do", Format: format, TimeGoal: goalTimeSmall, image: image, guest: changed}, reference)
	return many, little, os.Remove(image)
}

// measure runs both sides in turns.
func (b *compactBench) measure(ctx context.Context, c compactCase, reference int64) *compactResult {
	res := &compactResult{compactCase: c, Reference: reference}
	err := res.Before.sizes(c.image)
	for pair := 0; err == nil && pair < b.pairs; pair++ {
		b.say("%s, %s: run %d of %d", c.Format, c.Name, pair+1, b.pairs)
		sides := []func() error{func() error {
			s, err := b.ours(ctx, c, pair == 0)
			res.Ours = append(res.Ours, s)
			return err
		}, func() error {
			s, err := b.convert(ctx, c, pair == 0)
			res.Convert = append(res.Convert, s)
			return err
		}}
		for k := range sides {
			if err = errors.Join(err, sides[(pair+k)%2]()); err != nil {
				break
			}
		}
	}
	if err != nil {
		res.Error = err.Error()
		return res
	}
	var a, q []float64
	for k := range res.Ours {
		a, q = append(a, res.Ours[k].Seconds), append(q, res.Convert[k].Seconds)
	}
	res.Ratio = summarize(ratios(a, q, false))
	return res
}

// fresh makes a durable copy of an image in a directory of its own.
func (b *compactBench) fresh(ctx context.Context, image string) (string, func() error, error) {
	dir := filepath.Join(b.dir, "run")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", nil, err
	}
	remove := b.cleanup.add(func() error { return os.RemoveAll(dir) })
	path := filepath.Join(dir, filepath.Base(image))
	if err := command(ctx, "cp", "--sparse=auto", "--reflink=auto", image, path); err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return path, remove, syncAll([]string{path})
}

func (b *compactBench) ours(ctx context.Context, c compactCase, verify bool) (s compactSample, err error) {
	path, remove, err := b.fresh(ctx, c.image)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	s, err = b.timed(ctx, filepath.Dir(path), filepath.Join(b.tools, "image-compact"), "--json", path)
	if err == nil {
		err = s.sizes(path)
	}
	if err == nil && verify {
		err = b.verify(ctx, path, c)
	}
	return s, err
}

func (b *compactBench) convert(ctx context.Context, c compactCase, verify bool) (s compactSample, err error) {
	path, remove, err := b.fresh(ctx, c.image)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	out := path + ".new"
	// Like image-compact's, the result is durable at the end.
	script := `qemu-img convert -f "$1" -O "$1" "$2" "$3" && sync "$3"`
	s, err = b.timed(ctx, filepath.Dir(path), "sh", "-c", script, "convert", c.Format, path, out)
	if err == nil {
		err = s.sizes(out)
	}
	if err == nil && verify {
		err = b.verify(ctx, out, c)
	}
	return s, err
}

// sizes fills in the sizes of a file.
func (s *compactSample) sizes(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	s.Apparent, s.Allocated = st.Size(), st.Sys().(*syscall.Stat_t).Blocks*512
	return nil
}

// timed runs a command and watches the storage that dir takes meanwhile.
func (b *compactBench) timed(ctx context.Context, dir, name string, args ...string) (s compactSample, err error) {
	cmd := b.timer.command(ctx, append([]string{name}, args...)...)
	var said strings.Builder
	cmd.Stderr = &said
	before := storage(dir)
	peak := before
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			peak = max(peak, storage(dir))
			select {
			case <-done:
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	begin := time.Now()
	err = cmd.Run()
	s.Seconds = time.Since(begin).Seconds()
	close(done)
	<-ended
	s.Extra = peak - before
	if err != nil {
		return s, fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, lastLines(said.String(), 3))
	}
	s.RSS, err = b.timer.peak()
	return s, err
}

// storage is what the files of a directory take, in bytes.
func storage(dir string) int64 {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	var n int64
	for _, e := range entries {
		if st, err := e.Info(); err == nil {
			n += st.Sys().(*syscall.Stat_t).Blocks * 512
		}
	}
	return n
}

type compactDocument struct {
	Machine machine          `json:"machine"`
	Recipe  agedRecipe       `json:"recipe"`
	Results []*compactResult `json:"results"`
	Memory  *largeResult     `json:"large_disk"`
}

// print writes the table.
func (d *compactDocument) print(w io.Writer) error {
	fmt.Fprintf(w, "%s, %d processors, Linux %s, images on %s; %s\n", d.Machine.CPU, d.Machine.Processors, d.Machine.Kernel, d.Machine.Filesystem, d.Machine.QemuImg)
	fmt.Fprintf(w, "ext4 of %d GiB, %d files, %d %% deleted; imagestack %s; load average %.1f at the start\n\n",
		d.Recipe.Size>>30, d.Recipe.Files, d.Recipe.Delete, d.Machine.Revision, d.Machine.Load)
	t := tabwriter.NewWriter(w, 0, 8, 1, ' ', 0)
	fmt.Fprintln(t, "| image\t| before MiB\t| after MiB\t| / fstrim+convert\t| time / convert\t| s\t| peak extra MiB (convert)\t| peak RSS MiB\t|")
	fmt.Fprintln(t, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, r := range d.Results {
		if r.Error != "" {
			fmt.Fprintf(t, "| %s, %s\t| %s\t|\n", r.Format, r.Name, r.Error)
			continue
		}
		var extra, rss, convert int64
		var seconds []float64
		for k, s := range r.Ours {
			extra, rss, convert = max(extra, s.Extra), max(rss, s.RSS), max(convert, r.Convert[k].Extra)
			seconds = append(seconds, s.Seconds)
		}
		size := float64(r.Ours[0].Allocated) / float64(r.Reference)
		fmt.Fprintf(t, "| %s, %s\t| %d\t| %d\t| %.3f %s\t| %s %s\t| %.2f\t| %.1f (%d) %s\t| %d %s\t|\n", r.Format, r.Name,
			r.Before.Allocated>>20, r.Ours[0].Allocated>>20, size, met(size <= goalSize), ratioCell(r.Ratio), met(r.Ratio.Median <= r.TimeGoal),
			summarize(seconds).Median, float64(extra)/(1<<20), convert>>20, met(extra <= goalExtra), rss>>20, met(rss <= goalRSS))
	}
	if m := d.Memory; m != nil {
		fmt.Fprintf(t, "\nA disk of %d TiB: peak RSS %d MiB %s in %.1f s\n", m.Size>>40, m.RSS>>20, met(m.RSS <= goalRSS), m.Seconds)
	}
	return t.Flush()
}

func met(ok bool) string {
	if ok {
		return "✓"
	}
	return "✗"
}
