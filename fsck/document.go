package fsck

import "github.com/imagestack/imagestack/blockmap"

// DocumentVersion is the version of the JSON schema (docs/image-fsck.md). It
// goes up when a key changes its meaning or goes away; new keys may come.
const DocumentVersion = 1

// Document is what image-fsck --json prints.
type Document struct {
	Version int        `json:"version"`
	Exit    int        `json:"exit"` // the exit bits of the whole run
	Images  []ImageDoc `json:"images"`
}

// ImageDoc is one image that the user named.
type ImageDoc struct {
	Image string    `json:"image"`
	Exit  int       `json:"exit"`
	Error string    `json:"error,omitempty"`
	Files []FileDoc `json:"files"`
	// Stack is what was found between the files, as they are now; Mended what
	// was found there and fixed, Links the files that this has changed.
	Stack  *ReportDoc   `json:"stack,omitempty"`
	Mended []ReportDoc  `json:"mended,omitempty"`
	Links  []LinkChange `json:"links,omitempty"`
}

// FileDoc is one file of an image.
type FileDoc struct {
	File    string `json:"file"`
	Format  string `json:"format"`
	Own     bool   `json:"own"` // belongs to what was named; others are only checked
	Error   string `json:"error,omitempty"`
	Changed bool   `json:"changed"`
	Undo    string `json:"undo,omitempty"`
	Lost    string `json:"lost-found,omitempty"`
	Stats   *Stats `json:"stats,omitempty"` // as the file is now
	// Found is the report on the file as it was, Later what came to light
	// after a repair, Left what is there now (only after a repair).
	Found *ReportDoc  `json:"found,omitempty"`
	Later []ReportDoc `json:"later,omitempty"`
	Left  *ReportDoc  `json:"left,omitempty"`
}

// ReportDoc is a Report.
type ReportDoc struct {
	Worst    string       `json:"worst"` // clean, note, leak, damage or fatal
	Counts   []CountDoc   `json:"counts"`
	Findings []FindingDoc `json:"findings"` // the first of each code
}

// CountDoc is an exact count.
type CountDoc struct {
	Code     string   `json:"code"`
	Severity Severity `json:"severity"`
	Found    int64    `json:"found"`
	Fixed    int64    `json:"fixed"`
}

// FindingDoc is a Finding.
type FindingDoc struct {
	Code     string     `json:"code"`
	Severity Severity   `json:"severity"`
	File     string     `json:"file"`
	Offset   *int64     `json:"offset,omitempty"` // bytes of the file
	Field    string     `json:"field,omitempty"`
	Value    string     `json:"value,omitempty"`
	Guest    []RangeDoc `json:"guest,omitempty"` // bytes of the disk that it concerns
	Text     string     `json:"text"`
	Fix      *FixDoc    `json:"fix,omitempty"`
	Fixed    bool       `json:"fixed"`
}

// FixDoc is a Fix.
type FixDoc struct {
	Text  string     `json:"text"`
	Level Level      `json:"level"` // preen or full
	Loses []RangeDoc `json:"loses"`
}

// RangeDoc is a range of bytes.
type RangeDoc struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// NewDocument makes the document of a run.
func NewDocument(results []*ImageResult) *Document {
	d := &Document{Version: DocumentVersion, Images: []ImageDoc{}}
	for _, r := range results {
		i := ImageDoc{Image: r.Path, Exit: r.Exit(), Error: errorText(r.Err), Files: []FileDoc{}}
		for j := range r.Files {
			i.Files = append(i.Files, fileDoc(&r.Files[j]))
		}
		if r.Stack != nil {
			i.Stack = reportDoc(r.Stack)
		}
		for _, rep := range r.Mended {
			i.Mended = append(i.Mended, *reportDoc(rep))
		}
		i.Links = r.Links
		d.Exit |= i.Exit
		d.Images = append(d.Images, i)
	}
	return d
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func fileDoc(f *FileResult) FileDoc {
	d := FileDoc{File: f.Path, Format: f.Format, Own: f.Own, Error: errorText(f.Err), Undo: f.Undo, Lost: f.Lost}
	r := f.Result
	if r == nil {
		return d
	}
	d.Changed = r.Changed
	if r.Found != nil {
		d.Found = reportDoc(r.Found)
	}
	for _, rep := range r.Later {
		d.Later = append(d.Later, *reportDoc(rep))
	}
	if r.Left != nil {
		d.Stats = &r.Left.Stats
		if r.Left != r.Found {
			d.Left = reportDoc(r.Left)
		}
	}
	return d
}

func reportDoc(r *Report) *ReportDoc {
	d := &ReportDoc{Worst: "clean", Counts: []CountDoc{}, Findings: []FindingDoc{}}
	if w := r.Worst(); w != 0 {
		d.Worst = w.String()
	}
	for _, c := range r.Counts {
		d.Counts = append(d.Counts, CountDoc{c.Code.Name, c.Code.Severity, c.Found, c.Fixed})
	}
	for i := range r.Findings {
		f := &r.Findings[i]
		fd := FindingDoc{Code: f.Code.Name, Severity: f.Sev(), File: f.Place.File, Field: f.Place.Field,
			Value: f.Place.ValueText(), Guest: rangeDocs(f.Guest), Text: f.Text, Fixed: f.Fixed}
		if f.Place.Offset >= 0 {
			fd.Offset = &f.Place.Offset
		}
		if f.Fix != nil {
			fd.Fix = &FixDoc{Text: f.Fix.Text, Level: f.Fix.Level, Loses: rangeDocs(f.Fix.Loses)}
		}
		d.Findings = append(d.Findings, fd)
	}
	return d
}

func rangeDocs(rs []blockmap.Range) []RangeDoc {
	out := make([]RangeDoc, 0, len(rs))
	for _, r := range rs {
		out = append(out, RangeDoc{r.Off, r.Len})
	}
	return out
}
