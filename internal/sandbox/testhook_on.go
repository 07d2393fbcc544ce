//go:build imagestack_testhook

package sandbox

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// AttackEnv chooses, in a build with the tag, where Attack acts: at each stage
// that it names, separated by commas. A stage may be followed by "=" and a
// file in the directory of the image to open.
const AttackEnv = "IMAGESTACK_ATTACK"

// attackOnlyEnv leaves of the attempts those named, separated by commas: for
// the check that, without a sandbox, they do succeed.
const attackOnlyEnv = "IMAGESTACK_ATTACK_ONLY"

// Attack acts as a parser that an image has taken over: it tries what it must
// not be able to do and says on stderr, a line each, "attack STAGE WHAT: stopped"
// or "attack STAGE WHAT: SUCCEEDED". It tries from many threads at once.
func Attack(stage string) {
	for want := range strings.SplitSeq(os.Getenv(AttackEnv), ",") {
		name, file, _ := strings.Cut(want, "=")
		if name == stage {
			attack(stage, file)
		}
	}
}

func attack(stage, file string) {
	tries := []struct {
		what string
		do   func() error
	}{
		{"open-secret", func() error { return open("/etc/shadow", os.O_RDONLY) }},
		{"open-own-memory", func() error { return open("/proc/self/mem", os.O_RDWR) }},
		{"open-parent-memory", func() error { return open(fmt.Sprintf("/proc/%d/mem", os.Getppid()), os.O_RDWR) }},
		{"write-elsewhere", func() error { return open("/var/tmp/imagestack-was-here", os.O_WRONLY|os.O_CREATE) }},
		{"write-image", func() error { return open(file, os.O_RDWR) }},
		{"read-image", func() error { return open(file, os.O_RDONLY) }},
		{"connect", func() error { c, err := net.Dial("tcp", "127.0.0.1:1"); return attempted(c, err) }},
		{"connect-unix", func() error { c, err := net.Dial("unix", "/dev/log"); return attempted(c, err) }},
		{"exec", func() error { return exec.Command("/bin/true").Run() }},
		{"exec-self", func() error { return unix.Exec("/bin/true", []string{"true"}, nil) }},
		{"ptrace", func() error { return unix.PtraceAttach(os.Getppid()) }},
		{"kill-parent", func() error { return unix.Kill(os.Getppid(), 0) }},
		{"mount", func() error { return unix.Mount("none", "/mnt", "tmpfs", 0, "") }},
		{"unshare", func() error { return unix.Unshare(unix.CLONE_NEWUSER) }},
		{"become-root", func() error { return unix.Setuid(0) }},
	}
	only := os.Getenv(attackOnlyEnv)
	for _, try := range tries {
		if only != "" && !slices.Contains(strings.Split(only, ","), try.what) {
			continue
		}
		var wg sync.WaitGroup
		won := make(chan struct{}, 8)
		for range 8 {
			wg.Go(func() {
				if try.do() == nil {
					won <- struct{}{}
				}
			})
		}
		wg.Wait()
		result := "stopped"
		if len(won) > 0 {
			result = "SUCCEEDED"
		}
		fmt.Fprintf(os.Stderr, "attack %s %s: %s\n", stage, try.what, result)
	}
}

func open(path string, flags int) error {
	if path == "" {
		return unix.ENOENT
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err == nil {
		_ = f.Close()
	}
	return err
}

// attempted is nil when a connection was tried at all, refused or not.
func attempted(c net.Conn, err error) error {
	if err == nil {
		_ = c.Close()
		return nil
	}
	if strings.Contains(err.Error(), "permission") || strings.Contains(err.Error(), "not permitted") {
		return err
	}
	return nil
}
