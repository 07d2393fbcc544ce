package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"

	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/rewrite"
)

// phaseNames are the parts of a run for people.
var phaseNames = map[rewrite.Phase]string{
	rewrite.PhaseCheck: "references",
	rewrite.PhaseGuest: "free in the guest",
	rewrite.PhaseZeros: "zeros",
	rewrite.PhaseDedup: "same as below",
	rewrite.PhaseLeaks: "leaks",
	rewrite.PhaseTail:  "tail",
}

// print writes the text form.
func (d *document) print(w io.Writer, verbose bool) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, name+":\t"+format+"\n", args...) }
	row("image", "%s (%s, layer %d)", cli.Printable(d.Image), d.Format, d.Layer)
	row("virtual size", "%s", cli.Bytes(d.VirtualSize))
	if d.Resumed {
		row("resumed", "an interrupted run")
	}
	d.sizes(row)
	if d.Action != actAbandon {
		d.steps(t)
		row("smallest possible", "%s", cli.Bytes(d.Ideal))
		moved := "to be moved"
		if d.Action != actEstimate {
			moved = "moved"
		}
		row(moved, "%s", cli.Bytes(d.Move))
		extra := "extra space needed"
		if d.Action != actEstimate {
			extra = "extra space at most"
		}
		row(extra, "%s", cli.Bytes(d.Extra))
	}
	d.areas(t, verbose)
	for _, n := range d.Notes {
		row("note", "%s", cli.Printable(n))
	}
	if !d.Complete {
		row("incomplete", "%s", "the run was interrupted or failed; the image is consistent")
	}
	return t.Flush()
}

// sizes shows both sizes that people look at.
func (d *document) sizes(row func(name, format string, args ...any)) {
	if d.After == nil {
		row("now", "%s long, %s allocated", cli.Bytes(d.Before.Apparent), cli.Bytes(d.Before.Allocated))
		return
	}
	row("before", "%s long, %s allocated", cli.Bytes(d.Before.Apparent), cli.Bytes(d.Before.Allocated))
	row("after", "%s long, %s allocated", cli.Bytes(d.After.Apparent), cli.Bytes(d.After.Allocated))
}

func (d *document) steps(w io.Writer) {
	head := "reclaimable"
	if d.Action != actEstimate {
		head = "reclaimed"
	}
	fmt.Fprintf(w, "%s:\t%s\n", head, cli.Bytes(d.Reclaim))
	for _, s := range d.Steps {
		text := cli.Bytes(s.Bytes)
		if s.Skipped != "" {
			text = "not done: " + cli.Printable(s.Skipped)
		} else if s.Guest > 0 && s.Guest != s.Bytes {
			text += fmt.Sprintf(", %s of the disk", humanize.IBytes(uint64(s.Guest)))
		}
		fmt.Fprintf(w, "  %s:\t%s\n", phaseNames[s.Name], text)
	}
}

// areas shows what was found on the disk, and why what was not judged.
func (d *document) areas(w io.Writer, verbose bool) {
	if len(d.Guest) == 0 {
		return
	}
	fmt.Fprintf(w, "on the disk:\t\n")
	for _, a := range d.Guest {
		kind := a.Type
		if kind == "" {
			kind = "unknown"
		}
		text := fmt.Sprintf("%s, %s free of %s", kind, humanize.IBytes(uint64(a.Free)), humanize.IBytes(uint64(a.Length)))
		if !a.Judged {
			text = fmt.Sprintf("%s, not judged: %s (%s)", kind, cli.Printable(a.Reason), a.Code)
		} else if a.Replayed > 0 {
			text += ", read through its journal"
			if verbose {
				text += fmt.Sprintf(" (%d blocks)", a.Replayed)
			}
		}
		fmt.Fprintf(w, "  %s:\t%s\n", cli.Printable(a.Name), text)
	}
}

// escapeQuotes makes a name fit into single quotes of a shell.
func escapeQuotes(s string) string { return strings.ReplaceAll(s, "'", `'\''`) }
