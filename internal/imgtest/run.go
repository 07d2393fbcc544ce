package imgtest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// commandTimeout bounds every program that a test starts: some of them hang
// on the damage that we feed them.
const commandTimeout = 2 * time.Minute

// result is what a finished program left behind.
type result struct {
	exit   int // exit status, 128+signal when it was killed, as a shell says it
	stdout []byte
	stderr []byte
}

func (r result) all() string { return string(r.stdout) + string(r.stderr) }

// start runs a program to its end. Only the failure to run it at all, or its
// running too long, fails the test.
func start(t testing.TB, env []string, name string, args ...string) result {
	t.Helper()
	path := tool(name)
	if path == "" {
		Require(t, name)
		return result{}
	}
	// Not t.Context(): cleanups use the oracles too.
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Env = append(cmd.Env, env...)
	cmd.WaitDelay = 5 * time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	r := result{exit: cmd.ProcessState.ExitCode(), stdout: out.Bytes(), stderr: errOut.Bytes()}
	if ctx.Err() != nil {
		t.Fatalf("%s %s: still running after %v\n%s", name, strings.Join(args, " "), commandTimeout, r.all())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, r.all())
	}
	if r.exit < 0 {
		r.exit = signalled(cmd.ProcessState)
	}
	return r
}

// Run runs a program, fails the test unless it exits 0, and returns its
// standard output.
func Run(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	r := start(t, nil, name, args...)
	if r.exit != 0 {
		t.Fatalf("%s %s: exit %d\n%s", name, strings.Join(args, " "), r.exit, r.all())
	}
	return r.stdout
}

// Try runs a program and returns its exit status (128+n when signal n killed
// it) and everything that it printed, standard output first.
func Try(t testing.TB, name string, args ...string) (exit int, out string) {
	t.Helper()
	r := start(t, nil, name, args...)
	return r.exit, r.all()
}

// signalled is the exit status that a shell gives to a killed program.
func signalled(s *os.ProcessState) int {
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return -1
}
