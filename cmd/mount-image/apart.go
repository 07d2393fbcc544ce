package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/imagestack/imagestack/internal/cli"
)

// apartEnv tells a process that it is the one that apart has started.
const apartEnv = "IMAGESTACK_APART"

// isApart reports whether this process may ask a server and wait.
func isApart() bool { return os.Getenv(apartEnv) != "" }

// hangPatience is how long apart lets an interrupted process go on.
const hangPatience = time.Second

// apart runs this command line in a process of its own, and does not wait for
// it any longer soon after ctx has ended. Asking a server that hangs is a
// system call that signals to us do not end; over io_uring not even our exit
// does, and the shell would wait with us.
func apart(ctx context.Context) error {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), apartEnv+"=1")
	// Through pipes of ours: it may outlive us, and whoever reads what we say
	// would wait with it.
	cmd.Stdout, cmd.Stderr = struct{ io.Writer }{os.Stdout}, struct{ io.Writer }{os.Stderr}
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return said(err)
	case <-ctx.Done():
	}
	// A signal of the terminal has reached it already, one to us alone has not.
	var caught cli.SignalError
	if errors.As(context.Cause(ctx), &caught) {
		_ = cmd.Process.Signal(caught.Signal) // it may have ended
	}
	select {
	case err := <-done:
		return said(err)
	case <-time.After(hangPatience):
		return fmt.Errorf("the server of the mount does not answer: %w", context.Cause(ctx))
	}
}

// said is the result of another mount-image, which has told what was wrong.
func said(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return cli.Exit(exit.ExitCode())
	}
	return err
}
