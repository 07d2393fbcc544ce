package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/layers"
)

// Exit codes of qemu-img check.
const (
	qemuOK          = 0
	qemuError       = 1 // the check could not be done, or not in full
	qemuCorrupt     = 2
	qemuLeaks       = 3
	qemuUnsupported = 63 // the format has no check
)

// qemuCheck has the keys of qemu-img check --output=json. Those that may be
// absent are so when they are 0.
type qemuCheck struct {
	ImageEnd         int64  `json:"image-end-offset,omitempty"`
	TotalClusters    int64  `json:"total-clusters,omitempty"`
	CheckErrors      int64  `json:"check-errors"`
	Corruptions      int64  `json:"corruptions,omitempty"`
	Leaks            int64  `json:"leaks,omitempty"`
	CorruptionsFixed int64  `json:"corruptions-fixed,omitempty"`
	LeaksFixed       int64  `json:"leaks-fixed,omitempty"`
	Allocated        int64  `json:"allocated-clusters,omitempty"`
	Fragmented       int64  `json:"fragmented-clusters,omitempty"`
	Compressed       int64  `json:"compressed-clusters,omitempty"`
	Filename         string `json:"filename"`
	Format           string `json:"format"`
}

// compatQemu prints what qemu-img check prints on stdout and returns its exit
// code.
func (r *run) compatQemu(w io.Writer, res *fsck.ImageResult) (int, error) {
	if err := res.Err; err != nil || len(res.Files) == 0 || res.Files[0].Result == nil || res.Files[0].Left == nil {
		return qemuError, nil // said on stderr
	}
	f := &res.Files[0]
	if f.Err != nil {
		if errors.Is(f.Err, layers.ErrUnsupported) {
			return qemuUnsupported, nil
		}
		return qemuError, nil
	}
	if f.Format == "raw" {
		fmt.Fprintln(r.stderr, "image-fsck: This image format does not support checks")
		return qemuUnsupported, nil
	}
	q := newQemuCheck(f)
	if d := notOpened(f.Left, q.TotalClusters == 0); d != nil {
		// What qemu-img cannot even open it does not report on.
		fmt.Fprintf(r.stderr, "image-fsck: Could not open '%s': %s\n", f.Path, line(&d.Finding))
		return qemuError, nil
	}
	for i := range f.Found.Findings {
		if d := &f.Found.Findings[i]; !r.JSON && d.Sev() > fsck.Note {
			kind := "ERROR"
			if d.Sev() == fsck.Leak {
				kind = "Leaked cluster"
			}
			fmt.Fprintf(r.stderr, "%s %s\n", kind, line(&d.Finding))
		}
	}
	if r.JSON {
		if err := cli.PrintJSON(w, q); err != nil {
			return qemuError, err
		}
	} else {
		q.text(w)
	}
	switch {
	case q.Corruptions > 0:
		return qemuCorrupt, nil
	case q.CheckErrors > 0:
		return qemuError, nil
	case q.Leaks > 0:
		return qemuLeaks, nil
	}
	return qemuOK, nil
}

// refused are the codes of findings with which qemu-img does not open an image.
var refused = map[string]bool{
	"qcow2.header.truncated": true, "qcow2.header.magic": true, "qcow2.header.version": true,
	"qcow2.header.cluster-bits": true, "qcow2.header.header-length": true, "qcow2.header.refcount-order": true,
	"qcow2.header.crypt-method": true, "qcow2.header.incompatible-features": true, "qcow2.header.compression-type": true,
	"qcow2.header.raw-data-file": true, "qcow2.header.backing-name": true, "qcow2.header.extension-length": true,
	"qcow2.header.l1-size": true, "qcow2.snapshots.table": true, "qcow2.snapshots.extra-long": true,
	"qcow2.bitmaps.directory": true, "qcow2.bitmaps.table-entry": true, "qcow2.datafile.no-name": true,
}

// notOpened returns a finding with which qemu-img does not open the image.
// fatal says that any fatal one is.
func notOpened(r *fsck.Report, fatal bool) *fsck.Detail {
	for i := range r.Findings {
		d := &r.Findings[i]
		switch code := d.Code.Name; {
		case fatal && d.Sev() == fsck.Fatal && code != "qcow2.header.l1-offset", refused[code]:
			return d
		case code == "qcow2.header.size" && d.Place.Value != uint64(0), // a disk of no bytes is one
			code == "qcow2.header.l1-offset" && unaligned(d.Place.Value),
			code == "qcow2.reftable.header" && (d.Place.Field == "refcount_table_offset" && unaligned(d.Place.Value) ||
				d.Place.Field == "refcount_table_clusters" && d.Place.Value != uint32(0)):
			return d
		}
	}
	return nil
}

// unaligned reports that an offset is on no cluster boundary of any size.
func unaligned(v any) bool {
	off, ok := v.(uint64)
	return ok && off%512 != 0
}

// asCorruption are the codes of leaks that qemu-img counts as corruptions: COPIED flags
// that do not say what the counts say.
var asCorruption = map[string]bool{"qcow2.l1.copied-clear": true, "qcow2.l2.copied-clear": true}

func newQemuCheck(f *fsck.FileResult) *qemuCheck {
	s := &f.Left.Stats
	q := &qemuCheck{
		ImageEnd: s.ImageEnd, TotalClusters: s.TotalClusters, CheckErrors: s.CheckErrors,
		Allocated: s.AllocatedClusters, Fragmented: s.FragmentedClusters, Compressed: s.CompressedClusters,
		Filename: f.Path, Format: f.Format,
	}
	if q.Format == "ploop" {
		q.Format = "parallels"
	}
	q.Corruptions, q.Leaks = tally(f.Left)
	if f.Changed {
		corruptions, leaks := tally(f.Found)
		for _, rep := range f.Later {
			c, l := tally(rep)
			corruptions, leaks = max(corruptions, c), max(leaks, l)
		}
		q.CorruptionsFixed = max(0, corruptions-q.Corruptions)
		q.LeaksFixed = max(0, leaks-q.Leaks)
	}
	return q
}

// tally counts corruptions, one for each finding, and leaks, which qemu-img
// counts in clusters.
func tally(r *fsck.Report) (corruptions, leaks int64) {
	for _, s := range []fsck.Severity{fsck.Damage, fsck.Fatal} {
		n, _ := r.Tally(s)
		corruptions += n
	}
	leaks, _ = r.Tally(fsck.Leak)
	for _, n := range r.Counts {
		switch {
		case asCorruption[n.Code.Name]:
			corruptions += n.Found
			leaks -= n.Found
		case n.Code.Name == "qcow2.refcount.too-high-copied": // both, for qemu-img
			corruptions += n.Found
		}
	}
	if leaks > 0 {
		leaks = max(leaks, r.Stats.LeakedClusters)
	}
	return corruptions, leaks
}

// text is the human form.
func (q *qemuCheck) text(w io.Writer) {
	if q.CorruptionsFixed+q.LeaksFixed > 0 {
		fmt.Fprintf(w, "The following inconsistencies were found and repaired:\n\n    %d leaked clusters\n    %d corruptions\n\n"+
			"Double checking the fixed image now...\n", q.LeaksFixed, q.CorruptionsFixed)
	}
	if q.Corruptions+q.Leaks+q.CheckErrors == 0 {
		fmt.Fprintln(w, "No errors were found on the image.")
	}
	if q.Corruptions > 0 {
		fmt.Fprintf(w, "\n%d errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n", q.Corruptions)
	}
	if q.Leaks > 0 {
		fmt.Fprintf(w, "\n%d leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n", q.Leaks)
	}
	if q.CheckErrors > 0 {
		fmt.Fprintf(w, "\n%d internal errors have occurred during the check.\n", q.CheckErrors)
	}
	if q.TotalClusters > 0 && q.Allocated > 0 {
		fmt.Fprintf(w, "%d/%d = %0.2f%% allocated, %0.2f%% fragmented, %0.2f%% compressed clusters\n",
			q.Allocated, q.TotalClusters, 100*float64(q.Allocated)/float64(q.TotalClusters),
			100*float64(q.Fragmented)/float64(q.Allocated), 100*float64(q.Compressed)/float64(q.Allocated))
	}
	if q.ImageEnd > 0 {
		fmt.Fprintf(w, "Image end offset: %d\n", q.ImageEnd)
	}
}
