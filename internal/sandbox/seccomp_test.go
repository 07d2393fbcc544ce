package sandbox

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// eval runs a filter as the kernel does.
func eval(p []unix.SockFilter, nr, arch uint32, args [6]uint64) uint32 {
	var a uint32
	for pc := 0; ; pc++ {
		i := p[pc]
		jump := func(cond bool) {
			if cond {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		}
		switch i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			switch i.K {
			case dataNr:
				a = nr
			case dataArch:
				a = arch
			default:
				n := (i.K - dataArgs) / 8
				a = uint32(args[n] >> (8 * ((i.K - dataArgs) % 8)))
			}
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == i.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(a >= i.K)
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			jump(a&i.K != 0)
		case unix.BPF_RET | unix.BPF_K:
			return i.K
		default:
			panic(i)
		}
	}
}

func TestFilter(t *testing.T) {
	refused := func(e unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(e) }
	p := compile(append(confineRules(Policy{}), sealRules()...))
	if len(p) > unix.BPF_MAXINSNS {
		t.Errorf("%d instructions", len(p))
	}
	self := uint64(os.Getpid())
	for _, c := range []struct {
		nr   uint32
		args [6]uint64
		want uint32
	}{
		{nr: unix.SYS_READ, want: unix.SECCOMP_RET_ALLOW},
		{nr: unix.SYS_PWRITEV, want: unix.SECCOMP_RET_ALLOW},
		{nr: unix.SYS_FUTEX, want: unix.SECCOMP_RET_ALLOW},
		{nr: unix.SYS_EXECVE, want: refused(unix.EPERM)},
		{nr: unix.SYS_CLONE, args: [6]uint64{unix.CLONE_VM | unix.CLONE_THREAD | unix.CLONE_SIGHAND}, want: unix.SECCOMP_RET_ALLOW},
		{nr: unix.SYS_CLONE, args: [6]uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}, want: refused(unix.EPERM)},
		{nr: unix.SYS_CLONE3, want: refused(unix.ENOSYS)},
		{nr: unix.SYS_TGKILL, args: [6]uint64{self, 7, 10}, want: unix.SECCOMP_RET_ALLOW},
		{nr: unix.SYS_TGKILL, args: [6]uint64{self + 1, 7, 10}, want: refused(unix.EPERM)},
		{nr: unix.SYS_KILL, args: [6]uint64{^uint64(0), 9}, want: refused(unix.EPERM)},
		{nr: unix.SYS_IOCTL, args: [6]uint64{0, unix.TIOCSTI}, want: refused(unix.EPERM)},
		{nr: unix.SYS_IOCTL, args: [6]uint64{0, 1<<32 | unix.TIOCSTI}, want: refused(unix.EPERM)},
		{nr: unix.SYS_IOCTL, args: [6]uint64{0, unix.BLKGETSIZE64}, want: unix.SECCOMP_RET_ALLOW},
		{nr: unix.SYS_MMAP, args: [6]uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE}, want: unix.SECCOMP_RET_ALLOW},
		{nr: unix.SYS_MMAP, args: [6]uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC}, want: refused(unix.EPERM)},
		{nr: unix.SYS_OPENAT, want: refused(unix.EPERM)},
		{nr: unix.SYS_OPENAT2, want: refused(unix.ENOSYS)},
	} {
		if got := eval(p, c.nr, auditArch, c.args); got != c.want {
			t.Errorf("call %d %v: %#x, want %#x", c.nr, c.args, got, c.want)
		}
	}
	if got := eval(p, unix.SYS_READ, auditArch+1, [6]uint64{}); got != unix.SECCOMP_RET_KILL_PROCESS {
		t.Errorf("another architecture: %#x", got)
	}
	// A process that becomes a program, or changes files, may do that and no
	// more.
	for _, c := range []struct {
		policy Policy
		nr     uint32
		args   [6]uint64
		want   uint32
	}{
		{Policy{Exec: []string{"x"}}, unix.SYS_EXECVE, [6]uint64{}, unix.SECCOMP_RET_ALLOW},
		{Policy{Exec: []string{"x"}}, unix.SYS_EXECVEAT, [6]uint64{}, refused(unix.EPERM)},
		{Policy{Exec: []string{"x"}}, unix.SYS_CLONE, [6]uint64{unix.CLONE_VFORK}, refused(unix.EPERM)},
		{Policy{Exec: []string{"x"}}, unix.SYS_PRLIMIT64, [6]uint64{0}, unix.SECCOMP_RET_ALLOW},
		{Policy{Exec: []string{"x"}}, unix.SYS_PRLIMIT64, [6]uint64{1}, refused(unix.EPERM)},
		{Policy{}, unix.SYS_PRLIMIT64, [6]uint64{0}, refused(unix.EPERM)},
		{Policy{}, unix.SYS_OPENAT, [6]uint64{0, 0, 0, 0o644}, unix.SECCOMP_RET_ALLOW},
		{Policy{}, unix.SYS_OPENAT, [6]uint64{0, 0, 0, 0o4644}, refused(unix.EPERM)},
		{Policy{}, unix.SYS_FCHMOD, [6]uint64{3, 0o644}, refused(unix.EPERM)},
		{Policy{Change: []string{"x"}}, unix.SYS_FCHMOD, [6]uint64{3, 0o644}, unix.SECCOMP_RET_ALLOW},
		{Policy{Change: []string{"x"}}, unix.SYS_FCHMOD, [6]uint64{3, 0o2644}, refused(unix.EPERM)},
	} {
		if got := eval(compile(confineRules(c.policy)), c.nr, auditArch, c.args); got != c.want {
			t.Errorf("%+v: call %d %v: %#x, want %#x", c.policy, c.nr, c.args, got, c.want)
		}
	}
	if firstForeign < 1<<31 {
		if got := eval(p, unix.SYS_READ|firstForeign, auditArch, [6]uint64{}); got != refused(unix.ENOSYS) {
			t.Errorf("x32: %#x", got)
		}
	}
}
