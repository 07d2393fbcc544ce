package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// A daemon is the same program, started again in a session of its own with
// the write end of a pipe. Until it calls Ready it has the stdout and stderr
// of its parent, so that whatever goes wrong is seen where the command was
// typed; the parent waits, and exits as the child does when it ends before.

// readyEnv names the descriptor of the pipe in the child's environment.
const readyEnv = "IMAGESTACK_READY_FD"

// readyByte is what Ready sends.
const readyByte = '+'

// Daemon is the child's side.
type Daemon struct {
	ready   *os.File
	in, out *os.File // after Prepare
}

// DaemonChild returns the child's side when this process is the child of
// StartDaemon, else nil.
func DaemonChild() *Daemon {
	fd, err := strconv.Atoi(os.Getenv(readyEnv))
	if err != nil || fd < 3 {
		return nil
	}
	// Nobody whom this process starts takes part.
	_ = os.Unsetenv(readyEnv)
	unix.CloseOnExec(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil
	}
	return &Daemon{ready: os.NewFile(uintptr(fd), "ready")}
}

// Prepare does what of Ready needs the right to open files: it opens logFile,
// or /dev/null when it is empty. Leaving the working directory is then left to
// the caller.
func (d *Daemon) Prepare(logFile string) (err error) {
	out := os.DevNull
	flags := os.O_WRONLY
	if logFile != "" {
		out, flags = logFile, os.O_WRONLY|os.O_APPEND|os.O_CREATE
	}
	if d.out, err = os.OpenFile(out, flags, 0o600); err != nil {
		return err
	}
	d.in, err = os.Open(os.DevNull)
	return err
}

// Ready cuts the last ties to the parent (working directory, stdin, stdout,
// stderr; the latter two go to logFile, or to /dev/null when it is empty) and
// lets it exit with code 0. An error means that the parent is gone and nobody
// knows of this daemon, which must end. After Prepare, whose logFile counts,
// it opens nothing.
func (d *Daemon) Ready(logFile string) error {
	if d.ready == nil {
		return nil
	}
	if d.out == nil || d.in == nil {
		if err := d.Prepare(logFile); err != nil {
			return err
		}
		if err := os.Chdir("/"); err != nil {
			return err
		}
	}
	w, r := d.out, d.in
	defer w.Close()
	defer r.Close()
	// Not before everything else has worked: errors still reach the parent.
	for fd, f := range []*os.File{r, w, w} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
	}
	_, err := d.ready.Write([]byte{readyByte})
	err = errors.Join(err, d.ready.Close())
	d.ready = nil
	if err != nil {
		return fmt.Errorf("telling the parent: %w", err)
	}
	return nil
}

// StartDaemon starts the program again with the same arguments, in the
// background, and waits until it is ready (nil) or has ended (an error with
// its exit code and, since it has said why, without a message). Descriptors
// other than stdin, stdout and stderr are not inherited.
func StartDaemon(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := closeAllOnExec(); err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{w}
	cmd.Env = append(os.Environ(), readyEnv+"=3")
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("starting the server: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(unix.SIGTERM) })
	defer stop()
	buf := make([]byte, 1)
	n, err := r.Read(buf)
	if n == 1 && buf[0] == readyByte {
		if stop() {
			return cmd.Process.Release()
		}
		// It was told to end in the moment in which it became ready.
		_ = cmd.Wait()
		return context.Cause(ctx)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	err = cmd.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return Exit(exit.ExitCode())
	}
	if err == nil {
		return errors.New("the server ended before it was ready")
	}
	return fmt.Errorf("the server died before it was ready: %w", err)
}

// closeAllOnExec keeps descriptors that this process has inherited, knowingly
// or not, from living on in the daemon.
func closeAllOnExec() error {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if fd, err := strconv.Atoi(filepath.Base(name)); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}
