package main

import (
	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/rewrite"
)

// documentVersion counts changes of the JSON document that a script would
// notice; new keys do not count.
const documentVersion = 1

// document is what is printed with --json, see docs/image-compact.md. Lengths
// and offsets are bytes.
type document struct {
	Version int    `json:"version"`
	Action  action `json:"action"`
	// Complete is false when the run was interrupted or failed.
	Complete bool   `json:"complete"`
	Error    string `json:"error,omitempty"`
	To       string `json:"to,omitempty"`
	*rewrite.Report
	// Reclaimable, or reclaimed, by all steps together.
	Reclaim int64  `json:"reclaim"`
	Guest   []area `json:"guest"`
}

// area is a part of the disk that was looked at.
type area struct {
	Name     string `json:"name"`             // disk, p1, p2/vg/root, gaps
	Offset   *int64 `json:"offset,omitempty"` // of one in one piece
	Length   int64  `json:"length"`
	Type     string `json:"type,omitempty"`
	Judged   bool   `json:"judged"`
	Free     int64  `json:"free"`     // proven free
	Replayed int64  `json:"replayed"` // blocks read from the journal in place of their targets
	Code     string `json:"code,omitempty"`
	Reason   string `json:"reason,omitempty"`
}

func newDocument(act action, r *rewrite.Report, err error) *document {
	d := &document{Version: documentVersion, Action: act, Complete: err == nil, Report: r, Guest: []area{}}
	if err != nil {
		d.Error = err.Error()
	}
	for _, s := range r.Steps {
		d.Reclaim += s.Bytes
	}
	for _, a := range r.Guest {
		d.Guest = append(d.Guest, newArea(a))
	}
	return d
}

func newArea(a guestfs.Area) area {
	n := area{Name: a.Name, Length: a.Where.Len, Type: a.Type, Judged: a.Refusal == nil, Free: a.Free, Replayed: a.Info.Replayed}
	if a.Where.Off >= 0 {
		n.Offset = &a.Where.Off
	}
	if a.Refusal != nil {
		n.Code, n.Reason = string(a.Refusal.Code), a.Refusal.Text
	}
	return n
}
