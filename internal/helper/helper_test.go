package helper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/sandbox"
)

// The test binary is the program that runs within limits when this is its
// first argument.
const programArg = "(the program)"

func TestMain(m *testing.M) {
	Be()
	if len(os.Args) > 1 && os.Args[1] == programArg {
		program(os.Args[2])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// program tries what a program that an image has taken over would try; "" is
// success.
func program(view string) {
	got := map[string]string{}
	try := func(what string, err error) {
		got[what] = ""
		if err != nil {
			got[what] = err.Error()
		}
	}
	file := func(what, path string, flags int) {
		f, err := os.OpenFile(path, flags, 0o600)
		if err == nil {
			err = f.Close()
		}
		try(what, err)
	}
	file("read view", view, os.O_RDONLY)
	file("write view", view, os.O_RDWR)
	file("secret", "/etc/shadow", os.O_RDONLY)
	file("neighbour", view+".neighbour", os.O_RDONLY)
	file("make", view+".new", os.O_RDWR|os.O_CREATE)
	c, err := net.DialTimeout("tcp", "127.0.0.1:1", time.Second)
	if err == nil {
		err = c.Close()
	} else if errors.Is(err, unix.ECONNREFUSED) {
		err = nil // it was tried
	}
	try("connect", err)
	try("fork", exec.Command("/bin/true").Run())
	try("signal", unix.Kill(os.Getppid(), 0))
	f, err := os.OpenFile(view, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("x"), 8192)
	}
	try("grow", err)
	m, err := unix.Mmap(-1, 0, 8<<30, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_NORESERVE)
	if err == nil {
		_ = unix.Munmap(m)
	}
	try("memory", err)
	err = nil
	for i := 0; i < 2*files && err == nil; i++ {
		_, err = unix.Dup(0)
	}
	try("descriptors", err)
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CPU, &l); err != nil {
		panic(err)
	}
	got["cpu"] = fmt.Sprint(l.Max)
	_ = json.NewEncoder(os.Stdout).Encode(got) // the parent sees what is missing
	try("exec", unix.Exec("/bin/true", []string{"true"}, nil))
	fmt.Println("exec:", got["exec"])
}

func start(t *testing.T, mode sandbox.Mode, writable bool) (map[string]string, string) {
	t.Helper()
	view := filepath.Join(t.TempDir(), "view")
	for _, path := range []string{view, view + ".neighbour"} {
		if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd, err := Command(t.Context(), Spec{
		Mode: mode, Path: os.Args[0], Args: []string{programArg, view}, View: view, Size: 4096, Writable: writable,
	})
	if err != nil {
		t.Fatal(err)
	}
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	text, last, _ := strings.Cut(string(out), "\n")
	var got map[string]string
	if jsonErr := json.Unmarshal([]byte(text), &got); jsonErr != nil {
		t.Fatalf("%v, %v\n%s%s", err, jsonErr, out, errOut.String())
	}
	return got, last
}

// A program that was taken over reaches its file and nothing else.
func TestLimits(t *testing.T) {
	imgtest.RequireLandlock(t, sandbox.Available())
	for _, writable := range []bool{false, true} {
		got, last := start(t, sandbox.Require, writable)
		for _, what := range []string{"secret", "neighbour", "make", "connect", "fork", "signal", "grow", "memory", "descriptors"} {
			if e, ok := got[what]; !ok || e == "" {
				t.Errorf("writable %v: %s succeeded", writable, what)
			}
		}
		if got["read view"] != "" || (got["write view"] == "") != writable {
			t.Errorf("writable %v: %q", writable, got)
		}
		if !strings.Contains(last, "permission denied") {
			t.Errorf("another program: %q", last)
		}
		if got["cpu"] != fmt.Sprint(seconds) {
			t.Errorf("%s s of processor time", got["cpu"])
		}
		if writable && !strings.Contains(got["grow"], "file too large") {
			t.Errorf("growing the file: %q", got["grow"])
		}
	}
}

// Without the sandbox the same attempts succeed, but for the limits.
func TestLimitsControl(t *testing.T) {
	imgtest.RequireRoot(t)
	got, last := start(t, sandbox.Off, true)
	for _, what := range []string{"secret", "neighbour", "make", "connect", "fork", "signal"} {
		if got[what] != "" {
			t.Errorf("%s: %s", what, got[what])
		}
	}
	for _, what := range []string{"grow", "memory", "descriptors"} {
		if got[what] == "" {
			t.Errorf("%s succeeded", what)
		}
	}
	if last != "" {
		t.Errorf("another program: %q", last)
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	path, err := Find("sleep")
	if err != nil {
		t.Fatal(err)
	}
	cmd, err := Command(ctx, Spec{Mode: sandbox.Auto, Path: path, Args: []string{"60"}, View: "/dev/null"})
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := cmd.Run(); err == nil || time.Since(begun) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(begun))
	}
}

func TestText(t *testing.T) {
	tail := &Tail{Max: 5}
	for _, s := range []string{"ab", "c\x1bd", "é"} {
		if n, err := tail.Write([]byte(s)); n != len(s) || err != nil {
			t.Error(n, err)
		}
	}
	if got := tail.String(); got != "c?d??" {
		t.Errorf("%q", got)
	}
	if _, err := Find("no-such-program"); err == nil {
		t.Error("found")
	}
}
