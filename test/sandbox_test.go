package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// hooked builds the tools with the hook that acts as a parser which an image
// has taken over, and returns their directory.
var hooked = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "hooked")
	if err != nil {
		return "", err
	}
	_, self, _, _ := runtime.Caller(0)
	build := exec.Command("go", "build", "-buildvcs=false", "-tags", "imagestack_testhook", "-o", dir+"/", "./cmd/mount-image", "./cmd/image-stack", "./cmd/image-fsck", "./cmd/image-compact")
	build.Dir = filepath.Dir(filepath.Dir(self))
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as the Makefile does
	out, err := build.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return dir, nil
})

// attacked starts a hooked tool and returns what came of each attack, by
// stage and attempt, when done says so or the tool has ended.
func attacked(t *testing.T, env []string, done func() bool, args ...string) map[string]string {
	t.Helper()
	dir, err := hooked()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(dir, args[0]), args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	log := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = nil, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		select {
		case err = <-ended:
			// From an empty image nothing can be rebuilt: exit 4.
			if err != nil && !(slices.Contains(args, "--scavenge") && cmd.ProcessState.ExitCode() == 4) {
				t.Fatalf("%q: %v\n%s", args, err, log)
			}
		default:
			if done() {
				// What answers has been attacked before.
				if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
					t.Fatal(err)
				}
				if err := <-ended; err != nil {
					t.Fatalf("%q: %v\n%s", args, err, log)
				}
			} else if time.Since(start) < time.Minute {
				continue
			} else {
				_ = cmd.Process.Kill()
				err := <-ended
				_ = err // it was killed
				t.Fatalf("%q: not ready after a minute\n%s", args, log)
			}
		}
		break
	}
	got := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^attack (\S+) (\S+): (\S+)$`).FindAllStringSubmatch(log.String(), -1) {
		got[m[1]+" "+m[2]] = m[3]
	}
	return got
}

// A parser that an image has taken over reaches nothing but what it reads, and
// once the disk is served not even that.
func TestCompromisedParser(t *testing.T) {
	imgtest.RequireFuse(t)
	dir := t.TempDir()
	image := createQcow2(t, dir, 8<<20, false)
	attempts := []string{"open-secret", "open-own-memory", "open-parent-memory", "write-elsewhere", "write-image", "read-image", "connect",
		"connect-unix", "exec", "exec-self", "ptrace", "kill-parent", "mount", "unshare", "become-root"}
	if os.Geteuid() == 0 {
		attempts = slices.DeleteFunc(attempts, func(s string) bool { return s == "become-root" }) // it is no change
	}
	never := func() bool { return false }
	for _, c := range []struct {
		name    string
		args    []string
		stages  []string
		succeed []string
	}{
		{"info", []string{"image-stack", "info"}, []string{"parse"}, []string{"parse read-image"}},
		{"map", []string{"image-stack", "map"}, []string{"parse"}, []string{"parse read-image"}},
		{"mount", []string{"mount-image", "-f"}, []string{"parse", "serve"}, []string{"parse read-image"}},
		{"write", []string{"mount-image", "-f", "-w"}, []string{"parse", "serve"}, []string{"parse read-image", "parse write-image"}},
		{"scratch", []string{"mount-image", "-f", "--scratch"}, []string{"parse", "serve"}, []string{"parse read-image"}},
		{"fsck", []string{"image-fsck", "-n"}, []string{"parse"}, []string{"parse read-image"}},
		{"fsck as nobody", []string{"image-fsck", "-n", "--uid", "nobody"}, []string{"parse"}, []string{"parse read-image"}},
		{"repair", []string{"image-fsck", "-y"}, []string{"parse"}, []string{"parse read-image", "parse write-image"}},
		{"repair, undo elsewhere", []string{"image-fsck", "-y", "--undo", t.TempDir()}, []string{"parse"}, []string{"parse read-image", "parse write-image"}},
		{"dump", []string{"image-fsck", "--dump", filepath.Join(t.TempDir(), "dump")}, []string{"parse"}, []string{"parse read-image"}},
		{"estimate", []string{"image-compact", "-n"}, []string{"parse"}, []string{"parse read-image"}},
		{"compact", []string{"image-compact"}, []string{"parse"}, []string{"parse read-image", "parse write-image"}},
		{"scavenge", []string{"image-fsck", "--scavenge", filepath.Join(t.TempDir(), "new.qcow2")}, []string{"parse"}, []string{"parse read-image"}},
		{"guest", []string{"image-fsck", "--guest"}, []string{"parse", "serve"}, []string{"parse read-image"}},
		{"guest as nobody", []string{"image-fsck", "--guest", "--uid", "nobody"}, []string{"parse", "serve"}, []string{"parse read-image"}},
		{"guest repair", []string{"image-fsck", "--guest", "-y"}, []string{"parse", "serve"}, []string{"parse read-image"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if slices.Contains(c.args, "--uid") {
				imgtest.RequireRoot(t)
			}
			args := append(c.args, "--sandbox=require", image)
			done := never
			if c.args[0] == "mount-image" {
				m := t.TempDir()
				args = append(args, m)
				done = func() bool { return served(m) }
			}
			env := "IMAGESTACK_ATTACK=parse=" + image + ",serve=" + image
			got := attacked(t, []string{env}, done, args...)
			for _, stage := range c.stages {
				for _, what := range attempts {
					want := "stopped"
					if slices.Contains(c.succeed, stage+" "+what) {
						want = "SUCCEEDED"
					}
					if g := got[stage+" "+what]; g != want {
						t.Errorf("%s %s: %q, want %s", stage, what, g, want)
					}
				}
			}
		})
	}
	t.Run("taking back", func(t *testing.T) {
		// A repair that is undone: then everything is open before.
		leaky := createQcow2(t, t.TempDir(), 8<<20, false)
		f, err := os.OpenFile(leaky, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		// A ninth cluster, counted and used by nothing.
		_, err = f.WriteAt([]byte{0, 1}, 2<<16+2*8)
		if err := errors.Join(err, f.Truncate(9<<16), f.Close()); err != nil {
			t.Fatal(err)
		}
		undo := filepath.Join(t.TempDir(), "undo")
		if exit, out := imgtest.Try(t, "image-fsck", "-y", "--undo", undo, leaky); exit&1 == 0 {
			t.Fatalf("nothing was repaired: exit %d %s", exit, out)
		}
		got := attacked(t, []string{"IMAGESTACK_ATTACK=parse=" + leaky}, never, "image-fsck", "--sandbox=require", "--undo-apply", undo, leaky)
		for _, what := range attempts {
			if g := got["parse "+what]; g != "stopped" {
				t.Errorf("%s: %q", what, g)
			}
		}
	})
	// Without the sandbox the attempts are no empty gestures.
	for _, tool := range [][]string{{"image-stack", "info"}, {"image-fsck", "-n"}} {
		t.Run("control "+tool[0], func(t *testing.T) {
			only := "IMAGESTACK_ATTACK_ONLY=open-secret,write-elsewhere,write-image,connect,exec,kill-parent"
			got := attacked(t, []string{"IMAGESTACK_ATTACK=parse=" + image, only}, never, append(tool, "--sandbox=off", image)...)
			_ = os.Remove("/var/tmp/imagestack-was-here")
			if os.Geteuid() != 0 {
				delete(got, "parse open-secret")
			}
			if len(got) < 5 {
				t.Errorf("%v", got)
			}
			for what, g := range got {
				if g != "SUCCEEDED" {
					t.Errorf("%s: %s", what, g)
				}
			}
		})
	}
}

// served reports whether a disk answers in dir.
func served(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "disk.raw"))
	return err == nil
}

// statusOf is /proc/PID/status of every thread, by field; threads must agree.
func statusOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("%v %v", files, err)
	}
	got := map[string]string{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(text)) {
			k, v, _ := strings.Cut(line, ":")
			v = strings.TrimSpace(v)
			switch k {
			case "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp":
				if old, ok := got[k]; ok && old != v {
					t.Errorf("threads differ in %s: %q, %q", k, old, v)
				}
				got[k] = v
			}
		}
	}
	return got
}

// children are the processes that pid has started.
func children(t *testing.T, pid int) []int {
	t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var all []int
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for _, s := range strings.Fields(string(text)) {
			n, err := strconv.Atoi(s)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, n)
		}
	}
	return all
}

// An isolated server with another user's rights does all that it does without
// isolation: a loop device, a filesystem, discards, the end.
func TestSandboxWorks(t *testing.T) {
	imgtest.RequireLoop(t)
	imgtest.Require(t, "mkfs.ext4", "mount", "umount", "fstrim", "e2fsck")
	for _, f := range formats {
		for _, user := range []string{"", "nobody"} {
			t.Run(f.name+"/"+user, func(t *testing.T) {
				dir, m, guest := t.TempDir(), t.TempDir(), t.TempDir()
				image := f.create(t, dir, 64<<20, true)
				args := []string{"-w", "--loop", "--sandbox=require"}
				if user != "" {
					args = append(args, "--uid", user)
				}
				loop := strings.TrimSpace(string(imgtest.Run(t, "mount-image", append(args, image, m)...)))
				server := serverPID(t, m)
				status := statusOf(t, server)
				uid := "0\t0\t0\t0"
				if user != "" {
					uid = "65534\t65534\t65534\t65534"
				}
				for field, want := range map[string]string{
					"Uid": uid, "Gid": uid, "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000",
					"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
				} {
					if status[field] != want {
						t.Errorf("%s: %q, want %q", field, status[field], want)
					}
				}
				keepers := children(t, server)
				if len(keepers) != 1 {
					t.Errorf("children of the server: %v", keepers)
				}
				imgtest.Run(t, "mkfs.ext4", "-q", loop)
				imgtest.Run(t, "mount", loop, guest)
				data := imgtest.PatternBytes(3, 0, 8<<20)
				if err := os.WriteFile(filepath.Join(guest, "f"), data, 0o600); err != nil {
					t.Fatal(err)
				}
				imgtest.Run(t, "fstrim", guest)
				imgtest.Run(t, "umount", guest)
				imgtest.Run(t, "mount-image", "-u", m)
				for _, pid := range append(keepers, server) {
					waitGone(t, pid)
				}
				f.check(t, image, false)

				// Again, as a reader, with partitions asked for.
				loop = strings.TrimSpace(string(imgtest.Run(t, "mount-image", "--loop", "--sandbox=require", image, m)))
				imgtest.Run(t, "e2fsck", "-fn", loop)
				imgtest.Run(t, "mount", "-o", "ro,noload", loop, guest)
				got, err := os.ReadFile(filepath.Join(guest, "f"))
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("the file is not what it was (%v)", err)
				}
				imgtest.Run(t, "umount", guest)
				server = serverPID(t, m)
				if err := unix.Kill(server, unix.SIGTERM); err != nil {
					t.Fatal(err)
				}
				waitGone(t, server)
				if served(m) || len(loopsUnder(m)) > 0 {
					t.Error("SIGTERM leaves the mount or the loop device behind")
				}
			})
		}
	}
}

func waitGone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(text), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %d stays", pid)
		}
	}
}

// Parents, data files and throw-away layers where the user allows them, and
// nowhere else.
func TestSandboxPaths(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.Require(t, "qemu-img", "qemu-io")
	top, other, m := t.TempDir(), t.TempDir(), t.TempDir()
	base := filepath.Join(other, "base.qcow2")
	image := filepath.Join(top, "top.qcow2")
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", base, "4M")
	imgtest.Run(t, "qemu-io", "-c", "write -P 0x5a 0 4M", base)
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
	if exit, out := imgtest.Try(t, "mount-image", "--sandbox=require", image, m); exit != 1 || !strings.Contains(out, "--allow-path") {
		t.Errorf("exit %d %s", exit, out)
	}
	link := filepath.Join(t.TempDir(), "link.qcow2")
	if err := os.Symlink(image, link); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{0x5a}, 4<<20)
	for _, args := range [][]string{
		{"--allow-path", other, image}, {"--allow-path", other, "-w", image}, {"--allow-path", other, "--scratch", image},
		{"--allow-path", other, link},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			imgtest.Run(t, "mount-image", append(append([]string{"--sandbox=require"}, args...), m)...)
			flags := os.O_RDONLY
			writable := slices.Contains(args, "-w") || slices.Contains(args, "--scratch")
			if writable {
				flags = os.O_RDWR
			}
			f, err := os.OpenFile(filepath.Join(m, "disk.raw"), flags, 0)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("wrong content (%v)", err)
			}
			if writable {
				_, err := f.WriteAt(want[:1<<20], 1<<20)
				if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
					t.Error(err)
				}
			}
			_ = f.Close()
			imgtest.Run(t, "mount-image", "-u", m)
		})
	}
}

// A server that has lost its keeper still serves and can be unmounted; one
// that is killed takes the keeper with it.
func TestKeeper(t *testing.T) {
	imgtest.RequireFuse(t)
	dir := t.TempDir()
	image := createQcow2(t, dir, 8<<20, false)
	for _, victim := range []string{"keeper", "server"} {
		t.Run(victim, func(t *testing.T) {
			m := t.TempDir()
			imgtest.Run(t, "mount-image", "-w", "--sandbox=require", image, m)
			server := serverPID(t, m)
			keepers := children(t, server)
			if len(keepers) != 1 {
				t.Fatalf("%v", keepers)
			}
			keeper := keepers[0]
			pid := map[string]int{"keeper": keeper, "server": server}[victim]
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			waitGone(t, keeper)
			if victim == "keeper" {
				p := []byte("still here")
				f, err := os.OpenFile(filepath.Join(m, "disk.raw"), os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				_, err = f.WriteAt(p, 0)
				if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
					t.Error(err)
				}
			}
			imgtest.Run(t, "mount-image", "-u", m)
			waitGone(t, server)
			checkQcow2(t, image, true)
		})
	}
}

// Wrong uses of the flags.
func TestSandboxFlags(t *testing.T) {
	dir, m := t.TempDir(), t.TempDir()
	image := createQcow2(t, dir, 1<<20, false)
	for _, args := range [][]string{
		{"--sandbox=maybe", image, m}, {"--uid", "no such user", image, m}, {"--uid", "nobody", "--sandbox=off", image, m},
		{"-o", "sandbox=maybe", image, m}, {"-o", "run_as=", image, m},
	} {
		if exit, out := imgtest.Try(t, "mount-image", args...); exit != 2 {
			t.Errorf("%q: exit %d %s", args, exit, out)
		}
	}
	if exit, out := imgtest.Try(t, "image-stack", "info", "--sandbox=maybe", image); exit != 2 {
		t.Errorf("exit %d %s", exit, out)
	}
	for _, args := range [][]string{
		{"--sandbox=maybe", image}, {"--uid", "no such user", image}, {"--uid", "nobody", "--sandbox=off", image}, {"--uid", "nobody", "-y", image},
		{"--uid", "nobody", "--undo-apply", "x", image},
	} {
		if exit, out := imgtest.Try(t, "image-fsck", args...); exit != 16 {
			t.Errorf("%q: exit %d %s", args, exit, out)
		}
	}
}
