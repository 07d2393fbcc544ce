package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
)

// printer writes the text form of results.
type printer struct {
	w       io.Writer
	verbose bool
	repair  bool
}

func (p *printer) image(r *fsck.ImageResult) {
	for i := range r.Files {
		p.file(&r.Files[i])
	}
	for _, rep := range r.Mended {
		p.report(rep, true)
	}
	for _, l := range r.Links {
		fmt.Fprintf(p.w, "%s: says something else about its parent now; taken back by: image-fsck --undo-apply %s %s\n",
			printable(l.Path), printable(l.Undo), printable(l.Path))
	}
	if r.Stack != nil {
		p.report(r.Stack, false)
	}
}

func (p *printer) file(f *fsck.FileResult) {
	if f.Result == nil || f.Found == nil {
		return
	}
	p.report(f.Found, f.Changed)
	for _, rep := range f.Later {
		p.report(rep, f.Changed)
	}
	if f.Changed && f.Err == nil {
		if f.Left.Worst() > fsck.Note {
			fmt.Fprintf(p.w, "%s: what is left:\n", printable(f.Path))
			p.report(f.Left, false)
		}
		fmt.Fprintf(p.w, "%s: repaired; taken back by: image-fsck --undo-apply %s %s\n", printable(f.Path), printable(f.Undo), printable(f.Path))
	}
	if f.Lost != "" {
		fmt.Fprintf(p.w, "%s: content without a place is in %s\n", printable(f.Path), printable(f.Lost))
	}
	if f.Err != nil {
		return // said on stderr
	}
	fmt.Fprintf(p.w, "%s: %s\n", printable(f.Path), summary(f))
	if p.verbose {
		s := f.Left.Stats
		fmt.Fprintf(p.w, "%s: %s, disk of %d bytes, clusters of %d: %d of %d stored, %d of them compressed, %d leaked; end at %#x\n",
			printable(f.Path), f.Format, s.VirtualSize, s.ClusterSize, s.AllocatedClusters, s.TotalClusters,
			s.CompressedClusters, s.LeakedClusters, s.ImageEnd)
	}
	if !f.Own && f.Left.Remaining() > fsck.Note && p.repair {
		fmt.Fprintf(p.w, "%s: a parent, which others may share, is not repaired unless it is named itself\n", printable(f.Path))
	}
}

// report prints findings.
func (p *printer) report(r *fsck.Report, done bool) {
	for i := range r.Findings {
		f := &r.Findings[i]
		switch {
		case f.Fixed && done:
			fmt.Fprintf(p.w, "%s\n  FIXED: %s\n", line(&f.Finding), fixText(f.Fix))
		case f.Fix != nil:
			fmt.Fprintf(p.w, "%s\n  fix (%s): %s\n", line(&f.Finding), flagFor(f.Fix), fixText(f.Fix))
		default:
			fmt.Fprintln(p.w, line(&f.Finding))
		}
	}
	for _, c := range r.Counts {
		if more := r.More(c.Code); more > 0 {
			fmt.Fprintf(p.w, "%s: …and %d more of %s\n", printable(r.File), more, c.Code)
		}
	}
}

func flagFor(f *fsck.Fix) string {
	if f.Level == fsck.Preen && len(f.Loses) == 0 {
		return "-p"
	}
	return "-y"
}

// line is a finding in one line.
func line(f *fsck.Finding) string {
	s := fmt.Sprintf("%s: %s: %s", printable(f.Place.String()), f.Sev(), printable(f.Text))
	if len(f.Guest) > 0 {
		s += " (disk " + ranges(f.Guest) + ")"
	}
	return s + " [" + f.Code.Name + "]"
}

func fixText(f *fsck.Fix) string {
	if len(f.Loses) == 0 {
		return printable(f.Text)
	}
	return printable(f.Text) + ", losing disk " + ranges(f.Loses)
}

// maxRanges is how many ranges of a finding are printed.
const maxRanges = 8

func ranges(rs []blockmap.Range) string {
	var b strings.Builder
	for i, r := range rs {
		if i == maxRanges {
			fmt.Fprintf(&b, " and %d more", len(rs)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%#x+%#x", r.Off, r.Len)
	}
	return b.String()
}

// summary is the last line for a file.
func summary(f *fsck.FileResult) string {
	var parts []string
	r := f.Left
	for s := fsck.Fatal; s >= fsck.Note; s-- {
		if n, _ := r.Tally(s); n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, plural(s, n)))
		}
	}
	text := "clean"
	if r.Worst() > fsck.Note {
		text = "NOT CLEAN"
	}
	if len(parts) > 0 {
		text += ": " + strings.Join(parts, ", ")
	}
	if f.Changed {
		text += fmt.Sprintf(" (%d fixed)", f.Fixed())
	}
	return text
}

func plural(s fsck.Severity, n int64) string {
	name := map[fsck.Severity]string{fsck.Note: "note", fsck.Leak: "leak", fsck.Damage: "damaged place", fsck.Fatal: "fatal problem"}[s]
	if n != 1 {
		name += "s"
	}
	return name
}

// printable makes text from an image harmless for a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 32 || r == 127 || r >= 0x80 && r < 0xa0 || r == 0xfffd {
			return '?'
		}
		return r
	}, s)
}
