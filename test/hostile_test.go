package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/hostile"
)

// What a hostile image may cost: memory and processor time. Time as such says
// only that a program hangs, because the machine may be busy.
const (
	hostileRSS  = 256 << 20
	hostileCPU  = 5 * time.Second
	hostileWall = 5 * time.Minute
	// A repair may have to write as much as tables of 32 MiB name.
	repairCPU  = 30 * time.Second
	repairWall = 300 * time.Second
)

// Every tool on every hostile image: the documented exit code, one message,
// nothing written, nothing read that is nobody's business, bounded memory and
// time.
func TestHostile(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "time", "prlimit")
	var images, runs atomic.Int64
	t.Run("images", func(t *testing.T) {
		for i, c := range hostile.Cases() {
			if c.Class == hostile.Guest && i%*guestsEvery != 0 {
				continue
			}
			t.Run(c.Name, func(t *testing.T) {
				t.Parallel()
				dirs, err := c.Prepare(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				images.Add(1)
				tools := hostile.Tools()
				if c.Class == hostile.Guest {
					// The image around it has something for image-fsck to
					// repair. It is to be sound when it is compacted.
					tools = append(slices.DeleteFunc(tools, func(t hostile.Tool) bool { return t == hostile.Compact }), hostile.Compact)
				}
				for _, tool := range tools {
					if !built(tool) || c.Class == hostile.Guest && !guestTools[tool] {
						continue
					}
					runs.Add(1)
					(&hostileRun{T: t, c: c, dirs: dirs, tool: tool}).run()
				}
			})
		}
	})
	t.Logf("%d hostile images, %d runs", images.Load(), runs.Load())
	if *hostileRecord {
		name := filepath.Join("..", "internal", "imgtest", "hostile", "exits.txt")
		if err := os.WriteFile(name, []byte(hostile.Format(hostileCodes.all)), 0o644); err != nil {
			t.Error(err)
		}
	}
}

// Filesystems are many, and guestfs tests them all without a process for each.
var guestsEvery = flag.Int("hostile.guests", 8, "give one of so many hostile filesystems to the tools")

// Exit codes that are recorded have to be looked at by somebody before they are
// believed: git diff.
var hostileRecord = flag.Bool("hostile.record", false, "write the exit codes to internal/imgtest/hostile/exits.txt instead of judging them")

var hostileCodes = struct {
	sync.Mutex
	all map[string]map[hostile.Tool]int
}{all: map[string]map[hostile.Tool]int{}}

func (r *hostileRun) record(exit int) {
	hostileCodes.Lock()
	defer hostileCodes.Unlock()
	if hostileCodes.all[r.c.Name] == nil {
		hostileCodes.all[r.c.Name] = map[hostile.Tool]int{}
	}
	hostileCodes.all[r.c.Name][r.tool] = exit
}

// guestTools are those that look into filesystems.
var guestTools = map[hostile.Tool]bool{hostile.Partitions: true, hostile.Fsck: true, hostile.Estimate: true, hostile.Compact: true, hostile.Repair: true}

// built reports whether there is such a tool.
func built(tool hostile.Tool) bool {
	_, err := os.Stat(filepath.Join(binDir, strings.Fields(string(tool))[0]))
	return err == nil
}

type hostileRun struct {
	*testing.T
	c    hostile.Case
	dirs hostile.Dirs
	tool hostile.Tool
}

func (r *hostileRun) errorf(format string, args ...any) {
	r.Helper()
	r.Errorf("%s: %s", r.tool, fmt.Sprintf(format, args...))
}

func (r *hostileRun) run() {
	before, outside := r.state(r.dirs.In), r.state(r.dirs.Outside)
	words := strings.Fields(string(r.tool))
	args := append(words[1:], r.c.Args...)
	args = append(args, filepath.Join(r.dirs.In, r.c.Image))
	mounts := words[0] == "mount-image"
	dir := ""
	if mounts {
		dir = r.TempDir()
		args = append(args, dir)
	}
	exit, stdout, stderr := r.start(words[0], args...)
	served := false
	if mounts && exit == 0 {
		served = true
		r.read(dir)
		if code, _, e := r.start("mount-image", "-u", dir); code != 0 {
			r.errorf("-u: exit %d\n%s", code, e)
			_, _, _ = r.start("mount-image", "-u", "--force", dir)
		}
	}
	if want, ok := r.c.Want(r.tool); *hostileRecord && hostile.Recorded(r.tool) {
		r.record(exit)
	} else if !ok {
		r.errorf("exit %d, and nobody has said what it should be: -hostile.record", exit)
	} else if exit != want {
		r.errorf("exit %d, want %d\n%s", exit, want, clip(stderr))
	}
	if allowed := map[hostile.Tool]int{hostile.Fsck: 4 | 8, hostile.Repair: 1 | 4 | 8}[r.tool]; exit&^allowed != 0 && (allowed != 0 || exit != 1 && exit != 4) {
		r.errorf("exit %d is none of the documented ones\n%s", exit, clip(stderr))
	}
	r.message(words[0], exit, stdout, stderr)
	if r.state(r.dirs.Outside) != outside {
		r.errorf("something was written outside the directory of the image")
	}
	if r.tool == hostile.Repair {
		// Clean, or it says that it is not.
		if again, _, e := r.start(words[0], append([]string{"-n"}, args[1:]...)...); exit == 1 && again != 0 {
			r.errorf("exit %d, and %d of a check afterwards\n%s", exit, again, clip(e))
		}
		return
	}
	after := r.state(r.dirs.In)
	if r.tool == hostile.Compact && exit == 0 {
		return // its right
	}
	if r.tool == hostile.Write && served {
		return // its right
	}
	if r.tool == hostile.Write || r.tool == hostile.Compact {
		// The lock of a bundle stays, as ploop's does.
		after = withoutLock(after)
		before = withoutLock(before)
	}
	if after != before {
		r.errorf("the directory was changed:\n%s\nto\n%s", clip(before), clip(after))
	}
}

func withoutLock(state string) string {
	return regexp.MustCompile(`(?m)^DiskDescriptor\.xml\.lck .*\n`).ReplaceAllString(state, "")
}

// message checks what was said.
func (r *hostileRun) message(program string, exit int, stdout, stderr string) {
	for _, bad := range []string{"panic", "goroutine ", "runtime error", hostile.SecretText} {
		if strings.Contains(stdout+stderr, bad) {
			r.errorf("it says %q:\n%s%s", bad, clip(stdout), clip(stderr))
		}
	}
	for _, c := range stdout + stderr {
		if c < ' ' && c != '\n' && c != '\t' && c != '\r' || c == 0x7f {
			r.errorf("a control character is printed: %q", clip(stdout+stderr))
			break
		}
	}
	if exit == 0 || r.tool == hostile.Fsck || r.tool == hostile.Repair {
		return
	}
	lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
	if len(lines) > 2 || len(stderr) > 4096 {
		r.errorf("more than a message and a hint:\n%s", clip(stderr))
	}
	for _, l := range lines {
		if !strings.HasPrefix(l, program+": ") {
			r.errorf("a line without the tool's name: %q", l)
		}
	}
	if r.tool == hostile.Estimate || r.tool == hostile.Compact {
		return // its words are its own
	}
	for _, w := range r.c.Words {
		if !strings.Contains(stderr, w) {
			r.errorf("%q is not said:\n%s", w, clip(stderr))
		}
	}
}

// start runs a program within the limits.
//
// Processor time is no property of the program alone: neighbours on a core take
// its caches, and the kernel works for others on its account. So a run that
// changes nothing and exceeds the limit is repeated, and the least of three
// counts. The limit is as hard as before: a program that needs more than it
// exceeds it each time.
func (r *hostileRun) start(program string, args ...string) (exit int, stdout, stderr string) {
	most := hostileCPU
	if r.tool == hostile.Repair {
		most = repairCPU
	}
	var best *hostileCost
	for range 3 {
		c := r.once(most, program, args...)
		if c == nil {
			return -1, "", ""
		}
		if best == nil || c.cpu < best.cpu {
			best = c
		}
		if best.cpu <= most || imgtest.RaceEnabled || !changesNothing(program, args) {
			break
		}
		if program == "mount-image" && c.exit == 0 {
			r.once(most, program, "-u", args[len(args)-1])
		}
	}
	if best.cpu > most && !imgtest.RaceEnabled {
		r.errorf("%q: %v of processor time", args, best.cpu)
	} else if best.cpu > most/5 {
		r.Logf("%s %q: %v of processor time", program, args[:len(args)-1], best.cpu)
	}
	r.memory(best.peak)
	return best.exit, best.stdout, best.stderr
}

// changesNothing reports whether a run can be repeated as if it had not been.
func changesNothing(program string, args []string) bool {
	switch program {
	case "image-fsck", "image-compact":
		return slices.Contains(args, "-n")
	case "mount-image":
		return !slices.Contains(args, "-w") && !slices.Contains(args, "-u")
	}
	return slices.Contains([]string{"info", "map"}, args[0])
}

// hostileCost is what a run said and cost.
type hostileCost struct {
	exit           int
	stdout, stderr string
	cpu            time.Duration
	peak           string // of memory, KiB
}

// once runs a program, which is killed when it takes twice the processor time
// that it may; nil says that it did not come to an end.
func (r *hostileRun) once(most time.Duration, program string, args ...string) *hostileCost {
	wall := hostileWall
	if r.tool == hostile.Repair {
		wall = repairWall
	}
	ctx, cancel := context.WithTimeout(context.Background(), wall)
	defer cancel()
	// Twice the time is the end. (Not the limit itself: how much it was is told.)
	limit := fmt.Sprintf("--cpu=%d", 2*most/time.Second)
	if imgtest.RaceEnabled {
		limit = "--cpu=100"
	}
	// A child's peak of memory begins with what its parent had when it started
	// the child: so the parent is a small program, and not this one.
	peak := filepath.Join(r.TempDir(), "peak")
	cmd := exec.CommandContext(ctx, "time", append([]string{"-q", "-f", "%M", "-o", peak, "prlimit", limit, filepath.Join(binDir, program)}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &limited{w: &out}, &limited{w: &errOut}
	cmd.WaitDelay = 5 * time.Second
	_ = cmd.Run()
	if ctx.Err() != nil || cmd.ProcessState == nil {
		r.errorf("%q: still running after %v", args, wall)
		return nil
	}
	kib, err := os.ReadFile(peak)
	if err != nil {
		r.Fatal(err)
	}
	s := cmd.ProcessState
	return &hostileCost{s.ExitCode(), out.String(), errOut.String(), s.UserTime() + s.SystemTime(), string(kib)}
}

// memory checks a peak of resident memory in KiB.
func (r *hostileRun) memory(kib string) {
	n, err := strconv.ParseInt(strings.TrimSpace(kib), 10, 64)
	if err != nil {
		r.errorf("its memory: %v", err)
	}
	if n > hostileRSS>>10 && !imgtest.RaceEnabled {
		r.errorf("%d MiB of memory", n>>10)
	}
}

// limited keeps the first MiB.
type limited struct{ w *bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := 1<<20 - l.w.Len(); room > 0 {
		l.w.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

// read looks at the disk of a mount: errors are fine, hanging and secrets are
// not. It also asks what the server has cost.
func (r *hostileRun) read(dir string) {
	if _, err := serverPeak(dir); err != nil {
		r.errorf("no server: %v", err)
		return
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		r.errorf("%v", err)
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			r.errorf("%v", err)
			continue
		}
		if st, err := f.Stat(); err == nil {
			for _, off := range []int64{0, st.Size() / 2, st.Size() - 64<<10} {
				p := make([]byte, 64<<10)
				got, _ := f.ReadAt(p, max(off, 0))
				if bytes.Contains(p[:got], []byte(hostile.SecretText)) {
					r.errorf("%s holds the secret", e.Name())
				}
			}
		}
		_ = f.Close()
	}
	kib, err := serverPeak(dir)
	if err != nil {
		r.errorf("the server has gone: %v", err)
		return
	}
	r.memory(kib)
}

// state describes everything under dir, contents by their first MiB (the time
// of the last change says the rest).
func (r *hostileRun) state(dir string) string {
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		st, err := e.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		fmt.Fprintf(&b, "%s %v %d %v", rel, st.Mode(), st.Size(), st.ModTime().UnixNano())
		if st.Mode().IsRegular() {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			h := sha256.New()
			_, err = io.CopyN(h, f, 1<<20)
			_ = f.Close()
			if err != nil && err != io.EOF {
				return err
			}
			fmt.Fprintf(&b, " %x", h.Sum(nil)[:8])
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		r.Fatal(err)
	}
	return b.String()
}

func clip(s string) string {
	if len(s) > 2000 {
		return s[:2000] + "..."
	}
	return s
}
