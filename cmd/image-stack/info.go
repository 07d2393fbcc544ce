package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
)

type infoCmd struct {
	image
	Count bool `help:"Count the clusters in use of every layer, whatever there is to read. Without it that is left out where the tables of a layer are longer than 64 MiB (512 GiB of data in clusters of 64 KiB)."`
}

// quickTables is how much of a layer's tables is read without --count, bytes.
const quickTables = 64 << 20

// Run shows what is to know about a stack.
func (c *infoCmd) Run(ctx context.Context) error {
	if err := c.confine(); err != nil {
		return err
	}
	progress, err := c.Start(os.Stderr)
	if err != nil {
		return err
	}
	defer progress.Clear()
	o := c.options()
	if !c.Count {
		o.MaxTables = quickTables
	}
	report, err := open.Inspect(ctx, c.Image, o, func(done, total int) {
		progress.Update("layers", int64(done), int64(total))
	})
	progress.Clear()
	if err != nil {
		return err
	}
	if c.JSON {
		return cli.PrintJSON(os.Stdout, report)
	}
	return printReport(os.Stdout, report)
}

// printReport writes the text form: one block a layer, the top one first.
func printReport(w io.Writer, r *open.Report) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, name+":\t"+format+"\n", args...) }
	row("virtual size", "%s", cli.Bytes(r.VirtualSize))
	row("layers", "%d", len(r.Layers))
	for i, l := range r.Layers {
		fmt.Fprintf(t, "\nlayer %d:\t%s\n", i, cli.Printable(l.Path))
		printLayer(row, l)
	}
	if len(r.Snapshots) > 0 {
		fmt.Fprintf(t, "\nsnapshots of the bundle:\n")
		printSnapshots(t, r.Snapshots)
	}
	for i, l := range r.Layers {
		if len(l.Snapshots) > 0 {
			fmt.Fprintf(t, "\nsnapshots in layer %d:\n", i)
			printSnapshots(t, l.Snapshots)
		}
	}
	return t.Flush()
}

func printLayer(row func(name, format string, args ...any), l layers.Info) {
	format := l.Format
	if l.Version > 0 {
		format = fmt.Sprintf("%s v%d", l.Format, l.Version)
	}
	row("  format", "%s", format)
	row("  virtual size", "%s", cli.Bytes(l.VirtualSize))
	if l.Format != "raw" {
		row("  cluster size", "%s", cli.Bytes(l.ClusterSize))
	}
	row("  file size", "%s", cli.Bytes(l.FileSize))
	row("  allocated", "%s", cli.Bytes(l.AllocatedSize))
	if l.Format != "raw" {
		used := fmt.Sprintf("%d", l.UsedClusters)
		if l.PackedClusters > 0 {
			used += fmt.Sprintf(" (%d compressed)", l.PackedClusters)
		}
		if l.ZeroClusters > 0 {
			used += fmt.Sprintf(", %d zero", l.ZeroClusters)
		}
		if l.Uncounted {
			used = "not counted (--count reads all tables)"
		}
		row("  used clusters", "%s", used)
	}
	if l.Backing != "" {
		row("  backing file", "%s (%s)", cli.Printable(l.Backing), orUnstated(l.BackingFormat))
	}
	if l.DataFile != "" {
		row("  data file", "%s", cli.Printable(l.DataFile))
	}
	if len(l.Flags) > 0 {
		row("  flags", "%s", strings.Join(l.Flags, ", "))
	}
	for _, name := range slices.Sorted(maps.Keys(l.Details)) {
		row("  "+name, "%s", cli.Printable(l.Details[name]))
	}
	for _, b := range l.Bitmaps {
		row("  bitmap", "%s, granularity %s %s", cli.Printable(b.Name), cli.Bytes(b.Granularity), strings.Join(b.Flags, " "))
	}
}

func printSnapshots(w io.Writer, all []layers.Snapshot) {
	fmt.Fprintln(w, "  id\tname\tvirtual size\tdate\tparent")
	for _, s := range all {
		date := ""
		if s.Time != 0 {
			date = time.Unix(s.Time, 0).UTC().Format(time.DateTime)
		}
		virtual := ""
		if s.VirtualSize != 0 {
			virtual = humanize.IBytes(uint64(s.VirtualSize))
		}
		mark := "  "
		if s.Current {
			mark = "* "
		}
		fmt.Fprintf(w, "%s%s\t%s\t%s\t%s\t%s\n", mark, cli.Printable(s.ID), cli.Printable(s.Name), virtual, date, cli.Printable(s.Parent))
	}
}

func orUnstated(format string) string {
	if format == "" {
		return "format not stated"
	}
	return cli.Printable(format)
}
