package fsck

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// What can be wrong between the files of a stack. Repaired is only what the
// files prove, or the user states; stack_fix.go has the fixes. What is wrong
// between a descriptor and its images is a matter of the descriptor's checker.
var (
	codeParentMissing = Register("stack.parent.missing", Fatal,
		"The image names a parent, or its descriptor an image, that does not exist. The disk cannot be read where the image itself has no data.",
		"Bring the file back. Else: -p and -y take the name of the parent away when the image stores the whole disk by itself, so that nothing is read from a parent; -y names the file of this name beside the image, if it is of the stated format and there is only one. For a parent with another name: qemu-img rebase -u -F FORMAT -b FILE IMAGE.")
	codeParentLoop = Register("stack.parent.cycle", Fatal,
		"An image is its own parent, directly or over others. The stack has no end and cannot be opened.",
		"-p and -y take the name of the parent away from an image of the loop that stores the whole disk by itself, for that one is the base. Else find out from backups or names which image is the base, and take its parent away with qemu-img rebase -u -b '' IMAGE.")
	codeParentFormat = Register("stack.parent.wrong-format", Fatal,
		"A parent is not an image of the format that its child states.",
		"Check the parent as what it is (image-fsck --format). If only the statement is wrong, image-fsck -y --backing-format FORMAT writes the right one into the child.")
	codeParentDoubt = Register("stack.parent.not-followed", Note,
		"A parent is not opened: its format is not stated, or doubtful, or it lies outside the permitted directories. Neither it nor anything below was checked. (Fatal where it is the first image of a bundle: nothing was checked, then.)",
		"State --backing-format, or permit the directory with --allow-path, if the image is trusted. A format is never guessed, because a guest can make its disk begin like any image; -y writes the one that --backing-format states into the child.")
	codeParentUnstated = Register("stack.parent.format-unstated", Note,
		"An image does not state the format of its parent. QEMU guesses it from the content, which a guest can forge.",
		"-y writes the format that --backing-format states into the image.")
	codeParentBroken = Register("stack.parent.unreadable", Fatal,
		"An image of the stack cannot be opened, so what lies below it is not known.",
		"Repair that image first; its own findings say what is wrong with it.")
	codeParentNewer = Register("stack.parent.newer", Note,
		"A parent was modified after the last change of its child. If its content changed, the child does not fit it any more.",
		"Nothing can be repaired: what the child was made upon is gone. Find out what wrote to the parent; copying or touching the file also makes it newer. If its content did change, restore the parent from a backup of before the child was made, or check the files in the guest (--guest).")
	codeParentLonger = Register("stack.parent.longer", Note,
		"A parent is a longer disk than its child. The rest is hidden, and appears when the child grows without being told to hide it.",
		"Nothing, unless the child is to grow: image-stack resize writes zeros there.")
	codeParentShorter = Register("stack.parent.shorter", Note,
		"A parent is a shorter disk than its child. What lies behind its end reads as zeros.",
		"Nothing: this is what growing a disk leaves.")
	codeBaseIsTop = Register("stack.base.is-top", Note,
		"The parent of an image outside a ploop bundle is the current top of the bundle, to which the bundle's own tools write. Each write there damages the child.",
		"Nothing is repaired: who keeps what only their owner knows. Make a snapshot of the bundle first (ploop snapshot) and use that as the parent, or do not run the bundle any more.")
	codeTopIsBase = Register("stack.top.is-base", Note,
		"Another image in the same directory names this one as its parent. A change of this one's content, also by a repair, damages the other.",
		"Nothing is wrong as long as nobody writes to this one. Check and repair both, and look at the ranges that a repair names as lost.")
)

// StackFile is one file that belongs to an image.
type StackFile struct {
	Path string
	// Format is that of the checker: raw, ploop, qcow2, ploop-descriptor.
	Format string
	// Own tells that it is part of what the user named, and not only a parent
	// that others may share: a repair changes only own files.
	Own bool
}

// Stack are the files that belong to an image and how they fit.
type Stack struct {
	path  string
	o     open.Options
	trace *open.Trace
	files []StackFile
	desc  map[string]*ploop.Descriptor
	// known are the files, so that a long chain is not asked for one by one.
	known map[fileKey]bool
	// parents tells of the images of a chain or descriptor whether they have one.
	parents map[string]map[fileKey]bool
	// wanted are the fixes that the last Check was asked for.
	wanted []change
}

// FindStack finds what belongs to the image, descriptor or bundle directory at
// path, as far as that can be found. Of o it uses Format, BackingFormat and
// AllowPaths. Errors are those of the named file itself.
func FindStack(ctx context.Context, path string, o open.Options) (*Stack, error) {
	t, err := open.Follow(ctx, path, o)
	if err != nil {
		return nil, err
	}
	s := &Stack{path: path, o: o, trace: t, desc: map[string]*ploop.Descriptor{},
		known: map[fileKey]bool{}, parents: map[string]map[fileKey]bool{}}
	if len(t.Images) == 0 && len(t.Descriptors) == 0 {
		return nil, t.Err
	}
	if errors.Is(t.Err, layers.ErrInUse) {
		return nil, t.Err
	}
	bundle := namesBundle(path)
	for i, xml := range t.Descriptors {
		s.known[keyOf(xml)] = true
		s.files = append(s.files, StackFile{Path: xml, Format: "ploop-descriptor", Own: bundle && i == 0})
		if d, err := ploop.ReadDescriptor(xml); err == nil {
			s.desc[xml] = d
		}
	}
	for i, img := range t.Images {
		own := i == 0 || bundle && filepath.Dir(img.Path) == filepath.Dir(t.Descriptors[0])
		s.add(StackFile{Path: img.Path, Format: img.Format, Own: own})
	}
	if bundle {
		if err := s.addBranches(t.Descriptors[0]); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Files are all files, the descriptors first and then the images, the top one
// first.
func (s *Stack) Files() []StackFile { return s.files }

func (s *Stack) add(f StackFile) {
	k := keyOf(f.Path)
	if k != (fileKey{}) && s.known[k] {
		return
	}
	s.known[k] = true
	s.files = append(s.files, f)
}

// addBranches adds the images of a bundle that the current top does not stand
// on.
func (s *Stack) addBranches(xml string) error {
	d := s.desc[xml]
	if d == nil {
		return nil
	}
	rel, err := open.NewRelated(xml, s.o)
	if err != nil {
		return err
	}
	defer rel.Close()
	for _, ref := range d.Images() {
		f, path, err := rel.Open("StorageData/Storage/Image/File", ref.File)
		if err != nil {
			continue // reported by Check
		}
		_ = f.Close() // opened for reading
		s.add(StackFile{Path: path, Format: ref.Format, Own: true})
	}
	return nil
}

// namesBundle reports whether path is a directory or a descriptor.
func namesBundle(path string) bool {
	st, err := os.Stat(path)
	return err == nil && (st.IsDir() || strings.EqualFold(filepath.Ext(path), ".xml"))
}

func sameFile(a, b string) bool {
	sa, err1 := os.Stat(a)
	sb, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(sa, sb)
}

// Check reports what is wrong between the files. It opens files for reading
// only; the fixes that the sink wants are remembered.
func (s *Stack) Check(ctx context.Context, sink Sink) error {
	s.wanted = nil
	if errors.Is(s.trace.Err, unix.EIO) {
		return s.trace.Err // the disk under the image, not the image
	}
	s.checkEnd(ctx, sink)
	s.checkStatements(sink)
	images := s.trace.Images
	for i := 1; i < len(images); i++ {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		s.checkPair(images[i-1], images[i], sink)
	}
	for _, xml := range s.trace.Descriptors {
		if d := s.desc[xml]; d != nil {
			s.checkBundle(xml, d, sink)
		}
	}
	return s.checkChildren(ctx, sink)
}

// checkEnd reports why the stack ends before its lowest layer.
func (s *Stack) checkEnd(ctx context.Context, sink Sink) {
	err := s.trace.Err
	if err == nil {
		return
	}
	f := Finding{Place: Place{File: s.path, Offset: -1}, Text: err.Error()}
	var ie *layers.ImageError
	if errors.As(err, &ie) {
		f.Place = Place{File: ie.Path, Offset: ie.Offset, Field: ie.Field, Value: ie.Value}
		f.Text = ie.Err.Error()
	}
	below := len(s.trace.Images) > 1
	switch {
	case s.ofDescriptor(ie, err):
		return // its checker says more
	case errors.Is(err, fs.ErrNotExist):
		f.Code = codeParentMissing
		s.fixMissing(ctx, &f, ie, sink)
		return
	case errors.Is(err, open.ErrLoop):
		f.Code = codeParentLoop
		s.fixLoop(ctx, &f, ie, sink)
		return
	case errors.Is(err, layers.ErrPolicy):
		f.Code = codeParentDoubt
		if ie != nil && slices.Contains(s.trace.Descriptors, ie.Path) &&
			!slices.ContainsFunc(s.trace.Images, func(t open.Traced) bool { return t.Opened }) {
			f.Severity = Fatal // nothing was checked: not clean
		}
		s.fixFormat(&f, ie, sink)
		return
	case errors.Is(err, layers.ErrFormat) && below:
		f.Code = codeParentFormat
		s.fixFormat(&f, ie, sink)
		return
	default:
		f.Code = codeParentBroken
		if !below {
			// The image's own findings tell how bad that is.
			f.Severity = Note
		}
	}
	sink.Report(f)
}

// ofDescriptor reports whether the stack ends because of something that the
// checker of the descriptor finds.
func (s *Stack) ofDescriptor(ie *layers.ImageError, err error) bool {
	if ie == nil || !slices.Contains(s.trace.Descriptors, ie.Path) {
		return false
	}
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, layers.ErrCorrupt) && s.desc[ie.Path] != nil
}

// checkPair looks at a layer and the one below it.
func (s *Stack) checkPair(child, parent open.Traced, sink Sink) {
	sc, err1 := os.Stat(child.Path)
	sp, err2 := os.Stat(parent.Path)
	if err1 == nil && err2 == nil && sp.ModTime().After(sc.ModTime()) {
		sink.Report(Finding{Code: codeParentNewer, Place: Place{File: parent.Path, Offset: -1},
			Text: fmt.Sprintf("modified %s, after its child %s (%s)", stamp(sp), child.Path, stamp(sc))})
	}
	if !child.Opened || !parent.Opened || child.Size == parent.Size {
		return
	}
	code := codeParentShorter
	if parent.Size > child.Size {
		code = codeParentLonger
	}
	text := fmt.Sprintf("a disk of %d bytes under one of %d bytes, %s", parent.Size, child.Size, child.Path)
	if code == codeParentLonger && child.Format == "ploop" && parent.Format == "ploop" {
		text += "; ploop only makes disks longer: unless this one was made shorter, the order of the images is wrong"
	}
	sink.Report(Finding{Code: code, Place: Place{File: parent.Path, Offset: -1}, Text: text})
}

func stamp(st os.FileInfo) string { return st.ModTime().UTC().Format("2006-01-02 15:04:05.000 MST") }

// checkBundle looks for a child from outside on the current top of a bundle.
func (s *Stack) checkBundle(xml string, d *ploop.Descriptor, sink Sink) {
	for i := 1; i < len(s.trace.Images); i++ {
		child, base := s.trace.Images[i-1], s.trace.Images[i]
		if filepath.Dir(child.Path) == filepath.Dir(xml) && child.Format != "qcow2" || base.Format == "qcow2" {
			continue
		}
		for _, ref := range d.Images() {
			if ref.GUID == d.Top() && sameFile(resolveIn(xml, ref.File), base.Path) {
				sink.Report(Finding{Code: codeBaseIsTop, Text: "the parent of " + child.Path + " is the current top of the bundle",
					Place: Place{File: xml, Offset: -1, Field: "Snapshots/TopGUID", Value: d.Top()}})
			}
		}
	}
}

func resolveIn(from, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(from), name)
}
