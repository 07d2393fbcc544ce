package open

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/layers/qcow2"
	"github.com/imagestack/imagestack/layers/raw"
)

// openTop opens what the user named, and everything under it.
func (op *opener) openTop(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.IsDir() {
		path = filepath.Join(path, ploop.DescriptorName)
		if _, err := os.Stat(path); err != nil {
			return err
		}
	}
	if strings.EqualFold(filepath.Ext(path), ".xml") && op.o.Format != formatRaw {
		if !st.IsDir() {
			op.named = path
		}
		if f := normalFormat(op.o.Format); f != "" && f != formatPloop {
			return fmt.Errorf("%s: a ploop descriptor, not %s: %w", path, op.o.Format, layers.ErrFormat)
		}
		return op.openBundle(path, op.o.Snapshot, "")
	}
	f, err := backend.Open(path, backend.Options{Writable: op.writableLayer()})
	if err != nil {
		return err
	}
	head, err := readHead(f)
	format := normalFormat(op.o.Format)
	if err == nil && format == "" {
		format, err = detect(path, head)
	}
	var xml, guid string
	if err == nil && format == formatPloop && op.o.Format == "" {
		xml, guid, err = op.bundleOf(path)
	}
	if err != nil || guid != "" {
		_ = f.Close() // only looked at so far
	}
	if err != nil {
		return err
	}
	if guid != "" {
		snapshot := guid
		if op.o.Snapshot != "" {
			snapshot = op.o.Snapshot
		}
		return op.openBundle(xml, snapshot, guid)
	}
	if op.writableLayer() && op.o.Snapshot != "" {
		_ = f.Close() // only looked at so far
		return errSnapshot(path, op.o.Snapshot)
	}
	return op.openChain(f, path, format)
}

// openChain adds the image in f, which it owns, and its parents.
func (op *opener) openChain(f backend.File, path, format string) error {
	for {
		parent, err := op.add(f, path, format)
		if err != nil {
			_ = f.Close() // never changed
			return err
		}
		if parent.Name == "" {
			return nil
		}
		if f, path, format, err = op.openParent(path, parent); err != nil {
			return err
		}
		// The delta of a ploop bundle has parents that only its descriptor
		// knows.
		if format != formatPloop {
			continue
		}
		xml, guid, err := op.bundleOf(path)
		if err != nil || guid != "" {
			_ = f.Close() // only looked at
		}
		if err != nil {
			return err
		}
		if guid != "" {
			return op.openBundle(xml, guid, guid)
		}
	}
}

// openParent opens the parent of the image at path and decides its format.
func (op *opener) openParent(path string, parent layers.Parent) (backend.File, string, string, error) {
	if len(op.pile) >= layers.MaxDepth {
		return nil, "", "", errDepth(path)
	}
	format := normalFormat(parent.Format)
	if format == "" {
		format = normalFormat(op.o.BackingFormat)
	}
	if format == "" {
		return nil, "", "", &layers.ImageError{Path: path, Layer: len(op.pile) - 1, Offset: -1, Field: "backing file", Value: parent.Name,
			Err: fmt.Errorf("%w: the image does not say the format of its backing file; state --backing-format", layers.ErrPolicy)}
	}
	if err := checkFormat(format); err != nil {
		return nil, "", "", &layers.ImageError{Path: path, Layer: len(op.pile) - 1, Offset: -1, Field: "backing format", Value: parent.Format, Err: err}
	}
	f, next, err := op.policy.open(path, "backing file", parent.Name, false)
	if err != nil {
		return nil, "", "", err
	}
	if format == formatRaw && normalFormat(op.o.BackingFormat) != formatRaw {
		head, err := readHead(f)
		if err == nil {
			err = confirmRaw(next, len(op.pile), head)
		}
		if err != nil {
			_ = f.Close() // opened for reading
			return nil, "", "", err
		}
	}
	return f, next, format, nil
}

// add makes a layer of f and puts it under the pile. On error f stays the
// caller's.
func (op *opener) add(f backend.File, path, format string) (layers.Parent, error) {
	var none layers.Parent
	if len(op.pile) >= layers.MaxDepth {
		return none, errDepth(path)
	}
	writable := op.writableLayer()
	op.found = append(op.found, Traced{Path: path, Format: format})
	if err := op.claim(f, path, writable); err != nil {
		return none, err
	}
	lo := layers.OpenOptions{Path: path, Writable: writable, Cache: op.cache, OpenFile: op.openerFor(path), MaxTables: op.o.MaxTables}
	if len(op.pile) == 0 {
		lo.Snapshot = op.o.Snapshot
	}
	switch format {
	case formatRaw:
		l, err := raw.Open(op.ctx, f, lo)
		if err != nil {
			return none, err
		}
		op.pile = append(op.pile, l)
		return none, nil
	case formatPloop:
		l, err := ploop.Open(op.ctx, f, lo)
		if err != nil {
			return none, err
		}
		op.pile = append(op.pile, l)
		return none, nil
	}
	l, err := qcow2.Open(op.ctx, f, lo)
	if err != nil {
		return none, err
	}
	op.pile = append(op.pile, l)
	return l.Parent(), nil
}

// openerFor opens the further files that the image at path names.
func (op *opener) openerFor(path string) func(string, bool) (backend.File, error) {
	return func(name string, writable bool) (backend.File, error) {
		f, full, err := op.policy.open(path, "data file", name, writable)
		if err != nil {
			return nil, err
		}
		if err := op.claim(f, full, writable); err != nil {
			_ = f.Close() // never changed
			return nil, err
		}
		return f, nil
	}
}

// claim remembers the file, so that nothing appears twice in a stack, and
// locks it.
func (op *opener) claim(f backend.File, path string, writable bool) error {
	if op.o.DontCache {
		backend.DontCache(f)
	}
	if dev, ino, ok := backend.IDOf(f); ok {
		id := fileID{dev, ino}
		if first, twice := op.seen[id]; twice {
			return &layers.ImageError{Path: path, Layer: len(op.pile), Offset: -1, Field: "parent", Value: first,
				Err: fmt.Errorf("%w: %w: the same file is in the stack already", layers.ErrCorrupt, ErrLoop)}
		}
		op.seen[id] = path
	}
	l := backend.LockerOf(f)
	if l == nil {
		return nil
	}
	use, unshare := backend.ReaderUse, backend.ReaderUnshare
	if writable {
		use, unshare = backend.WriterUse, backend.WriterUnshare
	}
	if err := l.Lock(use, unshare); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}
