package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/layers"
)

// dump writes the metadata of an image to a file or, as JSON, to stdout.
func (r *run) dump(ctx context.Context) (err error) {
	if err := r.isolate(false); err != nil {
		return err
	}
	if r.DumpJSON {
		d, err := r.openDump(ctx)
		if err != nil {
			return err
		}
		return errors.Join(d.WriteJSON(ctx, r.stdout), d.Close())
	}
	// The keeper makes the file and, when it is complete, puts it in its place.
	var f *os.File
	defer func() {
		if f != nil {
			_ = f.Close() // after an error; what was written is not used then
		}
	}()
	create := func(image string) (*os.File, error) {
		if f == nil {
			fd, err := r.keeper.AskFile(ctx, assistRequest{Act: actDump, Name: image}, nil, -1)
			if err != nil {
				return nil, err
			}
			f = os.NewFile(uintptr(fd), r.Dump)
		}
		return f, nil
	}
	for try := 1; ; try++ {
		again, err := r.writeDump(ctx, create)
		if err == nil {
			break
		}
		if !again || try == dumpTries {
			return err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		if err := f.Truncate(0); err != nil {
			return err
		}
	}
	if err := f.Close(); err != nil {
		return err
	}
	return r.keeper.Ask(ctx, assistRequest{Act: actDumpDone}, nil)
}

// dumpTries is how often the dump of an image that is in use is begun.
const dumpTries = 5

// openDump opens the image as the flags say.
func (r *run) openDump(ctx context.Context) (*fsck.Dumped, error) {
	if r.ForceShare {
		return fsck.OpenDumpShared(ctx, r.Images[0], r.options().Open)
	}
	d, err := fsck.OpenDump(ctx, r.Images[0], r.options().Open)
	if errors.Is(err, layers.ErrInUse) {
		err = cli.WithHint(err, "another program holds the image; --force-share dumps what is on the disk now, as a power cut would leave it")
	}
	return d, err
}

// writeDump writes into the file that create returns for the image, and reports
// whether another try may do better.
func (r *run) writeDump(ctx context.Context, create func(image string) (*os.File, error)) (again bool, err error) {
	d, err := r.openDump(ctx)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	f, err := create(d.ID.Image)
	if err != nil {
		return false, err
	}
	w := bufio.NewWriterSize(f, 256<<10)
	err = errors.Join(d.Write(ctx, w), w.Flush(), d.Unchanged(ctx))
	return errors.Is(err, fsck.ErrUnstable), err
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
