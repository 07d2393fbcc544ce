package fsck

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// owned is an own qcow2 image of the stack whose header may be changed.
func (s *Stack) owned(path string) (*link, bool) {
	for _, f := range s.files {
		if f.Own && f.Format == "qcow2" && filepath.Clean(f.Path) == filepath.Clean(path) {
			bf, err := backend.Open(f.Path, backend.Options{})
			if err != nil {
				return nil, false
			}
			defer bf.Close() // opened for reading
			l, err := readLink(bf)
			return l, err == nil
		}
	}
	return nil, false
}

// offer reports the finding with a change as its fix.
func (s *Stack) offer(f *Finding, sink Sink, l *link, c change, level Level, text string) {
	// Does it fit?
	p := &Plan{o: PlanOptions{}, pages: newPageStore(1<<20, nil)}
	if err := c.plan(l, p); err != nil {
		f.Text += "; " + err.Error()
		sink.Report(*f)
		return
	}
	c.old = l.head
	f.Fix = &Fix{Text: text, Level: level}
	if sink.Report(*f) {
		s.wanted = append(s.wanted, c)
	}
}

// wholeAlone reports whether a qcow2 image stores its whole disk, so that
// nothing is ever read from a parent. An image with snapshots is not looked
// into.
func (s *Stack) wholeAlone(ctx context.Context, path string) bool {
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return false
	}
	rel, err := open.NewRelated(path, s.o)
	if err != nil {
		_ = f.Close() // opened for reading
		return false
	}
	defer rel.Close()
	img, err := qcow2.Open(ctx, f, layers.OpenOptions{Path: path, Cache: layers.NewCache(evidenceCache),
		OpenFile: func(name string, _ bool) (backend.File, error) {
			df, _, err := rel.Open("data file", name)
			return df, err
		}})
	if err != nil {
		_ = f.Close() // opened for reading
		return false
	}
	defer img.Close()
	for e, err := range blockmap.All(ctx, img, 0, img.Size()) {
		if err != nil || e.Kind == blockmap.Unmapped {
			return false
		}
	}
	info, err := img.Describe(ctx)
	return err == nil && len(info.Snapshots) == 0 && img.Size() > 0
}

// fixMissing handles a parent that does not exist.
func (s *Stack) fixMissing(ctx context.Context, f *Finding, ie *layers.ImageError, sink Sink) {
	if ie == nil || ie.Field != "backing file" {
		sink.Report(*f)
		return
	}
	child := ie.Path
	l, ok := s.owned(child)
	if !ok {
		f.Text += "; name " + child + " itself to have that repaired"
		sink.Report(*f)
		return
	}
	if s.wholeAlone(ctx, child) {
		s.offer(f, sink, l, change{path: child}, Preen, "take the name of the parent away: the image stores the whole disk, and nothing is read from a parent")
		return
	}
	found := s.namesakes(child, l)
	if len(found) != 1 {
		if len(found) > 1 {
			f.Text += fmt.Sprintf("; there are several files of this name: %q", found)
		}
		f.Text += "; if it was moved: qemu-img rebase -u -F FORMAT -b FILE " + child
		sink.Report(*f)
		return
	}
	s.offer(f, sink, l, change{path: child, name: found[0], format: l.format}, Full,
		"name "+found[0]+" instead, the only file of this name and format beside the image or in the allowed directories; likely and not proved")
}

// namesakes are files that have the base name of the missing parent and the
// stated format, in the directory of the child and the allowed ones, as the
// child has to name them.
func (s *Stack) namesakes(child string, l *link) (out []string) {
	base := filepath.Base(l.name)
	for i, dir := range append([]string{filepath.Dir(child)}, s.o.AllowPaths...) {
		path := filepath.Join(dir, base)
		st, err := os.Stat(path)
		if err != nil || !st.Mode().IsRegular() || sameFile(path, child) || s.inStack(path) || !s.isFormat(path, l.format) {
			continue
		}
		name := base
		if i > 0 {
			if abs, err := filepath.Abs(path); err == nil {
				name = abs
			}
		}
		out = append(out, name)
	}
	return out
}

// inStack reports whether the file is part of the stack already: to name it
// would make a loop.
func (s *Stack) inStack(path string) bool {
	for _, img := range s.trace.Images {
		if sameFile(img.Path, path) {
			return true
		}
	}
	return false
}

// isFormat reports whether the file begins as its stated format does. One that
// is not stated is never taken from the content.
func (s *Stack) isFormat(path, format string) bool {
	if format == "" {
		format = s.o.BackingFormat
	}
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return false
	}
	defer f.Close() // opened for reading
	head := make([]byte, 512)
	n, _ := f.ReadAt(head, 0) // what cannot be read is of no format
	head = head[:n]
	switch format {
	case "qcow2":
		return qcow2.Probe(head)
	case "ploop", "parallels":
		return ploop.Probe(head)
	case "raw":
		return !qcow2.Probe(head) && !ploop.Probe(head)
	}
	return false
}

// fixLoop handles an image that is its own parent: one that stores the whole
// disk is the base.
func (s *Stack) fixLoop(ctx context.Context, f *Finding, ie *layers.ImageError, sink Sink) {
	in := false
	for _, img := range s.trace.Images {
		in = in || ie != nil && sameFile(img.Path, ie.Path)
		if !in || !img.Opened || img.Format != "qcow2" || !s.wholeAlone(ctx, img.Path) {
			continue
		}
		l, ok := s.owned(img.Path)
		if !ok {
			f.Text += "; " + img.Path + " stores the whole disk: name it itself to have its parent taken away"
			continue
		}
		s.offer(f, sink, l, change{path: img.Path}, Preen, "take the parent away from "+img.Path+": it stores the whole disk, so it is the base")
		return
	}
	f.Text += "; which image is the base is not to be seen: take its parent away with qemu-img rebase -u -b '' IMAGE"
	sink.Report(*f)
}

// fixFormat handles a parent whose format is not stated, or wrongly: only the
// user can state one, with BackingFormat, and the content must not contradict.
func (s *Stack) fixFormat(f *Finding, ie *layers.ImageError, sink Sink) {
	child, parent, ok := s.lastPair(ie)
	if !ok {
		sink.Report(*f)
		return
	}
	l, ok := s.owned(child)
	if !ok || s.o.BackingFormat == "" || s.sameFormat(l.format) || !s.isFormat(parent, s.o.BackingFormat) {
		if ok && s.o.BackingFormat == "" {
			f.Text += "; if you know the format, image-fsck -y --backing-format FORMAT writes it into " + child
		}
		sink.Report(*f)
		return
	}
	s.offer(f, sink, l, change{path: child, name: l.name, format: s.backingFormat()}, Full, "state "+s.backingFormat()+", as --backing-format says")
}

// lastPair is the child that states a format and the parent of which it does.
func (s *Stack) lastPair(ie *layers.ImageError) (child, parent string, ok bool) {
	images := s.trace.Images
	n := len(images)
	if ie == nil || n == 0 {
		return "", "", false
	}
	if n > 1 && !images[n-1].Opened {
		return images[n-2].Path, images[n-1].Path, true
	}
	// Refused before it was opened: the error is of the parent's content.
	if images[n-1].Opened && ie.Field == "magic" && !sameFile(ie.Path, images[n-1].Path) {
		return images[n-1].Path, ie.Path, true
	}
	return "", "", false
}

// backingFormat is the user's word in QEMU's.
func (s *Stack) backingFormat() string {
	if s.o.BackingFormat == "ploop" {
		return "parallels"
	}
	return s.o.BackingFormat
}

func (s *Stack) sameFormat(stated string) bool {
	if stated == "ploop" {
		stated = "parallels"
	}
	return stated == s.backingFormat()
}

// checkStatements looks for parents whose format only --backing-format states.
func (s *Stack) checkStatements(sink Sink) {
	for i, img := range s.trace.Images {
		if i+1 >= len(s.trace.Images) || img.Format != "qcow2" || !img.Opened {
			continue
		}
		l, ok := s.owned(img.Path)
		if !ok || l.name == "" || l.format != "" || s.o.BackingFormat == "" {
			continue
		}
		f := Finding{Code: codeParentUnstated, Place: Place{File: img.Path, Offset: -1, Field: "backing format"}, Text: "the format of " + l.name + " is not stated"}
		if !s.isFormat(s.trace.Images[i+1].Path, s.o.BackingFormat) {
			sink.Report(f)
			continue
		}
		s.offer(&f, sink, l, change{path: img.Path, name: l.name, format: s.backingFormat()}, Full, "state "+s.backingFormat()+", as --backing-format says")
	}
}

// repairLinks makes the changes that the last Check was asked for.
func (s *Stack) repairLinks(ctx context.Context, h *holder, undos UndoStore) (done []LinkChange, err error) {
	for _, c := range s.wanted {
		u, err := c.repair(ctx, h, undos)
		if err != nil {
			return done, fmt.Errorf("%s: %w", c.path, err)
		}
		done = append(done, LinkChange{Path: c.path, Undo: u.name})
	}
	return done, nil
}

// LinkChange is an image of which the name or the format of the parent was
// changed.
type LinkChange struct {
	Path string `json:"file"`
	Undo string `json:"undo"`
}

func (c *change) repair(ctx context.Context, h *holder, undos UndoStore) (_ *openUndo, err error) {
	f, err := openLocked(c.path, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	u, err := h.undoFor(c.path, undos)
	if err != nil {
		return nil, err
	}
	undone, err := c.make(ctx, f, ExecuteOptions{Undo: u.File, Name: filepath.Base(c.path), MTime: mtimeOf(c.path),
		SyncDir: func() error { return undos.Sync(u.name) }})
	u.used = u.used || !undone
	return u, err
}
