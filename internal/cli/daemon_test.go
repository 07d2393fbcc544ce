package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"
)

// The test binary plays a tool that goes to the background when this names
// what it does there.
const playEnv = "IMAGESTACK_TEST_DAEMON"

func TestMain(m *testing.M) {
	if what := os.Getenv(playEnv); what != "" {
		Main(Tool{Name: "play", Flags: &struct{}{}, Run: func(ctx context.Context, _ *kong.Context) error { return play(ctx, what) }})
	}
	os.Exit(m.Run())
}

func play(ctx context.Context, what string) error {
	d := DaemonChild()
	if d == nil {
		return StartDaemon(ctx)
	}
	what, arg, _ := strings.Cut(what, ":")
	switch what {
	case "fail":
		return Usagef("will not")
	case "die":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	case "vanish":
		return nil
	case "hang":
		fmt.Println(os.Getpid())
		<-ctx.Done()
		return context.Cause(ctx)
	case "late":
		fmt.Println(os.Getpid())
		<-ctx.Done()
		return d.Ready("")
	}
	fmt.Println("on stdout")
	if err := d.Ready(filepath.Join(arg, "log")); err != nil {
		return err
	}
	// Tell what a daemon looks like from inside.
	var b bytes.Buffer
	fmt.Fprintln(&b, os.Getpid())
	cwd, _ := os.Getwd()
	sid, _ := unix.Getsid(0)
	fmt.Fprintln(&b, cwd, sid == os.Getpid(), os.Getenv(readyEnv) == "")
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		target, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		fmt.Fprintln(&b, fd.Name(), target)
	}
	fmt.Fprintln(os.Stderr, "late message")
	if err := os.WriteFile(filepath.Join(arg, "told.tmp"), b.Bytes(), 0o600); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(arg, "told.tmp"), filepath.Join(arg, "told")); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// start runs the tool and returns its exit code and output.
func start(t *testing.T, what string, inherit ...*os.File) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), playEnv+"="+what)
	cmd.ExtraFiles = inherit
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = 20 * time.Second // a daemon that holds on to our pipes fails the test
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
}

func TestDaemonReady(t *testing.T) {
	dir := t.TempDir()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := start(t, "ready:"+dir, w)
	_ = w.Close()
	if code != 0 || stdout != "on stdout\n" || stderr != "" {
		t.Fatalf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	var told []byte
	for end := time.Now().Add(10 * time.Second); told == nil; time.Sleep(10 * time.Millisecond) {
		if told, _ = os.ReadFile(filepath.Join(dir, "told")); time.Now().After(end) {
			t.Fatal("the daemon does not tell")
		}
	}
	lines := strings.Split(string(told), "\n")
	pid, err := strconv.Atoi(lines[0])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	if lines[1] != "/ true true" {
		t.Errorf("directory, own session, clean environment: %q", lines[1])
	}
	for _, line := range lines[2:] {
		fd, target, _ := strings.Cut(line, " ")
		switch {
		case fd == "0" && target != "/dev/null",
			(fd == "1" || fd == "2") && target != filepath.Join(dir, "log"),
			strings.HasPrefix(target, "pipe:"):
			t.Errorf("descriptor %s", line)
		}
	}
	// The pipe that somebody had left open in the caller is not held.
	if err := r.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("an inherited descriptor lives on: %v", err)
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		t.Error(err)
	}
	if log, err := os.ReadFile(filepath.Join(dir, "log")); err != nil || string(log) != "late message\n" {
		t.Errorf("log: %q %v", log, err)
	}
}

func TestDaemonFails(t *testing.T) {
	if code, stdout, stderr := start(t, "fail"); code != ExitUsage || stdout != "" || stderr != "play: will not\nplay: try: play --help\n" {
		t.Errorf("fail: exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	if code, _, stderr := start(t, "die"); code != ExitFailed || !strings.Contains(stderr, "died") {
		t.Errorf("die: exit %d, stderr %q", code, stderr)
	}
	if code, _, stderr := start(t, "vanish"); code != ExitFailed || !strings.Contains(stderr, "before it was ready") {
		t.Errorf("vanish: exit %d, stderr %q", code, stderr)
	}
	if code, _, stderr := start(t, "ready:/no/such/dir"); code != ExitFailed || !strings.Contains(stderr, "/no/such/dir") {
		t.Errorf("bad log: exit %d, stderr %q", code, stderr)
	}
}

// Ctrl-C while waiting ends the daemon to be, too.
func TestDaemonInterrupted(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), playEnv+"=hang")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != ExitInterrupt {
		t.Errorf("exit %d", code)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the child lives on: %v", err)
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// A daemon that is told to end while it becomes ready does not count as ready.
func TestDaemonInterruptedWhenReady(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), playEnv+"=late")
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 32)); err != nil { // the daemon runs
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != ExitInterrupt {
		t.Errorf("exit %d, want %d", code, ExitInterrupt)
	}
}
