package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/sandbox"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/rewrite"
)

// run is one call of the tool.
type run struct {
	*flags
	stdout, stderr io.Writer
	progress       *cli.Progress
}

// action is what a run does; a value of the JSON document.
type action string

const (
	actEstimate action = "estimate"
	actCompact  action = "compact"
	actResume   action = "resume"
	actAbandon  action = "abandon"
)

func (r *run) action() action {
	switch {
	case r.No:
		return actEstimate
	case r.Resume:
		return actResume
	case r.Abandon:
		return actAbandon
	}
	return actCompact
}

func (r *run) do(ctx context.Context) error {
	if err := r.check(); err != nil {
		return cli.Usage(err)
	}
	var err error
	if r.progress, err = r.Start(r.stderr); err != nil {
		return err
	}
	defer r.progress.Clear()
	if err := r.confine(); err != nil {
		return err
	}
	act := r.action()
	var report *rewrite.Report
	switch {
	case r.To != "" && !r.No:
		report, err = r.copyTo(ctx)
	case act == actEstimate:
		report, err = rewrite.Estimate(ctx, r.Image, r.options())
	case act == actResume:
		report, err = rewrite.Resume(ctx, r.Image, r.options())
	case act == actAbandon:
		report, err = rewrite.Abandon(ctx, r.Image, r.options())
	default:
		report, err = rewrite.Compact(ctx, r.Image, r.options())
	}
	r.progress.Clear()
	if err != nil {
		err = r.explain(ctx, err, r.pending(ctx, report, err))
	}
	if report == nil || err != nil && report.After == nil {
		return err // nothing was done
	}
	d := newDocument(act, report, err)
	d.To = r.To
	if r.JSON {
		return errors.Join(err, cli.PrintJSON(r.stdout, d))
	}
	return errors.Join(err, d.print(r.stdout, r.Verbose))
}

// check refuses flags that contradict each other.
func (r *run) check() error {
	modes := 0
	for _, set := range []bool{r.No, r.Resume, r.Abandon} {
		if set {
			modes++
		}
	}
	switch {
	case modes > 1:
		return errors.New("-n, --resume and --abandon exclude each other")
	case r.To != "" && (r.Resume || r.Abandon):
		return errors.New("--to makes a new file, of which nothing is left when it is interrupted: there is nothing to resume or abandon")
	case (r.Resume || r.Abandon) && (r.Gaps || r.Swap || r.DedupParent || r.Guest != "auto"):
		return errors.New("--resume and --abandon go by what the interrupted run was told; --guest, --gaps, --swap and --dedup-parent are of no use")
	case r.Guest == "off" && (r.Gaps || r.Swap):
		return errors.New("--gaps and --swap are of no use with --guest off")
	case r.Layer < 0 || r.Layer >= layers.MaxDepth:
		return fmt.Errorf("--layer %d: layers count from 0, the top one, to %d", r.Layer, layers.MaxDepth-1)
	case r.MaxExtra <= 0:
		return errors.New("--max-extra must not be zero")
	}
	return nil
}

// openOptions say how the image is opened.
func (r *run) openOptions() open.Options {
	return open.Options{
		Format: r.Format, BackingFormat: r.BackingFormat, AllowPaths: r.AllowPath, CacheSize: int64(r.CacheSize),
	}
}

// options are what the flags say.
func (r *run) options() rewrite.Options {
	return rewrite.Options{
		Open: r.openOptions(), Layer: r.Layer, ChildDirs: r.Children,
		Guest: r.Guest != "off", Gaps: r.Gaps, Swap: r.Swap, DedupParent: r.DedupParent, MostLeaked: r.MostLeaked,
		MaxExtra: int64(r.MaxExtra), RateLimit: int64(r.RateLimit),
		Progress: func(p rewrite.Progress) { r.progress.UpdateBytes(phaseNames[p.Phase], p.Done, p.Total) },
	}
}

// confine gives up, before the image is looked at, all that the work does not
// need.
func (r *run) confine() error {
	defer sandbox.Attack("parse") // of test builds
	if r.Sandbox == sandbox.Off {
		return nil
	}
	o := r.openOptions()
	o.Writable = !r.No && r.To == ""
	access, err := open.AccessTo(r.Image, o)
	if err != nil {
		return err
	}
	p := sandbox.Policy{Mode: r.Sandbox, List: access.List, Read: append(access.Read, r.Children...), Write: access.Write}
	// What a symbolic link leads to lies elsewhere: with other images that may
	// stand on it, and its record.
	homes, err := r.homes()
	if err != nil {
		return err
	}
	p.Read = append(p.Read, homes[1:]...)
	if o.Writable {
		// The record beside the image is made and removed.
		if p.Change, err = directories(access.Write); err != nil {
			return err
		}
		p.Change = append(p.Change, homes[1:]...)
	}
	if r.To != "" && !r.No {
		dir, err := realDir(r.To)
		if err != nil {
			return err
		}
		p.Change = append(p.Change, dir)
	}
	return cli.Confine(p, func(what string) { fmt.Fprintln(r.stderr, toolName+":", what) })
}

// homes are the directories of the image file.
func (r *run) homes() ([]string, error) {
	if st, err := os.Stat(r.Image); err != nil || st.IsDir() {
		return []string{r.Image}, err
	}
	return open.Homes(r.Image)
}

// pending tells whether the record of a run is there after err.
func (r *run) pending(ctx context.Context, report *rewrite.Report, err error) bool {
	if report != nil {
		return report.Pending
	}
	// Stopped before anything was done, with the record that was there.
	return (r.Resume || r.Abandon) && context.Cause(ctx) != nil && !errors.Is(err, rewrite.ErrNotPending)
}

// explain adds to an error what to do next. pending tells that the run has
// left its record.
func (r *run) explain(ctx context.Context, err error, pending bool) error {
	image := r.again()
	var at *layers.ImageError
	switch {
	case context.Cause(ctx) != nil:
		// The cause has the exit code of the signal.
		err = context.Cause(ctx)
		if r.To != "" || r.No {
			return cli.WithHint(err, "nothing was changed")
		}
		if !pending {
			return cli.WithHint(err, "stopped at a consistent point, the image can be used; nothing was left, begin again with: image-compact %s%s", r.what(), image)
		}
		return cli.WithHint(err, "stopped at a consistent point, the image can be used; go on with: image-compact --resume %s, or give up: image-compact --abandon %s", image, image)
	case errors.Is(err, rewrite.ErrPending) && r.To != "":
		return cli.WithHint(err, "it was left by a copy that was killed, and is removed now: begin again")
	case errors.Is(err, rewrite.ErrPending):
		return cli.WithHint(err, "go on with: image-compact --resume %s, or give it up: image-compact --abandon %s", image, image)
	case errors.Is(err, rewrite.ErrNotPending):
		return cli.WithHint(err, "begin with: image-compact %s%s", r.what(), image)
	case errors.Is(err, rewrite.ErrBase) && r.Layer > 0:
		return cli.WithHint(err, "a lower layer is worked on while no images stand on it but those of one stack: name the top image of that and its --layer, or compact the images that stand on it, each by itself")
	case errors.Is(err, rewrite.ErrBase):
		return cli.WithHint(err, "compact the images that stand on it, each by itself; if they are one stack, this one is the --layer of its top; --to makes a copy and leaves this one alone")
	case errors.Is(err, layers.ErrCorrupt) && errors.As(err, &at) && at.Field == "leaks":
		return cli.WithHint(err, "nothing was changed. Look at it with: image-fsck -n %s; if the files in the guest are all right, --most-leaked gives that space back", r.found())
	case errors.Is(err, layers.ErrUnsupported) && errors.As(err, &at) && at.Path == r.Image && (at.Field == "crypt_method" || at.Field == "full disk encryption header"):
		// Its options are a list with commas.
		name := quoted("driver=qcow2,encrypt.key-secret=s,file.filename=" + strings.ReplaceAll(r.Image, ",", ",,"))
		return cli.WithHint(err, "who has the key makes a compact copy with: qemu-img convert --object secret,id=s,file=KEYFILE --image-opts %s "+
			"-O qcow2 -o encrypt.format=luks,encrypt.key-secret=s NEW", name)
	case !pending && !r.No && r.Layer > 0 && errors.Is(err, fs.ErrPermission):
		return cli.WithHint(err, "nothing was changed; image-compact writes the image of the layer and a record beside it, and for a bundle its lock")
	case !pending && !r.No && r.To == "" && errors.Is(err, fs.ErrPermission):
		return cli.WithHint(err, "nothing was changed; image-compact writes the image and a record beside it; a copy elsewhere can be made with --to")
	case pending && r.To == "" && cli.ExitCode(err) == cli.ExitFailed:
		return cli.WithHint(err, "the image is consistent and can be used; when the cause is gone go on with: image-compact --resume %s, or give up: image-compact --abandon %s", image, image)
	}
	return err
}

// arguments are flags of a command line that is shown.
type arguments struct{ strings.Builder }

func (a *arguments) flag(name string, set bool) {
	if set {
		a.WriteString(name + " ")
	}
}

func (a *arguments) value(name, value string) {
	if value != "" {
		a.WriteString(name + " " + quoted(value) + " ")
	}
}

func (a *arguments) number(name string, n, preset int64) {
	if n != 0 && n != preset {
		a.value(name, strconv.FormatInt(n, 10))
	}
}

// what are the arguments that say what a new run gives back, with a space
// behind. A run that is resumed takes them from its record.
func (r *run) what() string {
	var a arguments
	a.flag("--guest off", r.Guest == "off")
	a.flag("--gaps", r.Gaps)
	a.flag("--swap", r.Swap)
	a.flag("--dedup-parent", r.DedupParent)
	a.flag("--most-leaked", r.MostLeaked)
	return a.String()
}

// again are the arguments with which the same image is found again and worked
// on under the same bounds.
func (r *run) again() string {
	var a arguments
	a.number("--layer", int64(r.Layer), 0)
	for _, d := range r.Children {
		a.value("--children", d)
	}
	a.number("--max-extra", int64(r.MaxExtra), rewrite.DefaultMaxExtra)
	a.number("--rate-limit", int64(r.RateLimit), 0)
	a.number("--cache-size", int64(r.CacheSize), 0)
	return a.String() + r.found()
}

// found are the arguments with which any of the tools finds the image.
func (r *run) found() string {
	var a arguments
	a.value("--format", r.Format)
	a.value("--backing-format", r.BackingFormat)
	for _, d := range r.AllowPath {
		a.value("--allow-path", d)
	}
	image := r.Image
	if strings.HasPrefix(image, "-") {
		image = "./" + image
	}
	return a.String() + quoted(image)
}

// quoted is a name as a shell takes it.
func quoted(name string) string {
	if name == "" {
		return "''"
	}
	for _, c := range name {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '/' || c == '.' || c == '-' || c == '_' || c == '+' || c == ':' || c == ',') {
			return "'" + escapeQuotes(name) + "'"
		}
	}
	return name
}

// realDir is the directory in which the file of that name lies, or will.
func realDir(name string) (string, error) {
	dir, err := filepath.EvalSymlinks(filepath.Dir(name))
	if err != nil {
		return "", err
	}
	return filepath.Abs(dir)
}
