package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
)

type mapCmd struct{ image }

// mapExtent is an extent as scripts see it.
type mapExtent struct {
	Start  int64  `json:"start"`  // bytes of the virtual disk
	Length int64  `json:"length"` // bytes
	Depth  int    `json:"depth"`  // layer, 0 is the top
	Kind   string `json:"kind"`   // data, packed or zero
	// Host and File say where data and packed extents are stored.
	Host *int64 `json:"host,omitempty"`
	File string `json:"file,omitempty"`
}

// Run lists the extents of the whole stack.
func (c *mapCmd) Run(ctx context.Context) (err error) {
	if err := c.confine(); err != nil {
		return err
	}
	progress, err := c.Start(os.Stderr)
	if err != nil {
		return err
	}
	stack, err := open.Open(ctx, c.Image, c.options())
	if err != nil {
		return err
	}
	each := func(do func(mapExtent) error) error {
		return eachExtent(ctx, stack, func(m mapExtent) error {
			progress.Update("disk", m.Start+m.Length, stack.Size())
			return do(m)
		})
	}
	defer progress.Clear()
	defer func() { err = errors.Join(err, stack.Close()) }()
	out := bufio.NewWriterSize(os.Stdout, 64<<10)
	if c.JSON {
		err = mapJSON(out, each)
	} else {
		err = mapText(out, each)
	}
	return errors.Join(err, out.Flush())
}

func eachExtent(ctx context.Context, s *layers.Stack, do func(mapExtent) error) error {
	files, err := dataFiles(s)
	if err != nil || s.Size() == 0 {
		return err
	}
	b, err := newBudgets(s)
	if err != nil {
		return err
	}
	for e, err := range blockmap.All(ctx, s, 0, s.Size()) {
		if err == nil {
			err = b.spend(e)
		}
		if err != nil {
			return err
		}
		m := mapExtent{Start: e.Guest, Length: e.Len, Depth: int(e.Layer), Kind: e.Kind.String()}
		if e.Stored() {
			m.Host = &e.Host
			m.File = files[e.Layer]
		}
		if err := do(m); err != nil {
			return err
		}
	}
	return nil
}

// budgets bound what a map can list by the sizes of the files: tables that
// share their entries can make a small file fill a disk of petabytes, whose
// map would not end.
type budgets []struct {
	path  string
	left  int64 // bytes that may still be mapped to the file
	holds int64 // bytes that it has
}

func newBudgets(s *layers.Stack) (budgets, error) {
	b := make(budgets, len(s.Layers()))
	for i, l := range s.Layers() {
		size, err := l.Data().Size()
		if err != nil {
			return nil, err
		}
		// The last cluster may reach behind the end of the file.
		b[i].path, b[i].holds = l.Data().Name(), size
		b[i].left = min(size, math.MaxInt64/maxShare-l.Granule())*maxShare + l.Granule()
	}
	return b, nil
}

// maxShare is how often, on average, a file may be mapped. Images of the known
// tools use every place once.
const maxShare = 16

// leastPacked is less than what the smallest compressed cluster takes, bytes.
const leastPacked = 4

func (b budgets) spend(e blockmap.Extent) error {
	if !e.Stored() {
		return nil
	}
	n := e.Len
	if e.Kind == blockmap.Packed {
		n = leastPacked
	}
	l := &b[e.Layer]
	if l.left -= n; l.left >= 0 {
		return nil
	}
	return &layers.ImageError{Path: l.path, Layer: int(e.Layer), Offset: e.Host, Field: "map", Value: fmt.Sprintf("guest offset %#x", e.Guest),
		Err: fmt.Errorf("%w: far more is mapped than the %d bytes of the file: its places are used again and again", layers.ErrCorrupt, l.holds)}
}

// dataFiles are the absolute paths of the files that hold the layers' data.
func dataFiles(s *layers.Stack) ([]string, error) {
	files := make([]string, len(s.Layers()))
	for i, l := range s.Layers() {
		var err error
		if files[i], err = filepath.Abs(l.Data().Name()); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// mapJSON writes the extents as one array, an element a line, without keeping
// them.
func mapJSON(w io.Writer, each func(func(mapExtent) error) error) error {
	sep := "["
	err := each(func(m mapExtent) error {
		b, err := json.Marshal(m)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s%s", sep, b)
		sep = ",\n"
		return err
	})
	if err != nil {
		return err
	}
	if sep == "[" {
		_, err = io.WriteString(w, "[")
	}
	_, err2 := io.WriteString(w, "]\n")
	return errors.Join(err, err2)
}

func mapText(w io.Writer, each func(func(mapExtent) error) error) error {
	const row = "%-16s %-16s %-5v %-6s %-16s %s\n"
	if _, err := fmt.Fprintf(w, row, "start", "length", "depth", "kind", "host", "file"); err != nil {
		return err
	}
	return each(func(m mapExtent) error {
		host := ""
		if m.Host != nil {
			host = fmt.Sprintf("%#x", *m.Host)
		}
		_, err := fmt.Fprintf(w, row, fmt.Sprintf("%#x", m.Start), fmt.Sprintf("%#x", m.Length), m.Depth, m.Kind, host, cli.Printable(m.File))
		return err
	})
}
