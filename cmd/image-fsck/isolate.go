package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/keeper"
	"github.com/imagestack/imagestack/internal/sandbox"
	"github.com/imagestack/imagestack/layers/open"
)

// Before the first byte of an image is read, the process that will read it
// keeps only the rights to read the images and their directories, and, for a
// repair, to change what is in the directories of the images that were named.
// What lies elsewhere (an undo file, a dump, the mount for --guest) is the
// business of a keeper, which reads no image; see assist.go.

// isolate gives up what the run does not need. It opens before what cannot be
// opened after.
func (r *run) isolate(repair bool) error {
	if err := r.startKeeper(repair); err != nil {
		return err
	}
	defer sandbox.Attack("parse") // of test builds
	if r.Sandbox == sandbox.Off {
		return nil
	}
	if repair || r.Restore != "" {
		r.spill = fsck.NewSpillFiles(runtime.GOMAXPROCS(0) + 1)
	}
	p := sandbox.Policy{Mode: r.Sandbox, User: r.user}
	for _, image := range r.Images {
		a, err := open.AccessTo(image, open.Options{Writable: repair})
		if err != nil {
			continue // opening it will say so
		}
		p.List = append(p.List, a.List...)
		p.Read = append(p.Read, a.Read...)
		for _, path := range a.Write {
			if isDir(path) {
				p.Change = append(p.Change, path)
			} else {
				p.Write = append(p.Write, path)
			}
		}
	}
	for _, dir := range r.AllowPath { // parents, which are not repaired
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			continue // opening the image will say so
		}
		p.Read = append(p.Read, real)
	}
	if r.Restore != "" {
		p.Read = append(p.Read, r.Restore)
	}
	if r.top != "" {
		p.Write = append(p.Write, r.top)
		// Beside a bundle, of which only the directory is open.
		p.List = append(p.List, filepath.Dir(r.top))
	}
	return r.confine(p)
}

// seal is isolate for a run that has opened everything.
func (r *run) seal() error {
	defer sandbox.Attack("parse")
	if r.Sandbox == sandbox.Off {
		return nil
	}
	if err := r.confine(sandbox.Policy{Mode: r.Sandbox}); err != nil {
		return err
	}
	return sandbox.Seal(r.Sandbox)
}

func (r *run) confine(p sandbox.Policy) error {
	return cli.Confine(p, func(what string) { fmt.Fprintln(r.stderr, "image-fsck:", what) })
}

// startKeeper starts one if the run has to do with anything but the images and
// their directories.
func (r *run) startKeeper(repair bool) (err error) {
	s := assistSetup{Mode: r.Sandbox, User: r.user, Top: r.top}
	switch {
	case r.Guest:
		s.Guest = true
		if r.fd != nil {
			s.ProgressFD = true
		}
	case r.Dump != "":
		s.Dump = r.Dump
	case repair && (r.Undo != "" || r.special()):
		s.Images, s.Undo = r.Images, &r.Undo
	default:
		return nil
	}
	o := keeper.Options{Title: r.Images[0], Stderr: os.Stderr, Here: true}
	if s.ProgressFD {
		o.Files = []*os.File{r.fd.f}
	}
	r.keeper, err = keeper.Start(&s, o)
	return err
}

// special reports whether an image is neither a file nor a directory: undo
// files are not to be written beside devices by a process that reads images.
func (r *run) special() bool {
	for _, image := range r.Images {
		if st, err := os.Stat(image); err == nil && !st.IsDir() && !st.Mode().IsRegular() {
			return true
		}
	}
	return false
}

// close ends what isolate has begun.
func (r *run) close() {
	if r.keeper != nil {
		r.keeper.Close()
	}
	if r.spill != nil {
		_ = r.spill.Close() // nobody looks at them again
	}
}

// user understands --uid.
func (r *run) lookUser() (err error) {
	if r.UID == "" {
		return nil
	}
	if r.Sandbox == sandbox.Off {
		return errors.New("--uid and --sandbox=off exclude each other")
	}
	if r.user, err = sandbox.LookupUser(r.UID); err == nil && os.Geteuid() != 0 && r.user.UID != os.Geteuid() {
		err = errors.New("only root can run the check as another user")
	}
	return err
}

// undoStore makes undo files where they were asked for.
func (r *run) undoStore() fsck.UndoStore {
	if r.keeper != nil && !r.Guest && r.Dump == "" {
		return keptUndos{r.keeper}
	}
	return fsck.UndoPlace(r.Undo)
}

// keptUndos are undo files that the keeper makes, which counts them itself.
type keptUndos struct{ k *keeper.Keeper }

func (u keptUndos) Create(path string, _ bool) (backend.File, string, error) {
	var name string
	fd, err := u.k.AskFile(context.Background(), assistRequest{Act: actUndo, Name: path}, &name, -1)
	if err != nil {
		return nil, "", err
	}
	f, err := received(fd, name)
	return f, name, err
}

func (u keptUndos) Sync(name string) error {
	return u.k.Ask(context.Background(), assistRequest{Act: actUndoSync, Name: name}, nil)
}

func (u keptUndos) Remove(name string) error {
	return u.k.Ask(context.Background(), assistRequest{Act: actUndoRemove, Name: name}, nil)
}

// received is a file that the keeper has sent.
func received(fd int, name string) (backend.File, error) {
	if fd < 0 {
		return nil, fmt.Errorf("%s: the keeper has sent no file: %w", name, unix.EBADF)
	}
	f := os.NewFile(uintptr(fd), name)
	bf, err := backend.NewFile(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return bf, nil
}
