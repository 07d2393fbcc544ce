package e2e

import (
	"context"
	"flag"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/hostile"
)

var opensEach = flag.Int("hostile.opens", 3, "give about so many images of each class to each tool under strace")

// Every file that is opened, as the kernel saw it, with the sandbox off: only
// the policy of the tools themselves stands between the image and the files.
// The images that name others are all looked at by two tools; besides, every
// tool looks at some of every class.
func TestHostileOpens(t *testing.T) {
	imgtest.RequireRoot(t)
	imgtest.RequireFuse(t)
	imgtest.Require(t, "strace")
	usual := map[hostile.Tool]*trace{}
	for _, tool := range hostile.Tools() {
		usual[tool] = usualOf(t, tool)
	}
	byClass := map[hostile.Class]int{}
	for _, c := range hostile.Cases() {
		byClass[c.Class]++
	}
	nth := map[hostile.Class]int{}
	for _, c := range hostile.Cases() {
		n := nth[c.Class]
		nth[c.Class]++
		var tools []hostile.Tool
		for k, tool := range hostile.Tools() {
			always := (c.Class == hostile.Path || c.Class == hostile.Chain) && (tool == hostile.Info || tool == hostile.Fsck)
			every := max(byClass[c.Class] / *opensEach, 1)
			if always || (n+k)%every == 0 {
				tools = append(tools, tool)
			}
		}
		if len(tools) == 0 || strings.Contains(c.Name, "1200") {
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			for _, tool := range tools {
				// Each has the image as it was made.
				dirs, err := c.Prepare(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				got := traced(t, tool, dirs.In, append(slices.Clone(c.Args), filepath.Join(dirs.In, c.Image)))
				for _, what := range got.beyond(usual[tool], dirs.In) {
					// The special file that the user named itself may be opened.
					if c.Name != "a character device" || what != "/dev/zero was opened" {
						t.Errorf("%s: %s", tool, what)
					}
				}
			}
		})
	}
}

// TestHostileOpensNotices is the control: what the policy is told to allow is
// seen in the trace.
func TestHostileOpensNotices(t *testing.T) {
	imgtest.Require(t, "strace")
	for _, c := range hostile.Cases() {
		if c.Name != "qcow2 backing file: outside by .." {
			continue
		}
		dirs, err := c.Prepare(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		got := traced(t, hostile.Info, dirs.In, []string{"--allow-path", dirs.Outside, filepath.Join(dirs.In, c.Image)})
		if !got.opened[filepath.Join(dirs.Outside, hostile.Secret)] {
			t.Errorf("the parent was not seen: %v", got.opened)
		}
		if all := got.beyond(&trace{}, dirs.In); !slices.Contains(all, filepath.Join(dirs.Outside, hostile.Secret)+" was opened") {
			t.Errorf("not noticed: %q", all)
		}
	}
}

// trace is what a program did.
type trace struct {
	opened map[string]bool // files
	calls  map[string]bool // that have to do with connections and programs
	own    []string        // directories that it was given
}

// usualOf is what a tool does for sound images.
func usualOf(t *testing.T, tool hostile.Tool) *trace {
	t.Helper()
	// What io_uring asks for depends on whether it is switched on, which other
	// tests change.
	all := &trace{opened: map[string]bool{"/sys/devices/system/cpu/possible": true, "/sys/module/fuse/parameters/enable_uring": true}, calls: map[string]bool{}}
	sound := t.TempDir()
	if err := os.WriteFile(filepath.Join(sound, "a"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	images := map[string][]string{sound: {filepath.Join(sound, "a")}}
	for _, c := range hostile.Sound()[:1] {
		dirs, err := c.Prepare(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		images[dirs.In] = []string{filepath.Join(dirs.In, c.Image)}
	}
	for dir, args := range images {
		got := traced(t, tool, dir, args)
		if len(got.opened) == 0 { // of this run
			t.Fatal("nothing was traced")
		}
		maps.Copy(all.opened, got.opened)
		maps.Copy(all.calls, got.calls)
	}
	return all
}

// beyond is what the program did outside of the image's directory, and not for
// any image.
func (tr *trace) beyond(usual *trace, dir string) (all []string) {
	for _, path := range slices.Sorted(maps.Keys(tr.opened)) {
		if !usual.opened[path] && !inside(path, dir) && !slices.ContainsFunc(tr.own, func(own string) bool { return inside(path, own) }) {
			all = append(all, path+" was opened")
		}
	}
	for _, call := range slices.Sorted(maps.Keys(tr.calls)) {
		if !usual.calls[call] {
			all = append(all, "a connection or a program: "+call)
		}
	}
	return all
}

var (
	traceResult  = regexp.MustCompile(`= \d+<([^>]*)>`)
	traceProcess = regexp.MustCompile(`^/proc/\d+/`)
	traceDevice  = regexp.MustCompile(`^/sys/devices/virtual/bdi/\d+:\d+/`)
	// What differs from run to run in a call: the process, pointers, results.
	traceVaries = regexp.MustCompile(`^\d+ +|0x[0-9a-f]+|/\* \d+ vars \*/|\) += .*|<[^>]*>|"/tmp/[^"]*"|/proc/self/fd/\d+|\d+`)
)

// traced runs a tool, which sees no directory for temporary files but one of
// its own. What it mounts is read from, and unmounted.
func traced(t *testing.T, tool hostile.Tool, dir string, image []string) *trace {
	t.Helper()
	tr := &trace{opened: map[string]bool{}, calls: map[string]bool{}, own: []string{t.TempDir()}}
	log := filepath.Join(t.TempDir(), "trace")
	words := strings.Fields(string(tool))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	args := append([]string{"-f", "-qq", "-y", "-o", log, "-e", "trace=open,openat,openat2,creat,socket,connect,execve",
		filepath.Join(binDir, words[0])}, words[1:]...)
	args = append(append(args, "--sandbox=off"), image...)
	mnt := ""
	if words[0] == "mount-image" {
		mnt = mountPoint(t)
		tr.own = append(tr.own, mnt)
		args = append(args, mnt, "-f")
	}
	cmd := exec.CommandContext(ctx, "strace", args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tr.own[0])
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait() // most images are refused
	}()
	if mnt != "" {
		useMount(t, mnt, done)
	}
	<-done
	if ctx.Err() != nil {
		t.Fatalf("%s: still running", tool)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Split(string(text), "\n") {
		switch {
		case strings.Contains(line, "socket("), strings.Contains(line, "connect("), strings.Contains(line, "execve(") && i > 0:
			tr.calls[traceVaries.ReplaceAllString(line, "")] = true
		default:
			if m := traceResult.FindStringSubmatch(line); m != nil {
				name := traceDevice.ReplaceAllString(m[1], "/sys/devices/virtual/bdi/0:0/")
				tr.opened[traceProcess.ReplaceAllString(name, "/proc/self/")] = true
			}
		}
	}
	return tr
}

// useMount waits for a mount, or for the end of its server, reads, and
// unmounts.
func useMount(t *testing.T, mnt string, done <-chan struct{}) {
	t.Helper()
	for {
		select {
		case <-done:
			return
		case <-time.After(20 * time.Millisecond):
		}
		if len(mountsUnder(mnt)) > 0 {
			break
		}
	}
	if f, err := os.Open(filepath.Join(mnt, "disk.raw")); err == nil {
		_, _ = f.ReadAt(make([]byte, 64<<10), 0) // damage is no news
		_ = f.Close()
	}
	// The user of the disk in front may be the server itself, which probes it.
	for range 50 {
		if o := runTool(t, "mount-image", "-u", mnt); o.exit == 0 || len(mountsUnder(mnt)) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("%s cannot be unmounted", mnt)
}
