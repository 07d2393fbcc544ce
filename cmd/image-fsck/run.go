package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/keeper"
	"github.com/imagestack/imagestack/internal/sandbox"
	"github.com/imagestack/imagestack/layers/open"
)

// run is one call of the tool.
type run struct {
	*flags
	stdin          *os.File
	stdout, stderr io.Writer
	progress       *cli.Progress
	ctx            context.Context // of the one call of do
	fd             *fdProgress
	keeper         *keeper.Keeper // nil when there is nothing for one to do
	spill          *fsck.SpillFiles
	user           *sandbox.User // to become, nil to stay
	top            string        // the new top layer of --guest -y, "" if none
}

func (r *run) do(ctx context.Context) error {
	r.ctx = ctx
	limitMemory(int64(r.Memory))
	err := r.check()
	if err == nil {
		err = r.lookUser()
	}
	if err != nil {
		return cli.Usage(err)
	}
	if r.ProgressFD != nil && *r.ProgressFD == 0 && r.Progress == "auto" {
		r.Progress = "bar"
	}
	if r.progress, err = r.Start(r.stderr); err != nil {
		return err
	}
	if r.ProgressFD != nil && *r.ProgressFD > 0 {
		if r.fd, err = newFDProgress(*r.ProgressFD); err != nil {
			return err
		}
		defer r.fd.close()
	}
	defer r.close()
	switch {
	case r.UndoApply != "":
		return r.undo(ctx)
	case r.Dump != "" || r.DumpJSON:
		return r.dump(ctx)
	case r.Restore != "":
		return r.restore(ctx)
	case r.Guest:
		return r.guest(ctx)
	}
	return r.fsck(ctx)
}

// check refuses flags that contradict each other.
func (r *run) check() error {
	modes := 0
	for _, set := range []bool{r.No, r.Preen || r.Auto, r.Yes} {
		if set {
			modes++
		}
	}
	for _, format := range []string{r.Format, r.BackingFormat} {
		if !slices.Contains([]string{"", "raw", "ploop", "parallels", "qcow2"}, format) {
			return fmt.Errorf("format %q: raw, ploop and qcow2 are checked", format)
		}
	}
	others := 0 // instead of a check
	for _, set := range []bool{r.UndoApply != "", r.Dump != "", r.DumpJSON, r.Restore != "", r.Guest} {
		if set {
			others++
		}
	}
	switch {
	case modes > 1:
		return errors.New("-n, -p and -y exclude each other")
	case others > 1:
		return errors.New("--undo-apply, --dump, --dump-json, --restore and --guest exclude each other")
	case others > 0 && (len(r.Images) != 1 || r.Compat != ""):
		return errors.New("--undo-apply, --dump, --dump-json, --restore and --guest want one image, and no --compat")
	case others > 0 && r.Restore == "" && !r.Guest && modes > 0:
		return errors.New("--undo-apply, --dump and --dump-json exclude -n, -p and -y")
	case others > 0 && r.Restore == "" && r.Undo != "":
		return errors.New("--undo is for repairs and --restore")
	case (r.Restore != "" || r.Guest) && (r.Preen || r.Auto):
		return errors.New("--restore and --guest are for -n or -y")
	case r.UID != "" && (modes > 0 && !r.No || r.UndoApply != ""):
		return errors.New("--uid is for checks that change nothing: what is changed would belong to that user")
	case r.ForceShare && r.Dump == "" && !r.DumpJSON:
		return errors.New("--force-share is for --dump and --dump-json")
	case r.No && r.Undo != "":
		return errors.New("--undo is of no use with -n")
	case r.Compat != "" && len(r.Images) != 1:
		return errors.New("--compat qemu wants one image")
	case r.ProgressFD != nil && *r.ProgressFD < 0:
		return errors.New("-C wants the number of a descriptor")
	case r.Undo != "" && len(r.Images) > 1 && !isDir(r.Undo):
		return errors.New("with several images --undo names a directory")
	}
	return nil
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// options are what the flags say.
func (r *run) options() fsck.RunOptions {
	o := fsck.RunOptions{
		Open:   open.Options{Format: r.Format, BackingFormat: r.BackingFormat, AllowPaths: r.AllowPath},
		Memory: int64(r.Memory), Data: r.Data, Undo: r.undoStore(), Single: r.Compat != "",
	}
	if r.spill != nil {
		o.Spill = r.spill.Get
	}
	switch {
	case r.No || r.UID != "":
	case r.Preen || r.Auto:
		o.Decide = fsck.DecidePreen
	case r.Yes:
		o.Decide = fsck.DecideAll
	case r.Compat != "" || r.JSON || r.stdin == nil || !cli.IsTerminal(r.stdin):
		// As with -n.
	default:
		a := &asker{ctx: r.ctx, in: bufio.NewReader(r.stdin), out: r.stdout, before: r.progress.Clear}
		o.Decide, o.Serial = a.decide, true
	}
	if r.progress != nil || r.fd != nil {
		o.OnProgress = func(file string, pass int, done, total int64) {
			r.progress.Update(file, done, total)
			r.fd.update(pass, done, total, file)
		}
	}
	return o
}

func (r *run) fsck(ctx context.Context) error {
	if err := r.isolate(r.options().Decide != nil); err != nil {
		return err
	}
	o := r.options()
	bits := 0
	var results []*fsck.ImageResult
	out := bufio.NewWriter(r.stdout)
	fsck.Run(ctx, r.Images, o, func(res *fsck.ImageResult) {
		r.progress.Clear()
		bits |= res.Exit()
		switch {
		case r.Compat != "" || r.JSON:
			results = append(results, res)
		default:
			p := printer{w: out, verbose: r.Verbose, repair: o.Decide != nil}
			p.image(res)
			_ = out.Flush() // reported by the flush below
		}
		r.errors(res)
	})
	var err error
	code := bits
	switch {
	case r.Compat != "":
		code, err = r.compatQemu(out, results[0])
	case r.JSON:
		err = cli.PrintJSON(out, fsck.NewDocument(results))
	}
	if err := errors.Join(err, out.Flush()); err != nil {
		return err
	}
	return cli.Exit(code)
}

// errors prints what prevented a check or a repair.
func (r *run) errors(res *fsck.ImageResult) {
	tell := func(err error) {
		if err != nil {
			fmt.Fprint(r.stderr, cli.Message("image-fsck", err))
		}
	}
	tell(res.Err)
	for i := range res.Files {
		f := &res.Files[i]
		if f.Err == nil {
			continue
		}
		err := fmt.Errorf("%s: %w", f.Path, f.Err)
		if f.Result != nil && f.Changed {
			err = cli.WithHint(err, "the repair was begun and not finished; run it again, or take it back with: image-fsck --undo-apply %s %s", f.Undo, f.Path)
		}
		tell(err)
	}
}

// undo takes back a repair.
func (r *run) undo(ctx context.Context) (err error) {
	u, err := backend.Open(r.UndoApply, backend.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, u.Close()) }()
	f, err := backend.Open(r.Images[0], backend.Options{Writable: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if l := backend.LockerOf(f); l != nil {
		if err := l.Lock(backend.WriterUse, backend.WriterUnshare); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if err := r.seal(); err != nil {
		return err
	}
	res, err := fsck.ApplyUndo(ctx, u, f, fsck.UndoOptions{Force: r.Force})
	switch {
	case errors.Is(err, fsck.ErrNothingToUndo):
		fmt.Fprintf(r.stdout, "%s: nothing to undo: the repair had not begun to change the image\n", r.Images[0])
		return nil
	case errors.Is(err, fsck.ErrChanged):
		return cli.WithHint(err, "take back later repairs first (their undo files have higher numbers); -f restores regardless")
	case err != nil:
		return err
	}
	if r.JSON {
		return cli.PrintJSON(r.stdout, map[string]any{"version": fsck.DocumentVersion, "image": r.Images[0],
			"restored-bytes": res.Bytes, "rounds": res.Sections, "size": res.Size})
	}
	fmt.Fprintf(r.stdout, "%s: restored as it was before the repair (%d bytes written)\n", r.Images[0], res.Bytes)
	return nil
}
