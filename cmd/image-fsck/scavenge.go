package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"

	"github.com/imagestack/imagestack/fsck/scavenge"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/sandbox"
	"github.com/imagestack/imagestack/layers"
)

// scavengeFlags are those of --scavenge.
type scavengeFlags struct {
	Scavenge    string   `placeholder:"NEW" help:"Rebuild IMAGE, whose map or header is lost, from what its content proves, into the new file NEW. IMAGE is only read."`
	ToFormat    string   `name:"to-format" placeholder:"FMT" help:"With --scavenge: format of NEW: raw, ploop or qcow2 (default: that of IMAGE)."`
	Guess       bool     `help:"With --scavenge: also place what the order of allocation suggests and nothing proves."`
	Size        cli.Size `placeholder:"SIZE" help:"With --scavenge: length of the disk, when the header is lost."`
	ClusterSize cli.Size `name:"cluster-size" placeholder:"SIZE" help:"With --scavenge: cluster size, when the header is lost."`
}

// scavenging tells whether any of the flags is set.
func (f *scavengeFlags) scavenging() bool { return *f != scavengeFlags{} }

// scavenge rebuilds an image whose map is lost.
func (r *run) scavenge(ctx context.Context) error {
	if err := r.checkScavenge(); err != nil {
		return cli.Usage(err)
	}
	progress, err := cli.NewProgress(r.Progress, r.stderr)
	if err != nil {
		return err
	}
	// What reads the image may read it, and make things beside the new one.
	if r.Sandbox != sandbox.Off {
		dir := filepath.Dir(r.Scavenge)
		if err := r.confine(sandbox.Policy{Mode: r.Sandbox, Read: []string{r.Images[0]}, Change: []string{dir}}); err != nil {
			return err
		}
	}
	sandbox.Attack("parse") // of test builds
	o := scavenge.Options{Format: r.Format, To: r.ToFormat, Size: int64(r.Size), ClusterSize: int64(r.ClusterSize),
		Guess: r.Guess, Memory: int64(r.Memory), OnProgress: progress.Update}
	rep, err := scavenge.Run(ctx, r.Images[0], r.Scavenge, o)
	progress.Clear()
	switch {
	case errors.Is(err, scavenge.ErrExists):
		return cli.WithHint(err, "--scavenge only makes new files; name another, or remove this one")
	case errors.Is(err, layers.ErrFormat):
		// An image from which nothing can be rebuilt is left uncorrected.
		return cli.WithExit(cli.ExitDamaged, err)
	case err != nil:
		return err
	}
	if r.JSON {
		err = cli.PrintJSON(r.stdout, rep)
	} else {
		err = printScavenged(r.stdout, rep, r.Verbose)
	}
	if err != nil {
		return err
	}
	return cli.Exit(rep.Exit)
}

// checkScavenge refuses flags that do not go with --scavenge.
func (r *run) checkScavenge() error {
	known := []string{"", "raw", "ploop", "parallels", "qcow2"}
	switch {
	case r.Scavenge == "":
		return errors.New("--to-format, --guess, --size and --cluster-size are for --scavenge")
	case len(r.Images) != 1:
		return errors.New("--scavenge wants one image")
	case r.No || r.Preen || r.Auto || r.Yes || r.Force || r.Undo != "" || r.UndoApply != "" || r.Guest || r.Dump != "" ||
		r.DumpJSON || r.Restore != "" || r.UID != "" || r.Compat != "" || r.Data || r.ProgressFD != nil:
		return errors.New("--scavenge goes with --format, --to-format, --guess, --size, --cluster-size, --memory, --json and --progress only")
	case !slices.Contains(known, r.Format) || r.Format == "raw":
		return fmt.Errorf("format %q: ploop and qcow2 images have a map that can be lost", r.Format)
	case !isDir(filepath.Dir(r.Scavenge)):
		return fmt.Errorf("there is no directory %s for the new image", filepath.Dir(r.Scavenge))
	case !slices.Contains(known, r.ToFormat):
		return fmt.Errorf("new format %q: raw, ploop and qcow2 are made", r.ToFormat)
	}
	return nil
}

// maxShown is how many rows of each list are printed without -v.
const maxShown = 16

// printScavenged is the text form of the report.
func printScavenged(out io.Writer, r *scavenge.Report, verbose bool) error {
	w := &lineWriter{w: out, name: printable(r.Image)}
	for _, key := range slices.Sorted(maps.Keys(r.Geometry)) {
		w.line("%s: from the %s", key, printable(r.Geometry[key]))
	}
	w.line("%s, disk of %d bytes, clusters of %d", r.Format, r.VirtualSize, r.ClusterSize)
	for _, f := range r.Filesystems {
		if f.Base != nil {
			w.line("%s %s of %d bytes begins at %#x: %s; %d blocks of metadata say where they belong", f.Type, f.UUID, f.Size, *f.Base, f.Basis, f.Blocks)
		} else {
			w.line("%s %s of %d bytes is of no use: %s", f.Type, f.UUID, f.Size, f.Basis)
		}
	}
	for _, n := range r.Notes {
		w.line("note: %s", printable(n))
	}
	for _, proof := range slices.Sorted(maps.Keys(r.Placed)) {
		w.line("placed by %s: %d of %d %s", proof, r.Placed[proof], r.Pieces, pieceName(r.Format))
	}
	w.rows(len(r.Places), verbose, 0, func(i int) {
		p := r.Places[i]
		w.line("disk %#x+%#x: from %#x: %s", p.Guest, p.Length, p.Host, p.Proof)
	})
	w.rows(len(r.Unplaced), verbose, maxShown, func(i int) {
		u := r.Unplaced[i]
		more := ""
		for k, at := range u.Places {
			if k == 0 {
				more = ", which names disk"
			}
			more += fmt.Sprintf(" %#x", at)
		}
		w.line("UNPLACED: %d bytes at %#x: %s%s", u.Length, u.Host, u.Why, more)
	})
	w.rows(len(r.Unknown), verbose, maxShown, func(i int) {
		w.line("UNKNOWN: disk %#x+%#x", r.Unknown[i].Offset, r.Unknown[i].Length)
	})
	for _, u := range r.Unreadable {
		w.line("UNREADABLE: disk %#x+%#x", u.Offset, u.Length)
	}
	if r.LostFound != "" {
		w.line("what has no place is in %s, see LIST there", printable(r.LostFound))
	}
	switch {
	case r.New == "":
		w.line("nothing has a proven place; no image was made")
	case r.GuessedBytes > 0:
		w.line("rebuilt as %s: %d bytes placed, %d of them by GUESSES, %d bytes unplaced", printable(r.New), r.PlacedBytes, r.GuessedBytes, r.UnplacedBytes)
	default:
		w.line("rebuilt as %s: %d bytes placed, all by proof, %d bytes unplaced", printable(r.New), r.PlacedBytes, r.UnplacedBytes)
	}
	return w.err
}

func pieceName(format string) string {
	if format == "qcow2" {
		return "L2 tables"
	}
	return "clusters"
}

// lineWriter prints lines about one image.
type lineWriter struct {
	w    io.Writer
	name string
	err  error
}

func (w *lineWriter) line(format string, args ...any) {
	if w.err == nil {
		_, w.err = fmt.Fprintf(w.w, "%s: %s\n", w.name, fmt.Sprintf(format, args...))
	}
}

// rows prints n rows, or without verbose only the first few.
func (w *lineWriter) rows(n int, verbose bool, few int, row func(i int)) {
	for i := range n {
		if !verbose && i == few {
			if few > 0 {
				w.line("…and %d more (see -v or --json)", n-i)
			}
			return
		}
		row(i)
	}
}
