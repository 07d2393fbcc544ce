package crash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/imagestack/imagestack/backend"
)

// NamesOp is an operation on the files of a directory and their names.
type NamesOp struct {
	Name string
	// Setup fills the directory.
	Setup func(dir string) error
	// Run does the operation; it is also done again on what a power cut left.
	Run func(ctx context.Context, dir string) error
	// Judge says what is wrong with a state; done means that Run had returned.
	// It may change the files.
	Judge func(ctx context.Context, dir string, done bool) error
}

// childEnv names the operation to the process that is traced.
const childEnv = "IMAGESTACK_CRASH_CHILD"

// RunChild runs an operation of the table when this process is one that is
// traced. TestMain calls it first.
func RunChild(ops []NamesOp) {
	name := os.Getenv(childEnv)
	if name == "" {
		return
	}
	for _, op := range ops {
		if op.Name == name {
			if err := op.Run(context.Background(), os.Args[1]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	fmt.Fprintln(os.Stderr, "no operation", name)
	os.Exit(2)
}

// ExamineNames runs a NamesOp in a child of this process and judges every
// state that a power cut may leave. scratch is an empty directory.
func ExamineNames(ctx context.Context, op NamesOp, scratch string, o Options) (*Report, error) {
	rep := &Report{Op: op.Name, Seeds: 1}
	dir := filepath.Join(scratch, "run")
	if err := errors.Join(os.Mkdir(dir, 0o700), op.Setup(dir)); err != nil {
		return rep, err
	}
	self, err := os.Executable()
	if err != nil {
		return rep, err
	}
	cmd := exec.Command(self, dir)
	cmd.Env = append(os.Environ(), childEnv+"="+op.Name, "TMPDIR="+scratch)
	tr, err := Trace(dir, cmd)
	if err != nil {
		return rep, fmt.Errorf("%s: %w", op.Name, err)
	}
	rep.Syncs, rep.Epochs = len(tr.Syncs), len(tr.Syncs)+1
	so := backend.StateOptions{Seed: o.Seed}
	if !o.Full {
		so.Random, so.MaxPerEpoch = 40, max(16, o.States/rep.Epochs)
	}
	seen := map[uint64]bool{}
	for s := range tr.Rec.States(so) {
		rep.States++
		seen[hashOf(s.Files)*31+tr.namesHash(s)] = true
		if err := op.judge(ctx, tr, s, scratch); err != nil {
			return rep, fmt.Errorf("%s: %s: %w", op.Name, s, err)
		}
	}
	rep.Distinct = len(seen)
	if o.Controls == nil {
		return rep, nil
	}
	for i, of := range tr.Syncs {
		site := op.Name + ": " + of
		if o.Controls.try(site) {
			continue
		}
		for s := range tr.Rec.States(backend.StateOptions{Seed: o.Seed, IgnoreSync: i + 1, Exhaustive: 7, Random: 40, MaxPerEpoch: 160}) {
			if s.Epoch < i {
				continue
			}
			if err := op.judge(ctx, tr, s, scratch); err != nil {
				o.Controls.notice(site, err.Error())
				break
			}
		}
	}
	return rep, nil
}

func (t *Traced) namesHash(s *backend.State) (sum uint64) {
	for name, i := range s.Names[t.Dir.Index()] {
		h := uint64(i + 1)
		for _, c := range []byte(name) {
			h = h*0x100000001b3 + uint64(c)
		}
		sum += h
	}
	return sum
}

// judge looks at a state, and at what the operation makes of it.
func (op *NamesOp) judge(ctx context.Context, tr *Traced, s *backend.State, scratch string) (err error) {
	dir, err := os.MkdirTemp(scratch, "state-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := tr.Put(s, dir); err != nil {
		return err
	}
	if err := patient(func() error { return op.Judge(ctx, dir, s.Completed == tr.Rec.Syncs()) }); err != nil {
		return fmt.Errorf("after the power cut: %w", err)
	}
	if err := patient(func() error { return op.Run(ctx, dir) }); err != nil {
		return fmt.Errorf("done again after the power cut: %w", err)
	}
	if err := patient(func() error { return op.Judge(ctx, dir, true) }); err != nil {
		return fmt.Errorf("done again after the power cut: %w", err)
	}
	return nil
}

// patient does something again for as long as a lock is in its way: while
// another test starts a program, the kernel may hold a copy of our own files
// for a moment more than we do.
func patient(do func() error) (err error) {
	for range 500 {
		if err = do(); !errors.Is(err, backend.ErrInUse) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}
