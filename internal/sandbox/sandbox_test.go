package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

const childEnv = "IMAGESTACK_SANDBOX_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// job is what a child process is asked to do.
type job struct {
	Policy Policy
	Seal   bool
	// NoLandlock makes the kernel one without it.
	NoLandlock bool
}

// child confines itself and reports what each attempt gave, "" for success.
func child(dir string) {
	var j job
	text, err := os.ReadFile(filepath.Join(dir, "job"))
	if err == nil {
		err = json.Unmarshal(text, &j)
	}
	if err != nil {
		panic(err)
	}
	// Threads from before and threads from after: all are held.
	const threads = 12
	var start, done sync.WaitGroup
	goOn := make(chan struct{})
	results := make([]map[string]string, threads)
	start.Add(threads)
	for i := range threads {
		done.Go(func() {
			runtime.LockOSThread()
			start.Done()
			<-goOn
			results[i] = attempts(dir)
		})
	}
	start.Wait()
	open, err := os.OpenFile(filepath.Join(dir, "write", "open"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		panic(err)
	}
	if j.NoLandlock {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			panic(err)
		}
		if err := install([]rule{{nr: unix.SYS_LANDLOCK_CREATE_RULESET, errno: unix.ENOSYS}}); err != nil {
			panic(err)
		}
	}
	warnings, err := Confine(j.Policy)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	if len(warnings) > 0 && !j.NoLandlock {
		panic(warnings)
	}
	for _, w := range warnings {
		fmt.Fprintln(os.Stderr, w)
	}
	if j.Seal {
		if err := Seal(j.Policy.Mode); err != nil {
			panic(err)
		}
	}
	close(goOn)
	done.Wait()
	later := make([]map[string]string, threads)
	for i := range threads {
		done.Go(func() {
			runtime.LockOSThread() // not unlocked: the thread ends
			later[i] = attempts(dir)
		})
	}
	done.Wait()
	merged := map[string]string{}
	for _, r := range append(results, later...) {
		for what, got := range r {
			if prev, ok := merged[what]; ok && prev != got {
				got = fmt.Sprintf("threads differ: %q, %q", prev, got)
			}
			merged[what] = got
		}
	}
	// What was open stays usable: data, size, holes, locks.
	record := func(what string, err error) {
		merged[what] = ""
		if err != nil {
			merged[what] = err.Error()
		}
	}
	_, err = open.WriteAt([]byte("hello"), 4096)
	record("use: write", err)
	record("use: sync", open.Sync())
	record("use: truncate", open.Truncate(1<<20))
	record("use: punch", unix.Fallocate(int(open.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 8192))
	record("use: lock", unix.FcntlFlock(open.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Len: 1}))
	merged["uid"] = fmt.Sprint(os.Getuid(), os.Getgid())
	var hdr = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		panic(err)
	}
	merged["caps"] = fmt.Sprintf("%x", data[0].Permitted|data[0].Effective|data[0].Inheritable|data[1].Permitted)
	if err := json.NewEncoder(os.Stdout).Encode(merged); err != nil {
		panic(err)
	}
}

// attempts tries everything; "" is success.
func attempts(dir string) map[string]string {
	got := map[string]string{}
	try := func(what string, err error) {
		got[what] = ""
		if err != nil {
			var errno unix.Errno
			if !errors.As(err, &errno) {
				got[what] = err.Error()
				return
			}
			got[what] = unix.ErrnoName(errno)
		}
	}
	file := func(what, path string, flags int) {
		f, err := os.OpenFile(path, flags, 0o600)
		if err == nil {
			_ = f.Close()
		}
		try(what, err)
	}
	file("read in read", dir+"/read/file", os.O_RDONLY)
	file("write in read", dir+"/read/file", os.O_RDWR)
	file("make in read", dir+"/read/new", os.O_RDWR|os.O_CREATE)
	file("read below read", dir+"/read/sub/file", os.O_RDONLY)
	file("list read", dir+"/read", os.O_RDONLY)
	file("list list", dir+"/list", os.O_RDONLY)
	file("read in list", dir+"/list/file", os.O_RDONLY)
	file("read in write", dir+"/write/file", os.O_RDONLY)
	file("write in write", dir+"/write/file", os.O_RDWR)
	file("make in write", dir+"/write/new", os.O_RDWR|os.O_CREATE)
	file("read file", dir+"/file", os.O_RDONLY)
	file("read link out", dir+"/read/link", os.O_RDONLY)
	file("read elsewhere", "/etc/passwd", os.O_RDONLY)
	file("read proc", "/proc/self/environ", os.O_RDONLY)
	file("write proc", "/proc/self/mem", os.O_RDWR)
	file("device", "/dev/null", os.O_RDWR)
	try("unlink", os.Remove(dir+"/write/none"))
	for _, where := range []string{"write", "change"} {
		fd, err := unix.Open(dir+"/"+where+"/setuid", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o4755)
		if err == nil {
			_ = unix.Close(fd)
		}
		try("setuid in "+where, err)
		try("chmod in "+where, os.Chmod(dir+"/"+where+"/file", 0o640))
		try("chmod setuid in "+where, unix.Fchmodat(unix.AT_FDCWD, dir+"/"+where+"/file", 0o4755, 0))
	}
	name := fmt.Sprintf("%s/change/of-thread-%d", dir, unix.Gettid())
	try("mkdir in change", os.Mkdir(name+".dir", 0o700))
	err := os.WriteFile(name, nil, 0o600)
	if err == nil {
		err = os.Rename(name, name+".new")
	}
	try("rename in change", err)
	try("remove in change", os.Remove(name+".new"))
	try("mkdir in write", os.Mkdir(strings.Replace(name, "change", "write", 1), 0o700))
	try("truncate elsewhere", os.Truncate(dir+"/file", 1))
	try("exec", exec.Command("/bin/true").Run())
	try("execve", unix.Exec("/bin/true", []string{"true"}, nil))
	_, err = net.DialTimeout("tcp", "127.0.0.1:1", time.Second)
	try("tcp", err)
	_, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	try("socket", err)
	_, err = net.Listen("tcp", "127.0.0.1:0")
	try("listen", err)
	try("signal", unix.Kill(1, 0))
	try("signal parent", unix.Kill(os.Getppid(), 0))
	try("signal self", unix.Kill(os.Getpid(), 0))
	try("ptrace", unix.PtraceAttach(os.Getppid()))
	try("mount", unix.Mount("none", dir, "tmpfs", 0, ""))
	try("umount", unix.Unmount(dir, 0))
	try("unshare", unix.Unshare(unix.CLONE_NEWUSER))
	_, err = unix.KeyctlInt(unix.KEYCTL_GET_KEYRING_ID, unix.KEY_SPEC_SESSION_KEYRING, 0, 0, 0)
	try("keyctl", err)
	_, _, errno := unix.Syscall(unix.SYS_BPF, 0, 0, 0)
	try("bpf", errnoErr(errno))
	_, _, errno = unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
	try("io_uring", errnoErr(errno))
	_, _, errno = unix.Syscall(unix.SYS_CLONE3, 0, 0, 0)
	try("clone3", errnoErr(errno))
	m, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err == nil {
		_ = unix.Munmap(m)
	}
	try("executable memory", err)
	return got
}

func errnoErr(e unix.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

// run runs a child with the policy in a fresh directory and returns what it
// could do.
func run(t *testing.T, p func(dir string) Policy, seal bool) map[string]string {
	t.Helper()
	exit, out, errOut := start(t, p, job{Seal: seal})
	if exit != 0 {
		t.Fatalf("exit %d\n%s%s", exit, out, errOut)
	}
	var got map[string]string
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return got
}

func start(t *testing.T, p func(dir string) Policy, j job) (exit int, out, errOut string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"read/file", "read/sub/file", "list/file", "write/file", "change/file", "file"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../file", dir+"/read/link"); err != nil {
		t.Fatal(err)
	}
	j.Policy = p(dir)
	text, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/job", text, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run() // the exit code tells
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

// Without Landlock, auto says so once and goes on with the rest; require ends.
func TestNoLandlock(t *testing.T) {
	for mode, exit := range map[Mode]int{Auto: 0, Require: 3} {
		got, out, errOut := start(t, func(dir string) Policy {
			p := policy(dir)
			p.Mode = mode
			return p
		}, job{NoLandlock: true, Seal: true})
		if got != exit || strings.Count(errOut, "Landlock") != 1 || strings.Count(errOut, "\n") != 1 {
			t.Errorf("%s: exit %d\n%s%s", mode, got, out, errOut)
		}
		if exit != 0 {
			continue
		}
		var did map[string]string
		if err := json.Unmarshal([]byte(out), &did); err != nil {
			t.Fatal(err)
		}
		for _, what := range []string{"exec", "socket", "read elsewhere", "write in read"} {
			if did[what] != "EPERM" {
				t.Errorf("%s: %q", what, did[what])
			}
		}
	}
}

func check(t *testing.T, got map[string]string, want map[string]string) {
	t.Helper()
	for what, w := range want {
		g, ok := got[what]
		if !ok {
			t.Errorf("%s was not tried", what)
		}
		for alternative := range strings.SplitSeq(w, "|") {
			if g == alternative {
				w = g
			}
		}
		if g != w {
			t.Errorf("%s: %q, want %q", what, g, w)
		}
	}
	for what, g := range got {
		if _, ok := want[what]; !ok {
			t.Errorf("nothing is said about %s: %q", what, g)
		}
	}
}

// everywhere are the answers that do not depend on the policy.
func everywhere(more map[string]string) map[string]string {
	want := map[string]string{
		"exec": "EPERM|EACCES", "execve": "EPERM", "tcp": "EPERM", "socket": "EPERM", "listen": "EPERM",
		"signal": "EPERM", "signal parent": "EPERM", "signal self": "", "ptrace": "EPERM",
		"mount": "EPERM", "umount": "EPERM", "unshare": "EPERM", "keyctl": "EPERM", "bpf": "EPERM", "io_uring": "EPERM",
		"clone3":     "ENOSYS",
		"use: write": "", "use: sync": "", "use: truncate": "", "use: punch": "", "use: lock": "",
	}
	for what, w := range more {
		want[what] = w
	}
	return want
}

func requireSandbox(t *testing.T) {
	t.Helper()
	imgtest.RequireLandlock(t, Available())
}

func policy(dir string) Policy {
	return Policy{Mode: Require, List: []string{dir + "/list"}, Read: []string{dir + "/read"}, Write: []string{dir + "/write"}}
}

func TestConfine(t *testing.T) {
	requireSandbox(t)
	want := everywhere(map[string]string{
		"setuid in write": "EPERM", "setuid in change": "EPERM", "chmod in write": "EPERM", "chmod in change": "EPERM",
		"mkdir in write": "EACCES", "mkdir in change": "EACCES", "rename in change": "EACCES", "remove in change": "EACCES|ENOENT",
		"chmod setuid in write": "EPERM", "chmod setuid in change": "EPERM",
		"read in read": "", "write in read": "EACCES", "make in read": "EACCES", "read below read": "", "list read": "",
		"list list": "", "read in list": "EACCES",
		"read in write": "", "write in write": "", "make in write": "",
		"read file": "EACCES", "read link out": "EACCES", "read elsewhere": "EACCES", "read proc": "EACCES",
		"write proc": "EACCES", "device": "EACCES", "unlink": "ENOENT|EACCES", "truncate elsewhere": "EACCES",
		"executable memory": "", "uid": fmt.Sprint(os.Getuid(), os.Getgid()), "caps": "0",
	})
	if os.Geteuid() == 0 {
		want["caps"] = "2" // CAP_DAC_OVERRIDE
	}
	check(t, run(t, policy, false), want)
}

func TestSeal(t *testing.T) {
	requireSandbox(t)
	want := everywhere(map[string]string{"uid": fmt.Sprint(os.Getuid(), os.Getgid()), "caps": "0", "executable memory": "EPERM"})
	for _, what := range []string{
		"read in read", "write in read", "make in read", "read below read", "list read", "list list", "read in list",
		"read in write", "write in write", "make in write", "read file", "read link out", "read elsewhere", "read proc",
		"write proc", "device", "unlink", "truncate elsewhere", "setuid in write", "setuid in change", "chmod in write",
		"chmod in change", "chmod setuid in write", "chmod setuid in change", "mkdir in write", "mkdir in change", "rename in change", "remove in change",
	} {
		want[what] = "EPERM"
	}
	check(t, run(t, policy, true), want)
}

// Where files may be changed they may be made, renamed, removed and given
// permissions, but not those of a program that runs as its owner.
func TestChange(t *testing.T) {
	requireSandbox(t)
	got := run(t, func(dir string) Policy {
		return Policy{Mode: Require, Change: []string{dir + "/change"}}
	}, false)
	for what, want := range map[string]string{
		"mkdir in change": "", "rename in change": "", "remove in change": "", "chmod in change": "",
		"setuid in change": "EPERM", "chmod setuid in change": "EPERM", "mkdir in write": "EACCES", "exec": "EACCES|EPERM", "execve": "EPERM",
	} {
		if g := got[what]; g != want && !slices.Contains(strings.Split(want, "|"), g) {
			t.Errorf("%s: %q, want %q", what, g, want)
		}
	}
}

// Another user still opens what root was asked to open, until Seal.
func TestUser(t *testing.T) {
	requireSandbox(t)
	imgtest.RequireRoot(t)
	u, err := LookupUser("nobody")
	if err != nil {
		t.Fatal(err)
	}
	as := func(dir string) Policy {
		p := policy(dir)
		p.User = u
		return p
	}
	got := run(t, as, false)
	for what, want := range map[string]string{
		"uid": fmt.Sprint(u.UID, u.GID), "caps": "2", "read in read": "", "write in write": "", "make in write": "", "read file": "EACCES",
	} {
		if got[what] != want {
			t.Errorf("%s: %q, want %q", what, got[what], want)
		}
	}
	got = run(t, as, true)
	if got["uid"] != fmt.Sprint(u.UID, u.GID) || got["caps"] != "0" || got["read in read"] != "EPERM" || got["use: write"] != "" {
		t.Errorf("%q", got)
	}
	// A reader gets the capability of a reader.
	reader := func(dir string) Policy { return Policy{Mode: Require, Read: []string{dir + "/read"}, User: u} }
	if got := run(t, reader, false); got["caps"] != "4" || got["read in read"] != "" || got["write in read"] != "EACCES" {
		t.Errorf("%q", got)
	}
}

func TestLookupUser(t *testing.T) {
	for name, want := range map[string]User{"root": {0, 0}, "0": {0, 0}, "4000123": {4000123, 4000123}} {
		if u, err := LookupUser(name); err != nil || *u != want {
			t.Errorf("%s: %v, %v", name, u, err)
		}
	}
	for _, name := range []string{"", "no such user", "-1", "99999999999"} {
		if u, err := LookupUser(name); err == nil {
			t.Errorf("%q: %v", name, u)
		}
	}
}

func TestOff(t *testing.T) {
	if w, err := Confine(Policy{Mode: Off}); w != nil || err != nil {
		t.Error(w, err)
	}
	if err := Seal(Off); err != nil {
		t.Error(err)
	}
	if _, err := Confine(Policy{Mode: Off, User: &User{1, 1}}); err == nil {
		t.Error("another user without a sandbox")
	}
	if _, err := os.ReadFile("/etc/passwd"); err != nil {
		t.Error(err)
	}
}
