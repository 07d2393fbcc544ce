package fsck

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers/open"
)

// Exit bits of fsck(8).
const (
	ExitClean       = 0
	ExitCorrected   = 1
	ExitUncorrected = 4
	ExitOperational = 8
	ExitUsage       = 16
	ExitCancelled   = 32
)

// RunOptions say how images are checked and repaired.
type RunOptions struct {
	Open open.Options // Format, BackingFormat, AllowPaths
	// Decide is nil for a check: then every file is opened for reading only.
	Decide  Decide
	Details int
	Memory  int64 // of all checks that run at the same time
	Data    bool
	// Undo makes the undo files; nil is UndoPlace("").
	Undo UndoStore
	// Spill is that of PlanOptions.
	Spill func() (backend.File, error)
	// Single checks only the file that is named, and neither parents nor how
	// they fit.
	Single bool
	// Serial checks one file at a time.
	Serial bool
	// OnProgress is told of progress, concurrently.
	OnProgress func(file string, pass int, done, total int64)
}

func (o *RunOptions) undos() UndoStore {
	if o.Undo == nil {
		return UndoPlace("")
	}
	return o.Undo
}

// FileResult is what became of one file.
type FileResult struct {
	StackFile
	*Result
	Undo string // the undo file, "" when nothing was changed
	Lost string // the lost+found directory, "" when nothing was put there
	Err  error  // why the check or the repair was not finished
}

// ImageResult is what became of one image that the user named.
type ImageResult struct {
	Path  string
	Files []FileResult
	// Stack is the report on how the files fit, as they are now; nil when that
	// was not looked at. Mended are the reports whose wanted fixes were made,
	// Links the files that these have changed.
	Stack  *Report
	Mended []*Report
	Links  []LinkChange
	Err    error
}

// Exit are the exit bits for r.
func (r *ImageResult) Exit() int {
	bits := exitOf(r.Err)
	if r.Stack != nil && r.Stack.Worst() > Note {
		bits |= ExitUncorrected
	}
	if len(r.Links) > 0 {
		bits |= ExitCorrected
	}
	for i := range r.Files {
		f := &r.Files[i]
		bits |= exitOf(f.Err)
		if f.Result == nil {
			continue
		}
		if f.Changed {
			bits |= ExitCorrected
		}
		if f.Left != nil {
			if f.Left.Remaining() > Note || f.Err != nil && f.Left.Worst() > Note {
				bits |= ExitUncorrected
			}
			if f.Left.Stats.CheckErrors > 0 {
				bits |= ExitOperational
			}
		}
	}
	return bits
}

func exitOf(err error) int {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.Canceled):
		return ExitCancelled
	}
	return ExitOperational
}

// Run checks and repairs the images at the paths with all that belongs to
// them. Images that share no file are done at the same time. The results are
// in the order of the paths; done is called with each as soon as it and all
// before it are there. An image that is named twice is checked once.
func Run(ctx context.Context, paths []string, o RunOptions, done func(*ImageResult)) {
	r := &runner{o: o, results: make([]ImageResult, len(paths)), stacks: make([]*Stack, len(paths))}
	for i, path := range paths {
		r.results[i].Path = path
		r.stacks[i], r.results[i].Err = r.find(ctx, path)
	}
	groups := r.group()
	workers := 1
	if !o.Serial {
		workers = max(1, min(len(groups), runtime.GOMAXPROCS(0)))
	}
	r.memory = o.Memory
	if r.memory <= 0 {
		r.memory = DefaultMemory
	}
	r.memory /= int64(workers)
	ready := make([]chan struct{}, len(paths))
	for i := range ready {
		ready[i] = make(chan struct{})
	}
	todo := make(chan []int)
	var wg sync.WaitGroup
	for range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for group := range todo {
				checked := map[fileKey]bool{}
				for _, i := range group {
					r.image(ctx, i, group, checked)
					close(ready[i])
				}
			}
		}()
	}
	go func() {
		for _, g := range groups {
			todo <- g
		}
		close(todo)
	}()
	for i := range paths {
		<-ready[i]
		done(&r.results[i])
	}
	wg.Wait()
}

type runner struct {
	o       RunOptions
	memory  int64
	results []ImageResult
	stacks  []*Stack
}

// find finds what belongs to an image.
func (r *runner) find(ctx context.Context, path string) (*Stack, error) {
	s, err := FindStack(ctx, path, r.o.Open)
	if err == nil && r.o.Single {
		for _, f := range s.files {
			if f.Own {
				s.files = []StackFile{f}
				break
			}
		}
	}
	return s, err
}

type fileKey struct{ dev, ino uint64 }

func keyOf(path string) fileKey {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return fileKey{}
	}
	return fileKey{st.Dev, st.Ino}
}

// group puts images that share a file together.
func (r *runner) group() [][]int {
	owner := map[fileKey]int{} // the group of a file
	groups := make([][]int, len(r.stacks))
	for i, s := range r.stacks {
		groups[i] = []int{i}
		if s == nil {
			continue
		}
		for _, f := range s.files {
			k := keyOf(f.Path)
			if j, ok := owner[k]; ok && j != i {
				groups[i] = append(groups[j], groups[i]...)
				groups[j] = nil
				for k, g := range owner {
					if g == j {
						owner[k] = i
					}
				}
			}
			owner[k] = i
		}
	}
	var out [][]int
	for _, g := range groups {
		if g != nil {
			out = append(out, g)
		}
	}
	return out
}

// maxStackRounds bounds how often the files of an image are looked for again
// because a repair has led to others.
const maxStackRounds = 4

// image does one image: its files, then how they fit. A repair of either may
// lead to files that could not be found before; these come next.
func (r *runner) image(ctx context.Context, i int, group []int, checked map[fileKey]bool) {
	res, s := &r.results[i], r.stacks[i]
	if s == nil {
		return
	}
	h := &holder{}
	defer func() { res.Err = errors.Join(res.Err, h.close(), h.closeUndos(r.o.undos())) }()
	for round := 0; ; round++ {
		todo := r.newFiles(s, res, i, group, checked)
		if round > 0 {
			todo = append(descriptorsOf(res), todo...)
		}
		changed, err := r.files(ctx, s, res, h, todo)
		if res.Err = err; err != nil || r.o.Single || ctx.Err() != nil {
			return
		}
		if changed {
			// What the repair has changed may lead to other files now. The locks
			// would be in the way.
			if res.Err = h.close(); res.Err == nil {
				s, res.Err = FindStack(ctx, res.Path, r.o.Open)
			}
			if res.Err != nil {
				return
			}
		}
		co := CollectorOptions{File: res.Path, Details: r.o.Details}
		if round < maxStackRounds {
			co.Decide = r.o.Decide
		}
		col := NewCollector(co)
		if res.Err = s.Check(ctx, col); res.Err != nil {
			return
		}
		res.Stack = col.Sum(Stats{})
		if len(s.wanted) > 0 {
			if s = r.links(ctx, s, res, h); s == nil {
				return
			}
			changed = true
		}
		if !changed || round == maxStackRounds {
			return
		}
	}
}

// links makes the changes that the check of the stack asks for, and finds the
// files again; nil when that went wrong.
func (r *runner) links(ctx context.Context, s *Stack, res *ImageResult, h *holder) *Stack {
	if res.Err = h.close(); res.Err != nil {
		return nil
	}
	done, err := s.repairLinks(ctx, h, r.o.undos())
	res.Links = append(res.Links, done...)
	if err != nil {
		res.Err = err
		return nil
	}
	res.Mended = append(res.Mended, res.Stack)
	s, res.Err = FindStack(ctx, res.Path, r.o.Open)
	return s
}

// newFiles enters the files of the stack that nobody has checked in the
// result, and returns their places there.
func (r *runner) newFiles(s *Stack, res *ImageResult, i int, group []int, checked map[fileKey]bool) (todo []int) {
	for _, f := range s.files {
		k := keyOf(f.Path)
		if j := res.otherFormat(f); j >= 0 {
			res.Files[j] = FileResult{StackFile: f} // what was said of it was wrong
			todo = append(todo, j)
			continue
		}
		if checked[k] || res.has(f.Path) || !f.Own && r.ownElsewhere(k, i, group) {
			continue
		}
		checked[k] = true
		todo = append(todo, len(res.Files))
		res.Files = append(res.Files, FileResult{StackFile: f})
	}
	return todo
}

// has reports whether the file, which may have been replaced since, is in the
// result.
func (r *ImageResult) has(path string) bool {
	for j := range r.Files {
		if filepath.Clean(r.Files[j].Path) == filepath.Clean(path) {
			return true
		}
	}
	return false
}

// otherFormat is the place of a file that was checked as another format before
// its child said the right one; -1 when there is none.
func (r *ImageResult) otherFormat(f StackFile) int {
	for j := range r.Files {
		if h := &r.Files[j]; h.Format != f.Format && filepath.Clean(h.Path) == filepath.Clean(f.Path) && (h.Result == nil || !h.Changed) {
			return j
		}
	}
	return -1
}

// descriptorsOf are the own descriptors, which repaired images let look
// different.
func descriptorsOf(res *ImageResult) (out []int) {
	for j, f := range res.Files {
		if f.Own && f.Format == "ploop-descriptor" {
			out = append(out, j)
		}
	}
	return out
}

// files checks, and repairs, the files of the result that todo names.
func (r *runner) files(ctx context.Context, s *Stack, res *ImageResult, h *holder, todo []int) (changed bool, err error) {
	if len(todo) == 0 {
		return false, nil
	}
	if err := h.open(res.Files, r.o.Decide != nil); err != nil {
		return false, err
	}
	guest := r.evidence(ctx, s, res, h)
	for _, j := range todo {
		f := &res.Files[j]
		var free func(off, n int64) bool
		// What the current state does not use an older one may.
		if len(s.trace.Images) > 0 && f.Own && sameFile(f.Path, s.trace.Images[0].Path) {
			free = guest
		}
		before := f.Result
		f.Err = r.file(ctx, f, h, free, s.hasParent(f.StackFile))
		changed = changed || f.Result != nil && f.Changed
		if before != nil {
			f.Result = before.then(f.Result)
		}
	}
	return changed, nil
}

// ownElsewhere reports whether the file is named itself by another image of
// the group.
func (r *runner) ownElsewhere(k fileKey, i int, group []int) bool {
	for _, j := range group {
		if j == i || r.stacks[j] == nil {
			continue
		}
		for _, f := range r.stacks[j].files {
			if f.Own && keyOf(f.Path) == k {
				return true
			}
		}
	}
	return false
}

// file checks, and repairs, one file.
func (r *runner) file(ctx context.Context, f *FileResult, h *holder, free func(off, n int64) bool, parent bool) (err error) {
	c, err := CheckerFor(f.Format)
	if err != nil {
		return err
	}
	o := RepairOptions{
		Options: Options{Memory: r.memory, Data: r.o.Data, GuestFree: free, Parent: parent},
		Details: r.o.Details,
		Plan:    PlanOptions{Memory: r.memory / 4, Spill: r.o.Spill},
		Execute: ExecuteOptions{Name: filepath.Base(f.Path)},
	}
	if r.o.OnProgress != nil {
		o.OnProgress = func(pass int, done, total int64) { r.o.OnProgress(f.Path, pass, done, total) }
	}
	rel, err := open.NewRelated(f.Path, r.o.Open)
	if err != nil {
		return err
	}
	defer rel.Close()
	o.OpenFile = func(name string) (backend.File, error) {
		data, _, err := rel.Open("data file", name)
		return data, err
	}
	o.Siblings = func() ([]string, error) { return listFiles(filepath.Dir(f.Path)) }
	file := h.find(f.Path)
	undos := r.o.undos()
	if r.o.Decide != nil && f.Own {
		st, err := os.Stat(f.Path)
		if err != nil {
			return err
		}
		o.Decide = r.o.Decide
		o.Execute.MTime = st.ModTime().UnixNano()
		if !st.Mode().IsRegular() {
			o.Plan.MaxSize, err = file.Size()
			if err != nil {
				return err
			}
		}
		lost := &countedLost{LostDir: LostDir(f.Path + ".lost+found")}
		o.Execute.Lost = lost
		o.Undo = func() (backend.File, error) {
			u, err := h.undoFor(f.Path, undos)
			if err != nil {
				return nil, err
			}
			f.Undo = u.name
			return u.File, nil
		}
		o.Execute.SyncDir = func() error { return undos.Sync(f.Undo) }
		if f.Format == "ploop-descriptor" {
			o.Swap = func(content []byte) (backend.File, error) { return h.swap(f.Path, content) }
		}
		defer func() {
			if lost.n > 0 {
				f.Lost = string(lost.LostDir)
			}
		}()
	}
	f.Result, err = Repair(ctx, c, file, o)
	if u := h.undo[filepath.Clean(f.Path)]; u != nil {
		if u.used = u.used || f.Changed; !u.used {
			f.Undo = ""
		}
	}
	return err
}

// countedLost knows whether anything was put there.
type countedLost struct {
	LostDir
	n int
}

func (c *countedLost) Create(name string) (backend.File, string, error) {
	f, used, err := c.LostDir.Create(name)
	if err == nil {
		c.n++
	}
	return f, used, err
}

func (c *countedLost) Remove(used string) error {
	err := c.LostDir.Remove(used)
	if err == nil {
		c.n--
	}
	return err
}
