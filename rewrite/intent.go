package rewrite

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
)

// recordSuffix is appended to the name of the image file.
const recordSuffix = ".compact"

// maxRecord bounds a record, bytes.
const maxRecord = 64 << 10

// record says that a run has begun. Its content is not needed to read the
// image.
type record struct {
	Version int    `json:"version"`
	Image   string `json:"image"` // base name of the image file
	Layer   int    `json:"layer"`
	Guest   bool   `json:"guest,omitempty"`
	Gaps    bool   `json:"gaps,omitempty"`
	Swap    bool   `json:"swap,omitempty"`
	Keep    bool   `json:"keep-zeros,omitempty"`
	Dedup   bool   `json:"dedup-parent,omitempty"`
}

func newRecord(image string, o *Options) record {
	return record{Version: 1, Image: image, Layer: o.Layer,
		Guest: o.Guest, Gaps: o.Gaps, Swap: o.Swap, Keep: o.KeepZeros, Dedup: o.DedupParent}
}

// restore gives o the options of the record.
func (r *record) restore(o *Options) {
	o.Guest, o.Gaps, o.Swap, o.KeepZeros, o.DedupParent = r.Guest, r.Gaps, r.Swap, r.Keep, r.Dedup
}

// recordStore is where the record is kept.
type recordStore interface {
	// load returns fs.ErrNotExist when there is none, and ErrNotRecord when
	// something else is in its place.
	load() (record, error)
	// save makes a record durable that is whole or not there.
	save(record) error
	// remove durably removes it.
	remove() error
}

// fileRecord is the record beside an image.
type fileRecord string

func (p fileRecord) load() (record, error) {
	var r record
	// Without waiting for who writes to a pipe.
	f, err := os.OpenFile(string(p), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return r, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return r, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxRecord {
		return r, fmt.Errorf("%s: %w", p, ErrNotRecord)
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return r, err
	}
	// A record that a failure of the host has damaged is empty or zeros.
	if rest := bytes.TrimLeft(b, "\x00"); len(rest) > 0 && rest[0] != '{' {
		return r, fmt.Errorf("%s: %w", p, ErrNotRecord)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: not a record of image-compact: %w", p, err)
	}
	if r.Version == 0 {
		return r, fmt.Errorf("%s: %w", p, ErrNotRecord)
	}
	if r.Version != 1 {
		return r, fmt.Errorf("%s: a record of version %d, written by a newer program", p, r.Version)
	}
	return r, nil
}

func (p fileRecord) save(r record) (err error) {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	dir := filepath.Dir(string(p))
	f, err := os.CreateTemp(dir, filepath.Base(string(p))+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // unless it has its final name
		}
	}()
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), string(p)); err != nil {
		return err
	}
	if err = backend.SyncDir(dir); err != nil {
		// Who is told that there is no record must not find one.
		return errors.Join(err, os.Remove(string(p)))
	}
	return nil
}

func (p fileRecord) remove() error {
	// Not os.Remove, whose error may be that of trying whether it is a directory.
	if err := unix.Unlink(string(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "remove", Path: string(p), Err: err}
	}
	return backend.SyncDir(filepath.Dir(string(p)))
}

// noRecord keeps nothing.
type noRecord struct{}

func (noRecord) load() (record, error) { return record{}, fs.ErrNotExist }
func (noRecord) save(record) error     { return nil }
func (noRecord) remove() error         { return nil }
