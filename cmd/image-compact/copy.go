package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/rewrite"
)

// partSuffix ends the name of a copy that is not finished.
const partSuffix = ".part"

// recordSuffix is what package rewrite adds to the name of an image for the
// record of an interrupted run.
const recordSuffix = ".compact"

// copyTo makes a copy of the image file, byte for byte (so that snapshots,
// bitmaps and unknown extensions are in it as well) and sharing its storage
// where the filesystem can, compacts that, and gives it its name at the end.
func (r *run) copyTo(ctx context.Context) (_ *rewrite.Report, err error) {
	if _, err := os.Lstat(r.To); !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("%s: %w: it is not overwritten", r.To, fs.ErrExist), err)
	}
	source, err := r.source(ctx)
	if err != nil {
		return nil, err
	}
	// Under the lock of a reader, for as long as it is copied.
	s, err := open.Open(ctx, r.Image, r.openOptions())
	if err != nil {
		return nil, err
	}
	part := r.To + partSuffix
	err = r.copyFile(ctx, part, s.Layers()[0].Data(), source.Path)
	if err = errors.Join(err, s.Close()); err != nil {
		return nil, err
	}
	o := r.options()
	o.Open.Format = source.Format
	report, err := rewrite.Compact(ctx, part, o)
	if err == nil {
		err = renameNew(part, r.To)
	}
	if err != nil {
		// Whatever the interrupted run keeps beside it goes as well.
		_, abandoned := rewrite.Abandon(context.WithoutCancel(ctx), part, o)
		if errors.Is(abandoned, rewrite.ErrNotPending) || errors.Is(abandoned, rewrite.ErrNotRecord) {
			abandoned = nil // and the file of somebody else stays
		}
		if abandoned != nil {
			// The record of what was under way is of no use without the copy.
			if rerr := remove(part + recordSuffix); !errors.Is(rerr, os.ErrNotExist) {
				abandoned = errors.Join(abandoned, rerr)
			}
		}
		return report, errors.Join(err, abandoned, remove(part))
	}
	report.Image = r.To
	return report, backend.SyncName(r.To)
}

// renameNew is a rename that replaces nothing.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// Not every filesystem knows the flag; a link replaces nothing either.
		if err = os.Link(from, to); err == nil {
			return remove(from)
		}
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// copyFile makes the file part, durable, a copy of from, which is the file at
// path.
func (r *run) copyFile(ctx context.Context, part string, from backend.File, path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		if dev, ino, ok := backend.IDOf(from); ok && (dev != sys.Dev || ino != sys.Ino) {
			return fmt.Errorf("%s: %w: --to with an external data file, which both images would use", path, layers.ErrUnsupported)
		}
	}
	out, err := backend.Open(part, backend.Options{Writable: true, Create: true, Exclusive: true})
	if err != nil {
		return err
	}
	err = copySparse(ctx, out, from, func(done, total int64) { r.progress.UpdateBytes("copying", done, total) })
	if err = errors.Join(err, out.Sync(), out.Close()); err != nil {
		return errors.Join(err, remove(part))
	}
	return nil
}

// remove is os.Remove of a file, without the attempt to remove a directory,
// whose error would hide the reason.
func remove(name string) error {
	if err := unix.Unlink(name); err != nil {
		return &os.PathError{Op: "remove", Path: name, Err: err}
	}
	return nil
}

// source finds the file to copy, and refuses images of which a copy of one
// file is not a copy.
func (r *run) source(ctx context.Context) (*open.Traced, error) {
	if r.Layer != 0 {
		return nil, cli.Usagef("--to copies the top layer: name the image of the layer itself")
	}
	t, err := open.Follow(ctx, r.Image, r.openOptions())
	if err != nil {
		return nil, err
	}
	if t.Err != nil {
		return nil, t.Err
	}
	top := &t.Images[0]
	if len(t.Images) > 1 {
		if len(t.Descriptors) > 0 {
			return nil, fmt.Errorf("%s: %w: --to with an image that stands on others of its bundle", r.Image, layers.ErrUnsupported)
		}
		// The name of the parent is in the image, relative to its directory.
		if same, err := sameDir(top.Path, r.To); err != nil || !same {
			return nil, errors.Join(err, fmt.Errorf("%s: %w: it has a parent, so the copy must lie in the same directory", r.Image, layers.ErrUnsupported))
		}
	}
	return top, nil
}

func sameDir(a, b string) (bool, error) {
	x, err1 := os.Stat(filepath.Dir(a))
	y, err2 := os.Stat(filepath.Dir(b))
	if err := errors.Join(err1, err2); err != nil {
		return false, err
	}
	return os.SameFile(x, y), nil
}

// copyPiece is what is copied between two looks at the context.
const copyPiece = 64 << 20

// copySparse copies a file without its holes.
func copySparse(ctx context.Context, to, from backend.File, step func(done, total int64)) error {
	total, err := from.Size()
	if err != nil {
		return err
	}
	if err := to.Truncate(total); err != nil {
		return err
	}
	for at := int64(0); at < total; {
		start, err := from.SeekData(at)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		end, err := from.SeekHole(start)
		if err != nil {
			return err
		}
		for at = start; at < min(end, total); {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(end, total, at+copyPiece) - at
			if _, err := to.CopyRange(from, at, at, n); err != nil {
				return err
			}
			at += n
			step(at, total)
		}
		at = max(at, end)
	}
	return nil
}

// directories are those of the paths that are directories.
func directories(paths []string) ([]string, error) {
	var dirs []string
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return nil, err
		}
		if st.IsDir() {
			dirs = append(dirs, p)
		}
	}
	return dirs, nil
}
