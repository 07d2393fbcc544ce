package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/cli"
)

// dump writes the metadata of an image to a file or, as JSON, to stdout.
func (r *run) dump(ctx context.Context) (err error) {
	if err := r.isolate(false); err != nil {
		return err
	}
	d, err := fsck.OpenDump(ctx, r.Images[0], r.options().Open)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if r.DumpJSON {
		return d.WriteJSON(ctx, r.stdout)
	}
	// The keeper makes the file and, when it is complete, puts it in its place.
	fd, err := r.keeper.AskFile(ctx, assistRequest{Act: actDump}, nil, -1)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), r.Dump)
	defer f.Close() // after an error; what was written is not used then
	w := bufio.NewWriterSize(f, 256<<10)
	if err := errors.Join(d.Write(ctx, w), w.Flush()); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return r.keeper.Ask(ctx, assistRequest{Act: actDumpDone}, nil)
}

// restore puts a dump back.
func (r *run) restore(ctx context.Context) error {
	if err := r.isolate(r.Yes); err != nil {
		return err
	}
	o := r.options()
	if o.Decide != nil && !r.Yes {
		o.Decide = nil // only -y restores: it loses what came after the dump
	}
	res, undo, err := fsck.RestoreFile(ctx, r.Images[0], r.Restore, o)
	if err != nil {
		if errors.Is(err, fsck.ErrNoFit) {
			return cli.WithHint(err, "nothing was changed; an older or newer dump may fit")
		}
		return err
	}
	what := "the roots of its tables"
	if res.All {
		what = "all metadata"
	}
	if r.JSON {
		err = cli.PrintJSON(r.stdout, map[string]any{"version": fsck.DocumentVersion, "image": r.Images[0], "identity": res.ID,
			"all": res.All, "bytes": res.Bytes, "behind": res.Behind, "after": res.After.Worst().String(), "changed": undo != "", "undo": undo})
	} else {
		verb := "would be restored with -y"
		if undo != "" {
			verb = "restored"
		}
		_, err = fmt.Fprintf(r.stdout, "%s: %s (%d bytes) %s; %d bytes behind what the dump knows\n",
			r.Images[0], what, res.Bytes, verb, res.Behind)
		if undo != "" && err == nil {
			_, err = fmt.Fprintf(r.stdout, "%s: taken back by: image-fsck --undo-apply %s %s\n", r.Images[0], undo, r.Images[0])
		}
	}
	switch {
	case err != nil:
		return err
	case undo != "" && res.After.Worst() > fsck.Note:
		return cli.Exit(fsck.ExitCorrected | fsck.ExitUncorrected) // leaks
	case undo != "":
		return cli.Exit(fsck.ExitCorrected)
	}
	return cli.Exit(fsck.ExitUncorrected)
}
