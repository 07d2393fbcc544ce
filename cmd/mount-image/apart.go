package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"time"

	"github.com/imagestack/imagestack/internal/cli"
)

// apartEnv tells a process that startApart has started it.
const apartEnv = "IMAGESTACK_APART"

// isApart reports whether this process may ask a server and wait.
func isApart() bool { return os.Getenv(apartEnv) != "" }

// hangPatience is how long an interrupted process may go on.
const hangPatience = time.Second

// apart is mount-image -u of one directory in a process of its own. Asking a
// server that hangs is a system call that signals to us do not end; over
// io_uring not even our exit does, and the shell would wait with us.
type apart struct {
	cmd      *exec.Cmd
	out, err bytes.Buffer
	done     chan error // gets what cmd.Wait returns
}

func startApart(dir string, force bool) (*apart, error) {
	args := []string{"-u", "--", dir}
	if force {
		args = slices.Insert(args, 1, "--force")
	}
	a := &apart{cmd: exec.Command("/proc/self/exe", args...), done: make(chan error, 1)}
	a.cmd.Args[0] = os.Args[0]
	a.cmd.Env = append(os.Environ(), apartEnv+"=1")
	a.cmd.Stdout, a.cmd.Stderr = &a.out, &a.err
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { a.done <- a.cmd.Wait() }()
	return a, nil
}

// wait waits until the process has ended, ctx has, or the time is up, if there
// is one; ended is false in the last case.
func (a *apart) wait(ctx context.Context, most <-chan time.Time) (ended bool, err error) {
	select {
	case err := <-a.done:
		return true, a.end(err)
	case <-ctx.Done():
		return true, a.interrupted(ctx)
	case <-most:
		return false, nil
	}
}

// end passes on what the process said and its exit code.
func (a *apart) end(err error) error {
	_, _ = a.out.WriteTo(os.Stdout) // as Println does
	_, _ = a.err.WriteTo(os.Stderr)
	return said(err)
}

// interrupted waits a moment longer, because ctx has ended.
func (a *apart) interrupted(ctx context.Context) error {
	// A signal of the terminal has reached it already, one to us alone has not.
	var caught cli.SignalError
	if errors.As(context.Cause(ctx), &caught) {
		_ = a.cmd.Process.Signal(caught.Signal) // it may have ended
	}
	select {
	case err := <-a.done:
		return a.end(err)
	case <-time.After(hangPatience):
		return fmt.Errorf("the server of the mount does not answer: %w", context.Cause(ctx))
	}
}

// unmountApart is unmount without waiting for what signals do not end.
func unmountApart(ctx context.Context, dir string) error {
	a, err := startApart(dir, false)
	if err != nil {
		return err
	}
	_, err = a.wait(ctx, nil)
	return err
}

// said is the result of another mount-image, which has told what was wrong.
func said(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return cli.Exit(exit.ExitCode())
	}
	return err
}
