package backend

import (
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
)

// Names is a directory that a Recorder watches: which name leads to which of
// its files. Like a file it has an index, and a Sync that makes durable what
// was done to its names before; a file's own Sync does nothing for its names,
// as POSIX has it. A Rename happens as a whole or not at all.
type Names struct {
	r     *Recorder
	index int
	path  string

	mu  sync.Mutex
	now map[string]int
}

// nameChange makes a name lead to a file, or to none (-1).
type nameChange struct {
	name string
	file int
}

// Names adds a directory that already has the given names, which lead to files
// that Wrap returned. path is for messages.
func (r *Recorder) Names(path string, have map[string]File) (*Names, error) {
	n := &Names{r: r, path: path, now: map[string]int{}}
	for name, f := range have {
		i, err := r.indexOf(f)
		if err != nil {
			return nil, err
		}
		n.now[name] = i
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n.index = len(r.files)
	r.files = append(r.files, &recorded{r: r, index: n.index, base: NewMem(path), names: maps.Clone(n.now)})
	return n, nil
}

func (r *Recorder) indexOf(f File) (int, error) {
	if w, ok := f.(*recorded); ok && w.r == r {
		return w.index, nil
	}
	return 0, fmt.Errorf("%s is not a file of this recorder", f.Name())
}

// Index is the place in State.Names.
func (n *Names) Index() int { return n.index }

// List are the names that there are now, sorted.
func (n *Names) List() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Sorted(maps.Keys(n.now))
}

func (n *Names) change(changes ...nameChange) {
	for _, c := range changes {
		if c.file < 0 {
			delete(n.now, c.name)
		} else {
			n.now[c.name] = c.file
		}
	}
	n.r.mu.Lock()
	defer n.r.mu.Unlock()
	n.r.log = append(n.r.log, event{kind: evNames, file: n.index, names: changes})
}

// Link gives f, a file of the Recorder, a name; a file that had the name loses
// it.
func (n *Names) Link(name string, f File) error {
	i, err := n.r.indexOf(f)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.change(nameChange{name, i})
	return nil
}

// Remove takes a name away.
func (n *Names) Remove(name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.now[name]; !ok {
		return &fs.PathError{Op: "remove", Path: n.path + "/" + name, Err: fs.ErrNotExist}
	}
	n.change(nameChange{name, -1})
	return nil
}

// Rename gives the file that old leads to the name to.
func (n *Names) Rename(old, to string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	i, ok := n.now[old]
	if !ok {
		return &fs.PathError{Op: "rename", Path: n.path + "/" + old, Err: fs.ErrNotExist}
	}
	n.change(nameChange{old, -1}, nameChange{to, i})
	return nil
}

// Sync is an fsync of the directory.
func (n *Names) Sync() error {
	n.r.mu.Lock()
	defer n.r.mu.Unlock()
	n.r.log = append(n.r.log, event{kind: evSync, file: n.index, ok: true})
	n.r.good++
	return nil
}

// applyNames does the changes of e.
func applyNames(names map[string]int, e event) {
	for _, c := range e.names {
		if c.file < 0 {
			delete(names, c.name)
		} else {
			names[c.name] = c.file
		}
	}
}

// hashNames adds names to a sum, in whatever order they come.
func hashNames(names map[string]int) uint64 {
	sum := uint64(0)
	for name, i := range names {
		h := uint64(i) + 0x9e3779b97f4a7c15
		for _, c := range []byte(name) {
			h = (h ^ uint64(c)) * 0x100000001b3
		}
		sum += h
	}
	return sum
}
